"""Groups, optimizer and schedule of a LightningModule in one call."""

from __future__ import annotations

import importlib
import inspect
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import hina_optim
from hina_lightning.groups import ParameterGroup, group_parameters
from hina_lightning.schedules import SCHEDULES, Schedule, ScheduleLR, ScheduleName
from hina_lightning.sharding.shapes import complete_shapes
from hina_optim import arguments as rule

__all__ = ["OptimizerLike", "configure_optimizers"]

#: A registered name, a class path, an optimizer class, a factory that takes groups, or ``{class_path, init_args}``.
OptimizerLike = str | type[Optimizer] | Callable[..., Optimizer] | Mapping[str, Any]

_OWNER = "configure_optimizers"
_OPTIONAL_SCHEDULE = rule.Rule(
    "one of " + ", ".join(map(repr, SCHEDULES)) + ", or None", lambda x: x is None or x in SCHEDULES
)
_WARMUP = rule.Rule(
    "a number of optimizer steps (an integer >= 0) or a share of the training (a float in [0, 1))",
    lambda x: rule.COUNT.holds(x) or (isinstance(x, float) and 0 <= x < 1),
)
#: Options of a masked optimizer that are learning rates: they keep their meaning when a group's rate is multiplied.
_RATES = ("min_lr", "max_lr", "lr_bump")
#: torch takes (name, parameter) pairs from here on.
_NAMED_PARAMETERS = torch.__version__ >= "2.6"

_log = logging.getLogger(__name__)


def configure_optimizers(
    module: nn.Module,
    optimizer: OptimizerLike = "HinaAdaptive",
    *,
    lr: float | None = None,
    preset: str | None = None,
    weight_decay: float | None = None,
    schedule: ScheduleName | None = "cosine",
    warmup: int | float = 0,
    lr_multipliers: Mapping[str, float] | None = None,
    lora_ratio: float | None = None,
    roles: Mapping[str, float] | None = None,
    total_steps: int | None = None,
    end_factor: float = 0.0,
    name: str = "lr",
    **arguments: Any,
) -> dict[str, Any]:
    """Build what ``LightningModule.configure_optimizers`` returns: groups, optimizer, and a schedule by optimizer step.

    Nothing is kept and the module is not changed: every call gives an equal, independent configuration.

    Args:
        module: The LightningModule, adapters in place and sharded if it is to be (Lightning calls ``configure_model``
            first). Any ``nn.Module`` will do when ``total_steps`` is given or not needed.
        optimizer: What to build.

            - a registered name (:func:`hina_optim.list_optimizers`);
            - a class path (``"torch.optim.AdamW"``) or a ``torch.optim.Optimizer`` class;
            - a factory that takes parameter groups, such as LightningCLI makes for ``OptimizerCallable``;
            - ``{"class_path": …, "init_args": …}``, what LightningCLI links.
        lr: Learning rate, ≥ 0. A factory, a mapping and a ``config`` may bring their own; everything else needs it.
        preset: A preset of the registered optimizer (:func:`hina_optim.list_presets`).
        weight_decay: ≥ 0, for the groups that decay. None: the optimizer's default.
        schedule: ``"cosine"``, ``"linear"``, ``"constant"`` (see :class:`~hina_lightning.schedules.Schedule`), or None
            for no scheduler at all.
        warmup: Linear warm-up of the schedule: optimizer steps (an int), or a share of the training (a float in
            [0, 1)). It begins at ``1/warmup``, so the first step is not wasted. Not to be confused with the
            ``warmup_steps`` of a masked optimizer, in which the mask moves.
        lr_multipliers: ``{regex: factor}``; the first one found in a parameter's name multiplies its learning rate, and
            ``min_lr``, ``max_lr`` and ``lr_bump`` where the optimizer has them.
        lora_ratio: LoRA+: learning rate of every adapter's B over that of A. Not beside the ``alora_ratio`` of an
            optimizer that has one.
        roles: ``{role: factor}`` for the learning rate of all parameters of an adapter role, or of all that begin like
            it (``"lokr_w2"``, ``"loha"``); see :data:`hina_optim.adapters.ROLES`. Each gets a group of its own.
        total_steps: Optimizer steps of the whole training. None: ``module.trainer.estimated_stepping_batches``.
        end_factor: Share of the learning rate at which a cosine or linear schedule ends, in [0, 1].
        name: Name of the schedule in ``LearningRateMonitor``, which logs ``<name>/<group>``. Give each of several
            optimizers its own.
        **arguments: Every other argument goes to the optimizer, a ``config`` object or a ``profile`` too.

    Returns:
        ``{"optimizer": …, "lr_scheduler": {"scheduler", "interval": "step", "frequency": 1, "name"}}``, without
        ``lr_scheduler`` when ``schedule`` is None. The groups carry unique names (see
        :func:`~hina_lightning.groups.group_parameters`), and the names of their parameters.

    Raises:
        ValueError: A value is not what it must be; nothing is trainable; a regular expression decides for nothing;
            ``lora_ratio`` without an adapter, or twice; the number of steps is not known (endless training, no
            trainer).
        TypeError: The optimizer does not know an argument.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
        >>> config = configure_optimizers(model, "torch.optim.AdamW", lr=1e-3, weight_decay=0.1, total_steps=10)
        >>> [(g["name"], g["weight_decay"]) for g in config["optimizer"].param_groups]
        [('decay', 0.1), ('no_decay', 0.0)]
    """
    rule.check(_OWNER, "schedule", schedule, _OPTIONAL_SCHEDULE)
    rule.check(_OWNER, "warmup", warmup, _WARMUP)
    rule.check(_OWNER, "end_factor", end_factor, rule.UNIT)
    if total_steps is not None:
        rule.check(_OWNER, "total_steps", total_steps, rule.INTERVAL)
    if schedule is None and warmup:
        raise ValueError(f"{_OWNER}: warmup={warmup!r} needs a schedule; schedule='constant' warms up and stays.")

    if isinstance(optimizer, Mapping):
        optimizer, arguments = _from_mapping(optimizer, arguments)
        lr = arguments.pop("lr", None) if lr is None else lr
        own_decay = arguments.pop("weight_decay", None)
        weight_decay = own_decay if weight_decay is None else weight_decay
    if weight_decay is not None:
        rule.check(_OWNER, "weight_decay", weight_decay, rule.NON_NEGATIVE)
    if lr is not None:
        rule.check(_OWNER, "lr", lr, rule.NON_NEGATIVE)

    build = _builder(optimizer, preset, lr, weight_decay, arguments)
    groups = group_parameters(
        module, lr_multipliers=lr_multipliers, lora_ratio=lora_ratio, roles=roles, shapes=_engine_shapes(module)
    )
    built = build(_options(groups, build, lr, weight_decay))
    if lora_ratio is not None:
        _refuse_second_ratio(built, lora_ratio)
    if schedule is None:
        return {"optimizer": built}
    form = _schedule(module, schedule, warmup, total_steps, end_factor)
    scheduler = {"scheduler": ScheduleLR(built, form), "interval": "step", "frequency": 1, "name": name}
    return {"optimizer": built, "lr_scheduler": scheduler}


