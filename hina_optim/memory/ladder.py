"""What an optimizer gives up for memory, one rung after another, the one that costs least quality first.

A rung says how many bytes it will save before it acts, and the ladder measures how many it did save. With several
processes all do what one of them has to, and every step that changes options can be taken back (:func:`relax_vram`).
New ways to save are further rungs: subclass :class:`Rung`, or :class:`Change`, and put it at its place in
:data:`LADDER`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypedDict

from hina_optim import arguments as rule
from hina_optim.engine import sizes
from hina_optim.memory.account import (
    Saver,
    any_rank,
    as_size,
    gradient_bytes,
    largest_state,
    parameter_bytes,
    used_bytes,
)
from hina_optim.memory.probes import GIB
from hina_optim.state.precision import PRECISIONS

__all__ = [
    "GIVEN_UP",
    "LADDER",
    "Action",
    "Change",
    "Rung",
    "VramReport",
    "optimize_for_vram",
    "plan_for_vram",
    "relax_vram",
    "used_bytes",
]

logger = logging.getLogger("hina_optim")

#: Option of a group: what the ladder changed, as it was before, so that it can be taken back, also after a resume.
GIVEN_UP = "given_up"


class Action(TypedDict):
    """One rung that was taken, or that a plan would take; ``bytes_saved`` is negative for one that was taken back."""

    rung: str
    bytes_predicted: int
    bytes_saved: int
    cost: str


class VramReport(TypedDict):
    """What :func:`optimize_for_vram` did, or what :func:`plan_for_vram` expects.

    ``bytes_saved`` of an action is measured; in a plan it is 0 and ``used_bytes_after`` is a prediction. Bytes are
    those of this rank, ``reached`` is whether all of them are within the target. ``message`` says what a reader must
    know, and is empty where there is nothing to say.
    """

    target_vram_gb: float
    used_bytes_before: int
    used_bytes_after: int
    reached: bool
    actions: list[Action]
    dry_run: bool
    message: str


class Rung(ABC):
    """One way to save memory.

    Attributes:
        name: Its name in reports and logs.
        cost: What is paid for the bytes, in words.
    """

    name: str
    cost: str

    @abstractmethod
    def applicable(self, optimizer: Saver) -> bool:
        """Whether there is anything left to save this way, and the options of the optimizer allow it."""

    @abstractmethod
    def predict(self, optimizer: Saver) -> int:
        """Bytes that it would save here, as the optimizer stands. Changes nothing."""

    @abstractmethod
    def act(self, optimizer: Saver) -> None:
        """Save them. Called on all ranks when one has to, also where there is nothing to save."""

    def apply(self, optimizer: Saver) -> int:
        """Save them, and return how many bytes were saved: :func:`used_bytes` before less after."""
        before = used_bytes(optimizer)
        self.act(optimizer)
        return before - used_bytes(optimizer)


class ReleaseScratch(Rung):
    """Give back the memory that the engine keeps for intermediate results."""

    name = "scratch"
    cost = "no quality; the next step allocates again what it needs"

    def applicable(self, optimizer: Saver) -> bool:
        """Whether the engine holds any."""
        return optimizer.scratch_bytes() > 0

    def predict(self, optimizer: Saver) -> int:
        """All of it."""
        return optimizer.scratch_bytes()

    def act(self, optimizer: Saver) -> None:
        """Release it."""
        optimizer.release_scratch()


class Change(Rung):
    """A rung that saves by other options of the groups; its prediction is exact."""

    @abstractmethod
    def options(self, group: dict[str, Any]) -> dict[str, Any]:
        """The options that it changes in a group; none if there is nothing to change, or it is not allowed."""

    @abstractmethod
    def restored(self, group: dict[str, Any]) -> dict[str, Any]:
        """The options that take it back, as far as the ladder has gone beyond what the user chose."""

    def applicable(self, optimizer: Saver) -> bool:
        """Whether any group has such options."""
        return any(self.options(group) for group in optimizer.param_groups)

    def predict(self, optimizer: Saver) -> int:
        """Bytes of state now, less bytes then."""
        return -_growth(optimizer, [self.options(group) for group in optimizer.param_groups])

    def act(self, optimizer: Saver) -> None:
        """Convert the state, and remember how it was."""
        _change(optimizer, [self.options(group) for group in optimizer.param_groups])


class StateTo(Change):
    """Store in a lower precision what is stored in a higher one, where the technique that keeps it tolerates that."""

    def __init__(self, precision: str, cost: str) -> None:
        self.name = self.precision = precision
        self.cost = cost
        self.level = PRECISIONS.index(precision)

    def options(self, group: dict[str, Any]) -> dict[str, Any]:
        """The precision, for a group in a higher one."""
        here = PRECISIONS.index(group["state_precision"])
        return {"state_precision": self.precision} if here < self.level else {}

    def restored(self, group: dict[str, Any]) -> dict[str, Any]:
        """The next higher precision, for a group that was built with one."""
        first = group.get(GIVEN_UP, {}).get("state_precision", group["state_precision"])
        lowered = group["state_precision"] == self.precision and PRECISIONS.index(first) < self.level
        return {"state_precision": PRECISIONS[self.level - 1]} if lowered else {}


class ToHost(Change):
    """Keep state of parameters on a GPU in host memory; with parameters on the CPU there is nothing to move."""

    def __init__(self, option: str, cost: str) -> None:
        self.name = f"{option}=cpu"
        self.option = option
        self.cost = cost

    def options(self, group: dict[str, Any]) -> dict[str, Any]:
        """The host, where it is not there yet."""
        return {self.option: "cpu"} if group.get(self.option, "cpu") is None else {}

    def restored(self, group: dict[str, Any]) -> dict[str, Any]:
        """The parameters' devices, where it was there."""
        return {self.option: None} if self.option in group.get(GIVEN_UP, {}) else {}


