"""analyze.py ends in one line for a mistake."""

import shutil

import pytest
import torch
from analyzing import PLAIN_VIT, analyzed, small_model
from helpers import BRIEF, CONVNET, TINY, make_image_folder, parse, world

import analyze
from models import build_model
from reports import redundancy, subjects


@pytest.fixture
def refused(tmp_path, capsys):
    """Each of `named` is in the one line that analyze.py ends in."""

    def check(*words, named):
        with pytest.raises(SystemExit) as caught:
            analyze.main([str(word) for word in ("--output-dir", tmp_path / "out", *words, "--device", "cpu")])
        code = caught.value.code
        line = code if isinstance(code, str) else capsys.readouterr().err.removesuffix("\n")
        assert line.startswith("error: ") and "\n" not in line
        assert all(str(word) in line for word in named), line
        assert not (tmp_path / "out" / "redundancy.json").exists()
        return line

    return check


def test_a_run_that_is_no_run(runs, tmp_path, refused):
    shutil.copy(runs / "plain" / "args.yaml", tmp_path)
    assert refused(tmp_path, named=(tmp_path, "checkpoint.pth"))
    assert refused("deit_tinny", named=("deit_tinny", "timm"))
    assert refused(tmp_path / "missing.pth", named=("missing.pth",))
    (tmp_path / "notes.pth").write_text("no checkpoint")
    assert refused(tmp_path / "notes.pth", *TINY, named=("RUN", "notes.pth"))


def test_weights_that_do_not_fit(runs, refused):
    best = runs / "plain" / "checkpoint_best.pth"
    named = ("RUN", best, "does not fit VisionTransformer")
    assert refused(best, "--model-kwargs", "depth=3", "embed_dim=24", "num_heads=3", named=named)
    assert refused(best, "--ema", named=(best, "averaged"))
    assert refused("deit_tiny_patch16_224", *BRIEF, "--ema", "--model-kwargs", "depth=1", named=("--ema",))


def test_weights_without_the_name_of_their_model(tmp_path, refused):
    torch.save(small_model().state_dict(), tmp_path / "weights.pth")
    words = ("--data-set", "DIGITS", "--input-size", "32", "--model", "deit_tiny_patch16_224")  # or its default
    named = ("--model deit_tiny_patch16_224: RUN", tmp_path / "weights.pth", "does not fit VisionTransformer")
    assert refused(tmp_path / "weights.pth", *words, named=named)


def test_wrong_flags(runs, tmp_path, refused):
    (tmp_path / "file").write_text("")
    assert refused(runs / "plain", "--output-dir", tmp_path / "file", named=("--output-dir", tmp_path / "file"))
    assert refused(runs / "plain", "--image", "99", named=("--image 99", "first 96 images"))
    assert refused(runs / "plain", runs / "other" / ".." / "plain", named=("twice",))


def test_a_run_keeps_its_remedies(runs, refused):
    named = ("--remedy is xsa, but", runs / "plain", "has none; leave the flag out")
    assert refused(runs / "plain", "--remedy", "xsa", named=named)


def test_an_empty_data_set(runs, tmp_path, refused):
    data = make_image_folder(tmp_path / "images", n=0)
    assert refused(runs / "plain", "--data-set", "IMNET", "--data-path", data, named=(data,))


def saved(path, model, *words):
    """A checkpoint of this program with the flags `words`."""
    torch.save({"model": model.state_dict(), "args": vars(parse(*words))}, path)
    return path


def test_runs_that_cannot_be_compared(runs, tmp_path, undrawn, refused):
    depth3 = ("--model-kwargs", "depth=3", "embed_dim=24", "num_heads=3")
    deeper = saved(tmp_path / "deeper.pth", small_model(depth=3), *depth3)
    assert refused(runs / "plain", deeper, "--num-images", "4", named=("plain", "deeper", "2 blocks", "3 blocks"))
    fake = saved(tmp_path / "fake.pth", small_model(), "--data-set", "FAKE", "--num-classes", "10", *PLAIN_VIT[-4:])
    words = (runs / "plain", fake, "--num-images", "4")
    assert refused(*words, named=("fake.pth", "measured on DIGITS", "measured on FAKE"))
    analyzed(tmp_path, *words, "--data-set", "DIGITS")


def test_several_processes(runs):
    with pytest.raises(SystemExit, match="without torchrun"):
        redundancy.analyze(
            [str(runs / "plain")], None, 4, None, False, "last", 0, False, [], flags=[], world=world(0, 2)
        )


def test_another_family(tmp_path, refused):
    kwargs = {"channels": [8, 8, 8, 8], "stem_width": 8}
    torch.save(build_model("resnet10t", 10, 32, **kwargs).state_dict(), tmp_path / "conv.pth")
    assert refused(tmp_path / "conv.pth", *BRIEF, *CONVNET, named=("ResNet", "ViT"))


@pytest.mark.parametrize("name", ["resnet18", "cait_xxs24_224"])
def test_a_model_that_cannot_be_measured_is_refused_before_its_weights_are_downloaded(name, monkeypatch, refused):
    build = subjects.build_model

    def build_without_download(pretrained=False, **kwargs):
        assert not pretrained
        return build(**kwargs)

    monkeypatch.setattr(subjects, "build_model", build_without_download)
    assert refused(name, "--data-set", "FAKE", named=("ViT",))


@pytest.mark.parametrize("layer", ["9", "-1", "middle", "0,1", "all"])
def test_a_bad_layer(layer, runs, undrawn, refused):
    assert refused(runs / "plain", f"--layer={layer}", "--num-images", "4", named=(layer,))


@pytest.mark.parametrize("names", [["one"], ["a/b", "a_b"], ["one", "two", "three"]])
def test_names_must_be_one_for_each_run(names, runs, refused):
    assert refused(runs / "plain", runs / "other", "--names", *names, named=("--names", "2", *names))


@pytest.mark.parametrize(
    "words", ["--num-images -1", "--num-images x", "--image x", "--no-such-flag", "--batch-size 0", "--device tpu"]
)
def test_bad_flags(words, runs, refused):
    assert refused(runs / "plain", *words.split(), named=(words.split()[0],))
