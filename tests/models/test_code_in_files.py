"""Code in checkpoints never runs; the fixture `plant` checks that."""

import re
import shutil

import numpy as np
import pytest
import timm.models._hub
import torch
from helpers import BRIEF, TINY, model_of, one_line, run_main
from huggingface_hub.errors import EntryNotFoundError
from planted import CONTAINS_CODE, NAMED, PLANTED, Code, change_pickle

import analyze
from models import weights
from training import checkpoint, checkpoint_files, resuming


@pytest.mark.parametrize("name", PLANTED)
def test_the_planted_code_would_run(tmp_path, name):
    write, load = PLANTED[name]
    write(tmp_path / name, Code(tmp_path / "ran"))
    try:
        load(tmp_path / name)
    except Exception as error:  # of a file that holds nothing but its code
        print(error)
    assert (tmp_path / "ran").exists()


def refusal(command, *words) -> str:
    """The line that a command ends in."""
    with pytest.raises(SystemExit) as caught:
        command(*words)
    return one_line(caught)


@pytest.mark.parametrize("name", PLANTED)
def test_code_in_a_checkpoint(plant, name, recwarn):
    path = str(plant(name))
    with pytest.raises(ValueError) as read:
        weights.read(path)
    with pytest.raises(ValueError) as loaded:
        weights.load_weights(model_of(), path)
    line = str(read.value)
    assert str(loaded.value) == line and refusal(resuming.load, path) == f"error: --resume {line}"
    assert line.startswith(f"{path} ")
    assert "weights_only" not in line.replace("Cannot use ``weights_only=True``", "")
    if name in NAMED:
        code = r"contains pickled code \((__)?builtins?(__)?\.eval\), which this program does not run"
        assert re.search(code, line)
    assert not recwarn.list  # which would be lines beside the error


def test_numbers_of_numpy_1_are_read(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": model_of(1).state_dict(), "metric": np.float64(71.5)}, path)
    change_pickle(path, lambda old: old.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert weights.read(str(path))["metric"] == 71.5


def analyzed(path):
    analyze.main([str(path), *TINY])


ROUTES = {
    "--resume": lambda path: run_main(*TINY, "--resume", path),
    "--resume ": lambda path: run_main(*TINY, "--eval", "--resume", path),
    "--finetune": lambda path: run_main(*TINY, "--finetune", path),
    "--teacher-path": lambda path: run_main(
        *(*TINY, "--distillation-type", "hard", "--teacher-model", "deit_tiny_patch16_224", "--teacher-path", path)
    ),
    "RUN": analyzed,
}


@pytest.mark.parametrize("name", ["new.pth", "protocol4.pth"])
@pytest.mark.parametrize("flag", ROUTES)
def test_code_by_every_flag(plant, flag, name):
    path = plant(name)
    assert f"{flag.strip()} {path} {CONTAINS_CODE}" in refusal(ROUTES[flag], path)


@pytest.fixture
def download(monkeypatch, tmp_path):
    """download(path) makes that file the content of every address."""

    def set_content(path):
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
        monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, local, *_, **__: shutil.copy(path, local))

    return set_content


@pytest.mark.parametrize("flag", ["--resume", "--finetune", "--teacher-path"])
def test_code_from_an_address(plant, download, flag):
    download(plant("new.pth"))
    line = refusal(ROUTES[flag], "https://example.org/weights.pth")
    assert flag in line and "weights.pth" in line and CONTAINS_CODE in line


def test_code_in_a_run_folder(tmp_path):
    path = tmp_path / "run" / checkpoint.LAST
    path.parent.mkdir()
    checkpoint_files.write({"model": model_of().state_dict(), "args": Code(tmp_path / "ran")}, path)
    for command in (analyzed, lambda folder: run_main(*TINY, "--resume", "auto", "--output-dir", folder)):
        assert f"{path} {CONTAINS_CODE}" in refusal(command, tmp_path / "run")
    assert not (tmp_path / "ran").exists()


def published(**overlay):
    """analyze.py of a timm name whose published weights are elsewhere."""
    analyze.main(["deit_tiny_patch16_224", *BRIEF, "--model-kwargs", f"pretrained_cfg_overlay={overlay}"])


@pytest.mark.parametrize("name", ["new.pth", "legacy.pth", "new.safetensors", "array.npy", "flax.npz"])
@pytest.mark.parametrize("custom_load", [False, True])
def test_code_in_weights_that_timm_loads(plant, name, custom_load):
    path = plant(name)
    with pytest.raises(SystemExit) as caught:
        published(file=str(path), custom_load=custom_load)
    line = one_line(caught, "deit_tiny_patch16_224", path)
    assert CONTAINS_CODE in line or custom_load or name not in ("new.pth", "legacy.pth")


def test_code_in_weights_that_timm_downloads(plant, download):
    download(plant("new.pth"))
    with pytest.raises(SystemExit) as caught:
        published(url="https://example.org/weights.pth", hf_hub_id=None)
    one_line(caught, "deit_tiny_patch16_224", "weights.pth", CONTAINS_CODE)


def test_code_in_weights_from_hugging_face(plant, monkeypatch):
    path = plant("new.pth")

    def download(repo_id, filename, **_):
        if filename.endswith(".safetensors"):
            raise EntryNotFoundError("not there")
        return str(path)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    with pytest.raises(SystemExit) as caught:
        published(hf_hub_id="someone/model")
    one_line(caught, "deit_tiny_patch16_224", "someone/model", CONTAINS_CODE)


@pytest.mark.parametrize("command", [lambda *words: run_main(*TINY, *words), lambda *words: analyze.main(
    ["deit_tiny_patch16_224", *TINY, *words])], ids=["main", "analyze"])  # fmt: skip
def test_code_by_model_kwargs(plant, capsys, command):
    path = plant("new.pth")
    with pytest.raises(SystemExit):
        command("--model-kwargs", f"checkpoint_path={path}")
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and "checkpoint_path" in line and "--finetune" in line
