"""analyze.py --atlas: what is measured, what is listed with a reason, and what a second call measures."""

import html
import json
import re

import pytest
import timm
import torch
import yaml
from analyzing import PLAIN_VIT, analyzed, small_model
from helpers import TINY
from huggingface_hub import constants
from matplotlib import pyplot as plt

import analyze
from diversity import measure_redundancy
from models import build_model
from reports import atlas, atlas_list, figures
from training import checkpoint

FEW = ("--num-images", "20", "--device", "cpu")
NO_NETWORK = "vit_small_patch14_dinov2.lvd142m"


@pytest.fixture(scope="module")
def unsaved():
    """Figures are drawn, but a few bytes are written in place of each; {file name: its figure}."""
    drawn = {}

    def save(figure, path):
        drawn[path.name] = figure
        path.with_name(f"{path.name}.png").write_bytes(b"figure")
        plt.close(figure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", save)
        yield drawn


def run_atlas(folder, *words):
    """`python analyze.py --atlas *words` in this process; returns the content of its atlas.json."""
    analyze.main([str(word) for word in ("--atlas", *words, *FEW, "--output-dir", folder)])
    return json.loads((folder / "atlas.json").read_text())


def write_list(path, families):
    path.write_text(yaml.safe_dump(families, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory, unsaved):
    """A list of models of which three cannot be measured, its folder, and the content of its atlas.json."""
    folder = tmp_path_factory.mktemp("atlas")
    torch.save(small_model("beit_base_patch16_224").state_dict(), folder / "beit.pth")
    torch.save(build_model("resnet10t", 10, 32, channels=[8] * 4, stem_width=8).state_dict(), folder / "conv.pth")
    shape = {"patch_size": 8, "input_size": 32, "model_kwargs": {"depth": 2, "embed_dim": 24, "num_heads": 3}}
    conv = {"model": "resnet10t", "input_size": 32, "model_kwargs": {"channels": [8] * 4, "stem_width": 8}}
    families = {
        "small ViT": [{"name": "plain", "run": str(runs / "plain")}, {"name": "other", "run": str(runs / "other")}],
        "BEiT": [{"name": "mine", "run": "beit.pth", "model": "beit_base_patch16_224", **shape}],
        "not here": [NO_NETWORK, "missing.pth", {"name": "convolutions", "run": "conv.pth", **conv}],
    }
    path = write_list(folder / "models.yaml", families)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        return path, folder / "out", run_atlas(folder / "out", path, "--data-set", "DIGITS")


def test_what_cannot_be_measured_is_listed_with_its_reason_and_the_others_are_measured(made):
    _, _, content = made
    assert {*content["models"]} > {"plain", "other", "mine"}
    assert content["not_measured"].keys() == {NO_NETWORK, "missing.pth", "convolutions"}
    reasons = content["not_measured"]
    assert "are not in the cache" in reasons[NO_NETWORK]
    assert reasons["missing.pth"].startswith("missing.pth is not a run folder")
    assert "ResNet" in reasons["convolutions"]
    assert not any(reason.startswith("error") or "\n" in reason for reason in reasons.values())


def test_initial_weights_are_beside_each_architecture_once(made):
    _, _, content = made
    models = content["models"]
    initial = {name for name, record in models.items() if record["report"]["measured_on"]["weights"] == "random"}
    assert len(models) == 5 and len(initial) == 2
    assert models["plain"]["random"] == models["other"]["random"] != models["mine"]["random"]
    for name, timm_name in (("plain", "deit_tiny_patch16_224_diverse"), ("mine", "beit_base_patch16_224")):
        torch.manual_seed(0)
        model = build_model(timm_name, 10, 32, 8, depth=2, embed_dim=24, num_heads=3)
        own = measure_redundancy(model, [torch.zeros(2, 3, 32, 32)])["weight"]
        assert models[models[name]["random"]]["report"]["weight"] == own != models[name]["report"]["weight"]


def test_the_numbers_are_those_of_analyze(made, runs, tmp_path, undrawn):
    path, _, content = made
    beit = ("--model", "beit_base_patch16_224", *PLAIN_VIT, *FEW)
    of_beit = analyzed(tmp_path, path.parent / "beit.pth", "random", *beit)["cells"]
    of_runs = {
        "plain": analyzed(tmp_path, runs / "plain", *FEW),
        "mine": of_beit["beit.pth"][0],
        content["models"]["mine"]["random"]: of_beit["random"][0],
    }
    for name, report in of_runs.items():
        of_atlas = content["models"][name]["report"]
        assert [key for key in report if key != "run" and report[key] != of_atlas[key]] == [], name


def test_a_second_call_measures_only_what_is_new(made, runs, tmp_path, monkeypatch):
    path, _, before = made
    copy = tmp_path / "out"
    copy.mkdir()
    (copy / "atlas.json").write_text(json.dumps(before))
    measured = []
    measure = atlas.measure
    monkeypatch.setattr(
        atlas, "measure", lambda subject, *rest: measured.append(subject.run) or measure(subject, *rest)
    )
    third = write_list(tmp_path / "more.yaml", {"more": [{"name": "watched", "run": str(runs / "watched")}]})
    after = run_atlas(copy, path, third, "--data-set", "DIGITS")
    assert measured == [str(runs / "watched")]
    assert after["models"].keys() == before["models"].keys() | {"watched"}
    assert all(after["models"][name] == record for name, record in before["models"].items())
    assert after["models"]["watched"]["random"] == before["models"]["plain"]["random"]


def test_other_weights_under_a_name_are_measured_again(made, runs, tmp_path):
    _, _, before = made
    (tmp_path / "atlas.json").write_text(json.dumps(before))
    changed = write_list(tmp_path / "list.yaml", {"small ViT": [{"name": "plain", "run": str(runs / "other")}]})
    after = run_atlas(tmp_path, changed, "--data-set", "DIGITS")["models"]
    assert after["plain"]["report"]["summary"] == before["models"]["other"]["report"]["summary"]
    assert after["plain"]["report"]["summary"] != before["models"]["plain"]["report"]["summary"]


def test_other_images_are_not_mixed_in(made, runs, tmp_path):
    _, _, before = made
    text = json.dumps(before)
    (tmp_path / "atlas.json").write_text(text)
    other = ("--num-images", "19", "--data-set", "DIGITS")
    with pytest.raises(SystemExit, match=r"the first 20 images.*the first 19 images.*--overwrite") as caught:
        analyze.main(["--atlas", str(runs / "plain"), *FEW, *other, "--output-dir", str(tmp_path)])
    assert caught.value.code.startswith("error: ") and "\n" not in caught.value.code
    assert (tmp_path / "atlas.json").read_text() == text
    analyze.main(["--atlas", str(runs / "plain"), *FEW, *other, "--overwrite", "--output-dir", str(tmp_path)])
    after = json.loads((tmp_path / "atlas.json").read_text())
    assert after["images"]["images"] == 19 and len(after["models"]) == 2


def test_a_model_with_other_images_than_the_first_one_is_listed(runs, tmp_path, unsaved):
    content = torch.load(runs / "plain" / checkpoint.LAST, weights_only=True)
    flags = content["args"] | {"data_set": "FAKE", "num_classes": 10}
    torch.save(content | {"args": flags}, tmp_path / "fake.pth")
    after = run_atlas(tmp_path / "out", runs / "plain", tmp_path / "fake.pth")
    assert next(iter(after["models"])) == str(runs / "plain") and len(after["models"]) == 2
    assert "its images are others" in after["not_measured"][str(tmp_path / "fake.pth")]


def test_the_page_has_figures_tables_and_reasons(made, unsaved):
    _, folder, content = made
    files = {path.name for path in folder.iterdir()}
    drawn = {f"atlas_{level}.png" for level in ("tokens", "heads", "weights")}
    assert files == {"atlas.json", "atlas.md", "atlas.html", ".lock", *drawn}
    text, page = (folder / "atlas.md").read_text(), (folder / "atlas.html").read_text()
    assert all(f"]({name})" in text for name in drawn) and page.count("data:image/png;base64,ZmlndXJl") == 3
    lines = [line for line in text.splitlines() if line.startswith("|")]
    row = next(line for line in lines if re.match(r"\| small ViT +\| other ", line))
    summary = content["models"]["other"]["report"]["summary"]
    assert f" {summary['embedding_token_cosine_last']:.3g} " in row
    assert f" {summary['weight_condition_number_qkv']:.3g} " in row
    (facts,) = [line for line in lines if line.startswith("| mine ")]
    assert "beit_base_patch16_224" in facts and "32 px: mean 0.5 0.5 0.5" in facts and "2 blocks" in facts
    for name, reason in content["not_measured"].items():
        assert f"- {name}: {reason}" in text and html.escape(reason) in page


def test_a_reason_is_printed_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    names = [NO_NETWORK, "missing.pth", "vit_base_patch16_224.dino", "none.pth"]
    with pytest.raises(SystemExit):
        analyze.main(["--atlas", *names, *FEW, *TINY, "--output-dir", str(tmp_path / "out")])
    lines = [line for line in capsys.readouterr().out.splitlines() if "not measured" in line]
    assert [line.partition(": not measured")[0].partition(",")[0] for line in lines] == names
    assert ["cache" in line or "not a run folder" in line for line in lines] == [True, True, False, False]
    assert lines[2].endswith(f", for the reason of {NO_NETWORK}") and lines[3].endswith("of missing.pth")


def test_no_model_could_be_measured(tmp_path):
    with pytest.raises(SystemExit, match=r"none of the 2 models could be measured; missing\.pth: ") as caught:
        analyze.main(["--atlas", "missing.pth", "none.pth", *FEW, *TINY, "--output-dir", str(tmp_path / "out")])
    assert "\n" not in caught.value.code and not [*(tmp_path / "out").glob("atlas*")]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--atlas", "--layer", "0"], "--layer is not of --atlas"),
        (["--atlas", "--function-level"], "--function-level is not of --atlas"),
        (["--num-images", "4"], "required: RUN"),
        (["--atlas", "x.pth", "--no-such-flag"], "--no-such-flag"),
        (["--atlas", "none.yaml"], "none.yaml cannot be read"),
    ],
)
def test_a_wrong_command_line_is_one_line(words, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        analyze.main([*words, "--output-dir", str(tmp_path / "out")])
    line = caught.value.code if isinstance(caught.value.code, str) else capsys.readouterr().err.removesuffix("\n")
    assert line.startswith("error: ") and named in line and "\n" not in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("families", "named"),
    [
        ({"A": "vit"}, "family A needs a list"),
        ({"A": [{"name": "x"}]}, "needs `run`"),
        ({"A": [{"run": "x.pth", "input_szie": 98}]}, "input_szie.*input_size"),
        ({"A": [{"run": "x.pth", "nme": "x"}]}, "nme.*did you mean name"),
        ({"A": [{"run": "x.pth", "data_path": "d"}]}, "data_path.*on the command line"),
        ({"A": ["x.pth"], "B": ["x.pth"]}, "two models of the atlas have the name x.pth"),
    ],
)
def test_a_wrong_list_is_one_line(families, named, tmp_path):
    with pytest.raises(SystemExit, match=named) as caught:
        atlas_list.read_entries([str(write_list(tmp_path / "list.yaml", families))])
    assert caught.value.code.startswith("error: ") and "\n" not in caught.value.code


