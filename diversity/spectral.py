"""The spread of the spectrum of X X^T for items X, by power iteration or exactly."""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from .similarity import unit


def spectral_spread(
    items: torch.Tensor,
    probes: torch.Tensor | None = None,
    steps: int = 1,
    exact: bool = False,
    draw: Callable[..., torch.Tensor] = torch.randn,
    eps: float = 0.0,
) -> torch.Tensor:
    """Largest minus smallest eigenvalue of G = X X^T, for items X as they are.

    By power iteration from each end: with a start vector x, y = G x and largest = <G y, y> / <y, y>. The same step on
    G - largest * I, from a second start vector, finds the eigenvalue farthest from `largest`, which is smallest -
    largest. Each step beyond the first replaces the start vectors by better ones, which count as constants in the
    gradient.

    Args:
        items: [..., items, D].
        probes: [2, ..., items, 1], the start vectors for the largest and for the smallest eigenvalue; drawn when None.
        steps: power steps for each end of the spectrum, >= 1.
        exact: by a dense eigenvalue solver, without probes and steps; on CUDA it waits for the host.
        draw: torch.randn or torch.rand, for probes.
        eps: added to the denominators <y, y>.

    Returns:
        [...], normally positive. Power iteration with eps = 0 never overestimates it; few steps underestimate it.

    Raises:
        ValueError: no step, or several steps of the exact solver.
    """
    if steps < 1 or (exact and steps > 1):
        raise ValueError(f"power steps must be >= 1, and 1 where the spread is exact, without any; got {steps}")
    if exact:
        return _exact_spread(items)
    if probes is None:
        probes = draw(2, *items.shape[:-1], 1, dtype=items.dtype, device=items.device)
    product, form = _gram_product(items)
    start = probes.squeeze(-1).movedim(0, -2)  # [..., 2, items]
    if steps > 1:
        start = _better_start(product, form, start, steps - 1, eps)
    pushed = product(start)
    towards_largest, second = pushed[..., :1, :], pushed[..., 1:, :]
    largest = _rayleigh_quotient(form, towards_largest, eps)
    shifted = second - largest * start[..., 1:, :]
    farthest = _rayleigh_quotient(lambda x: form(x) - largest * x.square().sum(dim=-1, keepdim=True), shifted, eps)
    return -farthest[..., 0, 0]


def _exact_spread(items: torch.Tensor) -> torch.Tensor:
    surplus = items.shape[-2] > items.shape[-1]
    gram = items.mT @ items if surplus else items @ items.mT
    not_finite = 0 * gram.sum(dim=(-2, -1))  # passed on, where the solver would raise
    eigenvalues = torch.linalg.eigvalsh(gram.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
    smallest = 0 if surplus else eigenvalues[..., 0]
    return eigenvalues[..., -1] - smallest + not_finite


@torch.no_grad()
def _better_start(product, form, start, steps, eps):
    """The start vectors [..., 2, items] after `steps` power steps on G and on G - largest * I, normalised."""
    first, second = start[..., :1, :], start[..., 1:, :]
    for _ in range(steps):
        first = unit(product(first))
    largest = _rayleigh_quotient(form, first, eps)
    for _ in range(steps):
        second = unit(product(second) - largest * second)
    return torch.cat((first, second), dim=-2)


def _gram_product(items: torch.Tensor) -> tuple[Callable[[torch.Tensor], torch.Tensor], ...]:
    """For rows x [..., k, items]: x -> x G and x -> <x G, x> [..., k, 1], with G = X X^T.

    G is formed only where it is smaller than one item: few, long items. Otherwise <x G, x> is the squared norm of x X.
    """
    count, length = items.shape[-2:]
    if count * count <= length:
        gram = items @ items.mT
        return lambda x: x @ gram, lambda x: (x @ gram * x).sum(dim=-1, keepdim=True)
    return lambda x: _GramProduct.apply(items, x), lambda x: (x @ items).square().sum(dim=-1, keepdim=True)


class _GramProduct(torch.autograd.Function):
    """x X X^T for rows x [..., k, items] and X [..., items, D].

    Autograd alone would form the gradient of X twice, once transposed, and add the two; this forms it in one product.
    It has no second derivative.
    """

    @staticmethod
    def forward(ctx, items, x):
        inner = x @ items
        ctx.save_for_backward(items, x, inner)
        return inner @ items.mT

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        items, x, inner = ctx.saved_tensors
        grad_inner = grad @ items
        left, right = torch.cat((grad, x), dim=-2), torch.cat((inner, grad_inner), dim=-2)
        if torch.compiler.is_compiling():  # a sum of four matrices fuses with the other gradients of X
            grad_items = (left.unsqueeze(-1) * right.unsqueeze(-2)).sum(dim=-3)
        else:
            grad_items = left.mT @ right
        return grad_items, grad_inner @ items.mT if ctx.needs_input_grad[1] else None


def _rayleigh_quotient(form: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, eps: float) -> torch.Tensor:
    """<x G, x> / (<x, x> + eps) for rows [..., 1, items] and `form` x -> <x G, x>, as [..., 1, 1]; 0 where x is 0."""
    norm = x.square().sum(dim=-1, keepdim=True) + eps
    return form(x) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
