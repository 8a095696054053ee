"""Applying remedies to a model and removing them: keys, copies, errors, and models that a remedy does not serve."""

import copy
import pickle
from functools import partial

import pytest
import timm
import torch
from families import attentions, build, fused, hooks, images
from helpers import assert_equal
from remedied import SERVED, SETTINGS, of_family, with_remedies
from timm.layers import Attention
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import nn

from diversity import REMEDIES, Remedy, RemedyError, apply_remedy, remedies_table
from diversity.remedies import RemedyHandle, sites

# --- the registry


def test_the_registry_describes_every_remedy():
    assert len(REMEDIES) == 11
    for name, entry in REMEDIES.items():
        assert type(entry) is Remedy and entry.name == name and issubclass(entry.module, nn.Module)
        assert set(entry.changes) <= set(sites.CHANGED) and set(entry.reads) <= set(sites.READ)
        assert entry.formula and entry.source and entry.parameters and "\n    Differs: " not in entry.formula
        assert "Source: " in entry.doc and "Differs: " in entry.doc
        assert all(entry.setting_help(setting) for setting in entry.settings)


def test_setting_names_need_no_prefix():
    names = [setting for entry in REMEDIES.values() for setting in entry.settings]
    assert len(names) == len(set(names)) == 11


def test_the_table_has_a_row_for_each():
    rows = remedies_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [*REMEDIES]
    assert all(row.replace(r"\|", "").count("|") == 6 for row in rows)
    assert "`contranorm_scale=0.01`, `contranorm_temperature=1.0`, `contranorm_where=norm1`" in remedies_table()


# --- applying and removing


@pytest.mark.parametrize("name", ["deit", "eva02", "swin"])
def test_removing_restores_the_stock_model(name):
    stock, model = build(name), build(name)
    for attn in (*attentions(stock), *attentions(model)):
        attn.fused_attn = True
    handles = [apply_remedy(model, remedy, **settings) for remedy, settings in of_family(name).items()]
    assert not torch.equal(model(images()), stock(images()))
    for handle in handles:
        handle.remove()
        handle.remove()
    assert hooks(model) == [] and all(fused(model)) and not hasattr(model, "remedies")
    assert_equal(model.state_dict(), stock.state_dict())
    assert torch.equal(model(images()), stock(images()))


def test_removing_one_leaves_the_others():
    model = with_remedies(build(), {"attnscale": {}, "neutreno": {}, "reattention": {}})
    expected = with_remedies(build(), {"attnscale": {}})
    model.remedies["attnscale"].load_state_dict(expected.remedies["attnscale"].state_dict())
    for remedy in ("reattention", "neutreno"):
        RemedyHandle(model, remedy).remove()
    assert [*model.state_dict()] == [*expected.state_dict()] and len(hooks(model)) == len(hooks(expected))
    assert torch.equal(model(images()), expected(images()))


def test_a_handle_is_a_context_manager_and_does_not_remove_what_was_applied_later():
    model, stock = build(), build()
    with apply_remedy(model, "xsa") as handle:
        assert not torch.equal(model(images()), stock(images()))
    assert torch.equal(model(images()), stock(images()))
    apply_remedy(model, "xsa")
    handle.remove()
    assert "xsa" in model.remedies


def test_parameters_are_saved_beside_the_stock_keys_and_have_no_weight_decay():
    stock, model = build(), with_remedies(build(), of_family("deit"))
    added = [key for key in model.state_dict() if key not in stock.state_dict()]
    assert [key for key in model.state_dict() if key in stock.state_dict()] == [*stock.state_dict()]
    prefixes = {".".join(key.split(".")[:2]) for key in added}
    learned = ("value_residual", "reattention", "gfsa", "attnscale", "featscale")
    assert prefixes == {f"remedies.{name}" for name in learned}
    no_decay = param_groups_weight_decay(model, 0.05)[0]
    assert no_decay["weight_decay"] == 0
    exempt = {id(parameter) for parameter in no_decay["params"]}
    assert all(id(parameter) in exempt for parameter in model.remedies.parameters())
    other = build()
    for name, settings in of_family("deit").items():
        apply_remedy(other, name, **settings)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images()), model(images()))


