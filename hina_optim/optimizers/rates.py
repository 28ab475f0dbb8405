"""What an optimizer tells about its learning rates: effective rates and the masks of elements."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hina_optim.optimizers.statistics import log_histogram, log_quantiles

if TYPE_CHECKING:
    from hina_optim.engine.bookkeeping import Buckets
    from hina_optim.engine.layout import Layout
    from hina_optim.techniques.base import ParamInfo, Technique

__all__ = ["RateInspection", "numbers"]

#: Options of the masks, as they are reported.
LR_MASK = ("warmup_steps", "min_lr", "max_lr", "lr_bump")
QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}


class RateInspection:
    """The part of :class:`~hina_optim.optimizers.inspection.Inspection` that is about learning rates."""

    if TYPE_CHECKING:
        VERSION: ClassVar[str]
        param_groups: list[dict[str, Any]]
        defaults: dict[str, Any]
        state: defaultdict[Tensor, Any]
        _layout: Layout
        _buckets: Buckets

        def recipe(self, group: dict[str, Any], info: ParamInfo) -> list[Technique]:
            """From the optimizer."""

        def param_names(self) -> list[str]:
            """From the optimizer."""

        def state_bytes(self, precision: str | None = None) -> int:
            """From the optimizer."""

        def set_state_precision(self, precision: str) -> int:
            """From the optimizer."""

        def _adapter_names(self) -> tuple[list[str], list[tuple[int, ...]]]:
            """From the adapter reports."""

        def _adapter_stats(self) -> dict[str, dict[str, int]]:
            """From the adapter reports."""

        def scratch_bytes(self) -> int:
            """From the optimizer."""

        def release_scratch(self) -> int:
            """From the optimizer."""

        def change_options(self, changes: Sequence[Mapping[str, Any]]) -> None:
            """From the optimizer."""

        def agree(self, here: bool) -> bool:
            """From the optimizer."""

    def get_effective_lrs(self) -> dict[str, float]:
        """The mean learning rate over all elements of each group, as it is applied, by group name.

        Of an element: the group's learning rate now, times what every technique makes of it as things stand (mask,
        importance, relations, rows and roles of adapters, trend of the loss). One wait for the device.
        """
        means = self._lr_eff()
        return dict(zip(means, numbers(list(means.values())), strict=True))

    def get_avg_learning_rate(self) -> float:
        """The mean effective learning rate over all elements of all groups."""
        sums = self._reduced(self._lr_sums())
        if not sums:
            return math.nan
        home = next(iter(sums.values())).device
        total = torch.stack([x.to(home) for x in sums.values()]).sum(0)
        return numbers([total[0] / total[1]])[0]

    def get_learning_rates(self) -> list[float]:
        """The effective learning rate of every group, in their order."""
        return list(self.get_effective_lrs().values())

    def lr_mask_statistics(self) -> dict[str, Tensor]:
        """Effective learning rates and the distribution of the masks; 0-d tensors on the device, waits for nothing.

        For each group: ``lr_eff/<group>``, the mean rate as it is applied. Where the group has a mask,
        ``lr_mask/<group>/{mean,p05,p50,p95}``, learning rates before any schedule, and
        ``lr_mask/<group>/{at_min,at_max}``, the share of elements at a bound. With gradients there,
        ``sign_agree/<group>``: of the elements whose sign has been seen, the share whose gradient has that sign again.
        Ask for it before the step: after it, the last sign is that of this very gradient. When the warm-up has ended,
        the last sign stays what it was then.

        Quantiles and shares come from a histogram of 512 bins between ``min_lr`` and ``max_lr``, of equal width in the
        logarithm: they are known to a factor of (max_lr / min_lr)^(1/512), 1.8 % with the defaults.
        """
        result = {f"lr_eff/{name}": mean for name, mean in self._lr_eff().items()}
        sums: dict[str, Tensor] = {}
        for name, group in self._groups():
            if group.get("use_lr_mask", False):
                sums[f"counts/{name}"], sums[f"sum/{name}"] = self._mask_sums(group)
                agreement = self._agreement(group)
                if agreement is not None:
                    sums[f"agree/{name}"] = agreement
        sums = self._reduced(sums)
        for name, group in self._groups():
            if f"counts/{name}" not in sums:
                continue
            counts, total = sums[f"counts/{name}"], sums[f"sum/{name}"]
            count = counts.sum()
            key = f"lr_mask/{name}"
            result[f"{key}/mean"] = total / count
            quantiles = log_quantiles(counts, group["min_lr"], group["max_lr"], list(QUANTILES.values()))
            result |= {f"{key}/{q}": value for q, value in zip(QUANTILES, quantiles.unbind(), strict=True)}
            result[f"{key}/at_min"] = counts[0] / count
            result[f"{key}/at_max"] = counts[-1] / count
            if f"agree/{name}" in sums:
                agree, signed = sums[f"agree/{name}"].unbind()
                result[f"sign_agree/{name}"] = agree / signed.clamp(min=1)
        return result

    def get_lr_mask_analysis(self) -> dict[str, Any]:
        """Where the masks stand, for each parameter and altogether, and in which phase the training is."""
        masked = [group for group in self.param_groups if group.get("use_lr_mask", False)]
        shown = masked[0] if masked else self.param_groups[0]
        step = self._global_step()
        warmup = int(shown.get("warmup_steps", 0))
        parameters = self._mask_analysis()
        return {
            "lr_mask_enabled": bool(masked),
            "configuration": {name: shown.get(name) for name in LR_MASK},
            "parameter_analysis": parameters,
            "global_statistics": _pooled(parameters),
            "training_phase": {
                "current_step": step,
                "in_warmup": bool(masked) and step < warmup,
                "warmup_progress": min(1.0, step / warmup) if warmup else 1.0,
            },
        }

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _groups(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for i, group in enumerate(self.param_groups):
            yield str(group.get("name") or f"group{i}"), group

    def _params(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """Name, parameter and state (empty before its first step), in the order of the groups."""
        params = (p for group in self.param_groups for p in group["params"])
        for name, p in zip(self.param_names(), params, strict=True):
            yield name, p, self.state.get(p, {})

    def _options(self, names: tuple[str, ...]) -> dict[str, Any]:
        group = self.param_groups[0]
        return {name: group[name] for name in names if name in group}

    def _global_step(self) -> int:
        return max((int(state["step"]) for _, _, state in self._params() if "step" in state), default=0)

    def _reduced(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Local sums (1-d or 0-d) → sums over all shards, by one reduction."""
        if not self._layout.sharded or not sums:
            return sums
        home = next(iter(sums.values())).device
        packed = self._layout.all_reduce(torch.cat([x.reshape(-1).to(home) for x in sums.values()]))
        parts = packed.split([x.numel() for x in sums.values()])
        return {name: part.reshape(x.shape) for (name, x), part in zip(sums.items(), parts, strict=True)}

    def _masks(self, group: dict[str, Any]) -> tuple[list[Tensor], int]:
        """The masks of a group that exist, and how many elements have none yet and stand at ``start_lr``."""
        masks = [self._buckets.decoded(p, "lr_mask") for p in group["params"]]
        waiting = sum(p.numel() for p, mask in zip(group["params"], masks, strict=True) if mask is None)
        return [mask for mask in masks if mask is not None], waiting

    def _mask_sums(self, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Histogram and sum of the masks of a group."""
        home = group["params"][0].device
        masks, waiting = self._masks(group)
        low, high = group["min_lr"], group["max_lr"]
        counts = log_histogram((mask.to(home) for mask in masks), low, high, home)
        total = torch.stack([torch.zeros((), device=home), *(m.sum(dtype=torch.float32).to(home) for m in masks)]).sum()
        if waiting:
            fresh = torch.full((1,), float(group["start_lr"]), device=home)
            counts = counts + log_histogram([fresh], low, high, home) * waiting
            total = total + fresh[0] * waiting
        return counts, total

    def _agreement(self, group: dict[str, Any]) -> Tensor | None:
        """``[agreeing, compared]`` over the elements of a group whose last sign is known; None without gradients."""
        home = group["params"][0].device
        parts = []
        for p in group["params"]:
            last = self._buckets.decoded(p, "last_sign") if p.grad is not None else None
            if p.grad is not None and last is not None:
                product = p.grad.sign() * last
                parts.append(torch.stack([(product > 0).sum(), (last != 0).sum()]).float().to(home))
        return torch.stack(parts).sum(0) if parts else None

    def _lr_sums(self) -> dict[str, Tensor]:
        """For each group ``[sum of the effective rates, number of elements]``."""
        result = {}
        for name, group in self._groups():
            home = group["params"][0].device
            weights, count = [], 0
            for p in group["params"]:
                state = Decoded(self._buckets, p, self.state.get(p, {}))
                factor: Tensor | float = 1.0
                for one in self._buckets.techniques(p):
                    factor = factor * one.rate_factor(p, state)
                if isinstance(factor, Tensor):
                    # a factor of fewer elements than the parameter stands for all that it broadcasts to
                    weight = factor.sum(dtype=torch.float32).to(home) * (p.numel() / max(1, factor.numel()))
                else:
                    weight = torch.full((), factor * p.numel(), device=home)
                weights.append(weight)
                count += p.numel()
            lr = group["lr"]
            total = torch.stack(weights).sum() * (lr.to(home).reshape(()) if isinstance(lr, Tensor) else lr)
            result[name] = torch.stack([total, torch.full_like(total, float(count))])
        return result

    def _lr_eff(self) -> dict[str, Tensor]:
        return {name: total / count for name, (total, count) in self._reduced(self._lr_sums()).items()}

    def _mask_analysis(self) -> dict[str, dict[str, float]]:
        """Numbers of the masks of all parameters that have elements, by name."""
        starts = {
            id(p): float(group["start_lr"])
            for group in self.param_groups
            if group.get("use_lr_mask", False)
            for p in group["params"]
        }
        names, rows, sizes = [], [], []
        for name, p, _ in self._params():
            if id(p) not in starts or p.numel() == 0:
                continue
            mask = self._buckets.decoded(p, "lr_mask")
            mask = torch.full((1,), starts[id(p)], device=p.device) if mask is None else mask.float()
            low, high = mask.aminmax()
            rows += [mask.mean(), low, high, mask.std(correction=0)]
            names.append(name)
            sizes.append(p.numel())
        values = iter(numbers(rows))
        keys = ("mean", "min", "max", "std")
        return {
            name: {**{key: next(values) for key in keys}, "elements": size}
            for name, size in zip(names, sizes, strict=True)
        }


class Decoded(Mapping[str, Tensor]):
    """A parameter's state as its techniques see it, decoded when it is asked for."""

    def __init__(self, buckets: Buckets, param: Tensor, state: Mapping[str, Any]) -> None:
        self._buckets, self._param, self._state = buckets, param, state

    def __getitem__(self, name: str) -> Tensor:
        value = self._buckets.decoded(self._param, name)
        if value is None:
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def numbers(tensors: list[Tensor]) -> list[float]:
    """0-d tensors → floats, with one wait for the device."""
    if not tensors:
        return []
    home = tensors[0].device
    return torch.stack([x.detach().float().to(home) for x in tensors]).tolist()


def _pooled(parameters: dict[str, dict[str, float]]) -> dict[str, float]:
    """The numbers of all parameters as if they were one; empty if there are none."""
    if not parameters:
        return {}
    rows = list(parameters.values())
    count = sum(row["elements"] for row in rows)
    mean = sum(row["elements"] * row["mean"] for row in rows) / count
    variance = sum(row["elements"] * (row["std"] ** 2 + (row["mean"] - mean) ** 2) for row in rows) / count
    return {
        "mean": mean,
        "min": min(row["min"] for row in rows),
        "max": max(row["max"] for row in rows),
        "std": math.sqrt(variance),
        "elements": count,
    }