class Simplify(Change):
    """Compute something simpler that keeps less state. Only where ``emergency_simplify`` allows it.

    Args:
        option: A switch.
        to: What it is set to.
        cost: What is paid for it, in words.
    """

    def __init__(self, option: str, to: bool, cost: str) -> None:
        self.name = f"{option}={to}"
        self.option = option
        self.to = to
        self.cost = cost

    def options(self, group: dict[str, Any]) -> dict[str, Any]:
        """The switch, where it is the other way and may be set."""
        allowed = group.get("adaptive_features", False) and group.get("emergency_simplify", False)
        return {self.option: self.to} if allowed and group.get(self.option) is (not self.to) else {}

    def restored(self, group: dict[str, Any]) -> dict[str, Any]:
        """As it was, where it was the other way."""
        was = group.get(GIVEN_UP, {}).get(self.option)
        return {self.option: was} if was is (not self.to) and group[self.option] is self.to else {}


class FactorSecondMoment(Simplify):
    """Keep the means of rows and columns of the second moments of matrices, made of what is there."""

    def __init__(self, cost: str) -> None:
        super().__init__("factored_second_moment", True, cost)

    def options(self, group: dict[str, Any]) -> dict[str, Any]:
        """On, but for AMSGrad, which needs the moment of every element."""
        return {} if group.get("amsgrad") else super().options(group)


#: All rungs, the cheapest in quality first. A walk takes them in this order and stops as soon as the target is reached.
LADDER: tuple[Rung, ...] = (
    ReleaseScratch(),
    ToHost("anchor_device", "no quality; a step fetches from the host what the weights were at first"),
    StateTo("bf16", "state keeps 8 significant bits instead of 24, rounded stochastically"),
    StateTo("8bit", "moments keep 8 bits with a scale for each 256, masks 256 levels; what has no code stays as it is"),
    ToHost("state_device", "no quality; a step fetches moments and masks from the host, and writes them back"),
    FactorSecondMoment("of the second moments of matrices, the means of rows and columns; their product stands for it"),
    Simplify("factored_image_state", True, "of what image techniques remember, the means of rows and columns"),
    Simplify("use_dynamic_adaptation", False, "parameters no longer get learning rate for their importance"),
    Simplify("enable_dual_momentum", False, "no long momentum"),
    Simplify("use_spd", False, "weights are no longer drawn back to where they began; that place is forgotten"),
    Simplify("use_lr_mask", False, "one learning rate for all elements; what the mask learned is forgotten"),
)


