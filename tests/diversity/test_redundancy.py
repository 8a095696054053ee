"""Redundancy as measured: against a textbook on every family of backbones, in closed form, and without a trace."""

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
from diversity import measures as registry
from diversity.measures import effective_rank_of, measures_of, measures_table, summary_measures
from diversity.redundancy import _Covariance, _Meter, _weights

PATCHES, WIDTH, HEADS = 16, 24, 3  # of the models of test_backbones that are no Swin


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


# --- closed forms: tokens


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


def embedding_of(tokens):
    """The report on a model whose tokens are `tokens` [16, 24] in every layer, whatever the images."""
    model = identity_blocks("average")
    with torch.no_grad():
        for parameter in model.patch_embed.parameters():
            parameter.zero_()
        model.pos_embed.copy_(tokens)
    report = measure_redundancy(model, images(2).split(1))
    for values in report["embedding"].values():
        assert values == pytest.approx(values[:1] * 4)
    return {name: values[0] for name, values in report["embedding"].items()} | {"variance": report["variance"][0]}


def orthogonal(size, seed=3):
    return torch.linalg.qr(normals(seed, size, size))[0]


def test_parallel_tokens():
    lengths = torch.arange(1, PATCHES + 1)[:, None]
    assert_close(
        embedding_of(lengths * normals(3, 1, WIDTH)),
        {
            **{"token_cosine": 1, "token_abscosine": 1, "first_cosine": 1, "effective_rank": 1, "components_90": 1},
            "variance": [1] + [0] * (WIDTH - 1),
        },
        abs=2e-6,
    )


def test_opposite_tokens():
    signs = torch.tensor([1.0, -1.0]).repeat(PATCHES // 2)[:, None]
    report = embedding_of(signs * normals(3, 1, WIDTH))
    assert report["token_cosine"] == pytest.approx(-1 / (PATCHES - 1))
    assert report["token_abscosine"] == pytest.approx(1)
    assert report["components_90"] == 1


def test_orthonormal_tokens():
    report = embedding_of(orthogonal(WIDTH)[:PATCHES])
    assert (report["token_cosine"], report["token_abscosine"]) == pytest.approx((0, 0), abs=1e-12)
    assert report["effective_rank"] == pytest.approx(PATCHES)
    assert report["variance"] == pytest.approx([1 / 15] * 15 + [0] * 9, abs=1e-12)  # the mean takes one dimension
    assert report["components_90"] == 14


def test_images_of_one_colour_hold_identical_tokens():
    model = identity_blocks("average")
    with torch.no_grad():
        model.pos_embed.zero_()
    report = measure_redundancy(model, [torch.ones(1, 3, 32, 32).double() * shade for shade in (0.5, 1, 3)])
    assert_close(report["embedding"], {
        **{"token_cosine": [1] * 4, "token_abscosine": [1] * 4, "first_cosine": [1] * 4},
        **{"effective_rank": [1] * 4, "components_90": [1] * 4},
    }, abs=1e-6)  # fmt: skip


def test_a_known_spectrum_of_tokens():
    shares = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.0078125]).double()
    axes = shares.sqrt()[:, None] * orthogonal(WIDTH)[:8]
    report = embedding_of(torch.cat((axes, -axes)))
    assert report["variance"] == pytest.approx([*shares.tolist(), *[0] * 16], abs=1e-12)
    assert report["components_90"] == 4
    assert report["effective_rank"] == pytest.approx(textbook_rank(shares.sqrt()).item(), rel=1e-6)


def test_the_covariance_of_rows_in_pieces():
    rows = 100 + normals(5, 50, 6) @ torch.diag(torch.tensor([3.0, 1, 1, 0.5, 0, 0]).double())
    covariance = _Covariance()
    for piece in rows.split(7):
        covariance.add(piece)
    assert covariance.fractions().tolist() == pytest.approx(variance_shares(rows).tolist(), abs=1e-9)


