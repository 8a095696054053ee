"""Redundancy as measured: against a textbook on every family of backbones, and without a trace in the model."""

import copy
import json
import math

import pytest
import timm
import torch
from golden_inputs import normals
from test_backbones import (
    FAMILIES,
    build,
    embedded,
    fused,
    hooks,
    images,
    patches,
    qkv_weights,
    swin_block,
    vit_block,
)
from textbook import cosines, flat, mean, mean_of

from diversity import MEASURES, TAPS, TapError, TappedViT, measurable, measure_redundancy, redundancy
from diversity.measures import measures_of, summary_measures


def textbook(name, model, samples):
    """What `measure_redundancy` must return, from a forward pass written out and all images at once."""
    blocks, tokens, firsts, maps = unrolled_layers(name, model.eval(), samples)
    shares = [variance_shares(x.flatten(0, 1)) for x in tokens]
    embedding = {
        "token_cosine": [mean_of(lambda x: different(cosines(x, x)).mean(), x) for x in tokens],
        "token_abscosine": [mean_of(lambda x: different(cosines(x, x)).abs().mean(), x) for x in tokens],
        "first_cosine": [
            mean_of(lambda a, b: cosines(a, b).diagonal().mean(), *pair) for pair in zip(firsts, tokens, strict=True)
        ],
        "effective_rank": [mean_of(lambda x: textbook_rank(torch.linalg.svdvals(x)), x) for x in tokens],
        "components_90": [next(k for k in range(1, len(s) + 1) if s[:k].sum() >= 0.9) for s in shares],
    }
    attention = {
        "head_cosine": [mean(different(cosines(a, a)).mean() for a in flat(m)) for m in maps],
        "row_std": [((m - 1 / m.shape[-1]) ** 2).mean(dim=-1).sqrt().mean() for m in maps],
        "row_entropy": [-torch.xlogy(m, m).sum(dim=-1).mean() for m in maps],
        "previous_cosine": [None, *(previous_cosine(blocks, maps, i) for i in range(1, len(maps)))],
    }
    weight, spectra = {}, {}
    for block in blocks:
        for matrix_name, matrix in matrices(block).items():
            singular = torch.linalg.svdvals(matrix)
            similarity = different(cosines(matrix, matrix)).abs()
            measures = {
                "effective_rank": textbook_rank(singular),
                "condition_number": torch.linalg.cond(matrix),
                "row_abscosine": similarity.mean(),
                "smallest_angle": torch.rad2deg(torch.arccos(similarity.max())),
            }
            for measure, value in measures.items():
                weight.setdefault(matrix_name, {}).setdefault(measure, []).append(value)
            spectra.setdefault(matrix_name, []).append(singular)
    stages = [0, 2] if "swin" in name else [0]
    report = {
        "images": len(samples),
        "stages": stages,
        "embedding": embedding,
        "attention": attention,
        "weight": weight,
    }
    return report | {"variance": shares, "spectra": spectra, "summary": textbook_summary(report)}


def unrolled_layers(name, model, samples):
    """The blocks; tokens of every layer; for each layer what it is compared with; the maps of every block."""
    if "swin" in name:
        x, blocks, tokens, firsts, maps = model.patch_embed(samples), [], [], [], []
        tokens, firsts = [patches(name, x)], [patches(name, x)]
        for stage in model.layers:
            x = stage.downsample(x)
            first = patches(name, x)
            for block in stage.blocks:
                x, block_maps = swin_block(block, x)
                blocks, maps = [*blocks, block], [*maps, block_maps]
                tokens, firsts = [*tokens, patches(name, x)], [*firsts, first]
        return blocks, tokens, firsts, maps
    x, context = embedded(name, model, samples)
    tokens, maps = [patches(name, x)], []
    for block in model.blocks:
        x, block_maps = vit_block(block, x, **context)
        tokens, maps = [*tokens, patches(name, x)], [*maps, block_maps]
    return list(model.blocks), tokens, tokens[:1] * len(tokens), maps


