"""What the comparisons of engine and float64 reference share: parameters, gradients, losses, options to draw from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import hina_optim
from hina_optim.reference.adamw_family import ReferenceAdaptiveHinaAdamW, ReferenceHinaAdamW
from hina_optim.reference.came_family import ReferenceCameAMP, ReferenceCameAMPImproved, ReferenceCOptim
from hina_optim.reference.common import Reference
from hina_optim.reference.hina_adaptive import ReferenceHinaAdaptive
from tests.every_optimizer import loss_of
from tests.optim_cases import SHAPES

#: The reference of every named optimizer.
REFERENCES: dict[str, type[Reference]] = {
    "HinaAdaptive": ReferenceHinaAdaptive,
    "AdaptiveHinaAdamW": ReferenceAdaptiveHinaAdamW,
    "HinaAdamWOptimizer": ReferenceHinaAdamW,
    "Automagic_CameAMP": ReferenceCameAMP,
    "Automagic_CameAMP_Improved": ReferenceCameAMPImproved,
    "RefactoredAutomagicCameAMP": ReferenceCameAMPImproved,
    "Automagic_CameAMP_8bit": ReferenceCameAMP,
    "Automagic_CameAMP_Improved_8Bit": ReferenceCameAMPImproved,
    "Automagic_CameAMP_COptim": ReferenceCOptim,
    "Automagic_CameAMP_COptim8bit": ReferenceCOptim,
}

#: Every option that changes mathematics, and values to draw: phases and intervals end within a few steps.
DRAWN: dict[str, list[Any]] = {
    "lr": [3e-4, 2.5e-4],
    "weight_decay": [0.01, 0.0, 0.3],
    "use_spd": [True, False],
    "spd_lambda": [0.06, 2.0],
    "use_cautious": [True, False],
    "use_orthogonal_grad": [False, True],
    "use_adopt_stability": [True, False],
    "amsgrad": [False, True],
    "factored_second_moment": [False, True],
    "use_grams": [False, True],
    "use_agr": [True, False],
    "use_tam": [True, False],
    "tam_beta": [0.9, 0.3],
    "use_dynamic_adaptation": [True, False],
    "adaptation_strength": [1.0, 3.0],
    "relationship_discovery_interval": [3, 1, 4],
    "importance_decay": [0.95, 0.2],
    "compatibility_threshold": [0.3, 0.8],
    "use_lr_mask": [True, False],
    "warmup_steps": [4, 0, 5, 20],
    "min_lr": [1e-7, 2.3e-4],
    "max_lr": [1e-3, 3.1e-4],
    "lr_bump": [1e-5, 7e-5],
    "d_coef": [2.0, 0.5],
    "dynamic_weight_decay": [True, False],
    "wd_transition_steps": [4, 2],
    "wd_decay_factor": [0.7, 0.2],
    "wd_min_ratio": [0.1, 0.6],
    "use_alora": [True, False],
    "alora_ratio": [16.0, 1.0, 0.5],
    "eta": [2.0, 0.7],
    "edge_suppression": [False, True],
    "edge_penalty": [0.1, 2.0],
    "edge_threshold": [0.6, 0.15],
    "spatial_awareness": [False, True],
    "frequency_penalty": [0.05, 0.9],
    "detail_preservation": [0.8, 2.5],
    "background_regularization": [False, True],
    "factored_image_state": [False, True],
    "lora_rank_penalty": [False, True],
    "rank_penalty_strength": [0.01, 1.0],
    "low_rank_emphasis": [1.2, 0.5],
    "rank_target": [2, 1, 0.9],
    "rank_interval": [2, 1, 10],
    "enable_dual_momentum": [True, False],
    "long_term_beta": [0.99, 0.6],
    "alpha_mix_ratio": [None, 0.7],
    "beta1_decay": [0.9995, 0.8, 1.0],
    "came": [True, False],
    "full_finetune": [False, True],
    "clip_threshold": [1.0, 0.4],
    "use_ada_decay": [True, False],
    "use_loss_context": [False, True],
    "context_window": [4, 6, 30],
    "adaptation_rate": [0.25, 1.0, 0.0],
    "momentum_scales": [(1, 2, 3), (1,), (1, 5, 20, 100)],
}
#: Those that are pairs in one family and threes or twos in the other.
DRAWN_ADAMW: dict[str, list[Any]] = {
    "betas": [(0.9, 0.999), (0.0, 0.5), (0.8, 0.99)],
    "eps": [1e-8, 0.5],
}
DRAWN_CAME: dict[str, list[Any]] = {
    "betas": [(0.8, 0.99, 0.999), (0.0, 0.5, 0.9), (0.9, 0.9, 0.0)],
    "eps": [(1e-30, 1e-16), (1e-2, 1e-1)],
}

#: A LoKr and a LoHa beside the shapes of the engine's tests, whose LoRA pair there is.
ADAPTERS: dict[str, tuple[int, ...]] = {
    "mix.lokr_w1": (3, 2),
    "mix.lokr_w2_a": (4, 2),
    "mix.lokr_w2_b": (2, 5),
    "blend.hada_w1_a": (6, 2),
    "blend.hada_w1_b": (2, 5),
    "blend.hada_w2_a": (6, 2),
    "blend.hada_w2_b": (2, 5),
}
ALL: dict[str, tuple[int, ...]] = {**SHAPES, **ADAPTERS}
#: What differs most, for tests that run often.
FEW: dict[str, tuple[int, ...]] = {
    name: ALL[name]
    for name in (
        *("vector", "square", "conv2d", "layer.lora_A.default.weight", "layer.lora_B.default.weight"),
        *("mix.lokr_w1", "mix.lokr_w2_a", "mix.lokr_w2_b"),
    )
}
ROLES = {
    "layer.lora_A.default.weight": "lora_a",
    "layer.lora_B.default.weight": "lora_b",
    "mix.lokr_w1": "lokr_w1",
    "mix.lokr_w2_a": "lokr_w2_a",
    "mix.lokr_w2_b": "lokr_w2_b",
    "blend.hada_w1_a": "loha_w1_a",
    "blend.hada_w1_b": "loha_w1_b",
    "blend.hada_w2_a": "loha_w2_a",
    "blend.hada_w2_b": "loha_w2_b",
}
PAIRS = [
    ("layer.lora_A.default.weight", "layer.lora_B.default.weight"),
    ("mix.lokr_w2_a", "mix.lokr_w2_b"),
    ("blend.hada_w1_a", "blend.hada_w1_b"),
    ("blend.hada_w2_a", "blend.hada_w2_b"),
]
LOKR = ("mix.lokr_w1", "mix.lokr_w2_a", "mix.lokr_w2_b")
#: Factors that begin at zero.
ZERO = ("layer.lora_B.default.weight", "blend.hada_w2_a")
STEPS = 13
LR = 3e-4

Named = list[tuple[str, nn.Parameter]]
Shapes = Mapping[str, tuple[int, ...]]


def weights(shapes: Shapes = ALL) -> list[Tensor]:
    """Where the parameters begin, float64."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes.values()]
    return [torch.zeros_like(w) if name in ZERO else w for name, w in zip(shapes, drawn, strict=True)]


