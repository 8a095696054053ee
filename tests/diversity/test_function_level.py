"""The function-level measures: against a textbook, planted cases, and without a trace in the model."""

import copy
import json

import numpy as np
import pytest
import timm
import torch
from families import build, fused, hooks, identity_blocks
from golden_inputs import normals
from textbook_function import accuracy, farthest_first, ridge, textbook_function, votes_of, without_heads
from textbook_redundancy import assert_close
from torch.nn import functional as F

from diversity import TapError, apply_remedy
from diversity.backbones import Backbone
from diversity.function_level import FUNCTION_MEASURES, function_summaries, labelled, measure_function
from diversity.function_level.patch_probe import box
from diversity.function_level.probes import Nearest
from diversity.function_level.ridge import Ridge
from diversity.function_level.token_drop import most_similar_last

CLASSES = 5


def labelled_images(count, seed=0):
    """Images of noise, each on a level of its label, and the labels in a random order."""
    generator = np.random.default_rng(seed)
    labels = torch.from_numpy(generator.permutation(np.arange(count) % CLASSES))
    return 0.5 * normals(seed + 1, count, 3, 32, 32) + labels[:, None, None, None] / CLASSES, labels


def small(name, **options):
    return build(name, **({} if "swin" in name else {"depth": 2}) | options)


# --- against the textbook


@pytest.mark.parametrize("name", ["average", "registers", "eva02", "swin"])
def test_every_measure_equals_the_textbook(name):
    model, test, train = small(name), labelled_images(11, seed=2), labelled_images(21, seed=7)
    with torch.no_grad():
        expected = textbook_function(name, model, Backbone.of(model), test, train)
    report = measure_function(model, [test], [train])
    measured = {key for key in function_summaries() if expected["tokens"] or "tokens" not in key}
    assert report.pop("summary").keys() == measured
    assert report.pop("not_measured").keys() == ({"tokens"} if "swin" in name else set())
    assert report.keys() == expected.keys()
    assert_close(report, expected, rel=1e-9)