def test_a_flag_of_a_model_that_has_a_wrong_value_is_its_reason(runs, tmp_path, unsaved, capfd):
    models = [
        {"name": "good", "run": str(runs / "plain")},
        {"name": "bad", "run": "vit_tiny_patch16_224", "input_size": "large"},
    ]
    (reason,) = run_atlas(tmp_path / "out", write_list(tmp_path / "list.yaml", {"A": models}))["not_measured"].values()
    assert "--input-size" in reason and "large" in reason
    assert capfd.readouterr().err == ""


def test_the_published_list_names_published_models():
    entries = atlas_list.read_entries([])
    assert all(timm.get_pretrained_cfg(entry.run).has_weights and not entry.flags for entry in entries)
    families = {"DeiT", "DeiT III", "AugReg ViT", "MAE", "DINO", "DINOv2", "CLIP", "SigLIP", "BEiT", "Swin"}
    assert families <= {entry.family for entry in entries}
    (entry,) = atlas_list.read_entries(["vit_base_patch16_224.mae"])
    assert entry.family == "MAE"


def test_a_mistake_in_the_code_of_a_model_stops_only_that_model(made, runs, tmp_path, monkeypatch, capsys):
    _, _, before = made
    (tmp_path / "atlas.json").write_text(json.dumps(before))
    monkeypatch.setattr(atlas, "load_model", lambda subject, *rest: {}[subject.run])
    after = run_atlas(tmp_path, runs / "watched", made[0], "--data-set", "DIGITS")
    name = str(runs / "watched")
    assert after["not_measured"][name].startswith("KeyError: ") and name not in after["models"]
    assert "in <lambda>" in capsys.readouterr().err


def test_the_same_weights_under_two_names_are_not_measured_at_each_call(made, runs, tmp_path, monkeypatch):
    families = {"A": [{"name": name, "run": str(runs / "plain")} for name in ("plain", "again")]}
    path = write_list(tmp_path / "list.yaml", families)
    before = run_atlas(tmp_path / "out", path, "--data-set", "DIGITS")
    monkeypatch.setattr(atlas, "measure", lambda *args: pytest.fail("measured again"))
    assert run_atlas(tmp_path / "out", path, "--data-set", "DIGITS") == before