def optimize_for_vram(optimizer: Saver, target_vram_gb: float, ladder: Sequence[Rung] = LADDER) -> VramReport:
    """Give memory back until at most ``target_vram_gb`` is in use, and no further.

    Existing state is converted; momentum and all that was learned is kept. Techniques are switched off last, and only
    in groups whose ``adaptive_features`` and ``emergency_simplify`` are both True. Every action is logged by the logger
    ``hina_optim``, with its bytes: at level INFO, at level WARNING where a technique is switched off. So is a target
    that cannot be reached, with what else could help.

    With several processes every one must call it: the fullest decides, and all take the same rungs.

    Args:
        optimizer: Changed in place. Nothing happens if it was built with ``memory_efficient=False``.
        target_vram_gb: GiB (2³⁰ bytes) that :func:`used_bytes` is to come down to.
        ladder: The rungs to take.

    Raises:
        ValueError: The target is not a finite number > 0.
    """
    return _walk(optimizer, target_vram_gb, ladder, dry_run=False)


def plan_for_vram(optimizer: Saver, target_vram_gb: float, ladder: Sequence[Rung] = LADDER) -> VramReport:
    """What :func:`optimize_for_vram` would do if it were for this rank alone; changes nothing and logs nothing."""
    return _walk(optimizer, target_vram_gb, ladder, dry_run=True)


def relax_vram(optimizer: Saver, budget_gb: float, ladder: Sequence[Rung] = LADDER) -> VramReport:
    """Take back what the ladder did, the last first, as long as all stays within a budget.

    Never beyond what the user chose. State goes on from its present values: what bits were lost stays lost, and a
    technique that is switched on again begins afresh. With several processes every one must call it.

    Args:
        optimizer: Changed in place.
        budget_gb: GiB that :func:`used_bytes` may come up to.
        ladder: The rungs that were taken.

    Returns:
        As :func:`optimize_for_vram`; bytes saved are negative. ``reached`` is whether all is as the user chose it.

    Raises:
        ValueError: The budget is not a finite number > 0.
    """
    rule.check("relax_vram", "budget_gb", budget_gb, rule.POSITIVE)
    budget = int(budget_gb * GIB)
    before = used = used_bytes(optimizer)
    actions: list[Action] = []
    for rung in [rung for rung in reversed(ladder) if isinstance(rung, Change)]:
        changes = [rung.restored(group) for group in optimizer.param_groups]
        if not any(changes):
            continue
        growth = _growth(optimizer, changes)
        if any_rank(optimizer, used + growth > budget):
            break
        _change(optimizer, changes)
        saved, used = used - used_bytes(optimizer), used_bytes(optimizer)
        actions.append(Action(rung=rung.name, bytes_predicted=-growth, bytes_saved=saved, cost=""))
        logger.info("relax_vram: took %s back for %s (%d bytes).", rung.name, as_size(-saved), -saved)
    left = any(group.get(GIVEN_UP) for group in optimizer.param_groups)
    return VramReport(
        target_vram_gb=float(budget_gb),
        used_bytes_before=before,
        used_bytes_after=used,
        reached=not left,
        actions=actions,
        dry_run=False,
        message="There is no room for more." if left else "",
    )


def _walk(optimizer: Saver, target_vram_gb: float, ladder: Sequence[Rung], dry_run: bool) -> VramReport:
    rule.check("plan_for_vram" if dry_run else "optimize_for_vram", "target_vram_gb", target_vram_gb, rule.POSITIVE)
    target = int(target_vram_gb * GIB)
    before = used = used_bytes(optimizer)
    if dry_run:
        return _report(optimizer, target_vram_gb, before, *_foresee(optimizer, before, target, ladder), dry_run=True)
    actions: list[Action] = []
    enabled = all(group.get("memory_efficient", True) for group in optimizer.param_groups)
    for rung in ladder if enabled else ():
        if not any_rank(optimizer, used > target):
            break
        predicted = rung.predict(optimizer) if rung.applicable(optimizer) else 0
        if not any_rank(optimizer, predicted > 0):
            continue
        saved = rung.apply(optimizer)
        used = used_bytes(optimizer)
        actions.append(Action(rung=rung.name, bytes_predicted=predicted, bytes_saved=saved, cost=rung.cost))
        logger.log(
            logging.WARNING if isinstance(rung, Simplify) else logging.INFO,
            "optimize_for_vram: %s saved %s (%d bytes; predicted %d). Cost: %s.",
            rung.name, as_size(saved), saved, predicted, rung.cost,
        )  # fmt: skip
    reached = not any_rank(optimizer, used > target)
    report = _report(optimizer, target_vram_gb, before, used, actions, reached)
    if report["message"]:
        logger.log(logging.WARNING if enabled else logging.INFO, "optimize_for_vram: %s", report["message"])
    return report


