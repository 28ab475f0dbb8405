"""What all named optimizers share: checked and documented options, sets of options, a budget, and log lines."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from hina_optim import arguments as rule
from hina_optim.engine.everything import about_all
from hina_optim.engine.optimizer import HinaOptimizer, ParamsT
from hina_optim.memory.account import any_rank, as_size, parameter_bytes
from hina_optim.memory.ladder import LADDER, StateTo, VramReport, optimize_for_vram, relax_vram
from hina_optim.memory.planning import BudgetError, plan_of
from hina_optim.memory.probes import GIB
from hina_optim.optimizers.adapter_reports import AdapterReports
from hina_optim.optimizers.inspection import Inspection
from hina_optim.optimizers.options import describe, names_of, rules_of

__all__ = ["LOG_INTERVAL", "Family", "options"]

log = logging.getLogger("hina_optim")

#: Steps from one line of ``verbose=True`` to the next.
LOG_INTERVAL = 100

_NOT_OPTIONS = frozenset({"self", "params", "config", "profile", "regularization", "momentum", "foreach", "__class__"})


def options(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters among the local variables of a constructor."""
    return {name: value for name, value in variables.items() if name not in _NOT_OPTIONS}


class Family(HinaOptimizer, Inspection, AdapterReports):
    """Base of the named optimizers.

    A class gives its purpose and steps in its docstring, a typed constructor whose arguments are all in
    :data:`~hina_optim.optimizers.options.OPTIONS`, and a recipe. Its rules and the ``Args`` section of its docstring
    come from there.
    """

    VERSION: ClassVar[str] = "1.0"
    #: Rules that differ from those of the table.
    OWN_RULES: ClassVar[dict[str, rule.Rule]] = {}
    #: What ``state_precision=None`` stands for.
    STATE_PRECISION: ClassVar[str] = "fp32"
    #: The class of the argument ``config``, where there is one.
    CONFIG: ClassVar[type[Any] | None] = None
    REMOVED: ClassVar[dict[str, str]] = {
        "fourier_feature_loss": (
            "An optimizer sees latents' gradients, not images: use edge_suppression=True, or spatial_awareness=True "
            "with frequency_penalty, instead."
        ),
        "super_resolution_mode": (
            "Use spatial_awareness=True with detail_preservation, and background_regularization=True, instead."
        ),
    }

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give the class its rules and the description of its arguments."""
        super().__init_subclass__(**kwargs)
        if "__init__" not in cls.__dict__ or "RULES" in cls.__dict__ or cls.__module__.split(".")[0] != "hina_optim":
            return  # a user's own class has rules and words of its own
        cls.RULES = {**rules_of(names_of(cls.__init__)), **cls.OWN_RULES}
        text = inspect.cleandoc(cls.__doc__ or "")
        before, mark, after = text.partition("\nRaises:\n")
        cls.__doc__ = f"{before.rstrip()}\n\n{describe(cls.__init__)}\n{mark}{after}"

    @classmethod
    def expand_arguments(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Put the options of ``config`` and ``profile`` below those that were given beside them."""
        given = dict(given)
        config, profile = given.pop("config", None), given.pop("profile", None)
        base: dict[str, Any] = {}
        if config is not None and profile is not None:
            raise ValueError(f"{cls.__name__}: config and profile are both given; a config holds all options already.")
        if config is not None:
            if cls.CONFIG is None or not isinstance(config, cls.CONFIG):
                wanted = cls.CONFIG.__name__ if cls.CONFIG else "no config"
                raise TypeError(f"{cls.__name__}: config is {type(config).__name__}, and must be {wanted}.")
            base = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        if profile is not None:
            from hina_optim.profiles import profile_arguments

            base = {**base, **profile_arguments(profile)}
        parameters = inspect.signature(cls).parameters if base else {}
        defaults = {name: p.default for name, p in parameters.items() if name != "params"}
        if base and defaults.keys() <= given.keys() | {"config", "profile"}:
            # LightningCLI spells every default out: those were not meant to override anything
            given = {name: value for name, value in given.items() if name == "params" or value != defaults[name]}
        expanded = {**base, **given}
        if expanded.get("state_precision") is None:
            lower = expanded.get("reduce_precision", False) and cls.STATE_PRECISION == "fp32"
            expanded["state_precision"] = "bf16" if lower else cls.STATE_PRECISION
        if expanded.get("cpu_offload_states", False) is True and expanded.get("state_device") is None:
            expanded["state_device"] = "cpu"
        return expanded

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        if any(group.get("use_grams") and group.get("use_cautious") for group in self.param_groups) and not (
            self.PHASES
        ):
            log.warning(
                "%s: with use_grams=True every update has its gradient's sign already, so use_cautious has nothing to "
                "do and is left out; set use_cautious=False to say that you know.",
                type(self).__name__,
            )

    #: Whether techniques act in phases of the training (then Grams and cautious take turns).
    PHASES: ClassVar[bool] = False

    @property
    def config(self) -> Any:
        """The options that the optimizer was built with, as an object of the class's config type.

        Raises:
            AttributeError: The class has none; use ``defaults``.
        """
        if self.CONFIG is None:
            raise AttributeError(f"{type(self).__name__} has no config; its options are in .defaults")
        names = {field.name for field in dataclasses.fields(self.CONFIG)}
        return self.CONFIG(**{name: value for name, value in self.defaults.items() if name in names})

    def check_group(self, group: dict[str, Any]) -> None:
        """Every option by its rule; then those that must fit together."""
        super().check_group(group)
        if group.get("amsgrad") and group.get("use_adopt_stability"):
            raise ValueError(
                f"{type(self).__name__}: amsgrad=True is about Adam's second moment, and ADOPT is on: set "
                "use_adopt_stability=False, or leave amsgrad out."
            )
        if group.get("amsgrad") and group.get("factored_second_moment"):
            raise ValueError(
                f"{type(self).__name__}: amsgrad=True keeps the largest second moment of every element, and "
                "factored_second_moment=True none of any element: leave one of them out."
            )
        if not group.get("use_lr_mask", False):
            return
        owner = type(self).__name__
        if not group["min_lr"] <= group["max_lr"]:
            raise ValueError(f"{owner}: min_lr={group['min_lr']} is above max_lr={group['max_lr']}.")
        start = float(group.get("start_lr", group["lr"]))
        if not group["min_lr"] <= start <= group["max_lr"]:
            raise ValueError(
                f"{owner}: lr={start} is outside [min_lr, max_lr] = [{group['min_lr']}, {group['max_lr']}], the "
                "bounds of the per-element learning rates: raise max_lr, lower min_lr, or set use_lr_mask=False."
            )

    def before_state(self) -> None:
        """Keep to ``vram_budget_gb`` from the first byte of state on, on all ranks alike, and say so.

        Raises:
            BudgetError: A budget that was asked for is smaller than the parameters themselves.
        """
        groups = [group for group in self.param_groups if "vram_budget_gb" in group and group["memory_efficient"]]
        owner = type(self).__name__
        if not groups:
            return
        budget = min(float(group["vram_budget_gb"]) for group in groups)
        # a subclass may take its arguments in another way
        constructors = (inspect.signature(cls.__init__).parameters for cls in type(self).__mro__)  # type: ignore[misc]
        usual = next(p["vram_budget_gb"].default for p in constructors if "vram_budget_gb" in p)
        asked = budget != usual
        weights = parameter_bytes(self)
        if asked and any_rank(self, weights > budget * GIB):
            raise BudgetError(
                f"{owner}: vram_budget_gb={budget:g} is smaller than the parameters themselves, {as_size(weights)}. "
                "Raise it, train fewer parameters, or set memory_efficient=False.",
                plan_of(self),
            )
        # a budget that nobody asked for is no reason to switch anything off
        ladder = LADDER if asked else tuple(rung for rung in LADDER if isinstance(rung, StateTo))
        report = optimize_for_vram(self, budget, ladder)
        if report["actions"]:
            log.warning(
                "%s: parameters, gradients and state need %s, more than vram_budget_gb=%g (or another rank's do): %s "
                "from the first step on. Raise vram_budget_gb, or set memory_efficient=False, to change nothing.",
                owner, as_size(report["used_bytes_before"]), budget,
                ", ".join(action["rung"] for action in report["actions"]),
            )  # fmt: skip

    @about_all
    def relax_vram(self, budget_gb: float) -> VramReport:
        """Take back what the ladder of memory did, the last first, as long as ``budget_gb`` (GiB) is kept to.

        See :func:`hina_optim.memory.relax_vram`.

        Raises:
            ValueError: The budget is not a finite number > 0.
        """
        return relax_vram(self, budget_gb)

    def after_step(self) -> None:
        """With ``verbose``, log the learning rates at intervals (a wait for the device, then only)."""
        if not any(group.get("verbose", False) for group in self.param_groups):
            return
        step = self._global_step()
        if step == 1 or step % LOG_INTERVAL == 0:
            rates = ", ".join(f"{name} {rate:.3g}" for name, rate in self.get_effective_lrs().items())
            log.info("%s: step %d, effective learning rate: %s", type(self).__name__, step, rates)