def gradients(step: int, shapes: Shapes = ALL, quiet: bool = False) -> list[Tensor | None]:
    """Gradients of a step: noise and a drift; now and then one is missing, zero, or not finite, unless ``quiet``."""
    noise = torch.Generator().manual_seed(1000 + step)
    drift = torch.Generator().manual_seed(7)
    result: list[Tensor | None] = []
    for name, shape in shapes.items():
        g = torch.randn(shape, generator=noise, dtype=torch.float64)
        g += torch.randn(shape, generator=drift, dtype=torch.float64)
        gone = (name in ("square", "mix.lokr_w2_a") and step in (4, 5)) or (name == "scalar" and step < 2)
        if (name in ("twin2", "vector") and step == 6) or (name == "twin1" and step == 0):
            g = g if quiet else torch.zeros_like(g)
        if not quiet and name in ("tall", "layer.lora_A.default.weight") and step in (2, 7):
            g.view(-1)[1] = torch.nan if step == 2 else torch.inf
        if not quiet and name == "wide" and step == 0:  # the first gradient of its life
            g.view(-1)[0] = -torch.inf
        result.append(None if gone and not quiet else g)
    return result


def reported_loss(step: int) -> float | None:
    """What is reported before a step: nothing at first, NaN once, and sometimes nothing."""
    if step < 2 or step == 9:
        return None
    return float("nan") if step == 6 else loss_of(step)


def build_reference(
    name: str, start: Sequence[Tensor] | Sequence[dict[str, Any]], arguments: dict[str, Any], shapes: Shapes = ALL
) -> Reference:
    """The reference of a named optimizer, knowing what the names say."""
    at = {label: i for i, label in enumerate(shapes)}
    return REFERENCES[name](
        start,
        pairs=[(at[a], at[b]) for a, b in PAIRS if a in at and b in at],
        roles={at[label]: role for label, role in ROLES.items() if label in at},
        adapters=[[at[label] for label in LOKR if label in at]],
        **arguments,
    )