def _foresee(optimizer: Saver, used: int, target: int, ladder: Sequence[Rung]) -> tuple[int, list[Action], bool]:
    """What a walk would come to: bytes in use after it, its actions, and whether the target is reached."""
    actions: list[Action] = []
    enabled = all(group.get("memory_efficient", True) for group in optimizer.param_groups)
    changes: list[dict[str, Any]] = [{} for _ in optimizer.param_groups]
    state = _growth(optimizer, changes)
    for rung in ladder if enabled else ():
        if used <= target:
            break
        ahead = changes
        if isinstance(rung, Change):
            groups = [{**group, **change} for group, change in zip(optimizer.param_groups, changes, strict=True)]
            ahead = [{**c, **rung.options(group)} for c, group in zip(changes, groups, strict=True)]
            then = _growth(optimizer, ahead)
            predicted = state - then
        else:
            predicted, then = rung.predict(optimizer) if rung.applicable(optimizer) else 0, state
        if predicted > 0:
            used, state, changes = used - predicted, then, ahead
            actions.append(Action(rung=rung.name, bytes_predicted=predicted, bytes_saved=0, cost=rung.cost))
    return used, actions, used <= target


def _report(
    optimizer: Saver, target_vram_gb: float, before: int, used: int, actions: list[Action], reached: bool,
    dry_run: bool = False,
) -> VramReport:  # fmt: skip
    enabled = all(group.get("memory_efficient", True) for group in optimizer.param_groups)
    message = ""
    if not enabled:
        message = "Nothing was done: the optimizer was built with memory_efficient=False."
    elif not reached:
        message = _what_else(optimizer, used, int(target_vram_gb * GIB))
    return VramReport(
        target_vram_gb=float(target_vram_gb),
        used_bytes_before=before,
        used_bytes_after=used,
        reached=reached,
        actions=actions,
        dry_run=dry_run,
        message=message,
    )


def _growth(optimizer: Saver, changes: Sequence[dict[str, Any]]) -> int:
    """Bytes of state on the devices with other options, less bytes now; of what is to come where there is none."""
    groups = [{**group, **change} for group, change in zip(optimizer.param_groups, changes, strict=True)]
    now, then = (sizes.kept(optimizer, given) for given in (None, groups))  # type: ignore[arg-type]
    counted = [i for i, one in enumerate(now) if not optimizer.state or optimizer.state.get(one.param)]
    after, before = (sizes.state_bytes((every[i] for i in counted), on_device=True) for every in (then, now))
    return after - before


def _change(optimizer: Saver, changes: Sequence[dict[str, Any]]) -> None:
    """Change options, remembering in each group what they were when the user chose them."""
    noted = []
    for group, change in zip(optimizer.param_groups, changes, strict=True):
        given_up = {**{name: group[name] for name in change}, **group.get(GIVEN_UP, {})}
        given_up = {name: value for name, value in given_up.items() if change.get(name, group[name]) != value}
        noted.append({**change, GIVEN_UP: given_up} if change else {})
    optimizer.change_options(noted)
    for option in {name for change in changes for name in change}:
        values = {group[option] for group in optimizer.param_groups}
        if len(values) == 1:
            optimizer.defaults[option] = values.pop()  # a group that is added later goes with the others


def _what_else(optimizer: Saver, used: int, target: int) -> str:
    """Why the target is out of reach, and what the user can do that the optimizer cannot."""
    largest = ", ".join(f"{name} {as_size(size)}" for name, size in largest_state(optimizer)) or "none allocated yet"
    short = "another rank has too much in use"
    if used > target:
        short = f"{as_size(used)} are in use, {as_size(used - target)} too many"
    return (
        f"The target of {as_size(target)} is out of reach: {short}, and the optimizer has nothing more to give. "
        f"Parameters take {as_size(parameter_bytes(optimizer))}, gradients {as_size(gradient_bytes(optimizer))}, "
        f"optimizer state: {largest}. Use a smaller batch or shorter sequences, gradient checkpointing, fewer "
        "trainable parameters (an adapter, or a lower rank), parameters in bf16, or switch off a technique that keeps "
        "the state named here."
    )
