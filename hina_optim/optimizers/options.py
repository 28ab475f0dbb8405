"""Every argument of the optimizers: its rule, and what it means. One table, so that a name means the same everywhere.

The docstring of each class gets its ``Args`` section from here, and the constructor its checks.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from hina_optim import arguments as rule
from hina_optim.engine.optimizer import ENGINE_RULES
from hina_optim.techniques.loss_context import WINDOW
from hina_optim.techniques.multi_scale import MOMENTUM_SCALES
from hina_optim.techniques.spectrum import RANK_TARGET

__all__ = ["CAME_RULES", "OPTIONS", "Option", "describe", "names_of", "rules_of"]


class Option(NamedTuple):
    """One argument.

    Attributes:
        rule: What a value must be; None for what is checked elsewhere.
        text: What it means, with its unit.
    """

    rule: rule.Rule | None
    text: str


_SHARE_OR_NONE = rule.Rule("a number in [0, 1], or None", lambda x: x is None or rule.UNIT.holds(x))
_BETAS3 = rule.Rule(
    "three numbers in [0, 1)",
    lambda x: isinstance(x, (tuple, list)) and len(x) == 3 and all(map(rule.BELOW_ONE.holds, x)),
)
_EPS2 = rule.Rule(
    "two finite numbers > 0",
    lambda x: isinstance(x, (tuple, list)) and len(x) == 2 and all(map(rule.POSITIVE.holds, x)),
)
_ADDRESSES = frozenset({"params", "foreach", "config", "profile", "regularization", "momentum"})

#: Rules of the CAME-based optimizers in place of those in the table.
CAME_RULES: dict[str, rule.Rule] = {"betas": _BETAS3, "eps": _EPS2}

#: In the order in which they are told.
OPTIONS: dict[str, Option] = {
    "params": Option(
        None,
        "Parameters, (name, parameter) pairs, or groups of either. By names it knows adapters and their pairs, and "
        "matches checkpoints. A group may set any of the options below for itself.",
    ),
    "config": Option(None, "All options in one object; an argument that is given beside it overrides it."),
    "profile": Option(
        None,
        '"memory_optimized", "quality_optimized" or "balanced": a set of options that other arguments override. It '
        "never sets the learning rate.",
    ),
    "lr": Option(rule.NON_NEGATIVE, "Learning rate, ≥ 0; with the mask on, within [min_lr, max_lr]."),
    "betas": Option(
        rule.BETAS, "Decay a step of the moments (CAME: of moment, squares and residuals), each in [0, 1)."
    ),
    "eps": Option(
        rule.POSITIVE, "Smallest denominator in units of the gradient (CAME: added to its squares, and to residuals)."
    ),
    "weight_decay": Option(
        rule.NON_NEGATIVE, "Decoupled decay, share of a weight a step and a unit of learning rate, ≥ 0."
    ),
    # gradient, moments and direction
    "use_agr": Option(rule.FLAG, "Adaptive gradient regularization, for parameters of two elements or more."),
    "use_orthogonal_grad": Option(
        rule.FLAG, "Remove the component of the gradient along the weights, and keep its norm."
    ),
    "use_adopt_stability": Option(rule.FLAG, "ADOPT. False: Adam moments."),
    "amsgrad": Option(
        rule.FLAG, "Adam moments only: never let the denominator shrink. Keeps one more tensor, in fp32."
    ),
    "factored_second_moment": Option(
        rule.FLAG,
        "Of the second moment of a matrix keep the means of its rows and columns only, where those are fewer numbers. "
        "Not with amsgrad.",
    ),
    "use_tam": Option(rule.FLAG, "Torque-aware momentum: damp what enters the moment when it turns against it."),
    "tam_beta": Option(rule.BELOW_ONE, "Decay a step of its smoothed cosine, in [0, 1)."),
    "use_cautious": Option(
        rule.FLAG, "Keep the update only where its sign is the gradient's, and the mean step. Left out under Grams."
    ),
    "use_grams": Option(rule.FLAG, "Magnitude of the update, signs of the gradient."),
    "came": Option(rule.FLAG, "Divide the step by its factored confidence. False: factored moments alone."),
    "clip_threshold": Option(
        rule.POSITIVE, "Root mean square above which the normalized gradient is scaled down to it, > 0."
    ),
    "beta1_decay": Option(
        rule.Rule("a number in (0, 1]", lambda x: rule.UNIT.holds(x) and float(x) > 0),
        "Factor on the first beta a step, in (0, 1], down to 0.5.",
    ),
    "enable_dual_momentum": Option(rule.FLAG, "A long-term moment beside the short one."),
    "long_term_beta": Option(rule.BELOW_ONE, "Its decay a step, in [0, 1)."),
    "alpha_mix_ratio": Option(
        _SHARE_OR_NONE,
        "Share of the long-term moment in the mix, in [0, 1]. None: grows from 0 to a half while it fills.",
    ),
    "momentum_scales": Option(
        MOMENTUM_SCALES, "Every how many steps each of the moments is updated; mixed by 1/scale."
    ),
    # rates
    "use_lr_mask": Option(
        rule.FLAG, "A learning rate for every element, raised where a gradient keeps its sign, lowered where it flips."
    ),
    "warmup_steps": Option(
        rule.COUNT, "Steps in which the masks move, ≥ 0; then they stay. Not a warm-up of the learning rate."
    ),
    "min_lr": Option(rule.POSITIVE, "Lower bound of the masks, > 0."),
    "max_lr": Option(rule.POSITIVE, "Upper bound of the masks."),
    "lr_bump": Option(rule.NON_NEGATIVE, "Change of a mask a step, in units of the learning rate, ≥ 0."),
    "d_coef": Option(rule.POSITIVE, "Factor on the bumps of agreeing signs in the first half of warmup_steps, > 0."),
    "use_alora": Option(
        rule.FLAG, "Rates of adapters: rows scaled by their norm, B over A by alora_ratio, balanced LoKr factors."
    ),
    "alora_ratio": Option(rule.POSITIVE, "Learning rate of B over that of A (LoKr: of w2 over w1), > 0."),
    "eta": Option(rule.POSITIVE, "Most that the row scaling multiplies a rate with, reached by a row of zeros, > 0."),
    "use_dynamic_adaptation": Option(rule.FLAG, "Importance and relationships between parameters."),
    "adaptation_strength": Option(
        rule.POSITIVE, "How far rates follow importance, > 0: factor on the distance of a score from 1, the average."
    ),
    "relationship_discovery_interval": Option(
        rule.INTERVAL, "Steps from one measurement of both to the next, ≥ 1; the first step measures."
    ),
    "importance_decay": Option(
        rule.BELOW_ONE, "Share of the old score (and gradient sketch) kept at each measurement, in [0, 1)."
    ),
    "compatibility_threshold": Option(
        rule.UNIT, "Score from which on two matrices are related, in [0, 1]; 1: adapter pairs and copies."
    ),
    "use_loss_context": Option(
        rule.FLAG,
        "Let the trend of the training loss move the learning rate, between 0.6 and 4 times. Needs the loss: "
        "step(closure), report_loss(), or the Lightning callback.",
    ),
    "context_window": Option(WINDOW, "Losses that are looked at, ≥ 4."),
    "adaptation_rate": Option(rule.UNIT, "Share of the way to its target that the factor goes a step, in [0, 1]."),
    # decay
    "dynamic_weight_decay": Option(rule.FLAG, "Let the decay shrink late in training."),
    "wd_transition_steps": Option(rule.INTERVAL, "Steps until it begins to, ≥ 1."),
    "wd_decay_factor": Option(rule.UNIT, "Factor on the decay every further wd_transition_steps, in [0, 1]."),
    "wd_min_ratio": Option(rule.UNIT, "Floor of the factor, in [0, 1]."),
    "use_ada_decay": Option(rule.FLAG, "Decay elements with large gradients up to twice as much, others less."),
    "use_spd": Option(
        rule.FLAG,
        "Selective projection decay: a step that leads away from the weights before the first update, against the "
        "gradient, is taken back in part. Keeps those weights, in their own dtype (one zero if all are zero).",
    ),
    "spd_lambda": Option(
        rule.NON_NEGATIVE, "Strength of that, ≥ 0; 1 takes back about all of the distance that the step added."
    ),
    "full_finetune": Option(
        rule.FLAG, "The weights are a whole model's: SPD after warm-up. False: an adapter's, whose rows are scaled."
    ),
    # images and low rank
    "edge_suppression": Option(
        rule.FLAG, "Damp gradient elements that stand out of their neighborhood (matrices, convolution kernels)."
    ),
    "edge_penalty": Option(rule.NON_NEGATIVE, "Its strength, ≥ 0."),
    "edge_threshold": Option(
        rule.POSITIVE, "Where an edge begins, in units of 5 times the average (rms) second difference, > 0."
    ),
    "spatial_awareness": Option(rule.FLAG, "Damp regions of the gradient that keep varying, and its high frequencies."),
    "frequency_penalty": Option(rule.UNIT, "Share of the high frequencies to remove, in [0, 1]."),
    "detail_preservation": Option(
        rule.NON_NEGATIVE, "Strength of the damping of busy regions, ≥ 0; the mask's bumps follow it too."
    ),
    "background_regularization": Option(
        rule.FLAG, "Up to halve the gradient of elements that are nearly always small."
    ),
    "factored_image_state": Option(
        rule.FLAG,
        "Of what spatial awareness and background regularization remember of a matrix or kernel keep the means of rows "
        "and columns only, where those are fewer numbers.",
    ),
    "lora_rank_penalty": Option(
        rule.FLAG,
        "Push down the singular values beyond a rank, of the product B·A for a LoRA pair, and emphasize the leading "
        "ones. For matrices with a side (of a LoRA pair: the rank) of at most 256.",
    ),
    "rank_penalty_strength": Option(rule.NON_NEGATIVE, "Weight of the penalty, loss per unit of singular value, ≥ 0."),
    "low_rank_emphasis": Option(
        rule.NON_NEGATIVE, "Factor on the part of the update within the leading singular directions, ≥ 0; 1 is off."
    ),
    "rank_target": Option(
        RANK_TARGET,
        "Rank to keep (an int ≥ 1), or share of the squared singular values to keep (a float in (0, 1)).",
    ),
    "rank_interval": Option(rule.INTERVAL, "Steps from one look at the singular values to the next, ≥ 1."),
    "regularization": Option(None, "Strategies that change the gradient, after the techniques above."),
    "momentum": Option(None, "A strategy in place of the momentum."),
    # memory
    "memory_efficient": Option(
        rule.FLAG, "Keep to vram_budget_gb, and let optimize_for_vram() act. False: do neither."
    ),
    "vram_budget_gb": Option(
        rule.POSITIVE,
        "GiB, > 0. Checked when the state is allocated, against all that PyTorch has allocated on the GPU (on a CPU: "
        "parameters, gradients and state). State that would not fit is kept in fewer bits or on the host, with a "
        "warning; a budget below the parameters themselves is an error. See docs/memory.md.",
    ),
    "reduce_precision": Option(rule.FLAG, 'The same as state_precision="bf16".'),
    "cpu_offload_states": Option(rule.FLAG, 'The same as state_device="cpu".'),
    "adaptive_features": Option(
        rule.FLAG,
        "With emergency_simplify: let the ladder of memory switch techniques that keep state off, the last of its "
        "rungs, each with a warning that names it. False: never.",
    ),
    "emergency_simplify": Option(rule.FLAG, "See adaptive_features; both are needed."),
    "max_buffer_memory_mb": Option(
        ENGINE_RULES["max_buffer_memory_mb"],
        "Bound on the temporary memory of a step, MB (10⁶ bytes), > 0. A parameter that a technique needs whole "
        "(edges, frequencies, spatial awareness, low rank) may exceed it.",
    ),
    "state_precision": Option(
        ENGINE_RULES["state_precision"],
        '"fp32", "bf16" (rounded stochastically), "8bit" (blocks of 256 within a row, learning-rate masks on a '
        'logarithmic scale, signs beside blocks in two bits) or "4bit" (the first moment in 4 bits and blocks of 128, '
        "masks on 16 levels, signs in one bit, the rest as in 8 bits) for moments, masks and running averages; None: "
        "what the class is named for. Other signs are int8, the first weights have the parameter's dtype, small "
        "statistics stay in fp32.",
    ),
    "min_8bit_size": Option(
        rule.COUNT, "Elements of the whole parameter below which state of 8 or 4 bits is kept in bf16 or fp32, ≥ 0."
    ),
    "force_8bit": Option(
        rule.FLAG, "Store in 8 bits, or 4, whatever can be, whatever its size and the length of its rows."
    ),
    "state_device": Option(
        ENGINE_RULES["state_device"],
        '"cpu": moments, masks and all other state of the parameters\' shapes live in (pinned) host memory; a step '
        "fetches them piece by piece and writes them back, with the same result to the bit. None: on the parameters' "
        "devices. With parameters on the CPU there is nothing to move.",
    ),
    "anchor_device": Option(
        ENGINE_RULES["anchor_device"],
        '"cpu": of the state, the weights before the first update (SPD, importance) live in host memory.',
    ),
    # the engine
    "rounding": Option(
        ENGINE_RULES["rounding"],
        'How bf16 and fp16 parameters are written: "stochastic", "kahan" (compensated; keeps one more tensor of the '
        'parameter\'s size and dtype) or "nearest" (steps below half of the last bit are lost).',
    ),
    "seed": Option(rule.INTEGER, "Of the stochastic rounding. The same on every rank, replica and resume."),
    "compile": Option(
        rule.OPTIONAL_FLAG,
        "Run under torch.compile, which takes long to build its graphs: one a segment for element-wise recipes, one a "
        "segment and shape for others. None: as False.",
    ),
    "verbose": Option(
        rule.FLAG, 'Log learning rates at intervals, level INFO of the logger "hina_optim". Nothing is ever printed.'
    ),
    "foreach": Option(None, "Accepted for compatibility with torch's optimizers; without effect."),
}


def names_of(constructor: Callable[..., Any]) -> list[str]:
    """Arguments of a constructor that are hyper-parameters, in its order.

    Raises:
        KeyError: One that is not in the table.
    """
    names = [name for name in inspect.signature(constructor).parameters if name not in ("self", *_ADDRESSES)]
    unknown = [name for name in names if name not in OPTIONS]
    if unknown:
        raise KeyError(f"{constructor.__qualname__}: no entry in OPTIONS for {', '.join(unknown)}.")
    return names


def rules_of(names: Iterable[str]) -> dict[str, rule.Rule]:
    """The rules of some arguments, and those of the engine, which every optimizer has."""
    return {
        **{name: option.rule for name in names if (option := OPTIONS[name]).rule is not None},
        **ENGINE_RULES,
    }


def describe(constructor: Callable[..., Any]) -> str:
    """The ``Args`` section of a docstring, Google style, for the arguments that a constructor has."""
    known = set(inspect.signature(constructor).parameters)
    entries = (f"{name}: {option.text}" for name, option in OPTIONS.items() if name in known)
    return "Args:\n" + "\n".join(
        textwrap.fill(entry, 112, initial_indent="    ", subsequent_indent="        ") for entry in entries
    )
