"""--opt muon: which parameters Muon updates, how far, and which ones its AdamW does; a step that is not taken."""

import pytest
import timm
import torch
from families import FAMILIES, build, images
from helpers import parse
from torch.nn import functional as F

from training.build import build_optimizer
from training.update import step_if

LR, WEIGHT_DECAY = 1e-3, 0.05


def stepped(model, opt="muon", allowed=True):
    """The optimizer of `--opt` after a step, or after one that was not allowed."""
    args = parse("--opt", opt, "--weight-decay", WEIGHT_DECAY)
    optimizer = build_optimizer(args, model, LR)
    F.cross_entropy(model(images()), torch.tensor([1, 3])).backward()
    step_if(optimizer, torch.tensor(allowed))
    return optimizer


@pytest.mark.parametrize("name", FAMILIES)
def test_muon_updates_the_matrices_of_the_blocks(name):
    """Not the embedding of patches, positions, tokens, tables of positions, norms and biases, nor the classifier."""
    model = build(name)
    optimizer = stepped(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_muon = {names[parameter] for parameter, state in optimizer.state.items() if state["use_muon"]}
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(("blocks.", "layers.")) and "cpb_mlp" not in name
    }
    assert by_muon == matrices and len(matrices) >= 12
    decayed = {names[p] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    heads = {name for name in names.values() if name in ("head.weight", "head.fc.weight", "head_dist.weight")}
    assert decayed == matrices | heads | {"patch_embed.proj.weight"}


@pytest.mark.parametrize("opt", ["nmuon", "adamuon", "nadamuon", "lookahead_muon"])
def test_every_form_of_muon_leaves_the_classifier_to_adamw(opt):
    model = build("deit")
    groups = stepped(model, opt).param_groups
    fallback = {p for group in groups if group.get("use_fallback") for p in group["params"]}
    tokens = {model.cls_token, model.pos_embed}
    assert fallback == {*model.head.parameters(), *model.patch_embed.parameters(), *tokens}


def test_other_optimizers_keep_their_two_groups():
    """As in the checkpoints of earlier versions."""
    for opt in ("adamw", "sgd", "lion"):
        optimizer = build_optimizer(parse("--opt", opt), build("deit"), LR)
        assert [group.get("use_fallback") for group in optimizer.param_groups] == [None, None]


@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (64, 256)])
def test_an_update_of_a_matrix_is_as_large_as_one_of_adamw(shape):
    """Its root mean square is about 0.2 of the rate, so that rates and decay of AdamW can be kept."""
    model = torch.nn.Linear(*shape, bias=False)
    model.pretrained_cfg = {}
    before = model.weight.detach().clone()
    optimizer = build_optimizer(parse("--opt", "muon", "--weight-decay", 0), model, LR)
    model.weight.grad = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert (model.weight - before).square().mean().sqrt().item() / LR == pytest.approx(0.2, rel=0.2)


def test_the_classifier_is_updated_as_by_adamw():
    """With timm's second beta, 0.95, and with the decay."""
    model, twin = build("deit"), build("deit")
    stepped(model)
    optimizer = torch.optim.AdamW(twin.head.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=WEIGHT_DECAY)
    F.cross_entropy(twin(images()), torch.tensor([1, 3])).backward()
    optimizer.step()
    torch.testing.assert_close(model.head.weight, twin.head.weight)


def test_a_step_that_is_not_allowed_changes_nothing():
    model = build("deit")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = stepped(model, allowed=False)
    assert not optimizer.state
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_timm_names_the_input_and_the_output_of_other_models():
    model = timm.create_model("resnet10t", num_classes=5)
    optimizer = build_optimizer(parse("--opt", "muon"), model, LR)
    fallback = {p for group in optimizer.param_groups if group.get("use_fallback") for p in group["params"]}
    assert fallback == {model.conv1[0].weight, *model.fc.parameters()}
