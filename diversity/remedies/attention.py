"""Remedies that change what attention multiplies: its values and its maps."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from .registry import check_number, check_switch, remedy
from .sites import BlockShape


@remedy("value_residual", changes=("values",), reads=("first_values",))
class ValueResidual(nn.Module):
    """l1 v_first + l2 v in place of the values v in all blocks but the first, with v_first those of the first block.

    Args:
        value_residual_first: l1.
        value_residual_own: l2.
        value_residual_learnable: l1 and l2 are parameters of each block, which begin with these values.

    Parameters: none; 2 in each block but the first if learnable.

    Raises:
        ValueError: a setting that is not a number, or not True or False.

    Source: Zhou et al., Value Residual Learning, ACL 2025.
    Differs: none.
    """

    def __init__(
        self,
        blocks: Sequence[BlockShape],
        *,
        value_residual_first: float = 0.5,
        value_residual_own: float = 0.5,
        value_residual_learnable: bool = False,
    ):
        super().__init__()
        self.first = check_number("value_residual_first", value_residual_first)
        self.own = check_number("value_residual_own", value_residual_own)
        self.weights = None
        if check_switch("value_residual_learnable", value_residual_learnable):
            self.weights = nn.ParameterDict({str(i): block.filled(2) for i, block in enumerate(blocks) if i > 0})
            with torch.no_grad():
                for weight in self.weights.values():
                    weight[0], weight[1] = self.first, self.own

    def forward(self, i: int, values: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        if i == 0:
            return values
        l1, l2 = (self.first, self.own) if self.weights is None else self.weights[str(i)].unbind()
        return (l1 * first + l2 * values).to(values.dtype)


@remedy("reattention", changes=("maps",))
class ReAttention(nn.Module):
    """BN(Theta A): the heads' maps A mixed by a learned H x H matrix, then batch normalisation of each head's map.

    Maps are after softmax and dropout. Rows do not sum to 1 any more. Attention is not fused, so that maps exist.
    Statistics of a batch are those of a process, and so are running ones, as with `nn.BatchNorm2d`. They are updated
    once in a step, also where a checkpointed block is computed again.

    Parameters: H x H + 2 H in each block.

    Source: Zhou et al., DeepViT: Towards Deeper Vision Transformer, 2021.
    Differs: Theta begins as the identity, which draws no random numbers, not as a random matrix; no bias in front of
        the batch normalisation, which would remove it.
    """

    def __init__(self, blocks: Sequence[BlockShape]):
        super().__init__()
        self.mixing = nn.ParameterList(block.filled(block.num_heads**2) for block in blocks)  # flat: no weight decay
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(block.num_heads, device=block.device, dtype=block.dtype) for block in blocks
        )
        with torch.no_grad():
            for mixing, block in zip(self.mixing, blocks, strict=True):
                mixing[:: block.num_heads + 1] = 1

    def forward(self, i: int, maps: torch.Tensor) -> torch.Tensor:
        heads = maps.shape[1]
        mixed = F.conv2d(maps, self.mixing[i].view(heads, heads, 1, 1))
        return self._normed(self.norms[i], mixed).to(maps.dtype)

    def _normed(self, norm: nn.BatchNorm2d, mixed: torch.Tensor) -> torch.Tensor:
        in_backward = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if not (norm.training and in_backward):
            return norm(mixed)
        momentum, norm.momentum = norm.momentum, 0.0  # a checkpointed block is computed again
        try:
            return norm(mixed)
        finally:
            norm.momentum = momentum
            norm.num_batches_tracked -= 1
