"""What the tests of analyze.py share: runs, small models, and their redundancy."""

import json
import shutil

import torch
from helpers import BRIEF, TINY, data_options, few_digits, run_main, world

import analyze
from datasets import build_data
from diversity import measure_redundancy
from models import build_model
from training import checkpoint

PLAIN_VIT = (*BRIEF, "--patch-size", "8", "--model-kwargs", "depth=2", "embed_dim=24", "num_heads=3")


def make_runs(folder):
    """Folders of finished runs: plain; watched, the same with --redundancy-every; other, with other weights."""
    flags = ("--batch-size", "64", "--epochs", "3")
    with few_digits(512):
        run_main(*TINY, *flags, "--output-dir", folder / "plain")
        run_main(*TINY, *flags, "--tensorboard", "--redundancy-every", "2", "--output-dir", folder / "watched")
    shutil.copytree(folder / "plain", folder / "other")
    content = torch.load(folder / "other" / checkpoint.LAST, weights_only=True)
    content["model"] = {key: value + 0.1 * value.roll(1, 0) for key, value in content["model"].items()}
    torch.save(content, folder / "other" / checkpoint.LAST)
    return folder


def analyzed(tmp_path, *words):
    """`python analyze.py *words` in this process; returns the content of its redundancy.json."""
    analyze.main([str(word) for word in (*words, "--device", "cpu", "--output-dir", tmp_path / "out")])
    return json.loads((tmp_path / "out" / "redundancy.json").read_text())


def numbers(report):
    """A report without its origin."""
    return {name: value for name, value in report.items() if name not in ("run", "measured_on")}


def measured(model, num_images=256, flags=TINY):
    """`measure_redundancy` of a model on the first validation images of the digits and their labels."""
    data = build_data(data_options(*flags), world())
    samples, labels = (torch.cat(parts)[:num_images] for parts in zip(*data.val, strict=True))
    return measure_redundancy(model, [(samples, labels)], data.num_classes)


def small_model(name="deit_tiny_patch16_224", weights=None, depth=2):
    """What `PLAIN_VIT` describes, with random weights or with `weights`."""
    torch.manual_seed(7)
    model = build_model(name, 10, 32, 8, depth=depth, embed_dim=24, num_heads=3)
    model.load_state_dict(weights or model.state_dict())
    return model


def loaded(path, key="model"):
    return torch.load(path, weights_only=True)[key]