def test_the_ridge_map_equals_least_squares_with_rows_of_the_penalty():
    features, labels = 3 + normals(1, 40, 6) * torch.arange(1, 7), torch.arange(40) ** 2 % CLASSES
    sums = Ridge(6, CLASSES, features.device)
    for some, of_some in zip(features.split(7), labels.split(7), strict=True):
        sums.add(some, of_some)
    for one, other in zip(sums.fit(), ridge(features, labels, CLASSES), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    weights, constants = (Ridge(6, CLASSES, features.device), sums)[0], sums.fit()
    weights.add(1000 * features - 5, labels)  # another scale and origin
    scaled, shift = weights.fit()
    predicted = features @ constants[0] + constants[1]
    torch.testing.assert_close((1000 * features - 5) @ scaled + shift, predicted, rtol=1e-7, atol=1e-9)


def test_features_without_variance_predict_the_most_frequent_class():
    sums = Ridge(3, CLASSES, torch.device("cpu"))
    sums.add(torch.full((9, 3), 0.1), torch.tensor([0, 1, 1, 2, 2, 2, 2, 3, 4]))
    weights, constants = sums.fit()
    assert not weights.any() and constants.argmax() == 2


def test_votes_are_those_of_the_twenty_nearest():
    bank, queries, labels = normals(1, 60, 4), normals(2, 6, 4), torch.arange(60) % CLASSES
    nearest = Nearest(F.normalize(queries, dim=1))
    for some, of_some in zip(bank.split(17), labels.split(17), strict=True):
        nearest.add(F.normalize(some, dim=1), of_some)
    votes = nearest.votes(CLASSES) * np.exp(1 / 0.07)
    for of_query, query in zip(votes, queries, strict=True):
        expected = votes_of(query, bank, labels)
        torch.testing.assert_close(of_query, torch.tensor([expected[label] for label in range(CLASSES)]).double())


def test_similar_tokens_come_last():
    tokens = normals(3, 2, 12, 5)
    orders = most_similar_last(tokens)
    assert orders.tolist() == [farthest_first([*F.normalize(image, dim=-1)]) for image in tokens]
    copies = torch.cat((tokens[:1, :6], 2 * tokens[:1, :6]), dim=1)  # of the same directions
    (order,) = most_similar_last(copies).tolist()
    assert {i % 6 for i in order[:6]} == {*range(6)}


# --- planted cases


def test_a_head_that_does_everything_is_the_last_to_be_removed():
    model = small("vit", depth=2, num_heads=3)
    model = without_heads(model, [(i, h) for i in range(2) for h in range(3) if (i, h) != (1, 2)])
    with torch.no_grad():
        model.blocks[1].attn.proj.weight.mul_(20)
    value = measure_function(model, [labelled_images(60)], measures=["heads"])["heads"]
    flat = np.concatenate(value["importance"])
    assert flat.argmax() == 5 and abs(flat[5]) > 1e-3 and np.abs(flat[:5]).max() < 1e-12
    *others, last = value["least_important"]
    assert value["removed"] == [0, 1, 1, 2, 2, 3, 4, 4, 5, 5, 6]
    assert len({*others}) == 1 and last != others[0]
    removed = without_heads(model.eval(), [(1, 2)])
    test = labelled_images(60)
    assert last == accuracy(removed, test[0][1::2], test[1][1::2])


@pytest.mark.parametrize("remedy", ["neutreno", "value_residual"])
def test_a_skipped_first_block_still_has_its_values(remedy):
    """Without what its branches add, its values are the same."""
    model, test = small("deit"), labelled_images(40)
    apply_remedy(model, remedy)
    skipped = measure_function(model, [test], measures=["blocks"])["blocks"]["skipped"]
    for layer in (model.blocks[0].attn.proj, model.blocks[0].mlp.fc2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    assert skipped[0] == measure_function(model, [test], measures=["accuracy"])["accuracy"]["accuracy"]


def test_blocks_that_do_nothing_can_be_skipped():
    model, test = identity_blocks("vit"), labelled_images(30)
    report = measure_function(model, [test], measures=["accuracy", "blocks", "heads"])
    assert report["blocks"]["skipped"] == [report["accuracy"]["accuracy"]] * 3
    assert {*report["heads"]["least_important"]} == {*report["heads"]["random"]}


def coloured(labels, seed=1):
    """Images in one colour for each label, with a little noise, which the patches of identity blocks show linearly."""
    colours = normals(seed, CLASSES, 3)[labels]
    return colours[..., None, None] + 0.01 * normals(seed + 1, len(labels), 3, 32, 32)


@pytest.fixture
def plain_tokens():
    """A model whose final patch tokens are linear in the patch, without position."""
    model = identity_blocks("average", global_pool="avg")
    with torch.no_grad():
        model.pos_embed.zero_()
        model.fc_norm = torch.nn.Identity()
    return model


def test_labels_that_are_linear_in_the_tokens_are_read_by_probe_and_neighbours(plain_tokens):
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, CLASSES, 80))
    batch = coloured(labels), labels
    train = coloured(labels) + 0.01, labels
    report = measure_function(plain_tokens, [batch], [train], measures=["knn", "probe", "patch_probe"])
    assert report["patch_probe"]["all"] == report["patch_probe"]["pasted"] == 100
    assert 60 < report["patch_probe"]["majority"] < 95
    assert report["probe"]["layers"][-1] == report["knn"]["layers"][-1] == 100


def test_random_labels_are_at_chance(plain_tokens):
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, CLASSES, 400))
    test, train = ((normals(seed, 400, 3, 32, 32), labels.roll(seed)) for seed in (1, 2))
    report = measure_function(plain_tokens, [test], [train], measures=["knn", "probe", "patch_probe"])
    for value in (report["knn"]["layers"][-1], report["probe"]["layers"][-1]):
        assert value == pytest.approx(20, abs=6)  # three standard deviations
    assert report["patch_probe"]["all"] == pytest.approx(20, abs=4)
    assert 20 <= report["patch_probe"]["chance"] < 24


