"""Redundancy as measured: against a textbook on every family of backbones, and without a trace in the model."""

import copy
import json
import math

import pytest
import timm
import torch
from families import CLASSES, FAMILIES, build, fused, hooks, identity_blocks, images
from golden_inputs import normals
from textbook_redundancy import assert_close, textbook_report
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diversity import MEASURES, TAPS, TapError, TappedViT, measurable, measure_redundancy, redundancy
from diversity.hooks import ModelHooks
from diversity.measures import measures_of, summary_measures
from diversity.measures.meter import Meter

# --- against the textbook


@pytest.mark.parametrize("name", FAMILIES)
def test_every_measure_equals_the_textbook(name):
    model, samples, labels = build(name), images(5), torch.tensor([2, 0, 2, 1, 0])
    with torch.no_grad():
        expected = textbook_report(name, copy.deepcopy(model), samples, labels)
    report = measure_redundancy(model, [(samples, labels)], extra=["effective_rank"])
    assert_close(report, expected, rel=1e-6, abs=1e-7)  # singular values come from a Gram matrix
    for level in ("embedding", "attention", "mlp"):
        assert list(report[level]) == list(measures_of(level))
    for level in ("weight", "circuit"):
        assert all(list(measures) == list(measures_of(level)) for measures in report[level].values())


@pytest.mark.parametrize("name", ["registers", "swin_windows"])
def test_batches_of_any_size_give_what_one_batch_gives(name, monkeypatch):
    model, samples = build(name), images(6)
    at_once = measure_redundancy(model, [samples])
    monkeypatch.setattr(redundancy, "CHUNK", 4)
    assert_close(measure_redundancy(model, [samples]), at_once)
    assert_close(measure_redundancy(model, samples.split([1, 3, 2])), at_once)
    assert_close(measure_redundancy(model, (image[None] for image in samples)), at_once)
    assert at_once["images"] == 6


