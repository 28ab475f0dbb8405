"""Relationships: parameters that belong together learn a little faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hina_optim import arguments as rule
from hina_optim.techniques.base import Flow, Folded, ParamInfo, PeriodicTechnique, Relations, Slot, Sums

__all__ = ["Relationships", "describe_relationships", "interaction_type", "with_random_signs"]

#: Numbers kept of a gradient. The cosine of two independent gradients is then off by about 1/√64.
SKETCH = 64

#: Share of the best score that is added to a rate.
GAIN = 0.2

#: Relations remembered for each parameter.
KEPT = 3

#: Odd multipliers of the hash that the signs of a sketch come from, as int32.
_FACTORS = (0x9E3779B9 - (1 << 32), 0x2C1B3C6D, 0x297A2D39)

#: Elements of the table of pairs worked on at once: bounds the memory for any number of parameters.
BLOCK = 1 << 22


class Relationships(PeriodicTechnique):
    """Find pairs of matrices that belong together, and raise the rate of both.

    Every ``interval`` steps each gradient is folded into a sketch of 64 numbers: element ``i`` (of the whole
    flattened gradient), with a sign hashed from ``i``, is added to number ``i mod 64``. The expected dot product of
    two sketches is that of the gradients. Sketches are scaled to length 1 and averaged over time with ``decay``.
    Then, for all pairs of matrices ``x ≠ y`` (first dimension × all others)::

        compatibility = 1                                   if they are the two halves of one adapter
                      = 0.7·share + 0.3·|cosine of sketches|  else; share: how many of the four equalities
                        rows = rows, columns = columns, rows = columns, columns = rows hold
        rate <- rate · (1 + 0.2 · best compatibility)       where it is at least the threshold

    The three best that reach the threshold are remembered for each matrix. All pairs come from one matrix product, in
    blocks of rows, so that memory stays bounded. Refreshed one step after measuring, on the device.

    Cosines mean something between gradients of one shape only; between others they are noise of about 1/8.

    First in a recipe but for other periodic techniques, so that it sees the raw gradient. State: 71 numbers a matrix,
    float32.

    Args:
        threshold: Compatibility from which on a relation counts, in [0, 1]. 1 keeps adapter pairs only (and exact
            copies).
        decay: Share of the old sketch kept at each measurement, in [0, 1).
        interval: Steps from one measurement to the next, an integer >= 1.

    Raises:
        ValueError: An argument is not what is said above.

    References:
        Count sketch: M. Charikar, K. Chen, M. Farach-Colton, "Finding frequent items in data streams", ICALP 2002. The
        rest is this project's own.
    """

    name: ClassVar[str] = "relationships"
    reads: ClassVar[frozenset[str]] = frozenset({"rate"})
    writes: ClassVar[frozenset[str]] = frozenset({"rate"})
    sums_over: ClassVar[frozenset[str]] = frozenset({"grad"})
    population: ClassVar[tuple[str, ...]] = (
        "relation_sketch",
        "relation_score",
        "relation_partners",
        "relation_scores",
    )

    def __init__(self, threshold: float = 0.3, decay: float = 0.95, interval: int = 100) -> None:
        rule.check("Relationships", "threshold", threshold, rule.UNIT)
        rule.check("Relationships", "decay", decay, rule.BELOW_ONE)
        rule.check("Relationships", "interval", interval, rule.INTERVAL)
        self.threshold = threshold
        self.decay = decay
        self.interval = interval

    def applies(self, info: ParamInfo) -> bool:
        """Matrices, in the wide sense, with elements."""
        return len(info.shape) >= 2 and info.numel > 0

    def measures(self, info: ParamInfo) -> bool:
        """The population is every matrix."""
        return self.applies(info)

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """Average sketch, best score, and the kept relations: index in the population (-1: none) and score."""
        return (
            Slot("relation_sketch", shape=(SKETCH,), precision="fp32"),
            Slot("relation_score", shape=(), precision="fp32"),
            Slot("relation_partners", shape=(KEPT,), init=-1.0, precision="fp32"),
            Slot("relation_scores", shape=(KEPT,), precision="fp32"),
        )

    def rate_factor(self, param: Tensor, state: Mapping[str, Tensor]) -> Tensor | float:
        """The factor in force."""
        return 1 + GAIN * state["relation_score"] if "relation_score" in state else 1.0

    def transform(self, flow: Flow) -> None:
        """Raise the rate by a fifth of the best score."""
        flow["rate"] = flow["rate"] * (1 + GAIN * flow.per_param(flow.state["relation_score"]))

    def sums(self, flow: Flow) -> Sums:
        """The gradient with random signs, folded into the sketch."""
        return {"sketch": Folded(with_random_signs(flow["grad"], flow["index"]), SKETCH)}

    def settle(self, flow: Flow, totals: dict[str, Tensor]) -> None:
        """Average the direction of the sketch over time; a zero gradient has none."""
        old = flow.state["relation_sketch"]
        flow.new["relation_sketch"] = self.decay * old + (1 - self.decay) * _unit(totals["sketch"])

    def refresh(self, states: dict[str, Tensor], infos: list[ParamInfo], relations: Relations) -> dict[str, Tensor]:
        """Compare all pairs, and keep the best of each parameter."""
        partners = relations.partners
        sketch = _unit(torch.nan_to_num(states["relation_sketch"], 0.0, 0.0, 0.0))
        count, device = len(infos), sketch.device
        views = torch.tensor([(i.shape[0], i.numel // i.shape[0]) for i in infos], dtype=torch.int64)
        rows, columns = views.to(device).unbind(1)
        partners = partners.to(device)
        everyone = torch.arange(count, device=device)
        found: list[tuple[Tensor, Tensor]] = []
        for mine in everyone.split(max(1, BLOCK // count)):
            equal = (
                (rows[mine, None] == rows).to(sketch.dtype)
                + (columns[mine, None] == columns)
                + (rows[mine, None] == columns)
                + (columns[mine, None] == rows)
            )
            score = 0.7 * equal / 4 + 0.3 * (sketch[mine] @ sketch.T).abs().clamp_max(1)
            score = score.masked_fill(partners[mine, None] == everyone, 1.0)
            score = score.masked_fill((mine[:, None] == everyone) | (score < self.threshold), -1.0)
            found.append(_best(score))
        scores = torch.cat([s for s, _ in found])
        indices = torch.cat([i for _, i in found])
        return {
            "relation_score": scores[:, 0],
            "relation_partners": indices.to(states["relation_partners"].dtype),
            "relation_scores": scores,
        }


def _unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1; zero rows stay zero."""
    largest = x.abs().amax(1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1)
    return x / torch.where(largest > 0, x.norm(dim=1, keepdim=True), 1)


