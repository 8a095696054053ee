"""analyze.py: which file a report replaces, random weights, --finetune, no network, and what differs in training."""

import shutil

import pytest
import torch
import yaml
from analyzing import PLAIN_VIT, analyzed, measured, numbers, small_model
from helpers import BRIEF, TINY, make_image_folder, one_line, parse, run_main
from huggingface_hub import constants

import analyze
from models import build_model
from reports import published, subjects
from training import build

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def run(runs, tmp_path):
    """A copy of a run without a report."""
    return shutil.copytree(runs / "plain", tmp_path / "run", ignore=shutil.ignore_patterns("redundancy.*"))


def analyze_run(*words):
    analyze.main([*map(str, words), "--device", "cpu"])


def test_the_value_of_a_flag_of_main_is_no_run(capsys):
    settings, flags = analyze.parse(["--atlas", "--data-path", "photos", "--num-images", "4", "--seed", "1"])
    assert settings["runs"] == [] and settings["num_images"] == 4 and flags == ["--data-path", "photos", "--seed", "1"]
    settings, flags = analyze.parse(["--atlas", "a.yaml", "b", "--input_size", "32", "--ema", "--mean", "-1", "0", "0"])
    assert settings["runs"] == ["a.yaml", "b"] and settings["ema"]
    assert flags == ["--input-size", "32", "--mean", "-1", "0", "0"]
    assert analyze.parse(["--num-images", "4", "a", "--seed", "1"])[0]["runs"] == ["a"]
    with pytest.raises(SystemExit):
        analyze.parse(["--data-path", "photos"])
    assert "required: RUN" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        analyze.parse(["--help"])
    assert not ended.value.code and "[RUN ...]" in capsys.readouterr().out


# --- the run's own report


def test_output_elsewhere_leaves_the_run_folder_alone(run, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in run.iterdir() if path.name != ".lock"}
    analyzed(tmp_path, run, "--num-images", "4")
    assert {path: path.stat().st_mtime_ns for path in run.iterdir() if path.name != ".lock"} == before


@pytest.mark.parametrize(
    ("words", "difference"),
    [(("--ema", "--num-images", "20"), "raw weights"), (("--num-images", "4"), "the first 20 images")],
)
def test_a_report_is_not_replaced_by_another_measurement(words, difference, run, runs, tmp_path, capsys):
    analyze_run(run, "--num-images", "20")
    report, table = run / "redundancy.json", run / "redundancy.md"
    before = report.read_bytes(), table.read_bytes()
    with pytest.raises(SystemExit) as caught:
        analyze_run(run, *words)
    one_line(caught, report, f"was measured otherwise ({difference})", "--output-dir", "--overwrite")
    analyzed(tmp_path, run, *words)
    analyzed(tmp_path, run, runs / "other", *words)
    assert f"{report} was measured otherwise ({difference}); it stays" in capsys.readouterr().out
    assert before == (report.read_bytes(), table.read_bytes())
    analyze_run(run, "--num-images", "20")  # the same measurement
    assert before[0] == report.read_bytes()
    analyze_run(run, *words, "--overwrite")
    assert before[0] != report.read_bytes()


# --- random weights and --finetune


def test_random_weights_are_those_that_a_run_starts_from(run, tmp_path, capsys):
    words = ("--config", run / "args.yaml", "--num-images", "20", "--seed", "3")
    report = analyzed(tmp_path, "random", *words)
    initial = build.build_initial(parse("--seed", 3), 10)
    assert numbers(report) == measured(initial, 20) and report["measured_on"]["weights"] == "random"
    assert "random: the initial weights of seed 3" in capsys.readouterr().out
    flags = yaml.safe_load((run / "args.yaml").read_text()) | {"finetune": "first.pth"}  # of a fine-tuned run
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(flags))
    words = ("--config", tmp_path / "args.yaml", *words[2:])
    both = analyzed(tmp_path, "random", run, *words)["cells"]
    assert numbers(both["random"][0]) == numbers(report) and list(both) == ["random", "run"]