def test_a_half_precision_model_is_measured_in_full_precision():
    model, samples = build("deit").eval(), images()
    exact = measure_redundancy(model, [samples])
    half = measure_redundancy(copy.deepcopy(model).bfloat16(), [samples.bfloat16()])
    assert_close(half["embedding"], exact["embedding"], rel=0.05, abs=0.05)
    rounded = copy.deepcopy(model).bfloat16().double()
    assert_close(half["weight"], measure_redundancy(rounded, [samples])["weight"], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", ["registers", "eva02", "swin"])
def test_float32_is_exact_to_1e_4(name):
    model, samples, labels = build(name, patch_size=2 if name == "swin" else 4), images(6), torch.arange(6) // 2
    exact = measure_redundancy(model, [(samples, labels)])
    single = measure_redundancy(copy.deepcopy(model).float(), [(samples.float(), labels)])
    assert not {key for key in exact["summary"] if key not in single["summary"]}
    assert_close(single["summary"], exact["summary"], rel=1e-4, abs=1e-7)
    for level in ("embedding", "attention", "mlp", "weight", "circuit", "cka"):
        assert_close(single[level], exact[level], rel=1e-4, abs=1e-6)


class ReadBacks(TorchDispatchMode):
    """Names of the operations for which a device would be waited for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        is_index = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if is_index or name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"):
            self.seen.append(name)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["deit", "swin"])
@pytest.mark.parametrize("labelled", [False, True])
def test_no_number_is_read_back_before_the_last_image(name, labelled, monkeypatch):
    monkeypatch.setattr(redundancy, "CHUNK", 2)
    model, seen = build(name), []

    def batches():
        for _ in range(4):
            yield (images(3), torch.tensor([0, 1, 1])) if labelled else images(3)
            seen.append(len(counter.seen))

    with ReadBacks() as counter:
        measure_redundancy(model, batches())
    assert seen == [0] * 4 and len(counter.seen) > 20  # it does see those afterwards


@pytest.mark.parametrize("name", ["registers", "swin"])
def test_on_a_gpu_everything_stays_there(name):
    """Fake tensors raise where a value is read, and where an operation mixes devices."""
    model = build(name).float().eval()
    with FakeTensorMode(), torch.no_grad():
        for module in model.modules():
            for stored in (module._parameters, module._buffers):
                for key, value in stored.items():
                    if value is not None:
                        fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                        stored[key] = torch.nn.Parameter(fake) if stored is module._parameters else fake
        meter = Meter(measurable(model), CLASSES)
        with ModelHooks() as added:
            meter.hook(added)
            for _ in range(2):
                samples = torch.empty(3, 3, 32, 32, device="cuda")
                meter.begin(samples, torch.zeros(3, dtype=torch.int64))  # labels of a loader
                model(samples)
        sums = [value for layers in meter.sums.values() for of_layer in layers for value in of_layer.values()]
        kept = [*sums, *meter.maxima, meter.tokens[0].within, meter.tokens[-1].of_classes, *meter.similarity.waiting[0]]
        assert len(sums) > 20 and {value.device.type for value in kept} == {"cuda"}


def test_autocast_and_tf32_change_neither_tokens_nor_weights():
    model = identity_blocks("average").float()
    with torch.no_grad():
        for parameter in model.patch_embed.parameters():
            parameter.zero_()
    expected, precision = measure_redundancy(model, [images().float()]), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            report = measure_redundancy(model, [images().float()])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert [report[level] for level in ("embedding", "weight", "circuit")] == [
        expected[level] for level in ("embedding", "weight", "circuit")
    ]


# --- labels


def test_labels_in_batches_of_any_size(monkeypatch):
    model, samples, labels = build("deit"), images(7), torch.tensor([0, 4, 4, 0, 1, 4, 0])
    at_once = measure_redundancy(model, [(samples, labels)])
    assert None not in at_once["embedding"]["within_class"] + at_once["embedding"]["between_class"]
    parts = [at_once["embedding"][key] for key in ("within_image", "within_class", "between_class")]
    assert [sum(of_layer) for of_layer in zip(*parts, strict=True)] == pytest.approx([1] * 4)
    monkeypatch.setattr(redundancy, "CHUNK", 2)
    assert_close(measure_redundancy(model, zip(samples.split(3), labels.split(3), strict=True)), at_once)
    other = measure_redundancy(model, [(samples, labels.roll(1))])
    assert other["embedding"]["between_class"] != pytest.approx(at_once["embedding"]["between_class"])
    assert_close(other["embedding"]["within_image"], at_once["embedding"]["within_image"])


@pytest.mark.parametrize("labels", [[0, 1, 2], [3, 3, 3]])
def test_classes_that_cannot_be_compared_have_no_variance(labels):
    embedding = measure_redundancy(build("deit"), [(images(3), torch.tensor(labels))])["embedding"]
    assert embedding["within_class"] == embedding["between_class"] == [None] * 4
    assert None not in embedding["within_image"]


def test_a_single_image_has_no_variance_between_images():
    report = measure_redundancy(build("deit"), [images(1)])
    assert report["embedding"]["within_image"] == report["embedding"]["rankme"] == [None] * 4
    assert report["cka"] is None


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([(images(2), torch.tensor([0, 5]))], "1 of 2 labels are not among the 5 classes, which are 0 to 4"),
        ([(images(2), torch.tensor([-1, 0]))], "1 of 2 labels are not among the 5 classes"),
        ([(images(2), torch.tensor([0, 1])), images(2)], "some batches have labels and others have none"),
        ([(images(2), torch.tensor([0]))], r"labels must be \[2\], one class for each image; got \[1\]"),
        ([(images(2), torch.eye(2))], r"labels must be \[2\], one class for each image; got \[2, 2\]"),
        ([(images(2), torch.ones(2))], r"one class for each image; got \[2\] of torch.float32"),
    ],
)
def test_wrong_labels_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        measure_redundancy(build("deit"), batches)


def test_labels_of_more_classes_than_the_model_has():
    batch = images(3), torch.tensor([0, 7, 7])
    assert None not in measure_redundancy(build("deit"), [batch], num_classes=8)["embedding"]["between_class"]
    assert (
        None
        not in measure_redundancy(build("deit", num_classes=0), [batch], num_classes=8)["embedding"]["within_class"]
    )


def test_an_unknown_optional_measure_is_refused():
    with pytest.raises(ValueError, match="unknown measure 'rank'; there are token_cosine, "):
        measure_redundancy(build("deit"), [images()], extra=["rank"])


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
    where = {"embedding": ["", "_last"], "attention": ["", "_first"], "mlp": [""], "weight": ["", "_qkv"]}
    where["circuit"] = ["_qk", "_ov"]
    names = {f"{m.level}_{m.key}{suffix}" for m in MEASURES.values() for suffix in where[m.level]}
    assert names == set(summary_measures())
    missing = {f"embedding_{key}{suffix}" for suffix in where["embedding"] for key in
               ("effective_rank", "high_norm_tokens", "within_class", "between_class")}  # fmt: skip
    assert set(summary) == names - missing - {"attention_previous_cosine_first"}  # there is no block before
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
