"""Patch mixing: labels against pixels counted by hand, draws against timm's own Mixup."""

import numpy as np
import pytest
import textbook
import torch
from golden_inputs import normals
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data import Mixup

from diversity import PatchMixup, patch_lam

fast = settings(derandomize=True, deadline=None, max_examples=80)


def counted(kept_mask, grid):
    """[P] share of True pixels of each patch of an [H, W] mask, patch by patch."""
    height, width = kept_mask.shape[0] // grid[0], kept_mask.shape[1] // grid[1]
    patches = [
        kept_mask[r * height : (r + 1) * height, c * width : (c + 1) * width]
        for r in range(grid[0])
        for c in range(grid[1])
    ]
    return torch.tensor([patch.double().mean() for patch in patches], dtype=torch.float64)


# --- patch_lam


@st.composite
def boxes(draw):
    grid = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    size = tuple(cells * draw(st.integers(1, 9)) for cells in grid)
    yl, yh = sorted(draw(st.tuples(st.integers(0, size[0]), st.integers(0, size[0]))))
    xl, xh = sorted(draw(st.tuples(st.integers(0, size[1]), st.integers(0, size[1]))))
    return (yl, yh, xl, xh), size, grid


@fast
@given(boxes())
def test_patch_lam_counts_pixels(case):
    (yl, yh, xl, xh), size, grid = case
    mask = torch.ones(size, dtype=torch.bool)
    mask[yl:yh, xl:xh] = False
    kept = patch_lam((yl, yh, xl, xh), size, grid)
    torch.testing.assert_close(kept, counted(mask, grid), rtol=0, atol=1e-12)
    assert kept.mean().item() == pytest.approx(1 - (yh - yl) * (xh - xl) / (size[0] * size[1]))


@pytest.mark.parametrize("size, grid", [((15, 21), (5, 3)), ((16, 16), (4, 4)), ((7, 10), (3, 4))])
def test_patch_lam_of_empty_and_full_boxes(size, grid):
    height, width = size
    for empty in [(0, 0, 0, 0), (3, 3, 2, 5), (2, 5, 4, 4), (height, height, width, width)]:
        assert (patch_lam(empty, size, grid) == 1).all()
    full = patch_lam((0, height, 0, width), size, grid)
    torch.testing.assert_close(full, torch.zeros_like(full), rtol=0, atol=1e-12)


def test_patch_lam_of_patches_that_cut_pixels():
    # 3 columns over 4 pixels: the box of the first two pixels covers column 0 and half of column 1.
    assert patch_lam((0, 1, 0, 2), (1, 4), (1, 3)).tolist() == pytest.approx([0, 0.5, 1])


# --- PatchMixup


def constant_images(batch, height, width):
    """Image i is filled with the value i, so a mixed pixel shows which images it came from."""
    return torch.arange(batch, dtype=torch.float32)[:, None, None, None].expand(-1, 3, height, width).contiguous()


@pytest.mark.parametrize("mode", ["elem", "pair"])
@pytest.mark.parametrize(
    "options",
    [
        dict(mixup_alpha=0.8, cutmix_alpha=1.0),
        dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.6, switch_prob=0.3),
        dict(mixup_alpha=0.4, cutmix_alpha=0.0),
        dict(mixup_alpha=0.0, cutmix_alpha=0.7),
        dict(mixup_alpha=0.0, cutmix_alpha=0.7, correct_lam=False),
        dict(mixup_alpha=0.8, cutmix_alpha=0.0, cutmix_minmax=(0.2, 0.8)),
    ],
    ids=str,
)
def test_draws_as_timm_does(mode, options):
    samples, labels = normals(0, 12, 3, 18, 25).float(), torch.arange(12) % 5
    theirs = Mixup(**options, mode=mode, label_smoothing=0.1, num_classes=5)
    ours = PatchMixup(**options, mode=mode)
    for seed in range(5):
        np.random.seed(seed)
        expected_samples, expected_targets = theirs(samples.clone(), labels)
        np.random.seed(seed)
        mixed, target = ours(samples, labels)
        torch.testing.assert_close(mixed, expected_samples, rtol=0, atol=1e-6)
        soft = textbook.soft_targets(*target[:2], target.lam[:, None], num_classes=5, smoothing=0.1)[:, 0]
        torch.testing.assert_close(soft.float(), expected_targets, rtol=0, atol=1e-6)
        assert torch.equal(target.partner, labels.flip(0))


