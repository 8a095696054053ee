"""Similarity of layers: linear CKA of the images' mean patch tokens."""

import torch

MINIBATCH = 256
"""Images that are compared with each other; the result does not depend on how a loader divides them into batches."""


class LayerSimilarity:
    """Linear CKA between all layers, from unbiased estimates of HSIC over minibatches of `MINIBATCH` images.

    With K = X X^T of the mean patch tokens X [n, D] of n images in one layer, and L those of another, both without
    their diagonals, HSIC(K, L) = (tr(K L) + sum(K) sum(L) / ((n - 1)(n - 2)) - 2 sum(K L) / (n - 2)) / (n (n - 3)), and
    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), each HSIC being the mean over the minibatches. A last minibatch that
    is smaller is left out if there is a full one.

    From 1 for layers that differ by a rotation and a factor to about 0; an unbiased estimate may be slightly negative.

    Source: Kornblith et al., ICML 2019; over minibatches Nguyen et al., ICLR 2021, with HSIC_1 of Song et al. 2012.
    Differs: images are compared by their mean patch tokens.
    """

    def __init__(self, layers: int):
        self.waiting, self.layers = [[] for _ in range(layers)], layers
        self.sum = None

    def add(self, layer: int, means: torch.Tensor):
        """Add the mean tokens [B, D] of further images; layers are added in order."""
        self.waiting[layer].append(means.double())
        if layer + 1 == self.layers:
            while sum(map(len, self.waiting[0])) >= MINIBATCH:
                self.waiting = [[torch.cat(chunks)] for chunks in self.waiting]
                hsic = self._hsic([tokens[:MINIBATCH] for (tokens,) in self.waiting])
                self.sum = hsic if self.sum is None else self.sum + hsic
                self.waiting = [[tokens[MINIBATCH:]] for (tokens,) in self.waiting]

    def cka(self) -> torch.Tensor | None:
        """[layers, layers], NaN where a layer does not distinguish the images; None for fewer than 4 images."""
        hsic = self.sum
        if hsic is None:
            rest = [torch.cat(chunks) for chunks in self.waiting]
            if len(rest[0]) < 4:
                return None
            hsic = self._hsic(rest)
        scale = torch.where(hsic.diagonal() > 0, hsic.diagonal(), torch.nan).rsqrt()
        return hsic * scale[:, None] * scale

    @staticmethod
    def _hsic(tokens: list[torch.Tensor]) -> torch.Tensor:
        """HSIC of every two layers, from the mean tokens [n, D] of each, D of any size.

        It is the inner product of the two matrices K from which the means of rows and columns are subtracted so that
        every row has sum 0 without its diagonal.
        """
        n = len(tokens[0])
        grams = []
        for means in tokens:
            centred = means - means.mean(dim=0)
            gram = (centred @ centred.mT).fill_diagonal_(0)
            rows = gram.sum(dim=1) / (n - 2)
            gram = gram - rows[:, None] - rows + gram.sum() / ((n - 1) * (n - 2))
            grams.append(gram.fill_diagonal_(0).flatten())
        grams = torch.stack(grams)
        return grams @ grams.mT / (n * (n - 3))
