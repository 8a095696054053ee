"""Keys and prefixes of other trainers: what is taken, what a note says about it, and --checkpoint-key."""

import re

import pytest
import torch
from helpers import TINY, assert_equal, model_of, one_line, run_main

from models import weights


def behind(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def tensors_of(*names):
    return {name: torch.ones(2) for name in names}


HEAD = tensors_of("head.mlp.0.weight", "head.mlp.0.bias", "head.last_layer.weight_v")
DECODER = tensors_of("mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.0.norm1.weight")
LIGHTNING = {"epoch": 3, "pytorch-lightning_version": "2.6", "optimizer_states": [], "loops": {"a": 1}}
TWO_KEYS = "weights of 'teacher'; the file also has student, see --checkpoint-key"
NO_HEAD = "left out, as not behind that prefix: head. (3 tensors)"
PROJECTION = "left out, of a projection head of pre-training: head. (3 tensors)"

WRAPPED = {
    "DINO": (
        lambda a, b: {
            "student": behind("module.backbone.", b) | behind("module.", HEAD),
            "teacher": behind("backbone.", a) | HEAD,
            "dino_loss": tensors_of("center"),
            "epoch": 100,
        },
        [TWO_KEYS, "prefix backbone. removed", NO_HEAD],
    ),
    "the backbone of DINO alone": (lambda a, b: a, []),
    "iBOT": (
        lambda a, b: {"state_dict": a | tensors_of("masked_embed") | HEAD},
        ["left out, of masked pre-training: masked_embed", PROJECTION],
    ),
    "DINOv2, one key": (
        lambda a, b: {
            "model": behind("teacher.backbone.", a)
            | behind("teacher.dino_head.", HEAD)
            | behind("student.backbone.", b)
        },
        [
            "prefix teacher.backbone. removed; the file also has student.backbone., see --checkpoint-key",
            "left out, as not behind that prefix: teacher.dino_head. (3 tensors)",
        ],
    ),
    "DINOv2 in chunks": (
        lambda a, b: {"teacher": {name.replace("blocks.1.", "blocks.0.1.").replace("blocks.0.n", "blocks.0.0.n")
                                  .replace("blocks.0.a", "blocks.0.0.a").replace("blocks.0.m", "blocks.0.0.m"): tensor
                                  for name, tensor in a.items()}},
        ["weights of 'teacher'"],
    ),
    "MAE": (
        lambda a, b: {"model": a | DECODER, "optimizer": {}, "epoch": 800},
        ["left out, of masked pre-training: mask_token, decoder_pos_embed, decoder_embed., decoder_blocks."],
    ),
    "MoCo v3": (
        lambda a, b: {
            "state_dict": behind("module.base_encoder.", a | tensors_of("head.0.weight", "head.1.weight"))
            | behind("module.momentum_encoder.", b) | behind("module.predictor.", HEAD)
        },
        [
            "prefix base_encoder. removed; the file also has momentum_encoder., see --checkpoint-key",
            "left out, as not behind that prefix: predictor. (3 tensors)",
            "left out, of a projection head of pre-training: head. (2 tensors)",
        ],
    ),
    "I-JEPA": (
        lambda a, b: {"encoder": behind("module.", a), "target_encoder": behind("module.", b), "epoch": 1},
        ["weights of 'encoder'; the file also has target_encoder, see --checkpoint-key"],
    ),
    "Lightning": (lambda a, b: LIGHTNING | {"state_dict": behind("model.", a)}, ["prefix model. removed"]),
    "Lightning, compiled": (
        lambda a, b: {"state_dict": behind("model._orig_mod.", a) | tensors_of("criterion.weight")},
        ["prefix model._orig_mod. removed", "left out, as not behind that prefix: criterion."],
    ),
    "lightly, DINO": (
        lambda a, b: {
            "state_dict": behind("student_backbone.", b)
            | behind("teacher_backbone.", a)
            | behind("teacher_head.", HEAD)
        },
        [
            "prefix teacher_backbone. removed; the file also has student_backbone., see --checkpoint-key",
            "left out, as not behind that prefix: teacher_head. (3 tensors)",
        ],
    ),
    "lightly, MAE": (
        lambda a, b: {"state_dict": behind("backbone.vit.", a) | behind("backbone.", tensors_of("mask_token"))
                      | behind("decoder.", DECODER)},
        [
            "prefix backbone.vit. removed",
            "left out, as not behind that prefix: backbone.mask_token, decoder. (4 tensors)",
        ],
    ),
    "BEiT v2": (lambda a, b: {"module": a}, ["weights of 'module'"]),
    "another key": (lambda a, b: {"weights": a, "numbers": {"a": 1}}, ["weights of 'weights'"]),
}  # fmt: skip
"""{trainer: (the file's content from two models' weights, the notes about it)}"""


def saved(path, stored):
    torch.save(stored, path)
    return str(path)


def backbones():
    return [model_of(seed, num_classes=0) for seed in (1, 3)]


@pytest.mark.parametrize("trainer", WRAPPED)
def test_files_of_other_trainers(tmp_path, trainer):
    wrap, notes = WRAPPED[trainer]
    source, other = (model.state_dict() for model in backbones())
    model = model_of(2, num_classes=0)
    assert weights.load_weights(model, saved(tmp_path / "file.pth", wrap(source, other))) == notes
    assert_equal(model.state_dict(), source)


@pytest.mark.parametrize(
    ("trainer", "key"),
    [("DINO", "student"), ("DINOv2, one key", "student"), ("DINOv2, one key", "student.backbone"),
     ("MoCo v3", "momentum_encoder"), ("I-JEPA", "target_encoder"), ("lightly, DINO", "student_backbone.")],
)  # fmt: skip
def test_a_key_chooses_the_other_weights(tmp_path, trainer, key):
    source, other = (model.state_dict() for model in backbones())
    model = model_of(2, num_classes=0)
    path = saved(tmp_path / "file.pth", WRAPPED[trainer][0](source, other))
    notes = weights.load_weights(model, path, checkpoint_key=key)
    assert_equal(model.state_dict(), other)
    assert not any("--checkpoint-key" in note for note in notes)


def test_the_averaged_weights_of_dino_are_those_of_the_teacher(tmp_path):
    source, other = (model.state_dict() for model in backbones())
    model = model_of(2, num_classes=0)
    weights.load_weights(model, saved(tmp_path / "file.pth", WRAPPED["DINO"][0](source, other)), use_ema=True)
    assert_equal(model.state_dict(), source)


def test_two_models_of_which_none_comes_first_are_refused(tmp_path):
    source, other = (model.state_dict() for model in backbones())
    path = saved(tmp_path / "file.pth", behind("left.", source) | behind("right.", other))
    with pytest.raises(ValueError) as caught:
        weights.load_weights(model_of(num_classes=0), path)
    assert str(caught.value) == f"{path} has several models: left., right.; choose one with --checkpoint-key"


@pytest.mark.parametrize(
    ("trainer", "has"), [("DINO", "dino_loss, student, teacher"), ("MAE", "model"), ("iBOT", "state_dict")]
)
def test_a_key_that_the_file_does_not_have(tmp_path, trainer, has):
    path = saved(tmp_path / "file.pth", WRAPPED[trainer][0](*(model.state_dict() for model in backbones())))
    with pytest.raises(ValueError) as caught:
        weights.load_weights(model_of(num_classes=0), path, checkpoint_key="tutor")
    line = f"{path} has no weights under tutor; it has {has}; choose one of them with --checkpoint-key"
    assert str(caught.value) == line


def test_a_tensor_that_is_missing_behind_a_prefix_is_an_error(tmp_path):
    source = model_of(1, num_classes=0).state_dict()
    del source["blocks.1.norm1.bias"]
    path = saved(tmp_path / "file.pth", {"teacher": behind("backbone.", source | tensors_of("extra.weight"))})
    with pytest.raises(ValueError, match=r"blocks\.1\.norm1\.bias is not in the file, and 1 more$"):
        weights.load_weights(model_of(num_classes=0), path)


def test_the_flag_of_a_run(tmp_path, capsys, few_digits):
    source, other = (model.state_dict() for model in backbones())
    path = saved(tmp_path / "dino.pth", WRAPPED["DINO"][0](source, other))
    losses = []
    for key in ((), ("--checkpoint_key", "student")):
        run_main(*TINY, "--finetune", path, *key, "--dry-run")
        out = capsys.readouterr().out
        assert "prefix backbone. removed" in out and ("weights of 'student'" in out) == bool(key)
        losses.append(re.search(r"loss ([\d.]+)", out)[1])
    assert losses[0] != losses[1]
    with pytest.raises(SystemExit) as caught:
        run_main(*TINY, "--finetune", path, "--checkpoint-key", "tutor", "--dry-run")
    one_line(caught, "--finetune", "no weights under tutor")