Build = Callable[[list[dict[str, Any]]], Optimizer]


def _from_mapping(given: Mapping[str, Any], arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    unknown = given.keys() - {"class_path", "init_args"}
    if unknown or not isinstance(given.get("class_path"), str):
        raise ValueError(f"{_OWNER}: optimizer={dict(given)!r} must be {{'class_path': …, 'init_args': {{…}}}}.")
    init_args = dict(given.get("init_args") or {})
    if init_args.get("config") is not None:
        # LightningCLI spells out every default beside the config, and none of them was meant to override it
        cls = _imported(given["class_path"])
        defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
        init_args = {name: value for name, value in init_args.items() if value != defaults.get(name)}
    return given["class_path"], {**init_args, **arguments}


def _builder(
    optimizer: str | type[Optimizer] | Callable[..., Optimizer],
    preset: str | None,
    lr: float | None,
    weight_decay: float | None,
    arguments: dict[str, Any],
) -> Build:
    """A function that makes the optimizer from groups."""
    if isinstance(optimizer, str) and "." in optimizer:
        optimizer = _imported(optimizer)
    given = dict(arguments)
    if isinstance(optimizer, (str, type)):
        if lr is None and given.get("config") is None:
            raise ValueError(f"{_OWNER}: give lr, the learning rate.")
        given |= {name: x for name, x in (("lr", lr), ("weight_decay", weight_decay)) if x is not None}
    if isinstance(optimizer, str):
        registered = optimizer
        return lambda groups: hina_optim.create_optimizer(registered, groups, preset=preset, **given)
    if preset is not None:
        raise ValueError(f"{_OWNER}: preset={preset!r} needs the name of a registered optimizer, not {optimizer!r}.")
    if isinstance(optimizer, type) and not issubclass(optimizer, Optimizer):
        raise ValueError(f"{_OWNER}: optimizer={optimizer!r} is not a torch.optim.Optimizer.")
    if not callable(optimizer):
        raise ValueError(
            f"{_OWNER}: optimizer={optimizer!r} must be a name, a class path, an optimizer class, a factory that takes "
            "parameter groups, or {'class_path': …, 'init_args': {…}}."
        )
    factory = optimizer
    return lambda groups: factory(groups, **given)


def _imported(path: str) -> Any:
    where, _, what = path.rpartition(".")
    try:
        return getattr(importlib.import_module(where), what)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{_OWNER}: optimizer={path!r} is not an importable class path: {error}.") from error


def _options(
    groups: list[ParameterGroup], build: Build, lr: float | None, weight_decay: float | None
) -> list[dict[str, Any]]:
    """Groups as the optimizer takes them: learning rates and their bounds multiplied, decay set."""
    defaults: dict[str, Any] = {"lr": lr}
    if lr is None or any(group.factor != 1 for group in groups):
        # What the optimizer would give to a group, presets and its own defaults included, only it can say.
        probe = build([{"params": _params([("probe", nn.Parameter(torch.zeros(1)))]), "name": "probe"}])
        defaults = {**probe.param_groups[0], **({} if lr is None else {"lr": lr})}
    options = []
    for group in groups:
        option: dict[str, Any] = {
            "params": _params(group.params),
            "name": group.name,
            "lr": defaults["lr"] * group.factor,
        }
        if group.factor != 1:
            option.update({rate: defaults[rate] * group.factor for rate in _RATES if rate in defaults})
        if not group.decays:
            option["weight_decay"] = 0.0
        elif weight_decay is not None:
            option["weight_decay"] = weight_decay
        options.append(option)
    return options


def _refuse_second_ratio(optimizer: Optimizer, lora_ratio: float) -> None:
    """LoRA+ is done once: by the groups' learning rates, or by the optimizer itself."""
    for group in optimizer.param_groups:
        if group.get("use_alora") and group.get("alora_ratio", 1) != 1:
            raise ValueError(
                f"{_OWNER}: lora_ratio={lora_ratio!r} was given, and {type(optimizer).__name__} multiplies the "
                f"learning rate of every B by alora_ratio={group['alora_ratio']!r} itself: leave lora_ratio out, or "
                "set alora_ratio=1."
            )


def _params(named: list[tuple[str, nn.Parameter]]) -> list[Any]:
    return list(named) if _NAMED_PARAMETERS else [parameter for _, parameter in named]


def _schedule(
    module: nn.Module, shape: ScheduleName, warmup: int | float, total_steps: int | None, end_factor: float
) -> Schedule:
    if total_steps is None and (shape != "constant" or isinstance(warmup, float)):
        total_steps = _estimated_steps(module)
    if isinstance(warmup, float):
        warmup = round(warmup * (total_steps or 0))
    if total_steps is not None and warmup > total_steps:
        _log.warning("The warm-up of %d steps is not over when the training ends, after %d.", warmup, total_steps)
    return Schedule(shape, warmup, None if shape == "constant" else total_steps, end_factor)


def _estimated_steps(module: nn.Module) -> int:
    """Optimizer steps of the whole training, from the trainer."""
    remedy = "Give total_steps, or use schedule='constant' with a warm-up in steps, or schedule=None."
    trainer = _trainer_of(module)
    if trainer is None:
        raise ValueError(f"{_OWNER}: {type(module).__name__} has no trainer to tell the number of steps. {remedy}")
    if trainer.limit_train_batches == 0:  # of which Lightning makes an endless training, although there is none
        return 1
    steps = trainer.estimated_stepping_batches
    if steps == math.inf or steps < 0:
        raise ValueError(f"{_OWNER}: the training is endless (no max_steps, and no end of epochs known). {remedy}")
    return max(int(steps), 1)


def _engine_shapes(module: nn.Module) -> dict[nn.Parameter, tuple[int, ...]]:
    """Shapes of parameters that the trainer's engine has cut; from now on it will tell our optimizers where they are.

    FSDPStrategy wraps the module before it asks for optimizers, DeepSpeedStrategy afterwards.
    """
    trainer = _trainer_of(module)
    strategy = getattr(trainer, "strategy", None)
    if strategy is None:
        return complete_shapes(module)
    # here, not above: scripts that use no Lightning call this, too
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

    from hina_lightning.callbacks.layout_binding import LayoutBinding

    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        LayoutBinding.add_to(trainer)
    return complete_shapes(strategy.model or module)


def _trainer_of(module: nn.Module) -> Any:
    try:
        return getattr(module, "trainer", None)
    except RuntimeError:  # a LightningModule without a trainer
        return None
