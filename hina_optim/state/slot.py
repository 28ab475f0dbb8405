"""What a technique remembers: the name, shape, first value and precision of one piece of state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Init = float | Literal["param", "start_lr"]
Precision = Literal["state", "fp32", "param", "int8"]
#: ``(low, start, high)``: levels between the ends, the denser the smaller, with the first value among them.
Levels = tuple[float, float, float]


@dataclass(frozen=True)
class Slot:
    """One named piece of state of one parameter.

    Attributes:
        name: Key in ``optimizer.state[p]``. Two techniques that declare the same slot share it.
        shape: ``"like"`` for the parameter's own shape, or a tuple: a fixed shape that does not depend on the
            parameter (``()`` is one number a parameter). Fixed shapes are never sharded.
        init: First value: a number, ``"param"`` (the weights before the first update) or ``"start_lr"`` (the learning
            rate that the group was built with).
        precision: Lowest precision that the technique tolerates. ``"state"`` follows the user's ``state_precision``;
            ``"fp32"`` never goes lower; ``"param"`` is the parameter's own dtype (exact for a copy of the weights);
            ``"int8"`` holds small integers exactly.
        code: How 8 bits hold it: ``"signed"`` or ``"unsigned"`` values in blocks with a scale, or fixed levels; None
            for what needs 16 bits. ``"ternary"``, with precision ``"int8"``: it is -1, 0 or 1, which takes 2 bits.
            Where 4 bits are asked for, signed values that are not slow and fixed levels take 4, and ternary ones 1: 0
            becomes 1 there, so a technique must not count on a 0 that it has not overwritten yet.
        slow: True if one step changes it by less than 8 bits tell apart: then they are rounded stochastically.
        mean_of: ``(name, "row")`` or ``(name, "column")``: this is the mean of the state ``name`` over each row or
            column of the matrix view. Where a recipe comes to keep one in the place of the other, it is made of it.
        constant: If True, a parameter whose first value is zero everywhere keeps one zero instead of a full tensor.
            Only for state that never changes (an anchor).
    """

    name: str
    shape: Literal["like"] | tuple[int, ...] = "like"
    init: Init = 0.0
    precision: Precision = "state"
    code: Literal["signed", "unsigned", "ternary"] | Levels | None = None
    slow: bool = False
    mean_of: tuple[str, Literal["row", "column"]] | None = None
    constant: bool = False

    def local_shape(self, param_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of this state for a parameter (or the shard of one) of shape ``param_shape``."""
        return param_shape if self.shape == "like" else self.shape


#: First moment of the gradient.
EXP_AVG = Slot("exp_avg", code="signed")
#: Second moment of the gradient.
EXP_AVG_SQ = Slot("exp_avg_sq", code="unsigned", slow=True)
#: The weights before the first update; a parameter that begins at zero keeps one zero (it broadcasts).
ANCHOR = Slot("anchor", init="param", precision="param", constant=True)