def _best(score: Tensor) -> tuple[Tensor, Tensor]:
    """The highest scores of each row with their columns, -1 marking none; of equals, the first column."""
    scores, indices = [], []
    for _ in range(KEPT):
        # unlike topk, argmax promises the first of equals: the same relations on every device
        index = score.argmax(1, keepdim=True)
        value = score.gather(1, index)
        scores.append(value.clamp_min(0))
        indices.append(torch.where(value > 0, index, -1))
        score = score.scatter(1, index, -1.0)
    return torch.cat(scores, 1), torch.cat(indices, 1)


def with_random_signs(x: Tensor, index: Tensor) -> Tensor:
    """Every element times +1 or -1, by a hash of its global flat index: the same on every shard, chunk and device.

    Indices that are equal in their lower 32 bits have the same sign.

    Args:
        x: float32 or float64, ``[N, *shape]``.
        index: Integers >= 0, ``[1, *shape]``.
    """
    h = index.to(torch.int32) * _FACTORS[0]
    h = h.bitwise_xor_(h >> 15).mul_(_FACTORS[1])
    h = h.bitwise_xor_(h >> 16).mul_(_FACTORS[2])
    if x.dtype == torch.float32:  # the upper bit of the hash flips the sign
        return (x.view(torch.int32) ^ h.bitwise_and_(-(1 << 31))).view(torch.float32)
    return x * h.bitwise_right_shift_(30).bitwise_or_(1).to(x.dtype)


def interaction_type(first: ParamInfo, second: ParamInfo, are_partners: bool) -> str:
    """In one word, what relates two matrices.

    Returns:
        ``"adapter_pair"``, ``"same_shape"``, ``"transposed_shape"``, ``"shared_dimension"`` (one equality of rows and
        columns at least) or ``"similar_gradients"``; the first that is true.
    """
    if are_partners:
        return "adapter_pair"
    a = (first.shape[0], first.numel // first.shape[0])
    b = (second.shape[0], second.numel // second.shape[0])
    if a == b:
        return "same_shape"
    if a == b[::-1]:
        return "transposed_shape"
    return "shared_dimension" if set(a) & set(b) else "similar_gradients"


def describe_relationships(
    names: Sequence[str],
    infos: Sequence[ParamInfo],
    partners: Tensor,
    relation_partners: Tensor,
    relation_scores: Tensor,
) -> list[dict[str, Any]]:
    """The kept relations, each pair once, most compatible first.

    Args:
        names: ``P`` names, of the population in its order.
        infos: What they are.
        partners: ``[P]``, as given to :meth:`Relationships.refresh`.
        relation_partners: ``[P, 3]``, the state of that name.
        relation_scores: ``[P, 3]``, the state of that name.

    Returns:
        ``[{"names": (a, b), "shapes": (…, …), "compatibility": float, "interaction_type": str}, …]``; an empty list
        when there are no relations.
    """
    known = partners.tolist()
    found: dict[tuple[int, int], float] = {}
    for i, (others, scores) in enumerate(zip(relation_partners.tolist(), relation_scores.tolist(), strict=True)):
        for other, score in zip(others, scores, strict=True):
            if other >= 0:
                j = int(other)
                found[min(i, j), max(i, j)] = float(score)
    return [
        {
            "names": (names[i], names[j]),
            "shapes": (infos[i].shape, infos[j].shape),
            "compatibility": score,
            "interaction_type": interaction_type(infos[i], infos[j], known[i] == j),
        }
        for (i, j), score in sorted(found.items(), key=lambda item: (-item[1], item[0]))
    ]