def test_parameters_have_the_type_and_the_mode_of_the_model():
    model = build().float().eval()
    apply_remedy(model, "reattention")
    assert {p.dtype for p in model.remedies.parameters()} == {torch.float32}
    assert not any(module.training for module in model.modules())


def test_no_random_number_is_drawn():
    model = build()
    state = torch.get_rng_state()
    for name, settings in of_family("deit").items():
        apply_remedy(model, name, **settings)
    assert torch.equal(torch.get_rng_state(), state)


# --- copies


def test_a_copy_has_its_own_hooks_and_parameters():
    model = with_remedies(build(), of_family("deit"))
    logits = model(images())
    copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for other in (copied, loaded):
        assert torch.equal(other(images()), logits)
        other(images()).sum().backward()
        assert all(parameter.grad is not None for parameter in other.remedies.parameters())
        assert len(hooks(other)) == len(hooks(model))
    assert all(parameter.grad is None for parameter in model.parameters())
    for name in [*copied.remedies]:
        RemedyHandle(copied, name).remove()
    assert hooks(copied) == [] and len(hooks(model)) == len(hooks(loaded)) > 0


def test_an_average_of_the_weights_follows_and_has_its_own_forward_pass():
    model = with_remedies(build().float(), of_family("deit", without=["reattention"]))  # which differs in eval mode
    ema, samples = ModelEmaV3(model, decay=0.5), images().float()
    before = model(samples)
    with torch.no_grad():
        for parameter in model.remedies.parameters():
            parameter.add_(1)
    assert torch.equal(ema.module(samples), before)
    ema.update(model)
    moved = ema.module.remedies["attnscale"].strength[0] - model.remedies["attnscale"].strength[0]
    torch.testing.assert_close(moved, torch.full((3,), -0.5))
    assert not torch.allclose(ema.module(samples), before)


def test_nothing_is_kept_after_a_forward_pass_even_one_that_fails():
    model = with_remedies(build(), of_family("deit"))
    model(images())
    assert model.remedies._kept == {}

    def fail(module, inputs):
        raise OSError("failed")

    handle = model.blocks[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(OSError, match="failed"):
        model(images())
    handle.remove()
    assert model.remedies._kept == {}
    copy.deepcopy(model)(images())


# --- errors


def refused(error, model, name, **settings):
    """The message of an error, after checking that it is one line and that the model stays as it is."""
    before, hooked = [*model.state_dict()], hooks(model)
    modules = [*model.modules()]
    with pytest.raises(error) as caught:
        apply_remedy(model, name, **settings)
    assert type(caught.value) is error
    assert [*model.state_dict()] == before and hooks(model) == hooked
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("atnscale", {}, "unknown remedy 'atnscale'; did you mean attnscale or featscale?"),
        ("dropout", {}, f"unknown remedy 'dropout'; there are {', '.join(REMEDIES)}"),
        ("gfsa", {"gfsa_ordr": 3}, "unknown setting 'gfsa_ordr' of the remedy gfsa; did you mean gfsa_order?"),
        ("xsa", {"order": 3}, "unknown setting 'order' of the remedy xsa; it has no settings"),
        ("gfsa", {"k": 3}, "unknown setting 'k' of the remedy gfsa; its settings are gfsa_order"),
        ("gfsa", {"gfsa_order": 1}, "gfsa_order must be an integer of at least 2; got 1"),
        ("gfsa", {"gfsa_order": 2.5}, "gfsa_order must be an integer of at least 2; got 2.5"),
        ("laplacian", {"laplacian_heads": 4}, "laplacian_heads must be at most 3, the heads of a block; got 4"),
        ("laplacian", {"laplacian_heads": 0}, "laplacian_heads must be an integer of at least 1; got 0"),
        ("laplacian", {"laplacian_heads": True}, "laplacian_heads must be an integer of at least 1; got True"),
        ("laplacian", {"laplacian_heads": 1.0}, "laplacian_heads must be an integer of at least 1; got 1.0"),
        ("neutreno", {"neutreno_strength": "much"}, "neutreno_strength must be a finite number; got 'much'"),
        ("neutreno", {"neutreno_strength": float("nan")}, "neutreno_strength must be a finite number; got nan"),
        ("value_residual", {"value_residual_own": True}, "value_residual_own must be a finite number; got True"),
        ("featscale", {"featscale_twice": 1}, "featscale_twice must be True or False; got 1"),
        ("contranorm", {"contranorm_scale": -1}, "contranorm_scale must be a finite number of at least 0; got -1"),
        ("contranorm", {"contranorm_temperature": 0}, "contranorm_temperature must be a finite number above 0; got 0"),
        (
            "contranorm",
            {"contranorm_where": "norm3"},
            "contranorm_where must be one of norm1, norm2, both; got 'norm3'",
        ),
    ],
)
def test_bad_names_and_settings(name, settings, message):
    assert refused(ValueError, build(), name, **settings) == message


