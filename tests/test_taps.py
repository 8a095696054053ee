"""TappedViT on small timm models, against a forward pass unrolled by hand."""

import copy

import pytest
import timm
import torch
from golden_inputs import normals

from diversity import TAPS, DiversityObjective, MixedTarget, TapError, TapOutput, TappedViT

CLASSES, PATCHES = 5, 16
# model: (timm name, further arguments, number of prefix tokens)
MODELS = {
    "vit": ("vit_tiny_patch16_224", {}, 1),
    "deit": ("deit_tiny_patch16_224", {}, 1),
    "distilled": ("deit_tiny_distilled_patch16_224", {}, 2),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}, 5),
    "average": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, 0),
}


def build(name="deit", **kwargs):
    """A small timm model in float64 with lively weights, in training mode."""
    timm_name, options, _ = MODELS[name]
    size = dict(img_size=32, patch_size=8, depth=3, embed_dim=24, num_heads=3, num_classes=CLASSES)
    torch.manual_seed(0)
    model = timm.create_model(timm_name, **{**size, **options, **kwargs}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


def images(batch=2):
    return normals(1, batch, 3, 32, 32)


def unrolled(model, samples, num_prefix_tokens):
    """The taps, written out from the model's weights; attention by hand from the q, k and v rows of each qkv."""
    x = model._pos_embed(model.patch_embed(samples))
    taps, weights = {"first": x[:, num_prefix_tokens:]}, []
    for i, block in enumerate(model.blocks):
        normed = block.norm1(x)
        batch, tokens, dim = normed.shape
        heads = []
        for rows in range(3):  # q, k, v
            weight = block.attn.qkv.weight[rows * dim : (rows + 1) * dim]
            bias = block.attn.qkv.bias[rows * dim : (rows + 1) * dim]
            weights.append(weight)
            heads.append((normed @ weight.T + bias).reshape(batch, tokens, 3, dim // 3).transpose(1, 2))
        q, k, v = heads
        maps = torch.softmax(q @ k.transpose(2, 3) / (dim // 3) ** 0.5, dim=-1)
        if i == 0:
            taps["attention"] = maps
        x = x + block.attn.proj((maps @ v).transpose(1, 2).reshape(batch, tokens, dim))
        x = x + block.mlp(block.norm2(x))
    taps["last"] = x[:, num_prefix_tokens:]
    taps["weights"] = torch.stack(weights)
    taps["patch_logits"] = model.head(model.fc_norm(model.norm(x)))[:, num_prefix_tokens:]
    return taps


def hooks(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


def fused(model):
    return [block.attn.fused_attn for block in model.blocks]


# --- values


@pytest.mark.parametrize("name", MODELS)
def test_taps_equal_an_unrolled_forward(name):
    model, samples = build(name), images()
    stock = copy.deepcopy(model)
    output = TappedViT(model, reads=TAPS, patch_logits=True).train()(samples)
    expected = unrolled(stock, samples, num_prefix_tokens=MODELS[name][2])
    for tap, value in expected.items():
        torch.testing.assert_close(getattr(output, tap), value, rtol=1e-9, atol=1e-10, msg=lambda m, t=tap: f"{t}: {m}")
    assert output.first.shape == output.last.shape == (2, PATCHES, 24)
    assert output.patch_logits.shape == (2, PATCHES, CLASSES)
    assert output.weights.shape == (9, 24, 24)
    torch.testing.assert_close(output.logits, stock(samples), rtol=1e-9, atol=1e-10)
    assert output.dist_logits is None


def test_non_square_images():
    model, samples = build(img_size=(16, 40)), normals(1, 2, 3, 16, 40)
    output = TappedViT(model, reads=TAPS, patch_logits=True)(samples)
    for tap, value in unrolled(model, samples, num_prefix_tokens=1).items():
        torch.testing.assert_close(getattr(output, tap), value, rtol=1e-9, atol=1e-10)
    assert output.first.shape[1] == 10


@pytest.mark.parametrize("name", MODELS)
def test_eval_returns_the_stock_models_logits(name):
    model = build(name)
    stock = copy.deepcopy(model).eval()
    tapped = TappedViT(model, reads=TAPS, patch_logits=True).eval()
    logits = tapped(images())
    assert type(logits) is torch.Tensor
    torch.testing.assert_close(logits, stock(images()), rtol=1e-9, atol=1e-10)
    assert not tapped._captured


def test_distilled_training_gives_the_logits_of_both_heads():
    model, samples = build("distilled"), images()
    model.set_distilled_training(True)
    expected = copy.deepcopy(model)(samples)
    output = TappedViT(model, patch_logits=True)(samples)
    torch.testing.assert_close((output.logits, output.dist_logits), expected)
    assert not torch.allclose(output.logits, output.dist_logits)


def test_attention_is_the_softmax_before_dropout():
    model, samples = build(attn_drop_rate=0.5, drop_rate=0.3, drop_path_rate=0.2), images()
    attention = TappedViT(model, reads=["attention"])(samples).attention
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones_like(attention[..., 0]))
    assert (attention > 0).all()


def test_first_is_taken_after_position_dropout():
    model, samples = build(pos_drop_rate=0.5), images()
    first = TappedViT(model, reads=["first"])(samples).first
    assert (first == 0).double().mean().item() == pytest.approx(0.5, abs=0.1)


def test_patch_logits_pass_the_dropout_of_the_head():
    output = TappedViT(build(drop_rate=0.5, num_classes=24), patch_logits=True)
    output.model.head = torch.nn.Identity()
    assert (output(images()).patch_logits == 0).double().mean().item() == pytest.approx(0.5, abs=0.1)


# --- what is handed out, and what is hooked for it


@pytest.mark.parametrize("asked", [*TAPS, "patch_logits", None])
def test_only_what_is_asked_for_is_handed_out_and_hooked(asked):
    model, samples = build(), images()
    tapped = TappedViT(model, reads=[asked] if asked in TAPS else [], patch_logits=asked == "patch_logits")
    output = tapped(samples)
    given = {name for name, value in output._asdict().items() if value is not None}
    assert given == {"logits", asked} - {None}
    assert len(hooks(model)) == (0 if asked in (None, "weights") else 1)
    assert fused(model) == [asked != "attention", True, True]
    assert not tapped._captured


def test_without_taps_it_is_the_stock_model_bit_for_bit():
    model, samples = build(), images()
    expected = copy.deepcopy(model)(samples)
    output = TappedViT(model)(samples)
    assert isinstance(output, TapOutput)
    assert torch.equal(output.logits, expected)


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_of_the_model_has_timms_keys(name):
    keys = list(build(name).state_dict())
    tapped = TappedViT(build(name), reads=TAPS, patch_logits=True)
    assert list(tapped.model.state_dict()) == keys
    assert list(tapped.state_dict()) == [f"model.{key}" for key in keys]


@pytest.mark.parametrize("by", ["close", "context manager"])
def test_close_removes_hooks_and_restores_fused_attention(by):
    model = build()
    tapped = TappedViT(model, reads=TAPS, patch_logits=True)
    assert len(hooks(model)) == 4 and fused(model) == [False, True, True]
    if by == "close":
        tapped.close()
    else:
        with tapped as entered:
            assert entered is tapped
    assert hooks(model) == [] and fused(model) == [True, True, True]
    output = tapped(images())
    assert {name for name, value in output._asdict().items() if value is not None} == {"logits"}


def test_close_leaves_attention_unfused_where_it_was():
    model = build()
    model.blocks[0].attn.fused_attn = False
    TappedViT(model, reads=["attention"]).close()
    assert fused(model) == [False, True, True]


REACHED = {
    "first": {"patch_embed.proj.weight", "pos_embed"},
    "last": {"patch_embed.proj.weight", "pos_embed", "blocks.2.mlp.fc2.weight"},
    "attention": {"patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"},
    "weights": {f"blocks.{i}.attn.qkv.weight" for i in range(3)},
    "patch_logits": {"patch_embed.proj.weight", "blocks.2.mlp.fc2.weight", "norm.weight", "head.weight"},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tap", REACHED)
def test_gradient_flows_from_a_tap(tap, checkpointing):
    model, samples = build(), images()
    stock = copy.deepcopy(model)
    model.set_grad_checkpointing(checkpointing)
    output = TappedViT(model, reads=TAPS, patch_logits=True)(samples)
    weights = normals(2, *getattr(output, tap).shape)
    (getattr(output, tap) * weights).sum().backward()
    (unrolled(stock, samples, num_prefix_tokens=1)[tap] * weights).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    assert REACHED[tap] <= grads.keys()
    torch.testing.assert_close(grads, expected, rtol=1e-8, atol=1e-9)


# --- errors


def test_unknown_tap_is_an_error():
    with pytest.raises(ValueError, match="unknown tap 'middle'; there are first, last, attention, weights"):
        TappedViT(build(), reads=["first", "middle"])


@pytest.fixture(scope="module")
def convnet():
    return timm.create_model("resnet10t", num_classes=CLASSES).train()


@pytest.mark.parametrize("tap", [*TAPS, "patch_logits"])
def test_convnet_cannot_give_taps(convnet, tap):
    with pytest.raises(TapError, match=f"ResNet cannot give {tap}: ") as raised:
        TappedViT(convnet, reads=[tap] if tap in TAPS else [], patch_logits=tap == "patch_logits")
    assert raised.value.tap == tap
    assert hooks(convnet) == []


def test_convnet_without_taps_is_a_plain_model(convnet):
    samples = images().float()
    tapped = TappedViT(convnet)
    assert tapped.train()(samples).logits.shape == (2, CLASSES)
    assert torch.equal(tapped.eval()(samples), convnet(samples))


@pytest.mark.parametrize("tap", ["first", "last", "attention", "patch_logits"])
def test_bypassed_hook_is_an_error(tap):
    model = build()
    tapped = TappedViT(model, reads=[tap] if tap in TAPS else [], patch_logits=tap == "patch_logits")
    model.forward_features = lambda samples, **kwargs: samples.new_zeros(len(samples), 1 + PATCHES, 24)
    with pytest.raises(RuntimeError, match="did not fire: VisionTransformer bypassed"):
        tapped(images())


def test_fused_attention_is_not_passed_over_in_silence():
    tapped = TappedViT(build(), reads=["attention"])
    tapped(images())
    tapped.model.blocks[0].attn.fused_attn = True
    with pytest.raises(RuntimeError, match="'attention' did not fire"):
        tapped(images())


# --- torch.compile


def test_compiles_as_one_graph_with_the_same_loss():
    objective = DiversityObjective(
        {
            "mixing": 1,
            "emb_cos_within": 0.5,
            "emb_contrast_cross": 0.5,
            "attn_cos_within": 0.1,
            "weight_mha_cond_orth": 0.1,
        }
    )
    tapped = TappedViT(build(depth=2), objective.reads, objective.patch_logits)
    labels, lam = torch.tensor([0, 3]), torch.tensor([0.3, 0.3], dtype=torch.float64)
    target = MixedTarget(labels, labels.flip(0), lam, lam[:, None].expand(-1, PATCHES))
    probes = {"weight_mha_cond_orth": normals(3, 2, 6, 24, 1)}

    def step(samples):
        return objective(tapped(samples), target, probes=probes)[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    losses = []
    for function in (step, compiled):
        tapped.zero_grad()
        loss = function(images())
        loss.backward()
        losses.append((loss.detach(), tapped.model.patch_embed.proj.weight.grad.clone()))
    torch.testing.assert_close(*losses)
