"""The contract of a technique: one idea of one paper, as pure functions on batches of tensors.

A technique sees ``N`` parameters of one shape at once, as tensors of shape ``[N, *shape]``, through a :class:`Flow`. It
never reads a value on the host, never loops over parameters and never writes to a weight: it changes the named values
of the flow, and the engine writes the outcome.

Named values (the only vocabulary that techniques share; all float32 and of shape ``[N, *shape]`` unless said
otherwise):

=============  =====================================================================================================
``grad``       gradient as the techniques before left it
``param``      weights before this update
``incoming``   what enters the first moment (the gradient, or its normalized form under ADOPT)
``clip``       per parameter, ``[N, 1, …]``: factor on ``incoming``, not applied to it yet (clipping by its rms)
``damping``    per parameter, ``[N, 1, …]``: factor on ``incoming`` as it enters the moment (torque-aware momentum)
``update``     direction ``u`` of the step, before rates
``scale``      per parameter, ``[N, 1, …]``: factor on ``update`` that may only be known once sums are reduced
``lr``         group learning rate now, 0-d or ``[N, 1, …]``; a technique may close it (0) for a parameter
``rate``       learning rate of every element, 0-d or broadcastable to ``[N, *shape]``
``decay``      decoupled decay of this step, broadcastable: ``decay · param`` is subtracted
``drift``      change of the weights beside step and decay, subtracted as it is; proportional to ``lr``
``pull``       per parameter, ``[N, 1, …]``: share of the way back to the anchor after the step
``bump_scale`` factor >= 0 on the bumps of the learning-rate mask
=============  =====================================================================================================

The engine then writes ``q = param - decay·param - drift - rate·scale·update`` and ``param ← q - pull·(q - anchor)``.

What crosses elements is declared, and only the engine does it, over all chunks and all shards:

* *sums*: :meth:`Technique.sums` returns element-wise tensors, the engine adds them up over the whole (global) parameter
  and hands the totals, ``[N, 1, …]``, to :meth:`Technique.settle`. Wrapped in :class:`ByRow` or :class:`ByColumn`, they
  are summed over each row or column of the matrix view (first dimension × all the others) instead, and come back as
  ``[N, rows]`` or ``[N, columns]``, complete on every shard and chunk; :meth:`Flow.over_rows` and
  :meth:`Flow.over_columns` lay such a vector over the elements present;
* *whole matrix*: a technique that names values in ``whole`` gets them complete in :meth:`Technique.whole_matrix`;
* *over all parameters, at intervals*: :class:`PeriodicTechnique`.

State names are shared vocabulary too: ``exp_avg`` (first moment), ``exp_avg_sq`` (second moment), ``anchor`` (weights
before the first update), ``lr_mask`` (per-element rate), ``last_sign``. A technique may read state that another
declares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from hina_optim.state.slot import Slot

__all__ = [
    "ByColumn",
    "ByRow",
    "Flow",
    "Folded",
    "ParamInfo",
    "PeriodicTechnique",
    "Relations",
    "Slot",
    "Sums",
    "Technique",
]

#: Copies of a number that :meth:`Flow.once` takes the largest of: a loop over fewer would be unrolled.
COPIES = 16

NAMES = frozenset(
    {
        "grad",
        "param",
        "incoming",
        "clip",
        "damping",
        "update",
        "scale",
        "lr",
        "rate",
        "decay",
        "drift",
        "pull",
        "bump_scale",
    }
)


@dataclass(frozen=True)
class Folded:
    """An element-wise tensor to be summed into ``size`` numbers a parameter.

    Element ``i`` (global, flat) goes to ``i % size``.
    """

    value: Tensor
    size: int


@dataclass(frozen=True)
class ByRow:
    """An element-wise tensor to be summed over each row of the matrix view: totals ``[N, rows]``."""

    value: Tensor


@dataclass(frozen=True)
class ByColumn:
    """An element-wise tensor to be summed over each column of the matrix view: totals ``[N, columns]``."""

    value: Tensor


Sums = dict[str, "Tensor | Folded | ByRow | ByColumn"]


class Relations(NamedTuple):
    """Which parameters of a population belong to one adapter.

    Attributes:
        partners: int64 ``[P]``: index of the other factor of the same product, -1 where none is known.
        adapters: int64 ``[P]``: a number that the parameters of one adapter share, -1 for those of none.
    """

    partners: Tensor
    adapters: Tensor


@dataclass(frozen=True)
class ParamInfo:
    """What is known of the parameters of a bucket before any value is seen (always of the *global* parameter).

    Attributes:
        shape: Global shape of one parameter.
        role: What the parameter is to an adapter: ``"lora_a"``, ``"lora_b"``, … or None.
        paired: True if the other half of the adapter is known.
    """

    shape: tuple[int, ...]
    role: str | None = None
    paired: bool = False

    @property
    def numel(self) -> int:
        """Number of elements of one parameter, over all shards."""
        return int(torch.Size(self.shape).numel())

    @property
    def rows(self) -> int:
        """Rows of the matrix view (1 for a vector or a number)."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        """Columns of the matrix view: all dimensions but the first, of a vector all elements."""
        return self.numel // self.rows if self.rows else 0

    @property
    def is_matrix(self) -> bool:
        """Whether there are two dimensions or more, and elements: whether the matrix view means anything."""
        return len(self.shape) > 1 and self.numel > 0

    @property
    def spatial_axes(self) -> tuple[int, ...]:
        """Axes with a neighborhood, as dims of a ``[N, *shape]`` tensor.

        Both axes of a matrix, the kernel axes of a convolution.
        """
        n = len(self.shape)
        if n < 2:
            return ()
        return (1, 2) if n == 2 else tuple(range(3, n + 1))


class Flow:
    """The values of ``N`` parameters on their way through a recipe, during one step.

    ``state`` holds the old state (float32, ``[N, *shape]``, or ``[N, …]`` for slots of fixed shape), read-only; a
    technique puts new state into ``new``. ``flow["index"]`` (measuring steps only) is the global flat index of every
    element present, int64 ``[1, *shape]``: a shard or a chunk does not begin at 0. ``holds`` is True where the engine
    compiles (:meth:`once`).
    """

    def __init__(
        self,
        values: dict[str, Tensor],
        state: dict[str, Tensor],
        new: dict[str, Tensor],
        scalars: dict[str, Tensor],
        info: ParamInfo,
        holds: bool = False,
    ) -> None:
        self.values = values
        self.state = state
        self.new = new
        self.scalars = scalars
        self.info = info
        self.holds = holds
        self._signs: dict[str, tuple[Tensor, Tensor]] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.values[name] = value

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str) -> Tensor | None:
        """The value, or None where no technique has set it."""
        return self.values.get(name)

    def sign_of(self, name: str) -> Tensor:
        """The signs of a value, computed once for all techniques that ask; not to be written to."""
        value = self.values[name]
        held = self._signs.get(name)
        if held is None or held[0] is not value:
            held = self._signs[name] = value, value.sign()
        return held[1]

    def per_param(self, x: Tensor) -> Tensor:
        """Reshape ``[N]`` to ``[N, 1, …]`` so that it broadcasts against the parameters present."""
        return x.reshape(x.shape[0], *([1] * (self.values["grad"].ndim - 1)))

    def once(self, x: Tensor) -> Tensor:
        """Numbers of a parameter, of rows or columns, made before the loop over elements, not again for each of them.

        Eagerly they are there anyway. A compiler takes up in a loop whatever can be computed there, a dozen roots and
        quotients, but not what is the outcome of a reduction: here the largest of equal numbers.
        """
        if not self.holds:
            return x
        if x.shape[1:].numel() == 1:
            return x.unsqueeze(-1).expand(*x.shape, COPIES).amax(-1)
        # twice, so that the loop over rows is not taken for the same as that over rows of elements: torch 2.13 cannot
        # always fuse the two
        return x.unsqueeze(-1).expand(2, *x.shape, COPIES).amax(-1)[0]

    def hold(self) -> None:
        """The same for every value that is one number a parameter."""
        for name, value in self.values.items() if self.holds else ():
            if value.ndim > 1 and value.shape[1:].numel() == 1:
                self.values[name] = self.once(value)

    def over_rows(self, x: Tensor) -> Tensor:
        """Lay a number a row, ``[N, rows]``, over the elements present: broadcastable to ``[N, *shape]``."""
        index = self.values.get("row_index")
        x = self.once(x if index is None else x.index_select(1, index))
        return x.reshape(x.shape[0], x.shape[1], *([1] * (self.values["grad"].ndim - 2)))

    def over_columns(self, x: Tensor) -> Tensor:
        """Lay a number a column, ``[N, columns]``, over the elements present: broadcastable to ``[N, *shape]``."""
        index = self.values.get("column_index")
        x = self.once(x if index is None else x.index_select(1, index))
        if index is not None and self.values["grad"].ndim == 2:  # a flat piece that does not consist of whole rows
            return x
        return x.reshape(x.shape[0], 1, *self.values["grad"].shape[2:])

    def scalar(self, technique: Technique, name: str) -> Tensor:
        """A number a parameter that :meth:`Technique.scalars` computed for this step, ``[N, 1, …]``, float32."""
        return self.per_param(self.scalars[f"{technique.name}.{name}"])

    @property
    def count(self) -> float | Tensor:
        """Global number of elements of one parameter, at least 1: a number, or ``[N, 1, …]``.

        Compiled, it is a tensor, so that one graph serves parameters of all sizes.
        """
        count = self.scalars.get("count")
        return max(float(self.info.numel), 1.0) if count is None else self.per_param(count)

    @property
    def rows(self) -> int | Tensor:
        """Rows of the matrix view of one parameter: a number, or, compiled, ``[N, 1]``."""
        found = self.scalars.get("rows")
        return self.info.rows if found is None else found.unsqueeze(1)

    @property
    def columns(self) -> int | Tensor:
        """Columns of the matrix view of one parameter: a number, or, compiled, ``[N, 1]``."""
        found = self.scalars.get("columns")
        return self.info.columns if found is None else found.unsqueeze(1)


Self = TypeVar("Self", bound="Technique")


class Technique:
    """One technique. Subclasses hold hyper-parameters only; everything remembered lies in declared slots.

    The engine calls, in the order of the recipe: :meth:`whole_matrix` (if ``whole``), :meth:`transform`, :meth:`sums`,
    and, once the totals are known, :meth:`settle`. The class variables tell the planner what each touches, so that
    techniques that do not depend on each other's totals share one reduction. ``private`` values are kept under
    ``"<technique name>.<anything>"`` and need no declaration.

    Attributes:
        name: Unique in a recipe; prefix of scalars and private values.
        reads: Named values that :meth:`transform` reads.
        writes: Named values that :meth:`transform` writes.
        sums_over: Named values that :meth:`sums` reads; empty means that the technique has no sums (name at least one
            value, ``grad`` if nothing else, for a technique that has).
        settles: Named values that :meth:`settle` writes.
        settle_reads: Named values that :meth:`settle` reads and does not write.
        whole: Named values that :meth:`whole_matrix` needs complete.
        whole_is_small: True if :meth:`whole_matrix` returns something of fixed shape (``[N, …]``, kept whole on every
            shard) instead of ``[N, *info.shape]``.
        by_rows: True if it uses :class:`ByRow`, :class:`ByColumn`, :meth:`Flow.over_rows` or
            :meth:`Flow.over_columns`: large parameters are then cut between rows.
        rate_of_whole: True if :meth:`rate_factor` needs the complete parameter.
        reads_loss: True if :meth:`transform`, :meth:`sums` or :meth:`settle` read ``flow.scalars["loss"]``: ``[N]``,
            equal numbers, the loss that was reported for this step, NaN where none was.
        needs_index: True if ``flow["index"]`` is read in steps that do not measure, too.
        window: First step in which it acts, and the first in which it does so no more (None: never), counted from 0 by
            the steps in which the parameter had a gradient. Outside of it the technique is left out of the step; its
            state is there and stays as it is. Set by :meth:`during`.
    """

    name: ClassVar[str] = ""
    reads: ClassVar[frozenset[str]] = frozenset()
    writes: ClassVar[frozenset[str]] = frozenset()
    sums_over: ClassVar[frozenset[str]] = frozenset()
    settles: ClassVar[frozenset[str]] = frozenset()
    settle_reads: ClassVar[frozenset[str]] = frozenset()
    whole: ClassVar[tuple[str, ...]] = ()
    whole_is_small: ClassVar[bool] = False
    by_rows: ClassVar[bool] = False
    rate_of_whole: ClassVar[bool] = False
    reads_loss: ClassVar[bool] = False
    needs_index: ClassVar[bool] = False
    window: tuple[int, int | None] = (0, None)

    def during(self: Self, start: int, stop: int | None = None) -> Self:
        """This technique, acting in steps ``start`` (from 0) to ``stop - 1`` only; for phases of a training."""
        if start < 0 or (stop is not None and stop < start):
            raise ValueError(f"{type(self).__name__}.during: {start}, {stop} are no first and last step.")
        self.window = (start, stop)
        return self

    def acts(self, step: int) -> bool:
        """Whether it acts in a step, counted from 0."""
        start, stop = self.window
        return step >= start and (stop is None or step < stop)

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """The state that this technique keeps for such a parameter."""
        return ()

    def applies(self, info: ParamInfo) -> bool:
        """Whether the technique means anything for such a parameter; decided on the global shape."""
        return True

    def scalars(self, t: Tensor) -> dict[str, Tensor]:
        """Numbers of this step that depend on time alone.

        Args:
            t: ``[N]``, float64 where the device has it: which update of its life this is for each parameter, from 1.

        Returns:
            Tensors ``[N]``; read them back with :meth:`Flow.scalar`.
        """
        return {}

    def whole_matrix(self, flow: Flow, *complete: Tensor) -> Tensor:
        """Compute on complete parameters; the piece of the result that lies here is put in ``flow["<name>.whole"]``.

        Args:
            flow: For hyper-parameters, scalars and state of fixed shape; its element-wise values may be a shard.
            complete: The values named in ``whole``, ``[N, *info.shape]``.

        Returns:
            A tensor ``[N, *info.shape]``.
        """
        raise NotImplementedError(f"{type(self).__name__} names whole={self.whole} but has no whole_matrix()")

    def transform(self, flow: Flow) -> None:
        """Change the flow, element by element.

        In place only what this very call has made: a segment may have to run twice.
        """

    def sums(self, flow: Flow) -> Sums:
        """Element-wise tensors whose sums over the whole parameter :meth:`settle` needs. Changes nothing.

        What is an inner product is best given by :func:`~hina_optim.techniques.products.inner`, added up already: one
        product at a time is in memory then, or none.
        """
        return {}

    def rate_factor(self, param: Tensor, state: Mapping[str, Tensor]) -> Tensor | float:
        """The factor that it puts on the learning rate as things stand; for reports, not for the step.

        Args:
            param: One parameter; of a sharded one the part that is here, or all of it where ``rate_of_whole``.
            state: Its state, as :meth:`transform` sees it but without the batch dimension; empty before the first step.

        Returns:
            A number, or a tensor that broadcasts to ``param``.
        """
        return 1.0

    def settle(self, flow: Flow, totals: dict[str, Tensor]) -> None:
        """Change the flow, knowing the totals.

        ``[N, 1, …]``; of :class:`Folded`, :class:`ByRow` and :class:`ByColumn` ``[N, size]``.
        """


class PeriodicTechnique(Technique):
    """A technique that compares parameters with each other, at intervals.

    In steps 1, 1 + ``interval``, 1 + 2·``interval``, … of a parameter (only then are :meth:`whole_matrix`,
    :meth:`sums` and :meth:`settle` called; :meth:`transform` runs in every step) it takes its sums, of the raw
    gradient and the weights before the update if it stands first in the recipe, and keeps them as state of fixed
    shape. At the start of the next step the engine calls :meth:`refresh` with the small states of *all* parameters,
    which returns new small state, in force until the next time. The lag of one step makes the outcome the same whether
    the groups are stepped in one call or one by one, and after a resume at any step. Groups may differ in
    hyper-parameters: each takes what the technique with its own makes of the whole population.
    """

    interval: int = 1

    #: slots (by name) of which refresh() gets every parameter's value
    population: ClassVar[tuple[str, ...]] = ()

    def measures(self, info: ParamInfo) -> bool:
        """Whether such a parameter is part of the population."""
        return True

    def refresh(self, states: dict[str, Tensor], infos: list[ParamInfo], relations: Relations) -> dict[str, Tensor]:
        """New small state from the small states of the whole population.

        Must be idempotent: called twice without a measurement in between, it changes nothing the second time. It runs
        eagerly, at intervals only.

        Args:
            states: ``{slot name: [P, *slot shape]}`` for the slots named in ``population``.
            infos: The ``P`` parameters, in the optimizer's order.
            relations: Which of them belong together.

        Returns:
            ``{slot name: [P, *slot shape]}``, what changed.
        """
        raise NotImplementedError(f"{type(self).__name__} has no refresh()")