def test_applying_a_remedy_twice():
    model = build()
    apply_remedy(model, "gfsa")
    line = "the model has the remedy gfsa already; call remove() of its handle to apply it again"
    assert refused(ValueError, model, "gfsa", gfsa_order=3) == line


@pytest.mark.parametrize("wrap", [nn.DataParallel, partial(torch.compile, backend="eager")])
def test_a_wrapped_model(wrap):
    line = refused(TypeError, wrap(build()), "xsa")
    assert line.startswith("the stock timm model is needed, not the ")


OUTSIDE = "its attention computes queries, keys and values outside of the module `qkv`"
LATER = "the values of its first block have another shape than those of later stages, or other windows"
NO_NORMS = "does not have a norm before attention and one before the MLP"


@pytest.mark.parametrize(
    ("name", "options", "remedy", "missing"),
    [
        ("beit", {}, "attnscale", f"Beit cannot have the remedy attnscale: {OUTSIDE}"),
        ("eva02", {"qkv_fused": True}, "xsa", f"{OUTSIDE}; the model argument qkv_fused=False builds three layers"),
        ("eva02", {}, "gfsa", "no module gives the queries and keys as its softmax sees them"),
        ("swin", {}, "gfsa", "no module gives the queries and keys as its softmax sees them"),
        ("swin", {}, "neutreno", LATER),
        ("swin", {}, "value_residual", LATER),
        ("swin", {"window_size": 3}, "centered", "its windows of (3, 3) do not divide the grid of (8, 8); padding"),
        ("swinv2", {}, "attnscale", OUTSIDE),
        ("swinv2", {}, "ortho_residual", f"its SwinTransformerV2Block {NO_NORMS}"),
        ("deit", {"depth": 1}, "neutreno", "it has a single block, and the values of the first block change those of"),
        ("deit", {"attn_layer": "diff", "num_heads": 2}, "laplacian", "its differential attention has two maps for"),
        ("deit", {"block_fn": ResPostBlock}, "contranorm", f"its ResPostBlock {NO_NORMS}"),
        ("deit", {"block_fn": ParallelScalingBlock}, "reattention", "the attention of its ParallelScalingBlock is not"),
        (
            "eva02",
            {"attn_type": "rope", "num_heads": 2, "num_kv_heads": 1},
            "xsa",
            "several of its heads have the same values",
        ),
    ],
)
def test_a_model_that_lacks_what_a_remedy_needs(name, options, remedy, missing):
    line = refused(RemedyError, build(name, **options), remedy)
    assert missing in line


@pytest.mark.parametrize("remedy", REMEDIES)
def test_a_model_of_another_family(remedy):
    line = refused(RemedyError, timm.create_model("test_convnext"), remedy)
    expected = "it is not one of timm's ViT, DeiT, BEiT, EVA and Swin models"
    assert line == f"ConvNeXt cannot have the remedy {remedy}: {expected}"


def test_every_family_has_or_refuses_each_remedy():
    for name, served in SERVED.items():
        model = build(name)
        for remedy in REMEDIES:
            if remedy in served:
                apply_remedy(model, remedy, **SETTINGS.get(remedy, {})).remove()
            else:
                refused(RemedyError, model, remedy)


def test_differential_attention_and_attention_of_unknown_classes():
    class Own(Attention):
        pass

    assert "the attention of its Block is not one of those" in refused(RemedyError, build(attn_layer=Own), "centered")
    for remedy in ("contranorm", "ortho_residual"):  # these do not look into attention
        apply_remedy(build(attn_layer="diff", num_heads=2), remedy)