def test_rows_without_variance_have_one_component():
    covariance = _Covariance()
    covariance.add(torch.ones(8, 4, dtype=torch.float64))
    assert covariance.fractions().tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("singular_values", "rank"),
    [
        ([2.0, 2, 2, 2], 4),
        ([7.0, 0, 0], 1),
        ([0.0, 0, 0], 1),
        ([1e-9, 1e-9], 2),
        ([3.0, 3, 0, 0], 2),
        ([2.0, 1, 1], math.exp(1.5 * math.log(2))),
    ],
)
def test_effective_rank_of_known_singular_values(singular_values, rank):
    values = torch.tensor(singular_values, dtype=torch.float64)
    assert effective_rank_of(values).item() == pytest.approx(rank)
    assert effective_rank_of(torch.stack((values, values))).tolist() == pytest.approx([rank, rank])


# --- closed forms: attention


@pytest.mark.parametrize("name", ["average", "registers", "swin"])
def test_uniform_attention(name):
    model = build(name)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "qkv"):
                rows = len(module.qkv.weight) * 2 // 3
                module.qkv.weight[:rows] = 0
                module.qkv.bias[:rows] = 0
            if hasattr(module, "relative_position_bias_table"):
                module.relative_position_bias_table.zero_()
    attention = measure_redundancy(model, [images()])["attention"]
    if name == "swin":  # in shifted windows a patch attends to its neighbours alone
        assert [entropy == pytest.approx(math.log(16)) for entropy in attention["row_entropy"]] == [1, 0, 1, 1]
        attention = {measure: values[2:] for measure, values in attention.items()}
    tokens = 16 if name == "swin" else PATCHES + FAMILIES[name].num_prefix_tokens
    depth = len(attention["row_std"])
    assert attention["row_entropy"] == pytest.approx([math.log(tokens)] * depth)
    assert attention["row_std"] == pytest.approx([0] * depth, abs=1e-12)
    assert attention["head_cosine"] == pytest.approx([1] * depth)
    assert attention["previous_cosine"][0] is None
    assert attention["previous_cosine"][1:] == pytest.approx([1] * (depth - 1))


def attention_of(*maps):
    """What is measured on maps [B, H, N, N] of successive blocks."""
    meter = _Meter(measurable(build("average")))
    meter.begin(len(maps[0]))
    for i, block_maps in enumerate(maps):
        meter.add_maps(i, block_maps)
    return [{name: value / meter.images for name, value in layer.items()} for layer in meter.sums["attention"]]


def test_one_hot_attention():
    itself = torch.eye(5).double()
    neighbour = itself.roll(1, dims=1)
    agreeing, differing = (torch.stack(heads)[None] for heads in ((itself, itself), (itself, neighbour)))
    first, second, third = attention_of(agreeing, differing, neighbour[None, None].expand(1, 2, 5, 5))
    spread = math.sqrt(1 / 5 - 1 / 25)
    assert first == pytest.approx({"row_std": spread, "row_entropy": 0, "head_cosine": 1}, abs=1e-12)
    expected = {"row_std": spread, "row_entropy": 0, "head_cosine": 0, "previous_cosine": 0.5}
    assert second == pytest.approx(expected, abs=1e-12)
    assert third == pytest.approx(expected | {"head_cosine": 1}, abs=1e-12)


def test_one_head_and_one_patch_leave_nothing_to_compare():
    report = measure_redundancy(build("average", num_heads=1, patch_size=32), [images(3)])
    assert report["embedding"]["token_cosine"] == report["embedding"]["token_abscosine"] == [None] * 4
    assert report["attention"]["head_cosine"] == [None] * 3
    assert not {"embedding_token_cosine", "embedding_token_abscosine", "attention_head_cosine"} & set(report["summary"])
    assert report["attention"]["row_entropy"] == pytest.approx([0] * 3)
    json.dumps(report, allow_nan=False)


# --- closed forms: weights


def weight_of(matrix, where="proj"):
    """The measures and the spectrum of a matrix in the first of three blocks."""
    model = build("deit")
    attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
    rows = {name: attn.qkv.weight[k * WIDTH : (k + 1) * WIDTH] for k, name in enumerate("qkv")}
    rows |= {"proj": attn.proj.weight, "fc1": mlp.fc1.weight, "fc2": mlp.fc2.weight}
    with torch.no_grad():
        rows[where].copy_(matrix)
    report = _weights(measurable(model))
    assert all(len(values) == 3 for measures in report["weight"].values() for values in measures.values())
    return {name: values[0] for name, values in report["weight"][where].items()}, report["spectra"][where][0]


