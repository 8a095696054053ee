"""An error in a user's model, data set or term keeps its traceback, with file and line; a refused value is one line."""

import dataclasses
import traceback

import pytest
from helpers import BRIEF, TINY, run_main
from PIL import Image
from timm.models import VisionTransformer, register_model
from torch.utils.data import Dataset

from diversity import REGULARIZERS
from pipeline import sources


class Own(VisionTransformer):
    """A model of a user, which takes `depth` and fails where it is told to."""

    def __init__(self, fails="", **kwargs):
        if fails == "to build":
            {}["depth"]
        self.fails = fails
        super().__init__(**kwargs)

    def forward(self, images):
        if self.fails == "to run":
            raise RuntimeError("gloo and NCCL: No space left on device")
        return super().forward(images)


@register_model
def own_vit(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
    return Own(**{"patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 3} | kwargs)


class Scans(Dataset):
    """A data set of a user."""

    classes = ("a", "b")

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 64

    def __getitem__(self, index):
        if index == 5 and self.error is not None:
            raise self.error
        return Image.new("RGB", (32, 32), (index, 0, 0)), index % 2


def function_of(error):
    """The last function of this file in a traceback."""
    return [frame.name for frame in traceback.extract_tb(error.__traceback__) if frame.filename == __file__][-1]


OWN = (*BRIEF, "--model", "own_vit", "--drop-path", 0)


@pytest.mark.parametrize(
    ("fails", "kind", "function"), [("to build", KeyError, "__init__"), ("to run", RuntimeError, "forward")]
)
def test_an_error_of_a_model(fails, kind, function, few_digits):
    with pytest.raises(kind) as caught:
        run_main(*OWN, "--model-kwargs", f"fails={fails!r}")
    assert function_of(caught.value) == function


def test_an_argument_that_a_users_model_does_not_take(refused):
    line = refused("--model-kwargs", "depht=2", base=OWN)
    assert "--model own_vit cannot be built" in line and "depht" in line


@pytest.mark.slow
def test_an_error_of_a_model_in_a_compiled_step(few_digits):
    with pytest.raises(RuntimeError, match="gloo and NCCL") as caught:
        run_main(*OWN, "--compile", "--model-kwargs", "fails='to run'")
    assert function_of(caught.value) == "forward"


def test_an_error_of_a_term(few_digits, monkeypatch):
    def own_term(last):
        return last[:, 7000]

    term = dataclasses.replace(REGULARIZERS["emb_so"], function=own_term, options={})
    monkeypatch.setitem(REGULARIZERS, "emb_so", term)
    with pytest.raises(IndexError) as caught:
        run_main(*TINY, "--emb_so_coef", 1)
    assert function_of(caught.value) == "own_term"


def add_scans(monkeypatch, error):
    """`--data-set DIGITS` is a user's data set, of which an image raises an error; opening it fails with its type."""

    def open_scans(options, is_training):
        if error is KeyError:
            raise KeyError("scans")
        return Scans(error)

    source = dataclasses.replace(sources.SOURCES["DIGITS"], open=open_scans)
    monkeypatch.setitem(sources.SOURCES, "DIGITS", source)


@pytest.mark.parametrize(
    ("error", "function"),
    [(KeyError, "open_scans"), (KeyError("label"), "__getitem__"), (RuntimeError("No space left"), "__getitem__")],
)
def test_an_error_of_a_data_set(error, function, monkeypatch):
    add_scans(monkeypatch, error)
    with pytest.raises((KeyError, RuntimeError)) as caught:
        run_main(*TINY)
    assert function_of(caught.value) == function


def test_an_error_of_a_data_set_in_a_loader_worker(monkeypatch):
    add_scans(monkeypatch, RuntimeError("No space left on device"))
    with pytest.raises(RuntimeError, match=r"test_own_code.py\", line \d+, in __getitem__"):
        run_main(*TINY, "--num-workers", 1)


def test_an_image_that_a_users_data_set_cannot_read_is_replaced(monkeypatch, capsys):
    add_scans(monkeypatch, OSError("truncated"))
    with pytest.raises(SystemExit, match=r"unreadable image .*truncated"):  # of the validation set, where none may be
        run_main(*TINY, "--no-repeated-aug")
    assert "truncated; replaced by the next one" in capsys.readouterr().err
