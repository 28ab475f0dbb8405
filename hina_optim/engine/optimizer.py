"""The base class of every optimizer here: parameter groups, state, the step, saving and loading."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from hina_optim import arguments as rule
from hina_optim.engine.agreement import Agreement, check_partitions, settled
from hina_optim.engine.bookkeeping import Buckets
from hina_optim.engine.bucket import Bucket
from hina_optim.engine.everything import about_all, whole_groups
from hina_optim.engine.exhaustion import before_any_change
from hina_optim.engine.housing import Housing
from hina_optim.engine.layout import Layout
from hina_optim.engine.program import Program
from hina_optim.engine.runner import Runner
from hina_optim.engine.transfers import Transfers
from hina_optim.state import checkpoint
from hina_optim.state.precision import PRECISIONS
from hina_optim.techniques.base import ParamInfo, Technique

__all__ = ["ENGINE_RULES", "HinaOptimizer", "ParamsT"]

log = logging.getLogger("hina_optim")

ParamsT = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

#: Arguments that every optimizer has beside its own, and their rules.
ENGINE_RULES: dict[str, rule.Rule] = {
    "max_buffer_memory_mb": rule.POSITIVE,
    "state_precision": rule.one_of(*PRECISIONS),
    "rounding": rule.one_of("stochastic", "kahan", "nearest"),
    "seed": rule.INTEGER,
    "compile": rule.OPTIONAL_FLAG,
    "min_8bit_size": rule.COUNT,
    "force_8bit": rule.FLAG,
    "state_device": rule.HOST_OR_NONE,
    "anchor_device": rule.HOST_OR_NONE,
}

#: What they are where a subclass does not say.
ENGINE_DEFAULTS: dict[str, Any] = {
    "max_buffer_memory_mb": 500,
    "state_precision": "fp32",
    "rounding": "stochastic",
    "seed": 0,
    "compile": None,
    "min_8bit_size": 4096,
    "force_8bit": False,
    "state_device": None,
    "anchor_device": None,
}


class HinaOptimizer(Housing, torch.optim.Optimizer):
    """Runs a recipe of techniques over parameter groups.

    A subclass gives a typed constructor, :attr:`RULES` and :meth:`recipe`; everything else is here. Hyper-parameters
    live in ``param_groups`` and ``defaults`` only, state in ``state[p]`` only, as tensors: copies, pickles and
    checkpoints lose nothing. A user's own recipe is a subclass that overrides :meth:`recipe`.

    Each group also gets ``start_lr``, the learning rate it was added with: per-element rates follow a scheduler
    through the ratio of ``lr`` to it.
    """

    RULES: ClassVar[dict[str, rule.Rule]] = ENGINE_RULES
    REMOVED: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make the constructor name the nearest known argument when given one that does not exist."""
        super().__init_subclass__(**kwargs)
        if "__init__" not in cls.__dict__:
            return
        init = cls.__dict__["__init__"]
        code = init.__code__
        known = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
        if code.co_flags & 0x08 or "defaults" in known:  # takes **kwargs, or is a base class: others check
            return

        @functools.wraps(init)
        def checked(self: HinaOptimizer, *args: Any, **arguments: Any) -> None:
            rule.reject_unknown(type(self).__name__, arguments, known, type(self).REMOVED)
            for name in known[: len(args)]:
                if name in arguments:
                    raise TypeError(f"{type(self).__name__}: {name} is given twice, by position and by name.")
            given = {**dict(zip(known, args, strict=False)), **arguments}
            init(self, *args[len(known) :], **type(self).expand_arguments(given))

        cls.__init__ = checked  # type: ignore[method-assign]

    @classmethod
    def expand_arguments(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the constructor, from those that were given; for classes with named sets of arguments."""
        return given

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._names: list[list[str] | None] = []
        self._layout = Layout()
        self._every_group: list[dict[str, Any]] = []
        self._settled: list[Tensor] = []  # parameters whose layout is known
        self._transfers = Transfers()
        self._granted = (0, 0)  # bytes of temporary memory that were asked for, and that there were
        self._buckets = Buckets(self)
        self._loss: Tensor | None = None
        self._said_no_loss = False
        defaults = {**ENGINE_DEFAULTS, **defaults}
        rule.check_all(type(self).__name__, defaults, self.RULES)
        if isinstance(params, Tensor):
            raise TypeError(f"{type(self).__name__}: params must be an iterable of parameters, got a tensor: use [p].")
        given: list[Any] = list(params)
        if not given:
            raise ValueError(
                f"{type(self).__name__}: got no parameters: the list (or generator, used up already?) is empty. "
                "Pass model.parameters() of a model in which something requires grad."
            )
        super().__init__(given, defaults)

    # -- recipe --------------------------------------------------------------------------------------------------

    def recipe(self, group: dict[str, Any], info: ParamInfo) -> list[Technique]:
        """The techniques of one group, in the order in which they act; called once for every kind of parameter.

        Args:
            group: The parameter group with its hyper-parameters.
            info: What the parameters are.
        """
        raise NotImplementedError(f"{type(self).__name__} must define recipe()")

    # -- groups ------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are checked, and nothing is added when one is bad.

        Raises:
            ValueError: A bad option, a duplicate parameter, or a duplicate group name.
        """
        owner = type(self).__name__
        found: list[str] = []
        if isinstance(param_group, dict):
            # torch only warns about a parameter that is in one group twice
            group = dict(param_group)
            given = group.get("params", [])
            if isinstance(given, (set, frozenset)):
                raise TypeError(f"{owner}: params is a set, whose order changes between runs; use a list.")
            group["params"] = [given] if isinstance(given, Tensor) else list(given)
            merged = {**self.defaults, **{k: v for k, v in group.items() if k != "params"}}
            self.check_group(merged)
            tensors = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
            names = [p[0] if isinstance(p, tuple) else None for p in group["params"]]
            group["params"] = tensors
            found = [n for n in names if n is not None]
            if found and len(found) != len(names):
                raise ValueError(
                    f"{owner}: group {len(self.param_groups)} mixes named and unnamed parameters; name all or none."
                )
            if not tensors:
                raise ValueError(f"{owner}: group {len(self.param_groups)} has no parameters; leave it out.")
            seen: dict[int, str | None] = {}
            for name, p in zip(names, tensors, strict=True):
                if id(p) in seen:
                    raise ValueError(
                        f"{owner}: the parameter {name or tuple(p.shape)} is in group {len(self.param_groups)} twice; "
                        "pass every parameter once (tied weights are one parameter)."
                    )
                seen[id(p)] = name
                if isinstance(p, Tensor) and p.is_complex():
                    raise ValueError(
                        f"{owner}: {name or 'a parameter'} is complex; view it as real (torch.view_as_real)."
                    )
                if isinstance(p, Tensor) and not p.is_floating_point():
                    raise ValueError(
                        f"{owner}: {name or 'a parameter'} has dtype {p.dtype}; only floating point can be trained."
                    )
            group_name = group.get("name")
            if group_name is not None and any(g.get("name") == group_name for g in self.param_groups):
                raise ValueError(f"{owner}: two groups are named {group_name!r}; names must be unique.")
            lr = merged.get("lr")
            group.setdefault("start_lr", float(lr) if lr is not None else 0.0)
            param_group = group
        super().add_param_group(param_group)
        self._every_group = list(self.param_groups)  # now, while they are all here
        # names stay out of the groups: a flattened checkpoint repeats every group value for every parameter
        self._names.append(found or None)
        if not found:
            self._buckets.identities.infer(len(self._names) - 1)
        self._buckets.identities.learn(len(self._names) - 1, found)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError unless every option of a group (defaults filled in) is valid. Subclasses add joint rules."""
        rule.check_all(type(self).__name__, group, self.RULES)

    def param_names(self) -> list[str]:
        """One name a parameter, in the order of the groups: its own where known, else its place.

        Where a name comes again (two models in one optimizer) it gets a number in front, ``"2:encoder.weight"``.
        """
        names: list[str] = []
        seen: Counter[str] = Counter()
        for g, group in self.indexed_groups():
            params = self._layout.params(group)
            told = [self._layout.name(p) for p in params]
            known = [name for name in told if name is not None] or (self._names[g] if g < len(self._names) else None)
            if known is None or len(known) != len(params):
                names += [f"group{g}.{i}" for i in range(len(params))]
            else:
                names += [f"{seen[name] + 1}:{name}" if seen[name] else name for name in known]
            seen.update(known or ())
        return names

    def indexed_groups(self) -> list[tuple[int, dict[str, Any]]]:
        """The groups that are there now, each with its index among those that the optimizer was built with.

        DeepSpeed leaves one of them in ``param_groups`` while it steps it.
        """
        if len(self.param_groups) >= len(self._every_group):
            self._every_group = list(self.param_groups)
            return list(enumerate(self.param_groups))
        index = {id(group): g for g, group in enumerate(self._every_group)}
        return [(index[id(group)], group) for group in self.param_groups]

    def group(self, index: int) -> dict[str, Any]:
        """A group by its index among those that the optimizer was built with."""
        return next(group for g, group in self.indexed_groups() if g == index)

    # -- step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one update.

        Args:
            closure: Computes the loss again, with gradients; called once, before any gradient is read.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: A sparse gradient, or a parameter whose shape or device is not that of its state. Nothing
                has changed then.
            torch.OutOfMemoryError: There was not enough memory, even after giving back what can be given back. The
                message says whether anything was changed; no parameter is without the state that belongs to it.
        """
        loss = None
        if closure is not None:
            reported = self._loss
            with torch.enable_grad():
                loss = closure()
            number = type(loss) in (int, float) or (isinstance(loss, Tensor) and loss.numel() == 1)
            # who reported while the closure ran knows more than its result: of accumulated batches it has the last only
            if number and self._loss is reported:
                self.report_loss(loss)
        with before_any_change():
            work = self._buckets.prepare()
            if work:
                self._buckets.refresh(work)
                programs = [(b, self._buckets.program(b)) for b in work]
                agreed = self._agreed_loss(programs)
        if work:
            budget = min(int(b.group["max_buffer_memory_mb"] * 1e6) for b in work)
            asked, granted = self._granted
            runner = Runner(self._layout, granted if asked == budget else budget, agreed, self._transfers)
            try:
                runner.step(programs)
            finally:  # whatever ends a step early: what it has updated has taken a step
                self._buckets.advance(runner.updated)
                self._granted = budget, runner.max_bytes
            self.after_step()
        return loss

    def after_step(self) -> None:
        """Called at the end of every step that had a gradient; for what a subclass has to say."""

    def report_loss(self, loss: Tensor | float) -> None:
        """Tell the training loss of the next step to techniques that read it; waits for nothing.

        Not needed where ``step(closure)`` is used, whose closure returns it. It holds until the next report, so that
        groups that are stepped one by one all see it. With several processes their mean is taken.

        Args:
            loss: One number; of several micro-batches, their mean. A tensor may be on any device.

        Raises:
            ValueError: It is not one number.
        """
        if not isinstance(loss, Tensor):
            if isinstance(loss, bool) or not isinstance(loss, (int, float)):
                raise ValueError(f"{type(self).__name__}: the loss is {type(loss).__name__}, not a number or a tensor.")
            loss = torch.tensor(float(loss))
        if loss.numel() != 1:
            raise ValueError(f"{type(self).__name__}: the loss has shape {tuple(loss.shape)}; report one number.")
        self._loss = loss.detach().reshape(()).float()

    def _agreed_loss(self, work: list[tuple[Bucket, Program]]) -> Tensor | None:
        """The reported loss, the same on all ranks, if any technique reads it."""
        if not any(program.reads_loss for _, program in work):
            return None
        if self._loss is None and not self._said_no_loss:
            self._said_no_loss = True
            log.warning(
                "%s: no loss was reported, so the techniques that follow it leave the learning rate as it is. Use "
                "step(closure), optimizer.report_loss(loss) before each step, or the Lightning callback.",
                type(self).__name__,
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # every rank takes part, with NaN where nothing was reported: then it counts as not reported anywhere
            loss = torch.tensor(math.nan) if self._loss is None else self._loss
            loss = loss.to(work[0][0].key.device, copy=True)
            torch.distributed.all_reduce(loss)
            return loss / torch.distributed.get_world_size()
        return self._loss

    def before_state(self) -> None:
        """Called once before any state is allocated, by all ranks; an optimizer with a memory budget checks it here."""

    def agree(self, here: bool) -> bool:
        """Whether it is so on any rank: what one must do, all do."""
        self.settle_layout()
        return bool(self._layout.total(torch.tensor([float(here)])))

    @about_all
    def init_state(self) -> None:
        """Allocate the state of every parameter that requires grad now, instead of at its first step."""
        with torch.no_grad():
            self.settle_layout()
            params = [p for _, _, p in self._buckets.identities.places() if p.requires_grad]
            agreement = Agreement(self)
            agreement.making_state(not self.state)
            self._buckets.ensure_together(params, agreement)

    def bind_layout(self, layout: Layout) -> None:
        """Tell where the elements of sharded parameters lie. To be called before the first step.

        Raises:
            RuntimeError: There is state already.
        """
        if self.state:
            raise RuntimeError(
                f"{type(self).__name__}: bind_layout() comes before the first step; there is state already."
            )
        self._layout, self._settled = layout, []

    def settle_layout(self) -> None:
        """See that the layout is that of the parameters that are in the groups now: frameworks replace them.

        Raises:
            RuntimeError: They lie in a way that the optimizer was not told of.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        if len(params) == len(self._settled) and all(map(operator.is_, params, self._settled)):
            return
        check_partitions(self)
        self._layout = settled(self._layout, params, type(self).__name__)
        self._settled = params

    # -- saving, loading, copying ------------------------------------------------------------------------------------

    @about_all
    def state_dict(self) -> dict[str, Any]:
        """State, groups, and under ``"hina"`` what lets :meth:`load_state_dict` check that they belong here."""
        self._buckets.conform()
        self._transfers.wait()
        with self._as_the_engine_sees():
            result = super().state_dict()
        result["state"] = {k: checkpoint.unstacked(state) for k, state in result["state"].items()}
        result["hina"] = checkpoint.describe(self)
        return result

    def whole_groups(self) -> contextlib.AbstractContextManager[None]:
        """Within this, groups hold what they are made of, also where an engine leaves them empty between its steps."""
        return whole_groups(self)

    @contextlib.contextmanager
    def _as_the_engine_sees(self) -> Iterator[None]:
        """The groups hold the parameters that have state, in the place of flat tensors that hold them."""
        held = [group["params"] for group in self.param_groups]
        for p in [p for p, state in self.state.items() if not state]:
            del self.state[p]  # an engine only looked (DeepSpeed at its flat tensors), and torch's state made an entry
        for group in self.param_groups:
            group["params"] = list(self._layout.params(group))
        try:
            yield
        finally:
            for group, params in zip(self.param_groups, held, strict=True):
                group["params"] = params

    @about_all
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state and groups: every dtype as saved, by name where both sides have names, all or nothing.

        Args:
            state_dict: From :meth:`state_dict`, also after ``torch.load(..., weights_only=True)``.

        Raises:
            ValueError: It belongs to another optimizer or model, or is incomplete; says what does not fit. Nothing
                has changed then.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        checkpoint.load(self, state_dict)
        for post in self._optimizer_load_state_dict_post_hooks.values():
            post(self)

    def described(self) -> dict[str, Any]:
        """What else a checkpoint must agree in with the optimizer that loads it: plain values by name."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        self._transfers.wait()
        state = defaultdict(dict, {p: checkpoint.unstacked(state) for p, state in self.state.items()})
        kept = {"names": self._names, "aliases": self._buckets.identities.aliases, "alone": self._buckets.alone()}
        return {**super().__getstate__(), "state": state, **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        names, alone, aliases = state.pop("names", None), state.pop("alone", ()), state.pop("aliases", {})
        super().__setstate__(state)
        if names is not None or not hasattr(self, "_names"):
            self._names = names or [None] * len(self.param_groups)
        if not hasattr(self, "_layout"):
            self._layout = Layout()
        self._every_group, self._settled = list(self.param_groups), []
        self._loss, self._said_no_loss = None, False
        self._transfers = Transfers()
        self._granted = (0, 0)
        self._buckets = Buckets(self)
        self._buckets.identities.aliases = dict(aliases)
        for g, known in enumerate(self._names):
            self._buckets.identities.learn(g, known)
        self._buckets.restore(alone)
