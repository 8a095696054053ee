"""The measures of redundancy in closed form, and their registry."""

import json
import math

import pytest
import torch
from families import FAMILIES, PATCHES, build, identity_blocks, images
from golden_inputs import normals
from textbook_redundancy import assert_close, textbook_rank, variance_shares
from torch.nn import functional as F

from diversity import MEASURES, measurable, measure_redundancy
from diversity.measures import cka, measures_table, registry, summary_measures
from diversity.measures.cka import LayerSimilarity
from diversity.measures.inputs import ChunkTokens
from diversity.measures.meter import Meter
from diversity.measures.ranks import effective_rank_of
from diversity.measures.sums import TokenSums
from diversity.redundancy import _weights

WIDTH = 24  # of the models of families.py that are not Swin


# --- closed forms: tokens


def embedding_of(tokens):
    """The report on a model whose tokens are `tokens` [16, 24] in every layer, whatever the images."""
    model = identity_blocks("average")
    with torch.no_grad():
        for parameter in model.patch_embed.parameters():
            parameter.zero_()
        model.pos_embed.copy_(tokens)
    report = measure_redundancy(model, images(2).split(1), extra=["effective_rank"])
    influence = report["embedding"].pop("block_influence")
    assert influence[0] is None and influence[1:] == pytest.approx([0] * 3, abs=1e-12)
    for values in report["embedding"].values():
        assert values == pytest.approx(values[:1] * 4)
    return {name: values[0] for name, values in report["embedding"].items()} | {"variance": report["variance"][0]}


def orthogonal(size, seed=3):
    return torch.linalg.qr(normals(seed, size, size))[0]


def test_parallel_tokens():
    lengths = torch.arange(1, PATCHES + 1)[:, None]
    report = embedding_of(lengths * normals(3, 1, WIDTH))
    ones = ("token_cosine", "token_abscosine", "first_cosine", "effective_rank", "participation_ratio", "stable_rank")
    assert_close({name: report[name] for name in ones}, dict.fromkeys(ones, 1), abs=2e-6)
    assert report["components_90"] == 1
    assert report["variance"] == pytest.approx([1] + [0] * (WIDTH - 1), abs=2e-6)


def test_opposite_tokens():
    signs = torch.tensor([1.0, -1.0]).repeat(PATCHES // 2)[:, None]
    report = embedding_of(signs * normals(3, 1, WIDTH))
    assert report["token_cosine"] == pytest.approx(-1 / (PATCHES - 1))
    assert report["token_abscosine"] == pytest.approx(1)
    assert report["components_90"] == 1
    assert report["high_frequency"] == pytest.approx(1)


def test_orthonormal_tokens():
    report = embedding_of(orthogonal(WIDTH)[:PATCHES])
    assert (report["token_cosine"], report["token_abscosine"]) == pytest.approx((0, 0), abs=1e-12)
    assert report["effective_rank"] == pytest.approx(PATCHES)
    assert report["participation_ratio"] == pytest.approx(PATCHES)
    assert report["stable_rank"] == pytest.approx(PATCHES - 1)
    assert report["high_frequency"] == pytest.approx(math.sqrt(1 - 1 / PATCHES))
    assert report["variance"] == pytest.approx([1 / 15] * 15 + [0] * 9, abs=1e-12)  # the mean takes one dimension
    assert report["components_90"] == 14


def test_images_of_one_colour_hold_identical_tokens():
    model = identity_blocks("average")
    with torch.no_grad():
        model.pos_embed.zero_()
    shades = [torch.ones(1, 3, 32, 32).double() * shade for shade in (0.5, 1, 3)]
    report = measure_redundancy(model, shades, extra=["effective_rank"])["embedding"]
    ones = ("token_cosine", "token_abscosine", "first_cosine", "effective_rank", "participation_ratio", "components_90")
    assert_close({name: report[name] for name in ones}, dict.fromkeys(ones, [1] * 4), abs=1e-6)
    assert_close([report["high_frequency"], report["within_image"]], [[0] * 4] * 2, abs=1e-7)


def test_a_known_spectrum_of_tokens():
    shares = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.0078125]).double()
    axes = shares.sqrt()[:, None] * orthogonal(WIDTH)[:8]
    report = embedding_of(torch.cat((axes, -axes)))
    assert report["variance"] == pytest.approx([*shares.tolist(), *[0] * 16], abs=1e-12)
    assert report["components_90"] == 4
    assert report["effective_rank"] == pytest.approx(textbook_rank(shares.sqrt()).item(), rel=1e-6)


def variance_of(*chunks):
    """Fractions of the variance of tokens [B, P, D] that are added chunk by chunk."""
    sums = TokenSums()
    for tokens in chunks:
        sums.add(ChunkTokens(tokens, tokens, None), None, 0)
    return sums.inputs(None).variance.tolist()


