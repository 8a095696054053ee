"""The forms of the losses for torch.compile agree with those of eager mode, in value and gradient."""

import pytest
import torch
from families import FAMILIES, build, fused, images
from golden_inputs import normals
from timm.layers import Attention

from diversity import REGULARIZERS, DiversityObjective, MixedTarget, TappedViT, token_cross_entropy

RELEASED = ["emb_cos_within", "emb_contrast_cross", "attn_cos_within", "weight_mha_cond_orth"]


@pytest.fixture
def compiling(monkeypatch):
    """Switch to the forms for torch.compile, which then run eagerly."""
    return lambda: monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def value_and_gradients(function, tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    weights = normals(9, *value.shape).to(value.dtype) if value.dim() else 1
    return value.detach(), *torch.autograd.grad((value * weights).sum(), leaves)


def tokens(seed, *shape):
    """Items with one of zeros and one that is shorter than 1e-8."""
    items = normals(seed, *shape)
    items[..., 1, :] = 0
    items[..., 2, :] *= 1e-10
    return items


def maps(seed, *shape):
    """Softmax maps, one of them of zeros."""
    attention = normals(seed, *shape).softmax(dim=-1)
    attention[..., 1, :, :] = 0
    return attention


INPUTS = {
    "emb_cos_within": [{"last": tokens(0, 2, 5, 7)}, {"last": tokens(0, 3, 2, 5, 7)}],
    "emb_cos_cross": [{"first": tokens(0, 2, 5, 7), "last": tokens(1, 3, 2, 5, 7)}],
    "emb_contrast_cross": [
        {"first": tokens(0, 2, 5, 7), "last": tokens(1, 2, 5, 7)},
        {"first": normals(0, 2, 5, 7), "last": normals(1, 3, 2, 5, 7)},
    ],
    "attn_cos_within": [{"attention": maps(0, 2, 3, 5, 5)}, {"attention": maps(0, 4, 2, 3, 5, 5)}],
    "attn_offdiag_cos_within": [{"attention": maps(0, 2, 3, 5, 5)}],
    "weight_mha_cond_orth": [{"weights": normals(0, 4, 6, 5)}, {"weights": normals(0, 4, 5, 30)}],
}


@pytest.mark.parametrize("name, taps", [(name, taps) for name, cases in INPUTS.items() for taps in cases])
def test_terms_agree(name, taps, compiling):
    probes = {"probes": normals(5, 2, 4, taps["weights"].shape[1], 1)} if "weights" in taps else {}

    def term(*tensors):
        return REGULARIZERS[name](**dict(zip(taps, tensors, strict=True)), **probes)

    expected = value_and_gradients(term, taps.values())
    compiling()
    found = value_and_gradients(term, taps.values())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", [name for name, term in REGULARIZERS.items() if term.skips_prefix])
def test_terms_skip_prefix_tokens(name, compiled, compiling):
    """As if they were not there: in the value, in the patches' gradients, and without a gradient of their own."""
    reads = REGULARIZERS[name].reads
    everything = [tokens(seed, 2, 7, 6) for seed, _ in enumerate(reads)]

    def term(*tensors, **options):
        return REGULARIZERS[name](**dict(zip(reads, tensors, strict=True)), **options)

    value, *expected = value_and_gradients(term, [one[:, 2:] for one in everything])
    if compiled:
        compiling()
    found, *gradients = value_and_gradients(lambda *tensors: term(*tensors, num_prefix_tokens=2), everything)
    torch.testing.assert_close(found, value, rtol=1e-9, atol=0)
    for gradient, of_patches in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient[:, 2:], of_patches, rtol=1e-9, atol=1e-13)
        assert not gradient[:, :2].any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cross_entropies_agree(dtype, smoothing, compiling):
    labels, lam = torch.tensor([0, 3, 4, 0]), torch.rand(4, 6, dtype=torch.float64)
    logits = (50 * normals(0, 4, 6, 5)).to(dtype)

    def loss(logits):
        return token_cross_entropy(logits, labels, labels.flip(0), lam, smoothing)

    expected = value_and_gradients(loss, [logits])
    compiling()
    found = value_and_gradients(loss, [logits])
    assert found[1].dtype == dtype
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {}
    torch.testing.assert_close(found, expected, **tolerance)


