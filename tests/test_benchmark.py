"""`benchmark.py step`, `terms` and `loader`: the rows of their tables and JSON files."""

import json
import re
import time

import pytest
from helpers import TINY, make_image_folder

import benchmark
import diversity
from benchmarks import host, loader, remedies
from training import update

SMALL_STEP = (
    *("--model", "deit_tiny_patch16_224", "--model-kwargs", "depth=2", "--device", "cpu"),
    *("--batch-size", "2", "--rounds", "1"),
)


def table(text):
    """{first cell: the others} of the first Markdown table in a text."""
    (first, *_) = re.findall(r"(?:^\|.*\n)+", f"{text}\n", flags=re.MULTILINE)
    _, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in first.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_steps(capsys, tmp_path):
    flags = [
        "--input-size",
        "64",
        "--variant=--no-fused-attn",
        "--patch-product",
        "--amp",
        "bf16",
        "--residual-dtype",
        "bfloat16",
    ]
    benchmark.main(["step", *SMALL_STEP, *flags, "--json", str(tmp_path / "step.json")])
    paper = [f"only {name}" for name in ("mixing", *(n for n, term in diversity.REGULARIZERS.items() if term.coef))]
    names = ["plain timm", "diversified", "diversified, --no-fused-attn", *paper, "textbook"]
    rows = table(capsys.readouterr().out)
    assert [*rows] == names
    assert all(float(cell) > 0 for row in rows.values() for cell in row[:4])
    steps = json.loads((tmp_path / "step.json").read_text())["steps"]
    assert [*steps] == names
    assert steps["plain timm"]["to_plain"] == 1


def test_terms(capsys, tmp_path):
    terms = ["mixing", "emb_grad_diversity", "attn_cos_cross", "weight_mha_so"]
    benchmark.main(["terms", *SMALL_STEP, "--json", str(tmp_path / "terms.json"), "--terms", *terms])
    rows = table(capsys.readouterr().out)
    assert [*rows] == [f"`{name}`" for name in terms]
    assert all(float(row[2]) > 0 for row in rows.values())  # each of them needs additional memory


def test_loaders(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "SECONDS", 0.1)
    data = make_image_folder(tmp_path / "data", n=24)
    flags = ["--data-set", "IMNET", "--data-path", data, "--resized", data, "--num-workers", "1"]
    own = ["--rounds", "1", "--steps", "2", "--json", tmp_path / "loader.json"]
    benchmark.main(["loader", *map(str, [*TINY, *flags, *own])])
    printed = capsys.readouterr().out
    rows = table(printed)
    parts = ["decode once", "fast crop", "bytes", "all three", "all three, resized copy", "all three, 1 processes"]
    assert [*rows] == ["DeiT's", *parts]
    assert all(float(row[0]) > 0 for row in rows.values())


def test_batches_of_cached_images_and_steps_on_them(capsys, tmp_path):
    own = ["--rounds", "2", "--steps", "3", "--json", tmp_path / "cached.json"]
    benchmark.main(["cached", *map(str, [*TINY, "--batch-size", "4", *own])])
    rows = table(capsys.readouterr().out)
    batches = [f"batches, --aa {aa}" for aa in ("rand-m9-mstd0.5-inc1", "none --color-jitter 0")]
    assert [*rows] == [*batches, "step on one batch", "step on cached images"]
    assert all(float(row[0].replace(",", "")) > 0 for row in rows.values())
    step = json.loads((tmp_path / "cached.json").read_text())["cached"]["step on cached images"]
    assert 0 < step["data_wait"] < 1 and step["to_one_batch"] > 0


def test_the_work_of_the_host(capsys, tmp_path, monkeypatch):
    """A wait of the optimizer is found in its row and in that of the step."""
    take = update.step_if
    monkeypatch.setattr(update, "step_if", lambda *args: (time.sleep(0.05), take(*args)))
    monkeypatch.setattr(host, "WARM_UP", 1)
    own = ["--rounds", "1", "--steps", "3", "--json", tmp_path / "host.json"]
    benchmark.main(["host", *map(str, [*TINY, "--batch-size", "4", *own])])
    assert [*table(capsys.readouterr().out)] == [*host.PARTS, host.OTHER, host.ALL]
    found = {name: row["us"] for name, row in json.loads((tmp_path / "host.json").read_text())["host"].items()}
    assert all(us > 0 for us in found.values())
    assert found["optimizer"] > 50_000 and found[host.ALL] > 50_000


def test_cached_images(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "SECONDS", 0.1)
    data = make_image_folder(tmp_path / "data", n=24)
    flags = ["--data-set", "IMNET", "--data-path", data, "--cache-images", "memory", "--num-workers", "1"]
    own = ["--rounds", "1", "--steps", "2", "--json", tmp_path / "loader.json"]
    benchmark.main(["loader", *map(str, [*TINY, *flags, *own])])
    rows = table(capsys.readouterr().out)
    assert [*rows] == ["DeiT's", "decode once, fast crop", "cached", "decode once, fast crop, 1 processes"]
    speed, of_loader = (float(rows[name][0]) for name in ("cached", "decode once, fast crop"))
    assert float(rows["cached"][2]) == pytest.approx(speed / of_loader, rel=0.05)


def test_remedies(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(remedies, "REMEDIES", ["attnscale", "xsa"])  # of all, which take longer
    words = ["--input-size", "32", "--patch-size", "16", "--variant=--remedy xsa centered", "--cpu-time"]
    benchmark.main(["remedies", *SMALL_STEP, *words, "--json", str(tmp_path / "remedies.json")])
    rows = table(capsys.readouterr().out)
    stock = ["`--model-kwargs attn_layer=diff`", "`--model-kwargs reg_tokens=4`", "`--model-kwargs init_values=1e-05`"]
    names = ["plain timm", "`attnscale`", "`xsa`", *stock, "`--opt muon`"]
    assert [*rows] == [*names, "--remedy xsa centered"]
    assert all(float(cell) > 0 for row in rows.values() for cell in row[:3])
    assert json.loads((tmp_path / "remedies.json").read_text())["remedies"]["plain timm"]["to_plain"] == 1
