"""Every remedy against a forward pass written out in float64, on every family of backbones it serves."""

import copy

import pytest
import torch
from families import build, images
from remedied import SERVED, SETTINGS, gradients, of_family, with_remedies
from textbook_remedies import Textbook
from unrolled import queries_keys_values

from diversity import REMEDIES, apply_remedy


def probe(logits):
    """A number that depends on every logit."""
    return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum()


def assert_is_the_textbook(name, stock, settings):
    """Logits and gradients; random numbers of drop path are the same ones."""
    model, samples = with_remedies(stock, settings), images()
    parameters = {key: p.detach().clone().requires_grad_() for key, p in model.remedies.named_parameters()}
    stock = copy.deepcopy(stock)
    torch.manual_seed(2)
    expected = Textbook(name, stock, settings, parameters).logits(samples)
    torch.manual_seed(2)
    actual = model(samples)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    torch.manual_seed(2)
    assert not torch.allclose(actual, stock(samples), rtol=1e-4, atol=1e-4)
    probe(actual).backward()
    probe(expected).backward()
    wanted = gradients(stock) | {f"remedies.{key}": p.grad for key, p in parameters.items()}
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("remedy", REMEDIES)
def test_value_and_gradients_are_those_of_the_textbook(remedy):
    assert_is_the_textbook("deit", build("deit"), {remedy: SETTINGS.get(remedy, {})})


@pytest.mark.parametrize(
    ("remedy", "settings", "options"),
    [
        ("contranorm", {"contranorm_where": "norm2", "contranorm_scale": 0.3}, {}),
        ("contranorm", {"contranorm_where": "both"}, {}),
        ("featscale", {"featscale_twice": True}, {"init_values": 0.5}),
        ("gfsa", {}, {"qk_norm": True}),
        ("laplacian", {}, {}),
        ("neutreno", {}, {}),
        ("ortho_residual", {"ortho_flattened": True}, {}),
        ("ortho_residual", {}, {"drop_path_rate": 0.5, "init_values": 0.5}),
        ("value_residual", {}, {}),
        ("attnscale", {}, {"scale_attn_norm": True, "attn_layer": "attn"}),
    ],
)
def test_settings_and_other_blocks(remedy, settings, options):
    assert_is_the_textbook("deit", build("deit", **options), {remedy: settings})


@pytest.mark.parametrize("name", [name for name in SERVED if name not in ("deit", "swinv2")])
def test_all_remedies_of_a_family_together_are_those_of_the_textbook(name):
    assert_is_the_textbook(name, build(name), of_family(name))


def test_remedies_change_a_tensor_in_the_order_of_the_registry():
    settings = of_family("deit")
    one = with_remedies(build(), settings)
    other = with_remedies(build(), dict(reversed(settings.items())))
    assert [*one.state_dict()] == [*other.state_dict()]
    assert torch.equal(one(images()), other(images()))


@pytest.mark.parametrize("remedy", SERVED["swinv2"])
def test_attention_of_a_second_swin(remedy):
    stock = build("swinv2")
    attn = stock.layers[0].blocks[0].attn
    changed = with_remedies(stock, {remedy: {}})
    theirs = changed.layers[0].blocks[0].attn
    x = torch.randn(3, 16, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    maps = []
    attn.attn_drop.register_forward_pre_hook(lambda module, inputs: maps.append(inputs[0]))
    output = attn(x)
    parameters = dict(changed.remedies.named_parameters())
    book = Textbook("swinv2", stock, {remedy: {}}, parameters)
    if remedy == "reattention":
        values = queries_keys_values(attn, x)[2]
        output = attn.proj((book.maps(0, maps[0]) @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(theirs(x), book.feat_scale(0, output), rtol=1e-9, atol=1e-10)


def test_reattention_evaluates_with_running_statistics():
    model = with_remedies(build(), {"reattention": {}})
    model(images())
    model.eval()
    norm, attn = model.remedies["reattention"].norms[0], model.blocks[0].attn
    x = images(2).flatten(1)[:, : 17 * 24].view(2, 17, 24)
    q, k, v = queries_keys_values(attn, x)
    maps = torch.einsum(
        "gh,bhij->bgij", model.remedies["reattention"].mixing[0].view(3, 3), (q @ k.mT / 8**0.5).softmax(-1)
    )
    mean, variance, weight, bias = (
        tensor.view(-1, 1, 1) for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    maps = weight * (maps - mean) / (variance + 1e-5).sqrt() + bias
    expected = attn.proj((maps @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("remedy", REMEDIES)
def test_it_begins_as_the_stock_model_where_the_formula_says_so(remedy):
    stock, model, samples = build(), build(), images()
    apply_remedy(model, remedy)
    is_stock = torch.equal(model(samples), stock(samples))
    assert is_stock == (remedy in ("attnscale", "featscale", "gfsa"))
    assert is_stock == ("where the model equals the stock model" in REMEDIES[remedy].doc)


def test_learned_weights_of_values_begin_at_the_settings():
    weights = {"value_residual_first": 0.8, "value_residual_own": 0.3}
    fixed, learned = build(), build()
    apply_remedy(fixed, "value_residual", **weights)
    apply_remedy(learned, "value_residual", value_residual_learnable=True, **weights)
    torch.testing.assert_close(learned(images()), fixed(images()))


@pytest.mark.parametrize("remedy", ["xsa", "ortho_residual", "contranorm"])
def test_vectors_of_length_zero_have_finite_gradients(remedy):
    model = build().float()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[-24:] = 0
        model.blocks[0].attn.qkv.bias[-24:] = 0
        for parameter in (*model.patch_embed.parameters(), model.pos_embed, model.cls_token):
            parameter.zero_()
    apply_remedy(model, remedy)
    logits = model(images().float())
    probe(logits).backward()
    assert logits.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize("remedy", REMEDIES)
def test_half_precision_stays_near_full_precision(remedy):
    model = with_remedies(build().float(), {remedy: SETTINGS.get(remedy, {})})
    samples = images().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(samples)
    full = model(samples)
    assert (half.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    assert (half - full).norm() < 0.05 * full.norm()
    probe(half).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_attention_stays_fused_but_for_reattention():
    for remedy in REMEDIES:
        model = build()
        for block in model.blocks:
            block.attn.fused_attn = True
        apply_remedy(model, remedy)
        assert [block.attn.fused_attn for block in model.blocks] == [remedy != "reattention"] * 3


def test_attention_that_is_fused_again_is_reported():
    model = build()
    apply_remedy(model, "reattention")
    model.blocks[1].attn.fused_attn = True
    with pytest.raises(RuntimeError, match="attention of block 1 was fused after"):
        model(images())
