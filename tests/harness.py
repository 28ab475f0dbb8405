"""Run one technique, or a chain of them, on complete tensors in plain eager torch: no engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hina_optim.techniques.base import ByColumn, ByRow, Flow, Folded, ParamInfo, PeriodicTechnique, Relations, Technique


def initial_state(technique: Technique, info: ParamInfo, param: Tensor, start_lr: float = 1e-3) -> dict[str, Tensor]:
    """The first value of every slot, float32 (or the dtype of ``param``), ``[N, …]``."""
    state = {}
    for slot in technique.slots(info):
        shape = (param.shape[0], *slot.local_shape(tuple(param.shape[1:])))
        if slot.init == "param":
            state[slot.name] = param.clone()
        else:
            state[slot.name] = param.new_full(shape, start_lr if slot.init == "start_lr" else float(slot.init))
    return state


def related(partners: Tensor) -> Relations:
    """Pairs as a population's relations, each pair an adapter of its own."""
    everyone = torch.arange(len(partners))
    return Relations(partners, torch.where(partners >= 0, torch.minimum(partners, everyone), -1))


def total(x: Tensor | Folded | ByRow | ByColumn) -> Tensor:
    """The sum over each parameter: ``[N, 1, …]``, or ``[N, size]`` for a folded value, rows and columns."""
    if isinstance(x, ByRow):
        return x.value.reshape(*x.value.shape[:2], -1).sum(2)
    if isinstance(x, ByColumn):
        return x.value.reshape(*x.value.shape[:2], -1).sum(1)
    if isinstance(x, Folded):
        flat = x.value.reshape(x.value.shape[0], -1)
        index = torch.arange(flat.shape[1]) % x.size
        return torch.zeros(flat.shape[0], x.size, dtype=flat.dtype).index_add_(1, index, flat)
    return x.reshape(x.shape[0], -1).sum(1).reshape(-1, *([1] * (x.ndim - 1)))


def run_technique(
    technique: Technique | Sequence[Technique],
    values: dict[str, Tensor],
    state: dict[str, Tensor] | None = None,
    *,
    t: int = 1,
    info: ParamInfo | None = None,
    measuring: bool = False,
    start_lr: float = 1e-3,
    loss: float = float("nan"),
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step of a technique on values of shape ``[N, *shape]`` (``grad`` must be there; ``param`` defaults to ones).

    Returns:
        The values after it, and the whole state after it.
    """
    chain = [technique] if isinstance(technique, Technique) else list(technique)
    values = dict(values)
    grad = values["grad"]
    values.setdefault("param", torch.ones_like(grad))
    values.setdefault("lr", torch.tensor(1e-3, dtype=grad.dtype))
    values.setdefault("rate", values["lr"])
    values["index"] = torch.arange(grad[0].numel()).reshape(1, *grad.shape[1:])
    info = info or ParamInfo(tuple(grad.shape[1:]))
    state = dict(state or {})
    for one in chain:
        state = {**initial_state(one, info, values["param"], start_lr), **state}
    steps = torch.full((grad.shape[0],), float(t), dtype=torch.float64)
    scalars = {f"{one.name}.{k}": v.to(grad.dtype) for one in chain for k, v in one.scalars(steps).items()}
    scalars["loss"] = torch.full((grad.shape[0],), loss, dtype=grad.dtype)
    flow = Flow(values, state, {}, scalars, info)
    for one in chain:
        if not one.applies(info) or not one.acts(t - 1):
            continue
        active = measuring or not isinstance(one, PeriodicTechnique)
        if one.whole and active:
            flow[f"{one.name}.whole"] = one.whole_matrix(flow, *(flow[name] for name in one.whole))
        one.transform(flow)
        if active:
            one.settle(flow, {k: total(v) for k, v in one.sums(flow).items()})
    return flow.values, {**state, **flow.new}