def test_a_box_is_a_rectangle_of_complete_patches_that_depends_on_the_pair_alone():
    shapes = set()
    for pair in range(300):
        inside = box((4, 3), 0, pair)
        rows, columns = inside.any(dim=1), inside.any(dim=0)
        assert torch.equal(inside, rows[:, None] & columns) and inside.any() and not inside.all()
        for line in (rows, columns):
            (places,) = line.nonzero(as_tuple=True)
            assert places[-1] - places[0] == len(places) - 1
        shapes.add((int(rows.sum()), int(columns.sum())))
        assert torch.equal(inside, box((4, 3), 0, pair))
    assert shapes == {(rows, columns) for rows in (1, 2, 3) for columns in (1, 2)}


# --- any batches, any model, no trace


@pytest.mark.parametrize(
    ("name", "measures"), [("registers", [*FUNCTION_MEASURES]), ("swin", ["knn", "probe", "patch_probe"])]
)
def test_batches_of_any_size_give_what_one_batch_gives(name, measures, monkeypatch):
    model, (images, labels), train = small(name), labelled_images(13), labelled_images(21, seed=7)
    at_once = measure_function(model, [(images, labels)], [train], measures=measures)
    monkeypatch.setattr(labelled, "CHUNK", 4)
    sizes = [1, 6, 0, 3, 3]
    in_parts = measure_function(
        model,
        [*zip(images.split(sizes), labels.split(sizes), strict=True)],
        [*zip(train[0].split(5), train[1].split(5), strict=True)],
        measures=measures,
    )
    assert not at_once["not_measured"]
    assert_close(in_parts, at_once)
    assert json.loads(json.dumps(at_once)) == at_once and at_once["test_images"] == 13
    other = measure_function(model, [(images, labels)], [train], seed=1, measures=["patch_probe"])
    assert other["patch_probe"] != at_once["patch_probe"]


@pytest.mark.parametrize("breaks", [False, True])
def test_the_model_is_as_it_was(breaks):
    model = small("eva02")
    model.blocks[0].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    batches = [labelled_images(7), (labelled_images(3)[0], torch.full((3,), 2 - 10 * breaks))]
    if breaks:
        with pytest.raises(ValueError, match="label -8"):
            measure_function(model, batches, batches, measures=["blocks", "tokens"])
    else:
        measure_function(model, batches, batches)
    assert modes == [module.training for module in model.modules()]
    assert not hooks(model) and all(fused(model))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("remedy", ["attnscale", "ortho_residual", "reattention"])
def test_heads_are_removed_behind_a_remedy(remedy):
    model, test = small("vit"), labelled_images(12)
    with apply_remedy(model, remedy):
        with torch.no_grad():
            for parameter in model.remedies.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        before = len(hooks(model))
        report = measure_function(model, [test], [test])
        assert not report["not_measured"] and len(hooks(model)) == before
        model.eval()
        with torch.no_grad():
            order = sorted((x, i, h) for i, row in enumerate(report["heads"]["importance"]) for h, x in enumerate(row))
            cut = without_heads(model, [place for _, *place in order[:3]])
            assert report["heads"]["least_important"][5] == accuracy(cut, test[0][1::2], test[1][1::2])
            loss, of_cut = (
                F.cross_entropy(one(test[0][::2]), test[1][::2]).item()
                for one in (model, without_heads(model, [order[-1][1:]]))
            )
            assert of_cut - loss == pytest.approx(order[-1][0], rel=1e-9)