def different(matrix):
    """Entries (i, j) with i != j."""
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


def textbook_rank(singular):
    shares = singular / singular.sum()
    return torch.exp(-sum(share * torch.log(share) for share in shares if share > 0))


def variance_shares(rows):
    variances = torch.linalg.svdvals(rows - rows.mean(dim=0)) ** 2
    shares = torch.zeros(rows.shape[1], dtype=rows.dtype)
    shares[: len(variances)] = variances / variances.sum()
    return shares


def previous_cosine(blocks, maps, i):
    """None where the windows of two blocks hold different patches."""
    same = maps[i].shape == maps[i - 1].shape
    same = same and getattr(blocks[i], "shift_size", 0) == getattr(blocks[i - 1], "shift_size", 0)
    return mean_of(lambda a, b: cosines(a, b).mean(), flat(maps[i - 1]), flat(maps[i])) if same else None


def matrices(block):
    further = {"proj": block.attn.proj, "fc1": getattr(block.mlp, "fc1", None), "fc2": block.mlp.fc2}
    further = {name: layer.weight for name, layer in further.items() if layer is not None}
    return dict(zip("qkv", qkv_weights(block.attn), strict=True)) | further


def textbook_summary(report):
    every = [value for values in report["weight"].values() for value in zip(*values.values(), strict=True)]
    qkv = [value for name in "qkv" for value in zip(*report["weight"][name].values(), strict=True)]
    values = {f"embedding_{measure}": layers[1:] for measure, layers in report["embedding"].items()}
    values |= {f"embedding_{measure}_last": [layers[-1]] for measure, layers in report["embedding"].items()}
    values |= {f"attention_{measure}": blocks for measure, blocks in report["attention"].items()}
    values |= {f"attention_{measure}_first": [blocks[0]] for measure, blocks in report["attention"].items()}
    values |= dict(zip((f"weight_{m}" for m in measures_of("weight")), zip(*every, strict=True), strict=True))
    values |= dict(zip((f"weight_{m}_qkv" for m in measures_of("weight")), zip(*qkv, strict=True), strict=True))
    values = {key: torch.tensor([v for v in layers if v is not None]).double() for key, layers in values.items()}
    return {
        key: layers.log().mean().exp() if "condition" in key else layers.mean()
        for key, layers in values.items()
        if len(layers)
    }


def flattened(report, path=""):
    """{path: number} of a nested report, tensors included; what is None is left out."""
    if isinstance(report, dict):
        return {key: v for name, value in report.items() for key, v in flattened(value, f"{path}/{name}").items()}
    if isinstance(report, list) or (torch.is_tensor(report) and report.dim()):
        return flattened(dict(enumerate(report)), path)
    return {} if report is None else {path: float(report)}


def assert_close(report, expected, rel=1e-9, abs=1e-9):
    assert flattened(report) == pytest.approx(flattened(expected), rel=rel, abs=abs)


def identity_blocks(name, **options):
    """A model whose blocks hand on their input."""
    model = build(name, **options)
    stages = model.layers if "swin" in name else [model]
    with torch.no_grad():
        for block in (block for stage in stages for block in stage.blocks):
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
    return model


# --- against the textbook


@pytest.mark.parametrize("name", FAMILIES)
def test_every_measure_equals_the_textbook(name):
    model, samples = build(name), images(3)
    with torch.no_grad():
        expected = textbook(name, copy.deepcopy(model), samples)
    report = measure_redundancy(model, [samples])
    assert_close(report, expected, rel=1e-6, abs=1e-7)  # singular values come from a Gram matrix
    for level in ("embedding", "attention"):
        assert list(report[level]) == list(measures_of(level))
    assert all(list(measures) == list(measures_of("weight")) for measures in report["weight"].values())


