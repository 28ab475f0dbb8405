"""LoRA+: the output side of an adapter learns faster than the side that reads the inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from hina_optim import arguments
from hina_optim.techniques.base import Flow, ParamInfo, Technique

__all__ = ["FAST_ROLES", "RoleRates"]

#: Roles whose rate is multiplied.
FAST_ROLES = frozenset(
    {
        "lora_b",
        "lora_mid",
        "lokr_w2",
        "lokr_w2_a",
        "lokr_w2_b",
        "lokr_t2",
        "loha_w1_a",
        "loha_w2_a",
        "loha_t1",
        "loha_t2",
    }
)


class RoleRates(Technique):
    """``rate ← ratio · rate`` for the factors of an adapter that play the part of LoRA's ``B``.

    A step of Adam changes every element by about the rate. What comes out of ``A`` adds up as many such changes as the
    layer has inputs, ``n``; what comes out of ``B`` only as many as the rank. For both to move features by an amount
    that does not depend on ``n``, the rate of ``B`` must be larger, in the limit ``n`` times. By that argument the
    factors which sum over a rank are fast, and those which sum over the inputs keep their rate:

    * LoRA: ``B``, and the core between the factors of a Tucker convolution (``lora_mid``); not ``A``, nor DoRA's
      magnitude.
    * LoHa, ``(w1_a·w1_b) ⊙ (w2_a·w2_b)``: the output side ``a`` of both products, and the cores ``t1`` and ``t2``.
    * LoKr, ``w1 ⊗ w2``: both factors sum over a part of the inputs, so the argument does not tell them apart. Fast is
      ``w2`` (``w2``, ``w2_a``, ``w2_b``, ``t2``), which begins at zero in LyCORIS as ``B`` does (in peft it is ``w1``).

    Roles decide, pairs do not: a ``B`` whose ``A`` is frozen or unknown is fast all the same. Decay follows the group's
    learning rate, not this one.

    Args:
        ratio: Rate of ``B`` over rate of ``A``, no unit, > 0. 1 leaves the technique out.

    Raises:
        ValueError: ratio is not a finite number > 0.

    Source: *LoRA+: Efficient Low Rank Adaptation of Large Models*, arXiv 2402.12354 (about ``A`` and ``B``; what it
    means for LoHa and LoKr is this project's own conclusion).
    """

    name: ClassVar[str] = "alora_ratio"
    reads: ClassVar[frozenset[str]] = frozenset({"rate"})
    writes: ClassVar[frozenset[str]] = frozenset({"rate"})

    def __init__(self, ratio: float = 16.0) -> None:
        arguments.check("RoleRates", "ratio", ratio, arguments.POSITIVE)
        self.ratio = float(ratio)

    def applies(self, info: ParamInfo) -> bool:
        """The fast roles, unless the ratio is 1."""
        return self.ratio != 1 and info.role in FAST_ROLES

    def rate_factor(self, param: Tensor, state: Mapping[str, Tensor]) -> Tensor | float:
        """The ratio."""
        return self.ratio

    def transform(self, flow: Flow) -> None:
        """Multiply the rate."""
        flow["rate"] = flow["rate"] * self.ratio