@pytest.mark.parametrize("remedy", ["neutreno", "value_residual"])
def test_tokens_are_not_dropped_where_a_remedy_needs_all_of_them(remedy):
    model, test = small("vit"), labelled_images(6)
    with apply_remedy(model, remedy):
        report = measure_function(model, [test], measures=["tokens"])
    assert report["tokens"] is None and remedy in report["not_measured"]["tokens"]
    assert report["summary"] == {}


@pytest.mark.parametrize(
    ("name", "options", "measure", "reason"),
    [
        ("beit", {}, "tokens", "relative position bias"),
        ("beit_shared", {}, "tokens", "relative position bias"),
        ("swinv2", {}, "tokens", "windows"),
        ("vit", {"depth": 1}, "tokens", "single block"),
        ("vit", {"num_classes": 0}, "heads", "no classifier"),
        ("vit", {}, "probe", "no training images"),
    ],
)
def test_what_does_not_apply_is_none_with_a_reason(name, options, measure, reason):
    model = small(name, **options)
    report = measure_function(model, [labelled_images(6)], num_classes=CLASSES, measures=[measure])
    assert report[measure] is None and reason in report["not_measured"][measure]


def test_a_differential_attention_has_no_map_to_rank_tokens_by():
    model = small("vit", attn_layer="diff", embed_dim=24, num_heads=3)
    report = measure_function(model, [labelled_images(6)], measures=["tokens", "heads"])
    assert report["tokens"]["least_attended"] is None and len(report["tokens"]["random"]) == 10
    assert "function_tokens_50_attended" not in report["summary"]
    assert len(report["heads"]["importance"][0]) == 3


# --- errors


IMAGES, LABELS = labelled_images(6)


@pytest.mark.parametrize(
    ("batches", "error", "words"),
    [
        (iter([(IMAGES, LABELS)]), TypeError, "several times; give a list or a loader"),
        ([IMAGES], TypeError, "need labels: batches of (images, labels)"),
        ([(IMAGES, LABELS + 1)], ValueError, "have the label 5, but the classes of the model are 0 to 4"),
        ([(IMAGES, LABELS - 1)], ValueError, "have the label -1"),
        ([(IMAGES, LABELS.double())], ValueError, "one integer label"),
        ([(IMAGES, LABELS[:3])], ValueError, "one integer label"),
        ([(IMAGES, 0 * LABELS)], ValueError, "6 image(s) of 1 class(es)"),
        ([], ValueError, "0 image(s) of 0 class(es)"),
        ([(IMAGES / 0, LABELS)], ValueError, "the logits are not finite"),
    ],
)
def test_images_that_cannot_be_used_are_one_line(batches, error, words):
    with pytest.raises(error) as caught:
        measure_function(small("vit"), batches)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_images_in_the_order_of_their_classes_are_no_pairs():
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    report = measure_function(small("vit"), [(labelled_images(8)[0], labels)], measures=["patch_probe"])
    assert "random order" in report["not_measured"]["patch_probe"]


def test_other_models_and_measures_are_refused():
    with pytest.raises(TapError, match="not one of timm's ViT"):
        measure_function(timm.create_model("resnet10t", num_classes=CLASSES), [(IMAGES, LABELS)])
    with pytest.raises(ValueError, match="unknown measure 'head'; there are accuracy, heads"):
        measure_function(small("vit"), [(IMAGES, LABELS)], measures=["head"])
    with pytest.raises(ValueError, match="classifies into 5 classes, but the labels have 4"):
        measure_function(small("vit"), [(IMAGES, LABELS)], num_classes=4)
    with pytest.raises(ValueError, match="num_classes is needed"):
        measure_function(small("vit", num_classes=0), [(IMAGES, LABELS)])


def test_every_measure_has_a_definition_a_source_and_a_unit():
    for entry in FUNCTION_MEASURES.values():
        assert "\nSource: " in entry.doc and entry.heading and entry.unit and entry.summary
    labels = [measure.label(place) for measure, place in function_summaries().values()]
    assert len({*labels}) == len(labels)