@pytest.mark.parametrize("name", ["registers", "swin_windows"])
def test_batches_of_any_size_give_what_one_batch_gives(name, monkeypatch):
    model, samples = build(name), images(6)
    at_once = measure_redundancy(model, [samples])
    monkeypatch.setattr(redundancy, "CHUNK", 4)
    assert_close(measure_redundancy(model, [samples]), at_once)
    assert_close(measure_redundancy(model, samples.split([1, 3, 2])), at_once)
    assert_close(measure_redundancy(model, (image[None] for image in samples)), at_once)
    assert at_once["images"] == 6


def test_a_half_precision_model_is_measured_in_double_precision():
    model, samples = build("deit").eval(), images()
    exact = measure_redundancy(model, [samples])
    half = measure_redundancy(copy.deepcopy(model).bfloat16(), [samples.bfloat16()])
    assert_close(half["embedding"], exact["embedding"], rel=0.05, abs=0.05)
    rounded = copy.deepcopy(model).bfloat16().double()
    assert_close(half["weight"], measure_redundancy(rounded, [samples])["weight"])


def test_gradient_checkpointing_changes_nothing():
    model = build("deit")
    plain = measure_redundancy(model, [images()])
    model.set_grad_checkpointing(True)
    assert measure_redundancy(model, [images()]) == plain


def test_dropout_and_stochastic_depth_are_off():
    rates = {f"{part}_rate": 0.5 for part in ("pos_drop", "proj_drop", "attn_drop", "drop_path")}
    assert measure_redundancy(build("deit", **rates), [images()]) == measure_redundancy(build("deit"), [images()])


# --- the model is left as it was


def trace(model):
    """All that a measurement could leave behind."""
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": list(map(id, hooks(model))),
        "fused": fused(model),
        "keys": list(model.state_dict()),
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
        "random": torch.get_rng_state().tolist(),
    }


def broken_batches():
    yield images()
    raise OSError("the disk is gone")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["deit", "eva02", "swin"])