@pytest.mark.parametrize("folder", ["", "./", "../x/"])
def test_finetune_names_the_weights_of_a_model(folder, tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    torch.save(small_model().state_dict(), "weights.pth")
    path = f"{folder}weights.pth"
    words = (*PLAIN_VIT, "--num-images", "20", "--finetune", path)
    report = analyzed(tmp_path, "deit_tiny_patch16_224", *words, "--model", "deit_tiny_patch16_224")
    assert numbers(report) == measured(small_model(), 20) and report["run"] == "deit_tiny_patch16_224"


def test_random_weights_beside_a_run_see_the_same_images(run, tmp_path):
    words = ("--model", "deit_tiny_patch16_224", *PLAIN_VIT, "--mean", 0.5, 0.4, 0.3, "--num-images", 20)
    alone = analyzed(tmp_path, "random", *words)
    both = analyzed(tmp_path, run, "random", *words)["cells"]
    assert numbers(both["random"][0]) == numbers(alone)


@pytest.mark.parametrize("name", ["random", "run"])
def test_two_names_of_weights_are_refused(name, run):
    with pytest.raises(SystemExit) as caught:
        analyze_run("random" if name == "random" else run, *TINY, "--finetune", "weights.pth")
    one_line(caught, name, "--finetune weights.pth both name weights")


@pytest.mark.parametrize("reason", [OSError("Name or service not known"), TimeoutError()])
def test_without_a_network_the_error_is_plain_and_immediate(reason, monkeypatch, tmp_path):
    class Session:
        def head(self, url, timeout):
            raise reason

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(published, "get_session", Session)
    with pytest.raises(SystemExit) as caught:
        analyze_run("vit_tiny_patch16_224", *BRIEF[:-6], "--data-set", "FAKE", "--output-dir", tmp_path / "out")
    line = one_line(caught, "vit_tiny_patch16_224 are not in the cache", "cannot be reached", "give a checkpoint file")
    assert "cannot be built" not in line


# --- what is compared


def test_two_image_folders_are_not_compared(tmp_path):
    model = build_model("deit_tiny_patch16_224", 2, 32, 8, depth=2, embed_dim=24, num_heads=3)
    files = []
    for number, name in enumerate(("cars", "birds")):
        images = make_image_folder(tmp_path / name, n=2 + number)
        flags = parse("--data-set", "IMNET", "--data-path", images, "--model", "deit_tiny_patch16_224")
        files.append(tmp_path / f"{name}.pth")
        torch.save({"model": model.state_dict(), "args": vars(flags)}, files[-1])
    with pytest.raises(SystemExit) as caught:
        analyze_run(*files, "--output-dir", tmp_path / "out")
    line = one_line(caught, "measured on cars validation", "measured on birds validation")
    assert "IMNET" not in line and not (tmp_path / "out").exists()


def test_the_table_says_what_was_measured_and_how_training_differed(run, tmp_path, few_digits):
    flags = ("--batch-size", "8", "--epochs", "1", "--drop-path", "0.2", "--emb_cos_within_coef", "1")
    run_main(*TINY, *flags, "--output-dir", tmp_path / "other")
    analyzed(tmp_path, run, tmp_path / "other", "--num-images", "10")
    notes = (tmp_path / "out" / "redundancy.md").read_text().split("\n\n")[1].splitlines()
    assert notes[0].startswith("- measured on DIGITS validation at 32 px, files ")
    assert notes[0].endswith("the first 10 images")
    assert notes[1].startswith(f"- trained differently: {run} and {tmp_path / 'other'} differ in ")
    assert "epochs 3 and 1, images per optimizer step 64 and 8, learning rate" in notes[1]
    for note in (
        "the last epoch of training differs: 2 in run/seed0; 0 in other/seed0",
        "--drop-path differs: 0.1 in run; 0.2 in other",
        "--epochs differs: 3 in run; 1 in other",
    ):
        assert f"- {note}" in notes
    assert not any("emb_cos_within" in note or "averaged" in note for note in notes)
    analyzed(tmp_path, run, tmp_path / "other", "--num-images", "10", "--names", "both", "both", "--overwrite")
    notes = (tmp_path / "out" / "redundancy.md").read_text().split("\n\n")[1].splitlines()
    (note,) = (note for note in notes if "averaged" in note)
    assert note.startswith("- the runs of both are averaged although they differ in --")
    differ = note.partition(" in ")[2].split(", ")
    assert {"--epochs", "--drop-path", "--emb-cos-within-coef", "--batch-size"} == {*differ}


def test_width_and_heads_of_a_swin_are_those_of_its_first_stage():
    size = {"depths": (1, 1), "num_heads": (2, 4), "embed_dim": 24, "window_size": 4}
    line = subjects.architecture(build_model("swin_tiny_patch4_window7_224", 10, 32, **size))
    assert "SwinTransformer of 2 blocks, 24 wide, 2 heads, 4 x 4 patches" in line
