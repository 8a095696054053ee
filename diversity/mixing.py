"""Mixup and CutMix that also return the label of every patch."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from timm.data.mixup import rand_bbox_minmax

MODES = ("batch", "pair", "elem")


class MixedTarget(NamedTuple):
    """Labels of a mixed batch: token t of image b is labelled labels[b] with weight lam and partner[b] with 1 - lam.

    Attributes:
        labels: [B], integer class of the first image.
        partner: [B], integer class of the image it was mixed with.
        lam: [B], fraction of the image (and of the class token's label) that comes from the first image.
        patch_lam: [B, P], the same fraction for each patch; None when no grid was given.
    """

    labels: torch.Tensor
    partner: torch.Tensor
    lam: torch.Tensor
    patch_lam: torch.Tensor | None = None


class PatchMixup:
    """timm's Mixup and CutMix with a label for every patch. Image i is mixed with image B-1-i.

    `draw` draws the random numbers of a batch on the host, from numpy's global generator, into one small tensor. `mix`
    and `target` mix images and labels on their device, by operations that torch.compile can trace and that never wait
    for the device. Calling the object does all three.

    Source: Mixup (Zhang et al. 2018), CutMix (Yun et al. 2019); labels per patch: The Principle of Diversity.
    Differs: any image size and grid; prob, switch_prob, mode and minmax are honoured.

    Args:
        mixup_alpha: Beta parameter of Mixup; 0 = no Mixup.
        cutmix_alpha: Beta parameter of CutMix; 0 = no CutMix.
        cutmix_minmax: (low, high) side lengths of the box as fractions of the image, in place of `cutmix_alpha`.
        prob: probability that a batch (pair, element) is mixed at all.
        switch_prob: probability of CutMix where both are on.
        mode: "batch", one draw for all images; "pair", one for each pair of partners; "elem", one for each image.
        correct_lam: weigh labels by the box after clipping at the border, not by the drawn fraction.
        grid: (rows, columns) of patches, or None when no per-patch label is needed.

    Raises:
        ValueError: an unknown mode, a negative alpha, or a probability outside [0, 1].
    """

    def __init__(
        self,
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        cutmix_minmax: tuple[float, float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        correct_lam: bool = True,
        grid: tuple[int, int] | None = None,
    ):
        if mode not in MODES:
            raise ValueError(f"unknown mixup mode {mode!r}; there are {', '.join(MODES)}")
        if min(mixup_alpha, cutmix_alpha) < 0:
            raise ValueError(f"alphas must be >= 0; got {mixup_alpha} and {cutmix_alpha}")
        if not (0 <= prob <= 1 and 0 <= switch_prob <= 1):
            raise ValueError(f"probabilities must lie in [0, 1]; got {prob} and {switch_prob}")
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = 1.0 if cutmix_minmax else cutmix_alpha
        self.cutmix_minmax = cutmix_minmax
        self.prob = prob
        self.switch_prob = switch_prob
        self.mode = mode
        self.correct_lam = correct_lam
        self.grid = grid

    def with_grid(self, grid: tuple[int, int] | None) -> "PatchMixup":
        """This object if it has a grid, otherwise a copy that has the given one."""
        if self.grid is not None:
            return self
        mixup = copy.copy(self)
        mixup.grid = grid
        return mixup

    def __call__(
        self, samples: torch.Tensor, labels: torch.Tensor, draws: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, MixedTarget]:
        """Mix a batch.

        Args:
            samples: [B, 3, H, W], left as it is; B even unless both alphas are 0.
            labels: [B], integer classes.
            draws: of `draw`, on the device of the samples; None = draw now.

        Returns:
            The mixed samples and their `MixedTarget`.

        Raises:
            ValueError: an odd batch, in which the middle image has no partner.
        """
        draws = self.draw(len(samples), samples.shape[-2:]) if draws is None else draws
        if draws is not None:
            draws = draws.to(samples.device)
        return self.mix(samples, draws), self.target(samples, labels, draws)

    def draw(self, batch: int, image_size: tuple[int, int]) -> torch.Tensor | None:
        """The random numbers for a batch of images.

        Args:
            batch: number of images.
            image_size: (height, width).

        Returns:
            None if both alphas are 0; otherwise float64 on the CPU, [B, 6], or [1, 6] in batch mode. Columns:
            the fraction of the first image in the label; its fraction in every pixel (below 1 under Mixup); and the box
            (yl, yh, xl, xh) that CutMix pastes from the partner, in pixels, empty without CutMix.

        Raises:
            ValueError: an odd batch.
        """
        if self.mixup_alpha == self.cutmix_alpha == 0:
            return None
        if batch % 2:
            raise ValueError(f"Mixup and CutMix pair the images of a batch, so its size must be even; got {batch}")
        count = {"batch": 1, "pair": batch // 2, "elem": batch}[self.mode]
        fractions, use_cutmix = self._draw_fractions(count)
        draws = np.zeros((count, 6))
        draws[:, :2] = fractions[:, None]
        cut = np.flatnonzero(use_cutmix & (fractions < 1))
        boxes = self._draw_boxes(fractions[cut], image_size)
        draws[cut, 1], draws[cut, 2:] = 1, boxes
        if self.correct_lam or self.cutmix_minmax:
            yl, yh, xl, xh = boxes.T
            draws[cut, 0] = 1 - (yh - yl) * (xh - xl) / (image_size[0] * image_size[1])
        if self.mode == "pair":
            draws = np.concatenate((draws, draws[::-1]))
        return torch.tensor(draws)

    def mix(
        self, samples: torch.Tensor, draws: torch.Tensor | None, partners: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The mixed samples [B, 3, H, W]; `draws` on their device, `partners` the flipped samples if they are known."""
        if draws is None:
            return samples
        partners = samples.flip(0) if partners is None else partners
        own, other = (fraction.to(samples.dtype)[:, None, None, None] for fraction in (draws[:, 1], 1 - draws[:, 1]))
        # On a CPU the draws can be read, and operations that change nothing are skipped.
        can_skip = draws.device.type == "cpu" and not torch.compiler.is_compiling()
        blended = samples if can_skip and (own == 1).all() else samples * own + partners * other
        if can_skip and (draws[:, 2:] == 0).all():
            return blended
        return torch.where(in_box(draws[:, 2:], samples.shape[-2:]), partners, blended)

    def target(self, samples: torch.Tensor, labels: torch.Tensor, draws: torch.Tensor | None) -> MixedTarget:
        """The labels [B] of `samples` as mixed by `draws`."""
        batch, dtype = len(samples), torch.promote_types(samples.dtype, torch.float32)
        num_patches = None if self.grid is None else self.grid[0] * self.grid[1]
        if draws is None:
            lam = torch.ones(batch, dtype=dtype, device=samples.device)
            kept = None if self.grid is None else lam[:, None].expand(-1, num_patches)
        else:
            lam = draws[:, 0].to(dtype).expand(batch)
            kept = None
            if self.grid is not None:
                kept = draws[:, 1:2] * patch_lam(draws[:, 2:].unbind(1), samples.shape[-2:], self.grid)
                kept = kept.to(dtype).expand(batch, -1)
        return MixedTarget(labels, labels.flip(0), lam, kept)

    def _draw_fractions(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Fractions of the first image (1 = unmixed) and whether to CutMix, [count] each; timm's order of draws."""
        use_cutmix = np.full(count, self.mixup_alpha <= 0)
        if self.mixup_alpha > 0 and self.cutmix_alpha > 0:
            use_cutmix = np.random.rand(count) < self.switch_prob
        fractions = np.ones(count)
        if self.cutmix_alpha > 0:
            fractions = np.random.beta(self.cutmix_alpha, self.cutmix_alpha, size=count)
        if self.mixup_alpha > 0:
            mixup_fractions = np.random.beta(self.mixup_alpha, self.mixup_alpha, size=count)
            fractions = np.where(use_cutmix, fractions, mixup_fractions)
        return np.where(np.random.rand(count) < self.prob, fractions, 1.0), use_cutmix

    def _draw_boxes(self, fractions: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
        """One box (yl, yh, xl, xh) for each fraction, [n, 4], drawn as in timm but all at once."""
        if self.cutmix_minmax:
            boxes = [rand_bbox_minmax(image_size, self.cutmix_minmax) for _ in fractions]
            return np.array(boxes, dtype=int).reshape(-1, 4)
        sides = (np.sqrt(1 - fractions)[:, None] * image_size).astype(int)
        centres = np.random.randint(0, image_size, size=sides.shape)
        low, high = np.clip((centres - sides // 2, centres + (sides + 1) // 2), 0, image_size)
        return np.stack((low, high), axis=2).reshape(-1, 4)


def in_box(boxes: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
    """Which pixels lie in the box (yl, yh, xl, xh) of their image: boxes [B, 4] -> [B, 1, H, W], boolean."""
    yl, yh, xl, xh = boxes[:, :, None].unbind(1)
    rows, columns = (torch.arange(side, device=boxes.device) for side in image_size)
    return ((yl <= rows) & (rows < yh))[:, None, :, None] & ((xl <= columns) & (columns < xh))[:, None, None, :]


def patch_lam(
    bbox: Sequence[int] | Sequence[torch.Tensor], image_size: tuple[int, int], grid: tuple[int, int]
) -> torch.Tensor:
    """Fraction of each patch's pixels that CutMix keeps from the first image.

    Args:
        bbox: (yl, yh, xl, xh), the pasted box in pixels, upper ends excluded; numbers, or tensors [B] for B boxes.
        image_size: (height, width) in pixels.
        grid: (rows, columns) of patches.

    Returns:
        [P], or [B, P] for B boxes, float64, row by row, in [0, 1]: 1 outside the box, 0 inside.

    Source: The Principle of Diversity, mixing-based patch diversity.
    Differs: none for square grids of square patches; others work too.
    """
    yl, yh, xl, xh = bbox
    rows = _overlap(yl, yh, image_size[0], grid[0])
    columns = _overlap(xl, xh, image_size[1], grid[1])
    return (1 - rows[..., :, None] * columns[..., None, :]).flatten(-2)


def _overlap(low, high, length: int, count: int) -> torch.Tensor:
    """Fraction of each of `count` equal parts of [0, length) that is in [low, high); one row for each interval."""
    low, high = (torch.as_tensor(end, dtype=torch.float64)[..., None] for end in (low, high))
    edges = torch.arange(count + 1, dtype=torch.float64, device=low.device) * length / count
    covered = torch.minimum(edges[1:], high) - torch.maximum(edges[:-1], low)
    return covered.clamp(min=0) * count / length