@pytest.mark.parametrize("minmax", [None, (0.3, 0.7)], ids=str)
@pytest.mark.parametrize("size, grid", [((24, 40), (3, 5)), ((15, 15), (5, 5)), ((28, 12), (4, 6))])
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_cutmix_labels_match_the_pixels(mode, size, grid, minmax):
    batch = 6
    samples = constant_images(batch, *size)
    mixup_fn = PatchMixup(mixup_alpha=0, cutmix_alpha=1.0, cutmix_minmax=minmax, mode=mode, grid=grid)
    own, partner = samples, samples.flip(0)
    kept_boxes = set()
    for seed in range(8):
        np.random.seed(seed)
        mixed, target = mixup_fn(samples, torch.arange(batch))
        kept = mixed == own
        assert torch.equal(kept, mixed != partner)
        for i in range(batch):
            mask = kept[i, 0]
            assert (kept[i] == mask).all()
            assert target.lam[i].item() == pytest.approx(mask.double().mean().item(), abs=1e-6)
            torch.testing.assert_close(target.patch_lam[i].double(), counted(mask, grid), rtol=0, atol=1e-6)
        if mode == "batch":
            assert (kept == kept[:1]).all()
        if mode == "pair":
            assert torch.equal(kept, kept.flip(0))
        kept_boxes.add(tuple(kept.flatten().tolist()))
    assert len(kept_boxes) > 4


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixup_labels_match_the_blend(mode):
    samples = constant_images(6, 8, 12)
    mixup_fn = PatchMixup(mixup_alpha=0.8, cutmix_alpha=0, mode=mode, grid=(2, 3))
    np.random.seed(0)
    mixed, target = mixup_fn(samples, torch.arange(6))
    lam = target.lam[:, None, None, None]
    torch.testing.assert_close(mixed, lam * samples + (1 - lam) * samples.flip(0))
    assert torch.equal(target.patch_lam, target.lam[:, None].expand(-1, 6))
    num_draws = {"batch": 1, "pair": 3, "elem": 6}[mode]
    assert len(target.lam.unique()) == num_draws
    assert ((target.lam > 0) & (target.lam < 1)).all()


def test_lam_without_correction_is_the_drawn_share_but_patches_follow_the_pixels():
    samples = constant_images(2, 16, 16)
    np.random.seed(3)
    _, corrected = PatchMixup(0, 1.0, grid=(1, 1))(samples, torch.arange(2))
    np.random.seed(3)
    _, drawn = PatchMixup(0, 1.0, correct_lam=False, grid=(1, 1))(samples, torch.arange(2))
    assert torch.equal(drawn.patch_lam, corrected.patch_lam)
    torch.testing.assert_close(corrected.lam, corrected.patch_lam[:, 0])
    assert (drawn.lam - corrected.lam).abs().min() > 0.01


def test_cutmix_minmax_bounds_the_box():
    samples = constant_images(2, 40, 60)
    mixup_fn = PatchMixup(mixup_alpha=0, cutmix_alpha=0, cutmix_minmax=(0.25, 0.75))
    np.random.seed(0)
    heights, widths = set(), set()
    for _ in range(100):
        mixed, _ = mixup_fn(samples, torch.arange(2))
        pasted = mixed[0, 0] == 1
        heights.add(pasted.any(dim=1).sum().item())
        widths.add(pasted.any(dim=0).sum().item())
    assert min(heights) >= 10 and max(heights) < 30 and len(heights) > 10
    assert min(widths) >= 15 and max(widths) < 45 and len(widths) > 15