def test_the_covariance_of_tokens_in_chunks():
    tokens = 100 + normals(5, 12, 4, 6) @ torch.diag(torch.tensor([3.0, 1, 1, 0.5, 0, 0]).double())
    expected = variance_shares(tokens.flatten(0, 1)).tolist()
    assert variance_of(*tokens.split(5)) == pytest.approx(expected, abs=1e-9)
    assert variance_of(*tokens.float().split(5)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_without_variance_have_one_component(dtype):
    assert variance_of(torch.ones(2, 4, 4, dtype=dtype)) == [1, 0, 0, 0]
    assert variance_of(torch.full((3, 7, 5), 0.1, dtype=dtype)) == [1, 0, 0, 0, 0]


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


def test_tokens_of_high_norm():
    """17 equal norms and another: it is sqrt(17) > 4 deviations from the mean; of 17 norms, none can be."""
    tokens = torch.ones(2, 18, 4).double()
    tokens[0, 3] *= 5
    assert MEASURES["high_norm_tokens"](ChunkTokens(tokens, tokens, None)).tolist() == [1 / 18, 0]
    assert MEASURES["high_norm_tokens"](ChunkTokens(tokens[:, :17], tokens, None)) is None


@pytest.mark.parametrize("width", [3, 4])
def test_massive_activations(width):
    tokens = torch.ones(2, 5, width).double()
    tokens[0, 2, 1], tokens[1] = -1000, torch.arange(1, 5 * width + 1).view(5, width)
    middle = (5 * width + 1) // 2
    assert MEASURES["massive_activation"](ChunkTokens(tokens, tokens, None)).tolist() == [1000, 5 * width / middle]


def test_the_influence_of_a_block_that_turns_tokens_by_an_angle():
    angle = torch.tensor(1e-4)
    before = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
    turn = torch.tensor([[angle.cos(), angle.sin()], [-angle.sin(), angle.cos()]])
    influence = MEASURES["block_influence"](ChunkTokens(3 * before @ turn, before, before))
    assert influence.item() == pytest.approx(5e-9, rel=1e-3)  # in float32, 1 - cosine would be 0


def test_rankme_of_orthogonal_mean_tokens():
    sums = TokenSums()
    for mean in 3 * orthogonal(WIDTH)[:5]:
        sums.add(ChunkTokens(mean.expand(1, 4, WIDTH), None, None), None, 0)
    assert MEASURES["rankme"](sums.inputs(None)).item() == pytest.approx(5)


# --- similarity of layers


def test_layers_that_differ_by_a_rotation_and_a_factor_are_one():
    tokens, similarity = normals(4, 9, WIDTH), LayerSimilarity(3)
    for chunk in tokens.split(4):
        for layer, means in enumerate((chunk, 3 * chunk @ orthogonal(WIDTH), torch.ones(len(chunk), 5))):
            similarity.add(layer, means)
    cka = similarity.cka()
    assert cka[:2, :2].flatten().tolist() == pytest.approx([1] * 4)
    assert cka[2].isnan().all() and cka[:, 2].isnan().all()  # a layer that does not distinguish the images


@pytest.mark.parametrize("sizes", [[10], [3, 3, 3, 1], [1] * 10])
def test_minibatches_have_their_own_size(sizes, monkeypatch):
    monkeypatch.setattr(cka, "MINIBATCH", 4)
    layers, similarity = [normals(4, 10, 6), normals(5, 10, 8)], LayerSimilarity(2)
    for chunks in zip(*(means.split(sizes) for means in layers), strict=True):
        for layer, means in enumerate(chunks):
            similarity.add(layer, means)
    minibatches = [slice(0, 4), slice(4, 8)]  # the last two images are left out
    hsic = sum(LayerSimilarity._hsic([means[part] for means in layers]) for part in minibatches)
    expected = hsic[0, 1] / (hsic[0, 0] * hsic[1, 1]).sqrt()
    assert similarity.cka()[0, 1].item() == pytest.approx(expected.item())
    assert similarity.cka()[0, 1].item() != pytest.approx(LayerSimilarity._hsic(layers)[0, 1].item())


# --- closed forms: units


@pytest.mark.parametrize("name", ["deit", "eva02"])
def test_units_that_are_never_positive_are_dead(name):
    model = build(name)
    mlp = model.blocks[1].mlp
    units = mlp.fc2.in_features
    gate = mlp.fc1.bias if name == "deit" else mlp.fc1.bias[:units]
    with torch.no_grad():
        gate[: units // 4] = -1e3  # of which GELU and SiLU make zeros or small negative numbers
        gate[units // 4 :] = 1e3
    assert measure_redundancy(model, images(3).split(1))["mlp"]["dead_units"][1] == 0.25


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
    meter = Meter(measurable(build("average")), 0)
    meter.begin(maps[0], None)
    for i, block_maps in enumerate(maps):
        meter.add_maps(i, block_maps)
    return [{name: value.item() / meter.images for name, value in layer.items()} for layer in meter.sums["attention"]]


def test_one_hot_attention():
    itself = torch.eye(5).double()
    neighbour = itself.roll(1, dims=1)
    agreeing, differing = (torch.stack(heads)[None] for heads in ((itself, itself), (itself, neighbour)))
    first, second, third = attention_of(agreeing, differing, neighbour[None, None].expand(1, 2, 5, 5))
    alone = {"row_std": math.sqrt(1 / 5 - 1 / 25), "row_entropy": 0, "sink": 0.2}
    assert first == pytest.approx(alone | {"head_cosine": 1}, abs=1e-12)
    expected = alone | {"head_cosine": 0, "previous_cosine": 0.5}
    assert second == pytest.approx(expected, abs=1e-12)
    assert third == pytest.approx(expected | {"head_cosine": 1}, abs=1e-12)


def test_every_token_attends_to_one():
    maps = torch.zeros(1, 2, 17, 17).double()
    maps[:, 0, :, 3] = maps[:, 1, :, 5] = 1
    measures, *_ = attention_of(maps)
    assert measures["sink"] == pytest.approx(1) and "distance" not in measures  # one token more than the grid has


def test_the_distance_of_attention():
    """On a grid of 4 x 4: to itself; to the left neighbour, or to the end of the row above from the first column."""
    itself = torch.eye(16).double()
    measures, *_ = attention_of(torch.stack((itself, itself.roll(-1, dims=1)))[None])
    left = (12 * 1 + 3 * math.hypot(1, 3) + math.hypot(3, 3)) / 16
    assert measures["distance"] == pytest.approx(left / 2)


def test_the_distance_of_attention_that_goes_almost_all_to_the_class_token():
    """In float32, where 1 - the attention to the class token would be rounding."""
    to_patches = torch.eye(16).roll(-1, dims=1).add(torch.eye(16)) / 2
    maps = F.pad(1e-9 * to_patches, (1, 0, 1, 0), value=1)[None, None]
    rows, columns = (places.flatten() for places in torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij"))
    distances = torch.hypot(rows - rows[:, None], columns - columns[:, None])
    left = (12 * 1 + 3 * math.hypot(1, 3) + math.hypot(3, 3)) / 16
    assert MEASURES["attention_distance"].function(maps, distances).tolist() == pytest.approx([left / 2])


def test_a_change_of_basis_within_a_head_changes_no_output_and_no_circuit():
    model = build("deit")
    before = measure_redundancy(model, [images()])
    attn, turn = model.blocks[1].attn, orthogonal(8) @ torch.diag(torch.arange(1.0, 9).double())
    with torch.no_grad():
        for matrix in (attn.qkv.weight, attn.qkv.bias):
            matrix[2 * WIDTH : 2 * WIDTH + 8] = turn @ matrix[2 * WIDTH : 2 * WIDTH + 8]
        attn.proj.weight[:, :8] = attn.proj.weight[:, :8] @ turn.inverse()
    after = measure_redundancy(model, [images()])
    for level in ("embedding", "attention", "circuit"):
        assert_close(after[level], before[level])
    assert after["weight"]["v"]["row_abscosine"][1] != pytest.approx(before["weight"]["v"]["row_abscosine"][1])


def test_one_head_and_one_patch_leave_nothing_to_compare():
    report = measure_redundancy(build("average", num_heads=1, patch_size=32), [images(3)])
    assert report["embedding"]["token_cosine"] == report["embedding"]["token_abscosine"] == [None] * 4
    assert report["attention"]["head_cosine"] == report["attention"]["head_output_cosine"] == [None] * 3
    assert report["attention"]["distance"] == report["circuit"]["qk"]["abscosine"] == [None] * 3
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
    expected |= {"stable_rank": WIDTH, "participation_ratio": WIDTH}
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
    zeros = weight_of(torch.zeros(WIDTH, WIDTH).double())[0]
    assert (zeros.pop("stable_rank"), zeros.pop("participation_ratio")) == (None, None)
    assert zeros == pytest.approx(
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
    row = "| embedding | `longest` | longest token ↑ | length | Length of the longest token. | Positive. |  |"
    assert row in measures_table().splitlines()


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_states_its_formula_and_its_range(name):
    value, value_range, *_ = MEASURES[name].doc.split("\n\n")
    assert value.endswith(".") and value_range.startswith("From ")
    assert MEASURES[name].heading and MEASURES[name].unit