def test_one_item_has_no_contrast(compiling):
    compiling()
    with pytest.raises(ValueError, match="at least two items"):
        REGULARIZERS["emb_contrast_cross"](first=normals(0, 2, 1, 4), last=normals(1, 2, 1, 4))


def test_second_derivatives_are_refused(compiling):
    compiling()
    attention = maps(0, 2, 3, 5, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(
        REGULARIZERS["attn_cos_within"](attention=attention), attention, create_graph=True
    )
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", FAMILIES)
def test_taps_agree(name, compiling):
    """Plain ViT blocks then keep fused attention during the forward pass, and only then."""
    model, during = build(name), []
    tapped = TappedViT(model, ["first", "last", "attention"], patch_logits=True, attn_layers="all")
    plain = [block.attn for block in tapped.backbone.blocks if type(block.attn) is Attention]
    handles = [attn.register_forward_pre_hook(lambda attn, inputs: during.append(attn.fused_attn)) for attn in plain]
    expected, unfused = tapped(images()), fused(model)
    assert during == [False] * len(plain)
    during.clear()
    compiling()
    found = tapped(images())
    assert during == [True] * len(plain) and fused(model) == unfused
    for tap in ("logits", "patch_logits", "first", "last", "attention"):
        torch.testing.assert_close(getattr(found, tap), getattr(expected, tap), rtol=1e-9, atol=1e-10)
    for handle in handles:
        handle.remove()


def test_maps_are_those_before_dropout_and_the_models_own_without_fused_attention(compiling):
    model = build(attn_drop_rate=0.5)
    expected = TappedViT(build(), ["attention"])(images()).attention
    compiling()
    torch.testing.assert_close(TappedViT(model, ["attention"])(images()).attention, expected)
    model = build()
    model.blocks[0].attn.fused_attn = False
    with TappedViT(model, ["attention"]) as tapped:
        torch.testing.assert_close(tapped(images()).attention, expected)
        assert not model.blocks[0].attn.fused_attn


@pytest.mark.parametrize(
    "name",
    ["deit", "swin", *(pytest.param(name, marks=pytest.mark.slow) for name in ("registers", "average", "distilled"))],
)
@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_step_has_the_gradients_of_eager(name, autocast):
    torch._dynamo.reset()  # else the cases count as recompilations of one step
    objective = DiversityObjective({"mixing": 1.0} | dict.fromkeys(RELEASED, 0.1), smoothing=0.1)
    tapped = TappedViT(build(name).float() if autocast else build(name), objective.reads, objective.patch_logits)
    samples = images().float() if autocast else images()
    labels, lam = torch.tensor([0, 3]), torch.tensor([0.3, 0.7])
    target = MixedTarget(labels, labels.flip(0), lam, lam[:, None].expand(-1, tapped.grid[0] * tapped.grid[1]))
    stack = tapped.backbone.weight_stacks(["qkv"])
    probes = tuple(normals(3, 2, *one.shape[:2], 1).to(one.dtype) for one in stack)
    probes = {"weight_mha_cond_orth": probes[0] if len(stack) == 1 else probes}

    def step(samples):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return objective(tapped(samples), target, probes=probes)[0]

    losses, gradients = [], []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        tapped.zero_grad()
        losses.append(function(samples))
        losses[-1].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in tapped.parameters() if p.grad is not None]))
    if autocast:
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)
        assert torch.cosine_similarity(*gradients, dim=0) > 0.999
    else:
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-8, atol=1e-10)