def assert_plain(samples, labels, mixed, target, num_patches):
    assert torch.equal(mixed, samples)
    assert torch.equal(target.labels, labels)
    assert torch.equal(target.lam, torch.ones(len(samples)))
    assert torch.equal(target.patch_lam, torch.ones(len(samples), num_patches))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_prob_0_leaves_everything(mode):
    samples, labels = normals(0, 4, 3, 8, 8).float(), torch.arange(4)
    for _ in range(5):
        assert_plain(samples, labels, *PatchMixup(prob=0, mode=mode, grid=(2, 2))(samples, labels), num_patches=4)


@pytest.mark.parametrize("batch", [1, 4, 5])
def test_both_alphas_0_are_plain_labels_for_any_batch(batch):
    samples, labels = normals(0, batch, 3, 8, 8).float(), torch.arange(batch)
    assert_plain(samples, labels, *PatchMixup(0, 0, grid=(2, 2))(samples, labels), num_patches=4)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_prob_is_the_share_of_mixed_draws(mode):
    mixup_fn = PatchMixup(mixup_alpha=1.0, cutmix_alpha=0, prob=0.5, mode=mode)
    samples = torch.zeros(20, 3, 1, 1)
    np.random.seed(0)
    mixed = torch.stack(
        [mixup_fn(samples, torch.arange(20))[1].lam != 1 for _ in range(400 if mode == "batch" else 40)]
    )
    assert mixed.double().mean().item() == pytest.approx(0.5, abs=0.08)
    if mode == "batch":
        assert (mixed == mixed[:, :1]).all()


@pytest.mark.parametrize("mode", ["batch", "elem"])
@pytest.mark.parametrize("switch_prob", [0.0, 0.5, 1.0])
def test_switch_prob_chooses_between_mixup_and_cutmix(switch_prob, mode):
    samples = constant_images(4, 32, 32)
    mixup_fn = PatchMixup(mixup_alpha=1.0, cutmix_alpha=1.0, switch_prob=switch_prob, mode=mode)
    np.random.seed(0)
    blended = []
    for _ in range(60):
        mixed, _ = mixup_fn(samples, torch.arange(4))
        is_whole = (mixed == samples) | (mixed == samples.flip(0))
        blended += (~is_whole).flatten(1).any(dim=1).tolist()
    assert np.mean(blended) == pytest.approx(1 - switch_prob, abs=0 if switch_prob in (0, 1) else 0.15)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0)], ids=["mixup", "cutmix"])
def test_samples_and_labels_are_not_changed_in_place(mode, alphas):
    samples, labels = normals(0, 4, 3, 9, 9).float(), torch.arange(4)
    before = samples.clone()
    np.random.seed(1)
    mixed, target = PatchMixup(*alphas, mode=mode)(samples, labels)
    assert not torch.equal(mixed, before)
    assert torch.equal(samples, before)
    assert torch.equal(labels, torch.arange(4)) and torch.equal(target.labels, labels)


def test_no_grid_gives_no_patch_lam():
    samples = constant_images(2, 8, 8)
    assert PatchMixup()(samples, torch.arange(2))[1].patch_lam is None
    assert PatchMixup(0, 0)(samples, torch.arange(2))[1].patch_lam is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_lam_is_float32_or_float64(dtype):
    mixed, target = PatchMixup(grid=(2, 2))(constant_images(2, 8, 8).to(dtype), torch.arange(2))
    assert mixed.dtype == dtype
    assert target.lam.dtype == target.patch_lam.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("options", [dict(), dict(prob=0.0), dict(mixup_alpha=0), dict(cutmix_alpha=0)], ids=str)
def test_odd_batch_is_an_error(options):
    with pytest.raises(ValueError, match="must be even; got 3"):
        PatchMixup(**options)(torch.zeros(3, 3, 8, 8), torch.arange(3))


def test_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match=r"'half'.*batch, pair, elem"):
        PatchMixup(mode="half")
