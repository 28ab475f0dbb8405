"""Inner products of whole tensors, as sums of a technique."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inner"]

#: Elements of a parameter from which on a CPU's linear algebra takes an inner product; of as many, a cell has few
#: parameters.
LARGE = 1 << 15
#: Elements that it adds up at once: it adds in single precision, without the care of torch's sums.
PIECE = 1 << 17


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each parameter's part that is here, a sum for :meth:`~.base.Technique.sums`.

    Where products lie in memory one after the other, and are gone before the next, they take a fraction of the time of
    several at once; a large parameter's are never there at all.

    Args:
        a: ``[N, *shape]``.
        b: The same shape and dtype.

    Returns:
        ``[N, 1, …]``; compiled, the products ``[N, *shape]``, which the engine adds up and the compiler never stores.
    """
    if torch.compiler.is_compiling():
        return a * b
    n, one_each = a.shape[0], (a.shape[0], *[1] * (a.ndim - 1))
    count = a.numel() // n
    if a.device.type != "cpu" or count < LARGE:
        return (a * b).sum(tuple(range(1, a.ndim)), keepdim=True) if a.ndim > 1 else a * b
    if n == 1 and count <= PIECE:
        return torch.dot(a.reshape(-1), b.reshape(-1)).reshape(one_each)
    rows = zip(a.reshape(n, -1), b.reshape(n, -1), strict=True)
    parts = [torch.dot(x, y) for row in rows for x, y in zip(*(v.split(PIECE) for v in row), strict=True)]
    return torch.stack(parts).reshape(n, -1).sum(1).reshape(one_each)