def test_the_model_is_left_as_it_was(name, training, monkeypatch):
    model = build(name).train(training)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    before, weights = trace(model), copy.deepcopy(model.state_dict())
    report = measure_redundancy(model, [images()])
    assert trace(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    with pytest.raises(OSError, match="the disk is gone"):
        measure_redundancy(model, broken_batches())
    with pytest.raises(RuntimeError, match="shape"), monkeypatch.context() as patch:
        last = (model.layers[-1] if name == "swin" else model).blocks[-1]
        patch.setattr(last.mlp.fc2, "forward", lambda x: x @ torch.ones(1, 1).double())  # in the middle of a batch
        measure_redundancy(model, [images()])
    assert trace(model) == before
    assert measure_redundancy(model, [images()]) == report


def test_a_part_in_eval_mode_stays_there():
    model = build("deit")
    model.blocks[0].eval()
    before = trace(model)
    measure_redundancy(model, [images()])
    assert trace(model) == before


@pytest.mark.parametrize("name", ["deit", "swin"])
def test_taps_on_the_model_neither_change_nor_disturb(name):
    model = build(name)
    expected = measure_redundancy(model, [images()])
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    tapped = TappedViT(model, TAPS, patch_logits=True)
    before, output = trace(model), tapped(images())
    assert True in before["fused"] and False in before["fused"]
    assert measure_redundancy(model, [images()]) == expected
    assert trace(model) == before and tapped._captured is None
    torch.testing.assert_close(tapped(images()), output, rtol=0, atol=0)
    tapped.close()
    assert all(fused(model)) and not hooks(model)


# --- errors


@pytest.mark.parametrize("name", ["resnet10t", "cait_xxs24_224"])
def test_another_family_is_refused(name):
    options = {"depth": 1, "embed_dim": 16, "num_heads": 2} if name.startswith("cait") else {"channels": [8, 8, 8, 8]}
    model = timm.create_model(name, **options)
    for call in (measurable, lambda model: measure_redundancy(model, [images()])):
        with pytest.raises(TapError, match=f"{type(model).__name__} cannot give tokens: it is not one of timm's"):
            call(model)


def test_attention_without_maps_is_refused():
    model = build("deit")
    model.blocks[1].attn = torch.nn.Identity()
    with pytest.raises(TapError, match="block 1 has no attention with an `attn_drop`"):
        measure_redundancy(model, [images()])
    assert not hooks(model) and model.training


@pytest.mark.parametrize("batches", [[], iter(())])
def test_no_images_are_refused(batches):
    model = build("deit")
    with pytest.raises(ValueError, match="no images"):
        measure_redundancy(model, batches)
    assert not hooks(model) and model.training


# --- the report


def test_the_summary_is_the_mean_over_layers_and_matrices():
    report = measure_redundancy(build("vit"), [images()])
    summary, weight = report["summary"], report["weight"]
    where = {"embedding": "last", "attention": "first", "weight": "qkv"}
    names = {f"{measure.level}_{measure.key}" for measure in MEASURES.values()}
    names |= {f"{measure.level}_{measure.key}_{where[measure.level]}" for measure in MEASURES.values()}
    assert names == set(summary_measures())
    assert set(summary) == names - {"attention_previous_cosine_first"}  # there is no block before
    cosine, heads = report["embedding"]["token_cosine"], report["attention"]["head_cosine"]
    assert len(cosine) == 4 and summary["embedding_token_cosine"] == pytest.approx(sum(cosine[1:]) / 3)
    assert (summary["embedding_token_cosine_last"], summary["attention_head_cosine_first"]) == (cosine[-1], heads[0])
    assert summary["attention_previous_cosine"] == pytest.approx(sum(report["attention"]["previous_cosine"][1:]) / 2)
    angles = {name: matrix["smallest_angle"] for name, matrix in weight.items()}
    assert summary["weight_smallest_angle"] == pytest.approx(sum(map(sum, angles.values())) / 18)
    assert summary["weight_smallest_angle_qkv"] == pytest.approx(sum(sum(angles[name]) for name in "qkv") / 9)
    conditions = [value for matrix in weight.values() for value in matrix["condition_number"]]
    assert summary["weight_condition_number"] == pytest.approx(math.prod(conditions) ** (1 / 18))
    conditions = [value for name in "qkv" for value in weight[name]["condition_number"]]
    assert summary["weight_condition_number_qkv"] == pytest.approx(math.prod(conditions) ** (1 / 9))


@pytest.mark.parametrize(
    ("name", "comparable"), [("swin", [0, 0, 0, 1]), ("swin_windows", [0] * 4), ("swinv2", [0] * 4), ("vit", [0, 1, 1])]
)
def test_maps_are_compared_with_those_of_the_same_windows(name, comparable):
    report = measure_redundancy(build(name), [images()])
    assert [value is not None for value in report["attention"]["previous_cosine"]] == comparable
    assert ("attention_previous_cosine" in report["summary"]) == any(comparable)


def test_a_swin_stage_is_compared_with_its_own_first_embedding():
    report = measure_redundancy(identity_blocks("swin_windows"), [images()])
    assert report["embedding"]["first_cosine"] == pytest.approx([1] * 5)
    assert [len(shares) for shares in report["variance"]] == [12, 12, 12, 24, 24]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_report_is_plain_json(name):
    report = measure_redundancy(build(name), [images()])
    text = json.dumps(report, allow_nan=False)
    assert json.loads(text) == report


def test_what_is_not_finite_is_refused():
    broken = images().clone()
    broken[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="the tokens of layer 0 are not finite"):
        measure_redundancy(build("deit"), [broken])
    model = build("deit")
    model.blocks[1].mlp.fc2.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        measure_redundancy(model, [images()])
    assert hooks(model) == []


def test_an_empty_batch_counts_nothing():
    assert measure_redundancy(build("deit"), [images(), images()[:0]]) == measure_redundancy(build("deit"), [images()])


def test_maps_that_hold_padding_are_left_out():
    report = measure_redundancy(build("swin", img_size=40), [normals(1, 2, 3, 40, 40)])
    assert report["attention"]["head_cosine"] == [None] * 4
    assert None not in report["embedding"]["token_cosine"]
