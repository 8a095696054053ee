"""What happens to a batch on its device: bytes normalised, boxes erased as timm erases them, images mixed."""

import random

import numpy as np
import pytest
import torch
from device_watch import watched_fake_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.random_erasing import RandomErasing

from benchmarks.fake_cuda import CUDA
from diversity import PatchMixup
from pipeline.batch_augmentation import BatchAugmentation, BatchErasing, to_device_at_once
from utils import seed_of

SIZE = (48, 40)


def timms_boxes(count, **options):
    """(height, width, top, left) of timm's boxes in `count` images, and the fraction of images with one."""
    erasing, boxes, erased = RandomErasing(mode="const", device="cpu", **options), [], 0
    random.seed(0)
    for _ in range(count):
        mask = (erasing(torch.ones(1, *SIZE)) == 0)[0]
        if mask.any():
            erased += 1
            rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
            boxes.append((len(rows), len(columns), rows[0].item(), columns[0].item()))
    return np.array(boxes), erased / count


def test_boxes_are_distributed_as_timms():
    theirs, their_fraction = timms_boxes(4000, probability=0.4)
    np.random.seed(0)
    yl, yh, xl, xh = BatchErasing(0.4).draw(4000, SIZE)[:, 0].numpy().T
    drawn = yh > yl
    assert drawn.mean() == pytest.approx(their_fraction, abs=0.03)
    ours = np.stack((yh - yl, xh - xl, yl, xl), axis=1)[drawn]
    for quantity in range(4):
        for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
            one, other = (np.quantile(boxes[:, quantity], quantile) for boxes in (ours, theirs))
            assert one == pytest.approx(other, abs=2), (quantity, quantile)
    areas = [boxes[:, 0] * boxes[:, 1] for boxes in (ours, theirs)]
    assert areas[0].mean() == pytest.approx(areas[1].mean(), rel=0.05)


def test_boxes_are_inside_the_image_and_divide_its_area():
    np.random.seed(0)
    boxes = BatchErasing(1.0, max_count=3).draw(500, SIZE)
    yl, yh, xl, xh = boxes.unbind(-1)
    assert boxes.dtype == torch.int32 and boxes.shape == (500, 3, 4)
    assert (yl >= 0).all() and (yh <= SIZE[0]).all() and (xl >= 0).all() and (xh <= SIZE[1]).all()
    sizes = (yh - yl) * (xh - xl)
    counts = (sizes > 0).sum(1)
    assert [counts.eq(count).double().mean().item() for count in (1, 2, 3)] == pytest.approx([1 / 3] * 3, abs=0.07)
    assert (sizes * counts[:, None]).max() <= 0.4 * SIZE[0] * SIZE[1]


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_the_probability_is_of_an_image(probability):
    yl, yh, _, _ = BatchErasing(probability).draw(200, SIZE)[:, 0].T
    assert ((yh > yl) == bool(probability)).all()


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_boxes_are_filled_and_nothing_else(mode):
    samples = torch.full((3, 3, 8, 10), 9.0)
    boxes = torch.tensor([[[1, 5, 2, 9], [0, 0, 0, 0]], [[0, 8, 0, 10], [2, 4, 2, 4]], [[0] * 4] * 2])
    torch.manual_seed(0)
    erasing = BatchErasing(1.0, mode, max_count=2)
    erased = erasing.erase(samples, boxes, erasing.draw_fill(samples))
    assert (samples == 9).all()
    changed = (erased != 9).all(1)
    assert changed[0, 1:5, 2:9].all() and changed[0].sum() == 4 * 7
    assert changed[1].all() and not changed[2].any()
    inside = erased[0, :, 1:5, 2:9]
    if mode == "const":
        assert (inside == 0).all()
    if mode == "rand":
        assert (inside == inside[:, :1, :1]).all() and len(inside[:, 0, 0].unique()) == 3
        assert not torch.equal(erased[1, :, 3, 3], erased[1, :, 0, 0])  # a later box covers an earlier one
    if mode == "pixel":
        assert len(inside.unique()) == inside.numel()


