"""What an optimizer tells about its learning rates: effective rates and the masks of elements."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hina_optim.engine.everything import about_all
from hina_optim.optimizers.statistics import log_histogram, log_quantiles

if TYPE_CHECKING:
    from hina_optim.engine.bookkeeping import Buckets
    from hina_optim.engine.layout import Layout
    from hina_optim.techniques.base import ParamInfo, Technique

__all__ = ["RateInspection", "numbers"]

#: A name, a parameter, and a vector that is to be added up over all shards of such parameters.
Part = tuple[str, Tensor, Tensor]

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

    @about_all
    def get_effective_lrs(self) -> dict[str, float]:
        """The mean learning rate over all elements of each group, as it is applied, by group name.

        Of an element: the group's learning rate now, times what every technique makes of it as things stand (mask,
        importance, relations, rows and roles of adapters, trend of the loss). One wait for the device.
        """
        means = self._lr_eff()
        return dict(zip(means, numbers(list(means.values())), strict=True))

    @about_all
    def get_avg_learning_rate(self) -> float:
        """The mean effective learning rate over all elements of all groups."""
        sums = self._added(self._lr_sums())
        if not sums:
            return math.nan
        home = next(iter(sums.values())).device
        total = torch.stack([x.to(home) for x in sums.values()]).sum(0)
        return numbers([total[0] / total[1]])[0]

    def get_learning_rates(self) -> list[float]:
        """The effective learning rate of every group, in their order."""
        return list(self.get_effective_lrs().values())

    @about_all
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
        parts: list[Part] = []
        agreements: list[tuple[str, Tensor, Tensor | None]] = []
        for name, group in self._groups():
            if group.get("use_lr_mask", False):
                for params in self._alike(group):
                    counts, total = self._mask_sums(group, params)
                    parts += [(f"counts/{name}", params[0], counts), (f"sum/{name}", params[0], total)]
                    agreements.append((f"agree/{name}", params[0], self._agreement(params)))
        here = [found is not None for _, _, found in agreements]
        if self._layout.sharded:  # a rank that holds no element may have no gradient: all decide what is added up
            here = [count > 0 for count in self._layout.total(torch.tensor(here, dtype=torch.float32)).tolist()]
        for (key, param, found), somewhere in zip(agreements, here, strict=True):
            if somewhere:
                parts.append((key, param, torch.zeros(2, device=param.device) if found is None else found))
        sums = self._added(parts)
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

    @about_all
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
        params = (p for group in self.param_groups for p in self._layout.params(group))
        for name, p in zip(self.param_names(), params, strict=True):
            yield name, p, self.state.get(p, {})

    def _options(self, names: tuple[str, ...]) -> dict[str, Any]:
        group = self.param_groups[0]
        return {name: group[name] for name in names if name in group}

    def _global_step(self) -> int:
        return max((int(state["step"]) for _, _, state in self._params() if "step" in state), default=0)

    def _alike(self, group: dict[str, Any]) -> list[list[Tensor]]:
        """The parameters of a group by the ranks among which they are cut: their sums can be added first."""
        found: dict[Hashable, list[Tensor]] = {}
        for p in self._layout.params(group):
            found.setdefault(self._layout.cut(p), []).append(p)
        return list(found.values())

    def _added(self, parts: Sequence[Part]) -> dict[str, Tensor]:
        """The sums of all vectors of a name over all shards, by one reduction."""
        values = self._layout.reduce([(param, value) for _, param, value in parts])
        result: dict[str, Tensor] = {}
        for (name, _, _), value in zip(parts, values, strict=True):
            result[name] = result[name] + value.to(result[name].device) if name in result else value
        return result

    def _mask_sums(self, group: dict[str, Any], params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Histogram and sum of the masks of some parameters of a group."""
        home = params[0].device
        found = [(self._buckets.decoded(p, "lr_mask"), self._layout.local(p).numel()) for p in params]
        masks = [mask for mask, _ in found if mask is not None]
        waiting = sum(numel for mask, numel in found if mask is None)  # these stand at start_lr
        low, high = group["min_lr"], group["max_lr"]
        counts = log_histogram((mask.to(home) for mask in masks), low, high, home)
        total = torch.stack([torch.zeros((), device=home), *(m.sum(dtype=torch.float32).to(home) for m in masks)]).sum()
        if waiting:
            fresh = torch.full((1,), float(group["start_lr"]), device=home)
            counts = counts + log_histogram([fresh], low, high, home) * waiting
            total = total + fresh[0] * waiting
        return counts, total

    def _agreement(self, params: Sequence[Tensor]) -> Tensor | None:
        """``[agreeing, compared]`` over the elements whose last sign is known; None without gradients."""
        home = params[0].device
        parts = []
        for p in params:
            grad = self._layout.grad(p)
            last = self._buckets.decoded(p, "last_sign") if grad is not None else None
            if grad is not None and last is not None:
                product = grad.sign() * last
                parts.append(torch.stack([(product > 0).sum(), (last != 0).sum()]).float().to(home))
        return torch.stack(parts).sum(0) if parts else None

    def _lr_sums(self) -> list[Part]:
        """For each group ``[sum of the effective rates, number of elements]``."""
        return [
            (name, params[0], self._lr_sum(group, params))
            for name, group in self._groups()
            for params in self._alike(group)
        ]

    def _lr_sum(self, group: dict[str, Any], params: Sequence[Tensor]) -> Tensor:
        home, weights, count = params[0].device, [], 0
        for p in params:
            here = self._layout.local(p)
            state = Decoded(self._buckets, p, self.state.get(p, {}))
            factor: Tensor | float = 1.0
            for one in self._buckets.techniques(p):
                factor = factor * self._factor(one, p, state)
            if isinstance(factor, Tensor):
                # a factor of fewer elements than the parameter stands for all that it broadcasts to
                weight = factor.sum(dtype=torch.float32).to(home) * (here.numel() / max(1, factor.numel()))
            else:
                weight = torch.full((), factor * here.numel(), device=home)
            weights.append(weight)
            count += here.numel()
        lr = group["lr"]
        total = torch.stack(weights).sum() * (lr.to(home).reshape(()) if isinstance(lr, Tensor) else lr)
        return torch.stack([total, torch.full_like(total, float(count))])

    def _factor(self, one: Technique, p: Tensor, state: Mapping[str, Tensor]) -> Tensor | float:
        """What a technique puts on the rates of the elements that are here."""
        here = self._layout.local(p)
        if not (one.rate_of_whole and self._layout.sharded):
            return one.rate_factor(here, state)
        (complete,) = self._layout.gather([(p, here.unsqueeze(0))])
        factor = one.rate_factor(complete[0], state)
        if not isinstance(factor, Tensor):
            return factor
        return self._layout.take(p, factor.expand(complete.shape[1:]).unsqueeze(0))[0]

    def _lr_eff(self) -> dict[str, Tensor]:
        return {name: total / count for name, (total, count) in self._added(self._lr_sums()).items()}

    def _mask_analysis(self) -> dict[str, dict[str, float]]:
        """Numbers of the masks of all parameters that have elements, by name; by two reductions."""
        starts = {
            id(p): float(group["start_lr"])
            for group in self.param_groups
            if group.get("use_lr_mask", False)
            for p in self._layout.params(group)
        }
        names, sizes, params, sums, ends = [], [], [], [], []
        for name, p, _ in self._params():
            size = int(torch.Size(self._layout.shard(p).shape).numel())
            if id(p) not in starts or size == 0:
                continue
            here = self._layout.local(p)
            mask = self._buckets.decoded(p, "lr_mask")
            mask = torch.full(here.shape, starts[id(p)], device=p.device) if mask is None else mask
            # around a value between the ends, lest the square of the mean cancels the mean of the squares
            precise = torch.float32 if p.device.type == "mps" else torch.float64
            wide = mask.to(precise) - starts[id(p)]
            none = torch.full((2,), -math.inf, dtype=precise, device=p.device)
            sums.append(torch.stack([wide.sum(), wide.square().sum()]))
            ends.append(torch.stack([-mask.amin(), mask.amax()]).to(precise) if mask.numel() else none)
            names.append(name)
            sizes.append(size)
            params.append(p)
        totals = self._layout.reduce(list(zip(params, sums, strict=True)))
        extremes = self._layout.reduce(list(zip(params, ends, strict=True)), largest=True)
        home = params[0].device if params else torch.device("cpu")
        rows = [torch.cat([a, b]).to(home) for a, b in zip(totals, extremes, strict=True)]
        values = iter(torch.stack(rows).reshape(-1).tolist() if rows else ())
        result = {}
        for name, size, p in zip(names, sizes, params, strict=True):
            total, squares, low, high = (next(values) for _ in range(4))
            variance = max(0.0, squares / size - (total / size) ** 2)
            mean = starts[id(p)] + total / size
            result[name] = {"mean": mean, "min": -low, "max": high, "std": math.sqrt(variance), "elements": size}
        return result


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
