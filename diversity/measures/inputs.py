"""What the measures read: one class for each kind of input; an attribute is computed when a measure first reads it.

Letters: B images (of a Swin: windows), P patch tokens, N tokens with prefix tokens, D width, H heads, hd = D / H.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..circuits import circuit_cosines, circuit_singular_values
from ..similarity import cosines, mean_unit


@dataclass
class ChunkTokens:
    """Patch tokens of one layer for some images.

    Attributes:
        tokens: [B, P, D].
        first: [B, P, D], those of the first layer of its stage.
        before: [B, P, D], the input of the block whose output `tokens` are; None for the input of the first block.
    """

    tokens: torch.Tensor
    first: torch.Tensor
    before: torch.Tensor | None

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Norms of the tokens [B, P]."""
        return torch.linalg.vector_norm(self.tokens, dim=-1)

    @cached_property
    def gram(self) -> torch.Tensor:
        """Inner products of an image's tokens [B, P, P]."""
        return self.tokens @ self.tokens.mT

    @cached_property
    def mean(self) -> torch.Tensor:
        """Mean token of each image [B, D]."""
        return self.tokens.mean(dim=1)

    @cached_property
    def centred(self) -> torch.Tensor:
        """Tokens without the mean of their image [B, P, D]."""
        return self.tokens - self.mean.unsqueeze(1)


@dataclass
class ChunkMaps:
    """Attention maps of one block for some images.

    Attributes:
        maps: [B, H, N, N], after the softmax, prefix tokens included.
        previous: [B, N * N], the `mean_map` of the block before; None where its maps are of other windows.
        distances: [P, P], of the patches in the grid, in patches; None where the tokens do not lie on a grid.
    """

    maps: torch.Tensor
    previous: torch.Tensor | None
    distances: torch.Tensor | None

    @cached_property
    def mean_map(self) -> torch.Tensor:
        """Mean over the heads of flattened maps of unit length [B, N * N]."""
        return mean_unit(self.maps.flatten(start_dim=2))


@dataclass
class ChunkHeads:
    """What the heads of one block add to the tokens, before LayerScale.

    Attributes:
        outputs: [B, N, D], the input of the output projection, head by head.
        projection: [D, D'], the inner products of the columns of the projection's weight, W^T W.
        heads: H.
    """

    outputs: torch.Tensor
    projection: torch.Tensor
    heads: int

    @cached_property
    def head_gram(self) -> torch.Tensor:
        """Inner products of the heads' contributions y_h W_O^h, flattened over tokens [B, H, H].

        <y_g W_g, y_h W_h> is the sum over the entries of (y_g^T y_h) * (W_g W_h^T), so that the contributions, H times
        as large as the tokens, are never formed.
        """
        products = (self.outputs.mT @ self.outputs) * self.projection
        heads = (self.heads, -1)
        return products.unflatten(-1, heads).unflatten(-3, heads).sum(dim=(-3, -1))


@dataclass
class AllTokens:
    """Patch tokens of one layer for all images.

    Attributes:
        variance: [D], fractions of the variance of the tokens along their principal axes, in falling order.
        images: number of images.
        squares_within_images: sum of squares of the tokens around the mean token of their image.
        squares_between_images: sum of squares of these means around the mean of all, once for every token.
        squares_between_classes: the same of the classes' means; None without labels, with a single class, or where no
            class has two images.
        mean_singular_values: [D], of the matrix of all images' mean tokens, in falling order.
    """

    variance: torch.Tensor
    images: int
    squares_within_images: torch.Tensor
    squares_between_images: torch.Tensor
    squares_between_classes: torch.Tensor | None
    mean_singular_values: torch.Tensor


@dataclass
class AllUnits:
    """Hidden units of one block's MLP for all images.

    Attributes:
        maxima: [units], the greatest output of the activation function for any token of any image.
    """

    maxima: torch.Tensor


@dataclass
class Matrix:
    """A matrix of weights.

    Attributes:
        matrix: [Dout, Din].
        singular_values: [min(Dout, Din)], in falling order, float64.
    """

    matrix: torch.Tensor
    singular_values: torch.Tensor

    @cached_property
    def row_abscosines(self) -> torch.Tensor:
        """Absolute cosines of every two rows [Dout, Dout], 0 on the diagonal."""
        return cosines(self.matrix).abs_().fill_diagonal_(0)


@dataclass
class Circuit:
    """The QK or the OV circuits of a block's heads; see circuits.py.

    Attributes:
        left, right: [H, hd, D], their factors, float64.
    """

    left: torch.Tensor
    right: torch.Tensor

    @cached_property
    def singular_values(self) -> torch.Tensor:
        """[H, hd], in falling order."""
        return circuit_singular_values(self.left, self.right)

    @cached_property
    def head_abscosines(self) -> torch.Tensor:
        """Absolute cosines of every two heads' circuits [H, H]."""
        return circuit_cosines(self.left, self.right).abs()


SOURCES = {
    "embedding": (ChunkTokens, AllTokens),
    "attention": (ChunkMaps, ChunkHeads),
    "mlp": (AllUnits,),
    "weight": (Matrix,),
    "circuit": (Circuit,),
}
"""{level of a measure: the classes of which it reads one}."""


def has(source: type, names: Sequence[str]) -> bool:
    """Whether a class of inputs has all of these attributes."""
    return all(name in source.__annotations__ or hasattr(source, name) for name in names)