def test_noise_is_normal():
    torch.manual_seed(0)
    noise = BatchErasing(1.0).draw_fill(torch.zeros(8, 3, 64, 64))
    assert noise.mean() == pytest.approx(0, abs=0.01) and noise.std() == pytest.approx(1, abs=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        noise = BatchErasing(1.0).draw_fill(torch.zeros(8, 3, 64, 64, dtype=torch.uint8)).float()
    assert noise.mean() == pytest.approx(0, abs=0.01) and noise.std() == pytest.approx(1, abs=0.01)


def drawn(mixup=None, **numbers):
    augment = BatchAugmentation(mixup or PatchMixup(mode="elem"), BatchErasing(1.0))
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    return augment.draw(images, **dict(seed=0, rank=0, epoch=0, batch=0) | numbers)


def test_draws_depend_on_seed_rank_epoch_and_batch():
    numbers = [dict(seed=s, rank=r, epoch=e, batch=b) for s in (0, 1) for r in (0, 1) for e in (0, 1) for b in (0, 1)]
    draws = [drawn(**each) for each in numbers]
    assert len({draw.boxes.numpy().tobytes() for draw in draws}) == 16
    assert len({draw.mixing.numpy().tobytes() for draw in draws}) == 8  # mixing is the same on all ranks
    np.random.seed(8)
    again = drawn(**numbers[5])
    assert torch.equal(again.boxes, draws[5].boxes) and torch.equal(again.mixing, draws[5].mixing)
    assert seed_of("erasing", 1, 2, 3, 4) == 8233121052151645815


def test_a_batch_is_normalised_then_erased_then_mixed():
    augment = BatchAugmentation(PatchMixup(grid=(2, 2), mode="elem"), BatchErasing(1.0, "const"))
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(6)
    draws = augment.draw(images, 0, 0, 0, 0)
    samples, target = augment(images, labels, draws)
    erased = augment.erasing.erase(augment.normalize(images), draws.boxes, torch.zeros(6, 1, 1, 1, 1))
    assert torch.equal(samples, augment.mixup.mix(erased, draws.mixing))
    for value, expected in zip(target, augment.mixup.target(erased, labels, draws.mixing), strict=True):
        assert torch.equal(value, expected)
    assert samples.dtype == torch.float32 and not torch.equal(samples, erased)


def test_nothing_to_do_changes_nothing():
    augment = BatchAugmentation()
    samples, labels = torch.randn(3, 3, 8, 8), torch.arange(3)
    draws = augment.draw(samples, 0, 0, 0, 0)
    mixed, target = augment(samples, labels, draws)
    assert draws == (None, None) and mixed is samples
    assert target.patch_lam is None and (target.lam == 1).all() and torch.equal(target.labels, labels)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_compiled_it_is_the_same(mode):
    """Compiled, partners are made from bytes."""
    augment = BatchAugmentation(PatchMixup(grid=(2, 2), mode="elem"), BatchErasing(1.0, mode, max_count=2))
    images, labels = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8), torch.arange(6)
    draws = augment.draw(images, 0, 0, 0, 0)
    batches = []
    for function in (augment, torch.compile(augment, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        batches.append(function(images, labels, draws))
    torch.testing.assert_close(batches[1][0], batches[0][0], rtol=0, atol=1e-6)
    for value, expected in zip(batches[1][1], batches[0][1], strict=True):
        assert torch.equal(value, expected)


DTYPES = (torch.bool, torch.uint8, torch.int16, torch.bfloat16, torch.int32, torch.float32, torch.int64, torch.float64)


@st.composite
def tensors(draw):
    """A tensor of 0 to 3 dimensions, of which some are 0; it may begin anywhere in its memory, with any strides."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 3), max_size=3))
    count, random = int(np.prod(shape)), np.random.RandomState(draw(st.integers(0, 99)))
    values = torch.from_numpy(random.randint(0, 99, 1 + 2 * count) * random.randint(0, 2, 1 + 2 * count)).to(dtype)
    values = values[1::2] if draw(st.booleans()) else values[1 : 1 + count]
    return values.reshape(shape).permute(draw(st.permutations(range(len(shape)))))


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.lists(tensors(), min_size=1, max_size=6))
def test_tensors_that_travel_together_arrive_as_they_were(originals):
    before = [original.clone() for original in originals]
    moved = to_device_at_once(originals, torch.device("cpu"))
    for tensor, original, expected in zip(moved, originals, before, strict=True):
        assert tensor.shape == original.shape and tensor.dtype == original.dtype and tensor.is_contiguous()
        assert tensor.data_ptr() % tensor.element_size() == 0
        assert torch.equal(tensor, expected)
    for place, tensor in enumerate(moved):  # none shares memory with another one
        tensor.zero_()
        for later, expected in zip(moved[place + 1 :], before[place + 1 :], strict=True):
            assert torch.equal(later, expected)


def test_tensors_travel_together_by_one_copy_from_page_locked_memory():
    shapes = {torch.int64: (3,), torch.bool: (5, 3), torch.float32: (0, 2), torch.bfloat16: (100, 999)}
    with watched_fake_cuda() as watch:
        moved = to_device_at_once([torch.empty(shape, dtype=dtype) for dtype, shape in shapes.items()], CUDA)
    assert {tensor.dtype: tuple(tensor.shape) for tensor in moved} == shapes
    assert {tensor.device for tensor in moved} == {CUDA}
    [copy] = watch.findings
    assert (copy.kind, copy.what) == ("upload", "copy from page-locked memory")
    assert copy.num_bytes == 3 * 8 + 5 * 3 + 100 * 999 * 2
