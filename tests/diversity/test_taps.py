"""TappedViT: what is handed out and hooked, layers, errors and compilation. Values of all families: test_backbones."""

import copy

import pytest
import timm
import torch
from families import CLASSES, build, fused, hooks, images
from golden_inputs import normals
from torch import nn
from unrolled import unrolled

from diversity import REGULARIZERS, TAPS, DiversityObjective, MixedTarget, TapError, TapOutput, TappedViT
from diversity.backbones import parse_layers, parse_weight_groups

PATCHES = 16


def tapped_with(asked, model, **options):
    """A TappedViT for one tap, or "patch_logits", or None for neither."""
    return TappedViT(model, reads=[asked] if asked in TAPS else [], patch_logits=asked == "patch_logits", **options)


def given(output):
    return {name for name, value in output._asdict().items() if value is not None}


# --- values


def test_non_square_images():
    model, samples = build(img_size=(16, 40)), normals(1, 2, 3, 16, 40)
    output = TappedViT(model, reads=TAPS, patch_logits=True)(samples)
    for tap, value in unrolled("deit", model, samples).items():
        torch.testing.assert_close(getattr(output, tap), value, rtol=1e-9, atol=1e-10)
    assert output.first.shape[1] == 10


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
    model = build()
    tapped = tapped_with(asked, model)
    assert given(tapped(images())) == {"logits", asked} - {None}
    of_maps = 2 if asked and "attention" in asked else 1  # maps of eager and of compiled blocks
    assert len(hooks(model)) == (0 if asked in (None, "weights") else of_maps)
    unfused = {"attention": 0, "attention_first": 0, "attention_last": 2}.get(asked)
    assert fused(model) == [i != unfused for i in range(3)]
    assert not tapped._captured


def test_taps_of_one_source_share_its_hook():
    model = build()
    tapped = TappedViT(model, reads=["last", "tokens", "attention", "attention_first"])
    assert len(hooks(model)) == 3
    output = tapped(images())
    assert torch.equal(output.attention, output.attention_first)
    assert torch.equal(output.last, output.tokens[:, 1:])


def test_without_taps_it_is_the_stock_model_bit_for_bit():
    model, samples = build(), images()
    expected = copy.deepcopy(model)(samples)
    output = TappedViT(model)(samples)
    assert isinstance(output, TapOutput)
    assert torch.equal(output.logits, expected)


@pytest.mark.parametrize("by", ["close", "context manager"])
def test_close_removes_hooks_and_restores_fused_attention(by):
    model = build()
    tapped = TappedViT(model, reads=TAPS, patch_logits=True)
    assert len(hooks(model)) == 7 and fused(model) == [False, True, False]
    if by == "close":
        tapped.close()
    else:
        with tapped as entered:
            assert entered is tapped
    assert hooks(model) == [] and fused(model) == [True, True, True]
    assert given(tapped(images())) == {"logits"}


def test_close_leaves_attention_unfused_where_it_was():
    model = build()
    model.blocks[0].attn.fused_attn = False
    TappedViT(model, reads=["attention"]).close()
    assert fused(model) == [False, True, True]


