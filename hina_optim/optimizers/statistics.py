"""Statistics over many tensors that can be added up across shards, and the numbers made of them.

Nothing here waits for the device: tensors in, 0-d tensors or small vectors out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["BINS", "log_histogram", "log_quantiles", "rank_pattern", "resolution"]

#: Bins of a histogram. Between 1e-7 and 1e-3 a bin is 1.8 % wide.
BINS = 512

#: Elements that are processed at a time: bounds temporary memory, and keeps float32 counts exact (below 2²⁴).
CHUNK = 1 << 22


def log_histogram(tensors: Iterable[Tensor], low: float, high: float, device: torch.device | str = "cpu") -> Tensor:
    """Count elements in :data:`BINS` bins of equal width in the logarithm.

    Histograms of the same range can be added: the parts of a sharded tensor give together what the whole gives.

    Args:
        tensors: Any shapes and floating dtypes, positive values. Values beyond the range count as the end
            of the range that they are beyond of (bf16 rounds a value at a bound to either side).
        low: Lower end of the range, > 0.
        high: Upper end, ≥ ``low``.
        device: Where the tensors are.

    Returns:
        float32 ``[BINS]``.
    """
    first, last = _range(low, high)
    counts = torch.zeros(BINS, device=device)
    for chunk in _chunks(tensors):
        counts += _count(chunk.log().clamp(first, last), first, last)
    return counts


def log_quantiles(counts: Tensor, low: float, high: float, q: Sequence[float]) -> Tensor:
    """Quantiles from a histogram of :func:`log_histogram`, interpolated within a bin.

    The error is at most one bin: a factor of :func:`resolution`.

    Args:
        counts: ``[BINS]``.
        low: As the histogram was made.
        high: As the histogram was made.
        q: Shares in [0, 1].

    Returns:
        float32 ``[len(q)]``; NaN where nothing was counted.
    """
    first, last = _range(low, high)
    cumulative = counts.round().long().cumsum(0).float()  # of integers: a float cumsum is not deterministic on CUDA
    total = cumulative[-1]
    wanted = torch.stack([total * share for share in q])
    # the first bin that reaches the wanted count; an empty bin never is, unless nothing was counted at all
    index = torch.searchsorted(cumulative, wanted.clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=BINS - 1)
    inside = counts[index]
    share = 1 - (cumulative[index] - wanted) / inside.clamp(min=1)
    value = (first + (index + share.clamp(0, 1)) * ((last - first) / BINS)).exp()
    return torch.where(total > 0, value, torch.full_like(value, math.nan))


def resolution(low: float, high: float) -> float:
    """The factor between the two ends of one bin: quantiles are known to within it."""
    first, last = _range(low, high)
    return math.exp((last - first) / BINS)


def rank_pattern(importance: Mapping[str, float], rank: int) -> dict[str, int]:
    """Ranks for the modules of a LoRA in proportion to their importance, in the form of peft's ``rank_pattern``.

    A module's importance is the mean over its parameters, and its rank is ``rank`` times that over the mean of all
    modules, rounded, between 1 and ``4·rank``: the ranks add up to about what a uniform ``rank`` would.

    Args:
        importance: Score of each parameter, by name. If there are LoRA matrices in peft's names, they alone count;
            otherwise every ``….weight``, so that a full fine-tuning can tell where an adapter is needed.
        rank: The uniform rank that is redistributed.

    Returns:
        ``{module path as the base model knows it: rank}``; empty if nothing was measured, or no name fits.

    Example:
        >>> rank_pattern({"enc.q.lora_A.default.weight": 3.0, "enc.v.lora_A.default.weight": 1.0}, rank=8)
        {'enc.q': 12, 'enc.v': 4}
    """
    modules: dict[str, list[float]] = {}
    for expression in (_LORA, _WEIGHT):
        for name, score in importance.items():
            match = expression.match(name)
            if match:
                modules.setdefault(match["module"], []).append(score)
        if modules:
            break
    means = {module: sum(scores) / len(scores) for module, scores in modules.items()}
    average = sum(means.values()) / max(1, len(means))
    if average <= 0:
        return {}
    return {module: min(4 * rank, max(1, round(rank * mean / average))) for module, mean in means.items()}


# peft wraps the base model as base_model.model; what stands before that belongs to whoever holds the peft model
_LORA = re.compile(r"(?:.*\bbase_model\.model\.)?(?P<module>.+)\.lora_(?:embedding_)?[AB](?:\..+)?$")
_WEIGHT = re.compile(r"(?P<module>.+)\.weight$")


def _count(x: Tensor, first: float, last: float) -> Tensor:
    """Elements in each bin, float32 ``[BINS]``."""
    if torch.are_deterministic_algorithms_enabled():  # histc refuses to run then, on CUDA
        index = ((x - first) * (BINS / (last - first))).long().clamp(0, BINS - 1)
        return torch.zeros(BINS, device=x.device).index_add_(0, index, torch.ones_like(x))
    return torch.histc(x, bins=BINS, min=first, max=last)


def _range(low: float, high: float) -> tuple[float, float]:
    """The range in logarithms; one of about a single value is widened to 0.1 %, more than float32 rounds."""
    first, last = math.log(low), math.log(high)
    return (first, last) if last - first > 1e-3 else (first - 5e-4, last + 5e-4)


def _chunks(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """All elements as flat float32 pieces of at most :data:`CHUNK`; small tensors are joined."""
    waiting: list[Tensor] = []
    size = 0
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        for piece in flat.split(CHUNK):
            if size + piece.numel() > CHUNK:
                yield torch.cat(waiting).float()
                waiting, size = [], 0
            if piece.numel():
                waiting.append(piece)
                size += piece.numel()
    if waiting:
        yield torch.cat(waiting).float()
