"""Code in settings and data sets never runs; the fixture `plant` checks that."""

import io
import json
import re
import shutil
import tarfile

import pytest
from helpers import TINY, data_options, make_image_folder, one_line, photo, run_main, run_process, world
from planted import CONTAINS_CODE, add_member

import table
from datasets import build_data

YAML = "lr: !!python/object/apply:builtins.eval [\"open('{}', 'w')\"]\n"


def test_code_in_yaml(tmp_path, capsys):
    path = tmp_path / "args.yaml"
    path.write_text(YAML.format(tmp_path / "ran"))
    with pytest.raises(SystemExit):
        run_main("--config", path)
    line = capsys.readouterr().err
    assert line.startswith(f"error: --config {path}") and "python/object/apply" in line and line.count("\n") == 1
    (tmp_path / "log.txt").write_text('{"epoch": 0, "test_acc1": 5.0, "train_loss": 1.0}\n')
    (tmp_path / "summary.json").write_text('{"epochs": 1}')
    table.main([str(tmp_path)])
    assert re.search(r"failed: its files cannot be read .*python/object/apply", capsys.readouterr().out)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("CIFAR", [f"cifar-100-python/{file}" for file in ("train", "test", "meta")]),
        ("torch/cifar100", [f"cifar-100-python/{file}" for file in ("train", "test", "meta")]),
        ("torch/mnist", [f"MNIST/processed/{file}.pt" for file in ("training", "test")]),
        ("torch/imagenet", ["meta.bin"]),
    ],
)
def test_code_in_torchvisions_files(plant, tmp_path, name, files):
    path = plant("protocol2.pth" if "cifar" in name.lower() else "new.pth")
    root = tmp_path / "data"
    make_image_folder(root)
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / file)
    with pytest.raises(SystemExit) as caught:
        run_main(*TINY, "--data-set", name, "--data-path", root)
    line = one_line(caught, f"--data-set {name}", root)
    assert CONTAINS_CODE in line or "cifar" in name.lower()  # whose checksums are torchvision's


def test_code_in_webdataset_shards(plant, tmp_path):
    """timm decodes the image and the label, and nothing else of a sample."""
    code = plant("protocol2.pth").read_bytes()
    splits = {}
    for split in ("train", "validation"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for number in range(2):
                png = io.BytesIO()
                photo(number).save(png, "png")
                members = {"png": png.getvalue(), "cls": b"1"}
                members |= dict.fromkeys(("pyd", "pickle", "pkl", "pth", "npy", "json"), code)
                for suffix, content in members.items():
                    add_member(tar, f"{number:04}.{suffix}", content)
        splits[split] = {"name": split, "num_samples": 2, "filenames": [f"{split}.tar"], "shard_lengths": [2]}
    (tmp_path / "info.json").write_text(json.dumps({"splits": splits}))
    options = data_options("--data-set", "wds/any", "--data-path", tmp_path, "--num-classes", 2, "--batch-size", 2)
    data = build_data(options, world())
    assert [len(samples) for samples, _ in data.val] == [2]
    assert [len(samples) for samples, _ in data.train] == [2]
    splits["validation"]["filenames"] = [f"pipe:touch {tmp_path / 'ran'}"]  # which webdataset would give to a shell
    (tmp_path / "info.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(SystemExit) as caught:
        run_main(*TINY, "--data-set", "wds/any", "--data-path", tmp_path, "--num-classes", 2, "--batch-size", 2)
    one_line(caught, "wds/any", "pipe:touch")


HUGGING_FACE = """
import sys
sys.path.insert(0, "tests")
from helpers import data_options
from pipeline.opening import build_source
cache, *folders = sys.argv[1:]
for folder in folders:
    try:
        build_source(data_options("--data-set", "hfds/" + folder, "--data-path", cache), is_training=False)
    except SystemExit as error:
        print(error)
"""


def test_code_in_hugging_face_sets(plant, tmp_path):
    """A script beside the images, tags in the card, pickles in a shard; as the packages' names clash, in a process."""
    marker = tmp_path / "ran"
    script = make_image_folder(tmp_path / "scripted", n=1, splits=("train", "validation"))
    (script / "scripted.py").write_text(f"open({str(marker)!r}, 'w')\n")
    card = make_image_folder(tmp_path / "card", n=1, splits=("train", "validation"))
    (card / "README.md").write_text("---\n" + YAML.format(marker) + "---\n")
    shards = tmp_path / "shards"
    shards.mkdir()
    for split in ("train", "validation"):
        with tarfile.open(shards / f"{split}.tar", "w") as tar:
            for suffix, name in (("pyd", "protocol2.pth"), ("pickle", "protocol2.pth"), ("pth", "new.pth")):
                add_member(tar, f"0000.{suffix}", plant(name).read_bytes())
    process = run_process("-c", HUGGING_FACE, tmp_path / "cache", script, card, shards)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: --data-set hfds/") for line in lines)
    assert f"{script} cannot" in lines[0] and "scripted.py" in lines[0]
    assert f"{card} cannot" in lines[1] and "python/object/apply" in lines[1]
    assert f"{shards} cannot" in lines[2] and CONTAINS_CODE in lines[2]