REACHED = {
    "first": {"patch_embed.proj.weight", "pos_embed"},
    "last": {"patch_embed.proj.weight", "pos_embed", "blocks.2.mlp.fc2.weight"},
    "tokens": {"patch_embed.proj.weight", "cls_token", "blocks.2.mlp.fc2.weight"},
    "attention": {"patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"},
    "attention_first": {"patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"},
    "attention_last": {"patch_embed.proj.weight", "blocks.0.mlp.fc2.weight", "blocks.2.attn.qkv.weight"},
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
    (unrolled("deit", stock, samples)[tap] * weights).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    assert REACHED[tap] <= grads.keys()
    torch.testing.assert_close(grads, expected, rtol=1e-8, atol=1e-9)


# --- layers


LAYERS = [
    *(("first", [0]), ("last", [-1]), ("all", None), ("0", [0]), ("1", [1])),
    *(("0,1", [0, 1]), ((1, 0), [0, 1]), ((1, 1, 0, 1), [0, 1]), ("1,1", [1])),
]


@pytest.mark.parametrize("name", ["deit", "swin_windows"])
@pytest.mark.parametrize("layers, indices", LAYERS)
def test_layers_choose_blocks(name, layers, indices):
    indices = indices or range(3 if name == "deit" else 2)
    model, samples = build(name), images()
    taps = unrolled(name, model, samples, emb_layers=indices, attn_layers=indices)
    for argument, tap in (("emb_layers", "last"), ("attn_layers", "attention")):
        output = TappedViT(model, [tap], **{argument: layers})(samples)
        torch.testing.assert_close(getattr(output, tap), taps[tap], rtol=1e-9, atol=1e-10)


def test_a_list_with_a_gap_in_any_order():
    model, samples = build(), images()
    taps = unrolled("deit", model, samples, emb_layers=[0, 2], attn_layers=[0, 2])
    for layers in ("0,2", "2,0", (2, 0), [2, 0, 2]):
        output = TappedViT(model, ["last", "attention"], emb_layers=layers, attn_layers=layers)(samples)
        torch.testing.assert_close((output.last, output.attention), (taps["last"], taps["attention"]))


def test_layers_leave_the_other_taps_alone():
    model, samples = build(), images()
    tapped = TappedViT(model, TAPS, emb_layers="0,1", attn_layers="1")
    taps = unrolled("deit", model, samples, emb_layers=[0, 1], attn_layers=[1])
    output = tapped(samples)
    for tap in TAPS:
        torch.testing.assert_close(getattr(output, tap), taps[tap], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("layers, unfused", [("first", [0]), ("last", [2]), ("0,2", [0, 2]), ("all", [0, 1, 2])])
def test_only_the_chosen_blocks_are_unfused(layers, unfused):
    model = build()
    with TappedViT(model, ["attention", "last"], emb_layers="all", attn_layers=layers):
        assert fused(model) == [i not in unfused for i in range(3)]
    assert fused(model) == [True, True, True]


@pytest.mark.parametrize("layers", ["", "middle", "-1", "0,", "0;1", "0, 1", "1.5", (), (0, "last"), (-1,), (0.5,)])
def test_layers_that_cannot_be_read(layers):
    with pytest.raises(ValueError, match="layers are first, last, all or block indices such as 0,5,11; got"):
        parse_layers(layers)


def test_layers_that_can_be_read():
    assert [parse_layers(word) for word in ("first", "last", "all")] == ["first", "last", "all"]
    assert parse_layers("11,0,5,0") == parse_layers((11, 5, 0)) == (0, 5, 11)
    assert parse_layers(7) == (7,)


@pytest.mark.parametrize("groups, word", [("", ""), ("q", "q"), ("qkv,,proj", ""), ((), ""), (["qkv", "fc3"], "fc3")])
def test_weight_groups_that_cannot_be_read(groups, word):
    with pytest.raises(ValueError, match=f"unknown weight group '{word}'; there are qkv, proj, fc1, fc2"):
        parse_weight_groups(groups)


def test_weight_groups_that_can_be_read():
    assert parse_weight_groups("fc1,qkv,fc1") == parse_weight_groups(("qkv", "fc1")) == ("qkv", "fc1")


def test_table_names_what_every_tap_holds():
    tapped = TappedViT(build("swin"), TAPS, True, emb_layers="all", attn_layers="last", weight_groups="qkv,fc1")
    assert [line.split(maxsplit=1) for line in tapped.table().splitlines()[:-1]] == [
        ["tap", "from the 2 blocks in its last stage"],
        ["first", "input of block 0"],
        ["last", "output of blocks 0, 1"],
        ["tokens", "output of block 1"],
        ["attention", "maps of block 1"],
        ["attention_first", "maps of block 0"],
        ["attention_last", "maps of block 1"],
        ["weights", "qkv, fc1 of all blocks: 6 of [12, 12], 2 of [48, 12], 6 of [24, 24], 2 of [96, 24]"],
    ]
    assert tapped.table().splitlines()[-1].split() == ["patch", "logits", "4", "x", "4", "patches"]
    assert TappedViT(build(), ["last"]).table().splitlines()[0].endswith("from the 3 blocks")
    assert TappedViT(build()).table() == ""


# --- errors


def test_unknown_tap_is_an_error():
    with pytest.raises(ValueError, match=f"unknown tap 'middle'; there are {', '.join(TAPS)}"):
        TappedViT(build(), reads=["first", "middle"])


@pytest.fixture(scope="module")
def convnet():
    return timm.create_model("resnet10t", num_classes=CLASSES).train()


@pytest.fixture(scope="module")
def cait():
    return timm.create_model(
        "cait_xxs24_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=3, num_classes=CLASSES
    )


@pytest.mark.parametrize("tap", [*TAPS, "patch_logits"])
@pytest.mark.parametrize("family", ["convnet", "cait"])
def test_another_family_cannot_give_taps(family, tap, request):
    model = request.getfixturevalue(family)
    missing = f"{type(model).__name__} cannot give {tap}: it is not one of timm's ViT, DeiT, BEiT, EVA and Swin models"
    with pytest.raises(TapError, match=missing) as raised:
        tapped_with(tap, model)
    assert (raised.value.tap, raised.value.argument) == (tap, "model")
    assert hooks(model) == []


def test_convnet_without_taps_is_a_plain_model(convnet):
    samples = images().float()
    tapped = TappedViT(convnet)
    assert tapped.train()(samples).logits.shape == (2, CLASSES)
    assert torch.equal(tapped.eval()(samples), convnet(samples))


LACKING = [  # tap, family, arguments of the model and of TappedViT, the message, the argument at fault
    ("last", "deit", {}, {"emb_layers": "0,3"}, "there is no block 3; it has 3 blocks, 0 to 2", "emb_layers"),
    ("attention", "deit", {}, {"attn_layers": (7,)}, "there is no block 7; it has 3 blocks, 0 to 2", "attn_layers"),
    ("last", "swin", {}, {"emb_layers": "2"}, "it has 2 blocks in its last stage, 0 to 1", "emb_layers"),
    ("attention", "swinv2", {}, {"attn_layers": "2"}, "it has 2 blocks in its last stage, 0 to 1", "attn_layers"),
    ("first", "deit", {"patch_size": 32}, {}, "it has a single patch", None),
    ("last", "swin", {"patch_size": 16}, {}, "it has a single patch", None),
    ("attention", "deit", {"num_heads": 1}, {}, "it has a single head", None),
    ("attention_last", "swin", {"num_heads": (2, 1)}, {}, "it has a single head", None),
    ("attention_first", "deit", {"depth": 1}, {}, "it has a single block", None),
    ("attention_last", "swin", {"depths": (2, 1)}, {}, "it has a single block", None),
    ("attention_first", "swin_windows", {}, {}, "the windows of its first and last block hold different patches", None),
    ("attention_last", "swinv2", {}, {}, "the windows of its first and last block hold different patches", None),
    ("attention", "swin", {"img_size": 40}, {}, "padding would count as patches", None),
    ("weights", "eva02_clip", {}, {"weight_groups": "qkv,fc1"}, "no linear layer 'fc1'", "weight_groups"),
    ("patch_logits", "deit", {"patch_drop_rate": 0.5}, {}, "patches are dropped", None),
    ("patch_logits", "eva", {"patch_drop_rate": 0.5}, {}, "patches are dropped", None),
    ("attention", "vit", {"attn_layer": "diff", "num_heads": 3}, {}, "two maps for each head", None),
    ("tokens", "vit", {"global_pool": "map"}, {}, "its head reads an attention pool", None),
    ("patch_logits", "vit", {"global_pool": "map"}, {}, "its head reads an attention pool", None),
    ("patch_logits", "deit", {"num_classes": 0}, {}, "it has no linear `head`", None),
    ("patch_logits", "swin", {"num_classes": 0}, {}, "it has no linear `head`", None),
]


@pytest.mark.parametrize("tap, family, model_options, options, message, argument", LACKING)
def test_what_a_model_lacks_is_named(tap, family, model_options, options, message, argument):
    model = build(family, **model_options)
    before = fused(model)
    with pytest.raises(TapError, match=f"{type(model).__name__} cannot give {tap}: .*{message}") as raised:
        tapped_with(tap, model, **options)
    assert (raised.value.tap, raised.value.argument) == (tap, argument)
    assert hooks(model) == [] and fused(model) == before


@pytest.mark.parametrize("group, part", [("fc2", "mlp"), ("qkv", "attn"), ("proj", "attn")])
def test_a_block_without_the_layers_of_a_weight_group_is_an_error(group, part):
    model = build()
    setattr(model.blocks[1], part, nn.Identity())
    with pytest.raises(TapError, match=f"its blocks have no linear layer '{group}'") as raised:
        TappedViT(model, ["weights"], weight_groups=group)
    assert (raised.value.tap, raised.value.argument) == ("weights", "weight_groups")


def test_attention_without_maps_to_hook_is_an_error():
    model = build()
    model.blocks[2].attn = nn.Identity()
    TappedViT(model, ["attention"])
    with pytest.raises(TapError, match="cannot give attention_last: block 2 has no attention with an `attn_drop`"):
        TappedViT(model, ["attention_last"])


def test_a_head_of_several_layers_cannot_classify_patches():
    model = build()
    model.head = nn.Sequential(nn.Linear(24, 8), nn.Linear(8, CLASSES))
    with pytest.raises(TapError, match="cannot give patch_logits: it has no linear `head`"):
        TappedViT(model, patch_logits=True)


def test_what_is_not_asked_for_may_be_lacking():
    model = build("eva", patch_drop_rate=0.5, depth=1)
    TappedViT(model, ["first", "last", "tokens", "attention", "weights"])(images())
    TappedViT(build("swin_windows"), ["attention"])(images())
    TappedViT(build(patch_size=32, num_heads=1), ["tokens", "weights"], patch_logits=True)(images())


@pytest.mark.parametrize("tap", [*sorted({*TAPS} - {"weights"}), "patch_logits"])
def test_bypassed_hook_is_an_error(tap):
    model = build()
    tapped = tapped_with(tap, model)
    model.forward_features = lambda samples, **kwargs: samples.new_zeros(len(samples), 1 + PATCHES, 24)
    with pytest.raises(RuntimeError, match="did not fire: VisionTransformer bypassed"):
        tapped(images())


@pytest.mark.parametrize("tap, block", [("attention", 0), ("attention_first", 0), ("attention_last", 2)])
def test_fused_attention_is_not_passed_over_in_silence(tap, block):
    tapped = TappedViT(build(), reads=[tap])
    tapped(images())
    tapped.model.blocks[block].attn.fused_attn = True
    with pytest.raises(RuntimeError, match=f"the hook for the maps of block {block} did not fire"):
        tapped(images())


def test_a_forward_that_fails_keeps_nothing():
    tapped = TappedViT(build(), reads=TAPS, patch_logits=True)
    tapped.model.norm.register_forward_pre_hook(lambda module, inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tapped(images())
    assert tapped._captured is None


# --- torch.compile

RELEASED = ["emb_cos_within", "emb_contrast_cross", "attn_cos_within", "weight_mha_cond_orth"]
OTHERS = [name for name in REGULARIZERS if name not in (*RELEASED, "emb_grad_diversity")]  # which differentiates itself


@pytest.mark.parametrize("terms", [RELEASED, OTHERS], ids=["released", "others"])
def test_compiles_as_one_graph_with_the_same_loss(terms):
    objective = DiversityObjective({"mixing": 1.0} | dict.fromkeys(terms, 0.1))
    tapped = TappedViT(build(depth=2), objective.reads, objective.patch_logits)
    labels, lam = torch.tensor([0, 3]), torch.tensor([0.3, 0.3], dtype=torch.float64)
    target = MixedTarget(labels, labels.flip(0), lam, lam[:, None].expand(-1, PATCHES))
    weights, features = normals(3, 2, 6, 24, 1), normals(4, 2, 2, PATCHES, 1)
    probes = {name: weights for name in terms if name.startswith("weight_mha_cond_orth")}
    probes |= {"emb_cond_orth": features, "attn_cond_orth": features[:, :, :3]}

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
