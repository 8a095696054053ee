"""TappedViT: what it returns and hooks, which layers, and compilation. All families are in test_backbones."""

import copy

import pytest
import torch
from families import PATCHES, build, fused, hooks, images, tapped_with
from golden_inputs import normals
from unrolled import unrolled

from diversity import REGULARIZERS, TAPS, DiversityObjective, MixedTarget, TapOutput, TappedViT
from diversity.backbones import parse_layers, parse_weight_groups


def returned(output):
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


# --- what is returned, and what is hooked for it


@pytest.mark.parametrize("asked", [*TAPS, "patch_logits", None])
def test_only_what_is_asked_for_is_returned_and_hooked(asked):
    model = build()
    tapped = tapped_with(asked, model)
    assert returned(tapped(images())) == {"logits", asked} - {None}
    of_maps = 2 if asked and "attention" in asked else 1  # maps of eager and of compiled blocks
    assert len(hooks(model)) == (0 if asked in (None, "weights", "circuits") else of_maps)
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
    assert returned(tapped(images())) == {"logits"}


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
    "circuits": {f"blocks.{i}.attn.{layer}.weight" for i in range(3) for layer in ("qkv", "proj")},
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
        ["circuits", "QK and OV circuits of all blocks: 4 of [2, 2, 6, 12], 4 of [4, 2, 6, 24]"],
    ]
    assert tapped.table().splitlines()[-1].split() == ["patch", "logits", "4", "x", "4", "patches"]
    assert TappedViT(build(), ["last"]).table().splitlines()[0].endswith("from the 3 blocks")
    assert TappedViT(build()).table() == ""


# --- torch.compile

COMPILED = [name for name in REGULARIZERS if name != "emb_grad_diversity"]  # which differentiates itself


def test_all_terms_compile_as_one_graph_with_the_same_loss():
    objective = DiversityObjective({"mixing": 1.0} | dict.fromkeys(COMPILED, 0.1))
    tapped = TappedViT(build(depth=2), objective.reads, objective.patch_logits)
    labels, lam = torch.tensor([0, 3]), torch.tensor([0.3, 0.3], dtype=torch.float64)
    target = MixedTarget(labels, labels.flip(0), lam, lam[:, None].expand(-1, PATCHES))
    weights, features = normals(3, 2, 6, 24, 1), normals(4, 2, 2, PATCHES, 1)
    probes = {name: weights for name in COMPILED if name.startswith("weight_mha_cond_orth")}
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
