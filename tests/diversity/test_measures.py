"""The measures of redundancy in closed form, and their registry."""

import json
import math

import pytest
import torch
from families import FAMILIES, PATCHES, build, identity_blocks, images
from golden_inputs import normals
from textbook_redundancy import assert_close, textbook_rank, variance_shares

from diversity import MEASURES, measurable, measure_redundancy
from diversity import measures as registry
from diversity.measures import effective_rank_of, measures_table, summary_measures
from diversity.redundancy import _Covariance, _Meter, _weights

WIDTH = 24  # of the models of families.py that are not Swin


# --- closed forms: tokens


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