def run_reference(name: str, arguments: dict[str, Any], steps: int = STEPS, shapes: Shapes = ALL) -> Reference:
    """The reference alone, on the same stream."""
    reference = build_reference(name, weights(shapes), {"lr": LR, **arguments}, shapes)
    last: float | None = None
    for step in range(steps):
        last = now if (now := reported_loss(step)) is not None else last
        _schedule(reference, step, steps)
        reference.step(gradients(step, shapes), _as_taken(last))
    return reference


def run_both(
    name: str,
    arguments: dict[str, Any],
    dtype: torch.dtype = torch.float64,
    steps: int = STEPS,
    strategies: dict[str, Any] | None = None,
    groups: tuple[dict[str, Any], dict[str, Any]] | None = None,
) -> tuple[Named, Reference]:
    """The engine on ``dtype`` parameters and the reference from the same start; the rate follows a schedule.

    With ``groups``, every other parameter is in the first one.
    """
    labels = [*list(ALL)[::2], *list(ALL)[1::2]] if groups else list(ALL)
    shapes, half = {label: ALL[label] for label in labels}, len(labels[::2])
    start = [w.to(dtype) for w in weights(shapes)]
    named = [(label, nn.Parameter(w.clone())) for label, w in zip(shapes, start, strict=True)]
    arguments = {"lr": LR, **arguments, **(strategies or {})}
    cut = [slice(None, half), slice(half, None)]
    theirs = [{"params": start[c], **g} for c, g in zip(cut, groups, strict=True)] if groups else start
    ours = [{"params": named[c], **g} for c, g in zip(cut, groups, strict=True)] if groups else named
    optimizer = getattr(hina_optim, name)(ours, state_precision="fp32", **arguments)
    reference = build_reference(name, theirs, arguments, shapes)
    last: float | None = None
    for step in range(steps):
        given = [None if g is None else g.to(dtype) for g in gradients(step, shapes)]
        for (_, p), g in zip(named, given, strict=True):
            p.grad = g
        loss = reported_loss(step)
        if loss is not None:
            optimizer.report_loss(loss)
            last = loss
        _schedule(reference, step, steps)
        for group, other in zip(optimizer.param_groups, reference.param_groups, strict=True):
            group["lr"] = other["lr"]
        optimizer.step()
        reference.step(given, _as_taken(last))
    return named, reference


def _schedule(reference: Reference, step: int, steps: int) -> None:
    for group in reference.param_groups:
        group["lr"] = group["start_lr"] * (1 - step / (2 * steps))


def _as_taken(loss: float | None) -> float | None:
    """The loss as the optimizer takes it, in float32."""
    return None if loss is None else float(torch.tensor(loss, dtype=torch.float32))


def compare(named: Named, reference: Reference, relative: float, dtype: torch.dtype = torch.float64) -> None:
    """Parameters have moved, and each within ``relative`` of the largest movement in it."""
    start = [w.to(dtype).double() for w in weights({label: ALL[label] for label, _ in named})]
    still = []
    for (label, p), expected, before in zip(named, reference.params, start, strict=True):
        if expected.numel() == 0:
            continue
        moved = float((expected - before).abs().max())
        if moved < 1e-6:
            still.append(label)
        error = float((p.detach().double() - expected).abs().max()) / max(moved, 1e-6)
        assert error <= relative, f"{label}: {error:.3e} of its movement"
    # a strong pull to the anchor may hold a parameter of one element; a stronger one takes any of them back all the way
    # once its last step was at least half of its distance
    returns = any(g.get("use_spd") and g["spd_lambda"] > 1 for g in reference.param_groups)
    assert set(still) <= {"one", "scalar"} or (returns and len(still) < len(named) / 4), (
        f"{still} stand still: that would prove nothing"
    )


def draws(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Any combination of options that the optimizer accepts."""
    own = DRAWN_CAME if "Came" in name else DRAWN_ADAMW
    values = {option: (own | DRAWN)[option] for option in REFERENCES[name].DEFAULTS}
    drawn = st.fixed_dictionaries({option: st.sampled_from(v) for option, v in values.items()})
    return drawn.map(_allowed)


def _allowed(arguments: dict[str, Any]) -> dict[str, Any]:
    """AMSGrad is about Adam's whole second moment, and refused under ADOPT and where that is factored."""
    refused = arguments.get("use_adopt_stability") or arguments.get("factored_second_moment")
    return {**arguments, "amsgrad": False} if refused else arguments