@pytest.mark.parametrize("where", ["q", "k", "v", "proj"])
def test_an_orthogonal_matrix(where):
    measures, spectrum = weight_of(3 * orthogonal(WIDTH), where)
    expected = {"effective_rank": WIDTH, "condition_number": 1, "row_abscosine": 0, "smallest_angle": 90}
    assert measures == pytest.approx(expected, abs=1e-9)
    assert spectrum == pytest.approx([3] * WIDTH)


def test_rectangular_matrices():
    wide, tall = torch.zeros(WIDTH, 4 * WIDTH).double(), orthogonal(4 * WIDTH)[:, :WIDTH]
    wide[:, :WIDTH] = torch.diag(torch.arange(1.0, WIDTH + 1))
    measures, spectrum = weight_of(wide, "fc2")
    assert spectrum == pytest.approx(range(WIDTH, 0, -1))
    assert (measures["condition_number"], measures["smallest_angle"]) == pytest.approx((WIDTH, 90))
    measures, spectrum = weight_of(tall, "fc1")
    assert (len(spectrum), measures["condition_number"]) == (WIDTH, pytest.approx(1))
    assert measures["effective_rank"] == pytest.approx(WIDTH)
    assert 0 < measures["smallest_angle"] < 90 and 0 < measures["row_abscosine"] < 1  # 96 rows in 24 dimensions


def test_a_matrix_that_lacks_a_direction():
    diagonal = torch.ones(WIDTH).double()
    diagonal[5] = 0
    measures, spectrum = weight_of(torch.diag(diagonal))
    assert measures["condition_number"] == 2**52 and spectrum[-1] == 0
    assert measures["effective_rank"] == pytest.approx(WIDTH - 1)
    assert weight_of(torch.zeros(WIDTH, WIDTH).double())[0] == pytest.approx(
        {"effective_rank": 1, "condition_number": 2**52, "row_abscosine": 0, "smallest_angle": 90}
    )


@pytest.mark.parametrize("factor", [1, -1, 0.5])
def test_two_rows_along_one_line(factor):
    matrix = orthogonal(WIDTH)
    matrix[7] = factor * matrix[2]
    measures, _ = weight_of(matrix)
    assert measures["smallest_angle"] == pytest.approx(0, abs=1e-5)
    assert measures["row_abscosine"] == pytest.approx(2 / (WIDTH * (WIDTH - 1)))
    assert measures["condition_number"] > 1e12


def test_rows_at_a_known_angle():
    matrix = orthogonal(WIDTH)
    matrix[7] = -math.cos(math.radians(40)) * matrix[2] + math.sin(math.radians(40)) * matrix[7]
    assert weight_of(matrix)[0]["smallest_angle"] == pytest.approx(40)


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


# --- the registry


def test_a_new_measure_is_one_decorated_function(monkeypatch):
    monkeypatch.setattr(registry, "MEASURES", dict(MEASURES))

    @registry.measure("embedding", "longest token", unit="length", better="higher", geometric=True)
    def embedding_longest(tokens):
        """Length of the longest token.

        Positive.
        """
        return tokens.norm(dim=-1).amax(dim=-1)

    report = measure_redundancy(build("deit"), [images()])
    longest = report["embedding"]["longest"]
    assert len(longest) == 4 and min(longest) > 0
    assert report["summary"]["embedding_longest"] == pytest.approx(math.prod(longest[1:]) ** (1 / 3))
    assert report["summary"]["embedding_longest_last"] == pytest.approx(longest[-1])
    entry, place = summary_measures()["embedding_longest_last"]
    assert entry is embedding_longest and entry.label(place) == "longest token, last layer ↑"
    row = "| embedding | `longest` | longest token ↑ | length | Length of the longest token. | Positive. |"
    assert row in measures_table().splitlines()


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_states_its_formula_and_its_range(name):
    value, value_range, *_ = MEASURES[name].doc.split("\n\n")
    assert value.endswith(".") and value_range.startswith("From ")
    assert MEASURES[name].heading and MEASURES[name].unit
