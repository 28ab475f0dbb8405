"""What is known of every optimizer without building it: one record each, for listing, documentation and tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, cast

from hina_optim import optimizers
from hina_optim.engine.optimizer import HinaOptimizer
from hina_optim.presets import PRESETS, Preset
from hina_optim.state.precision import PRECISIONS

__all__ = ["RECORDS", "OptimizerInfo", "Paper"]


class Paper(NamedTuple):
    """A source: title and arXiv number."""

    title: str
    arxiv: str

    @property
    def url(self) -> str:
        """Where to read it."""
        return f"https://arxiv.org/abs/{self.arxiv}"


@dataclass(frozen=True)
class OptimizerInfo:
    """All that is known of an optimizer without building it.

    Attributes:
        name: The name of the class.
        description: One sentence.
        aliases: Other names under which :mod:`hina_optim` has the class. Names are also understood in any case, with
            underscores and hyphens or without: these spellings are not listed.
        papers: What it builds upon.
        capabilities: What can be relied on, in words that tests iterate over.
        state_precisions: What its state may be stored in, highest first.
        tags: Words to find it by.
        presets: Sets of arguments that it has.
    """

    name: str
    description: str
    aliases: tuple[str, ...] = ()
    papers: tuple[Paper, ...] = ()
    capabilities: frozenset[str] = frozenset()
    state_precisions: tuple[str, ...] = PRECISIONS
    tags: frozenset[str] = frozenset()
    presets: tuple[Preset, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "presets", tuple(preset for preset in PRESETS if preset.optimizer == self.name))

    @property
    def cls(self) -> type[HinaOptimizer]:
        """The class."""
        return cast("type[HinaOptimizer]", getattr(optimizers, self.name))


ADAMW = Paper("Decoupled Weight Decay Regularization", "1711.05101")
ADOPT = Paper("ADOPT: Modified Adam Can Converge with Any β2 with the Optimal Rate", "2411.02853")
AGR = Paper(
    "Adaptive Gradient Regularization: A Faster and Generalizable Optimization Technique for Deep Neural Networks",
    "2407.16944",
)
TAM = Paper("Torque-Aware Momentum", "2412.18790")
CAUTIOUS = Paper("Cautious Optimizers: Improving Training with One Line of Code", "2411.16085")
GRAMS = Paper("Grams: Gradient Descent with Adaptive Momentum Scaling", "2412.17107")
SPD = Paper("Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models", "2411.01713")
ORTHOGONAL = Paper("Grokking at the Edge of Numerical Stability", "2501.04697")
LORA = Paper("LoRA: Low-Rank Adaptation of Large Language Models", "2106.09685")
LORA_PLUS = Paper("LoRA+: Efficient Low Rank Adaptation of Large Models", "2402.12354")
ALLORA = Paper("ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", "2410.09692")
LYCORIS = Paper("Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", "2309.14859")
ADAFACTOR = Paper("Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", "1804.04235")
CAME = Paper("CAME: Confidence-guided Adaptive Memory Efficient Optimization", "2307.02047")
ADA_DECAY = Paper("Adaptive Weight Decay for Deep Neural Networks", "1907.08931")
ADEMAMIX = Paper("The AdEMAMix Optimizer: Better, Faster, Older", "2409.03137")
ACCELERATED = Paper(
    "Connections between Schedule-Free Optimizers, AdEMAMix, and Accelerated SGD Variants", "2502.02431"
)
EIGHT_BIT = Paper("8-bit Optimizers via Block-wise Quantization", "2110.02861")

_ADAMW_PAPERS = (ADAMW, ADOPT, AGR, TAM, CAUTIOUS, GRAMS, SPD, ORTHOGONAL)
_CAME_PAPERS = (CAME, ADAFACTOR, AGR, TAM, ADA_DECAY, SPD, GRAMS, CAUTIOUS, ALLORA)
_IMPROVED_PAPERS = (*_CAME_PAPERS, ADEMAMIX, ACCELERATED)
_ALL = frozenset({"compile", "exact_resume", "closure", "lora"})
_CAME_ALL = _ALL | {"lr_mask", "phases", "factored"}
_CAME_TAGS = frozenset({"came", "factored", "fine-tuning", "low-memory"})
_IMAGES = frozenset({"image_control"})

RECORDS: tuple[OptimizerInfo, ...] = (
    OptimizerInfo(
        name="HinaAdaptive",
        description=(
            "ADOPT or AdamW with gradient regularization, a learning rate for every element, and learning rate that "
            "moves to the parameters that matter."
        ),
        papers=_ADAMW_PAPERS,
        capabilities=_ALL | _IMAGES | {"lr_mask", "importance", "relationships", "vram_budget"},
        tags=frozenset({"adam", "adopt", "fine-tuning", "low-memory"}),
    ),
    OptimizerInfo(
        name="AdaptiveHinaAdamW",
        description=(
            "HinaAdaptive without its memory budget and its control of images: importance, relationships and a "
            "learning rate for every element on ADOPT or AdamW, for any architecture."
        ),
        papers=_ADAMW_PAPERS,
        capabilities=_ALL | {"lr_mask", "importance", "relationships"},
        tags=frozenset({"adam", "adopt", "fine-tuning"}),
    ),
    OptimizerInfo(
        name="HinaAdamWOptimizer",
        description=(
            "ADOPT or AdamW for adapters: rows scaled by their norm, another learning rate for LoRA's B, balanced "
            "LoKr factors, and a weight decay that shrinks late in training."
        ),
        aliases=("HinaAdamW",),
        papers=(*_ADAMW_PAPERS, LORA, LORA_PLUS, ALLORA, LYCORIS),
        capabilities=_ALL | {"lora_roles"},
        tags=frozenset({"adam", "adopt", "lokr", "adapters", "fine-tuning"}),
    ),
    OptimizerInfo(
        name="Automagic_CameAMP",
        description=(
            "CAME: factored moments and confidence, with a learning rate for every element and techniques that take "
            "turns in the phases of a training."
        ),
        aliases=("AutomagicCameAMP",),
        papers=_CAME_PAPERS,
        capabilities=_CAME_ALL,
        tags=_CAME_TAGS,
    ),
    OptimizerInfo(
        name="Automagic_CameAMP_Improved",
        description=(
            "Automagic_CameAMP with control of edges, frequencies and background, low-rank adapters, and a long-term "
            "moment."
        ),
        aliases=("AutomagicCameAMPImproved",),
        papers=_IMPROVED_PAPERS,
        capabilities=_CAME_ALL | _IMAGES | {"config"},
        tags=_CAME_TAGS,
    ),
    OptimizerInfo(
        name="RefactoredAutomagicCameAMP",
        description=(
            "Automagic_CameAMP_Improved with strategies of regularization and momentum that a user can replace, and "
            "four phases."
        ),
        papers=_IMPROVED_PAPERS,
        capabilities=_CAME_ALL | _IMAGES | {"config", "strategies"},
        tags=_CAME_TAGS,
    ),
    OptimizerInfo(
        name="Automagic_CameAMP_8bit",
        description="Automagic_CameAMP with its state in 8 bits.",
        aliases=("Automagic_CameAMP_8Bit", "AutomagicCameAMP8bit", "AutomagicCameAMPLowBit"),
        papers=(*_CAME_PAPERS, EIGHT_BIT),
        capabilities=_CAME_ALL | {"8bit"},
        tags=_CAME_TAGS,
    ),
    OptimizerInfo(
        name="Automagic_CameAMP_Improved_8Bit",
        description="Automagic_CameAMP_Improved with its state in 8 bits, and profiles.",
        aliases=("AutomagicCameAMPImproved8Bit", "AutomagicCameAMPImprovedLowBit"),
        papers=(*_IMPROVED_PAPERS, EIGHT_BIT),
        capabilities=_CAME_ALL | _IMAGES | {"config", "8bit", "profiles"},
        tags=_CAME_TAGS,
    ),
    OptimizerInfo(
        name="Automagic_CameAMP_COptim",
        description=(
            "Automagic_CameAMP whose learning rate follows the trend of the loss and the consistency of the gradients, "
            "with moments at several time scales."
        ),
        aliases=("AutomagicCameAMPCOptim",),
        papers=_CAME_PAPERS,
        capabilities=_CAME_ALL | {"loss_context"},
        tags=_CAME_TAGS | {"automatic-lr"},
    ),
    OptimizerInfo(
        name="Automagic_CameAMP_COptim8bit",
        description="Automagic_CameAMP_COptim with its state in 8 bits.",
        aliases=("AutomagicCameAMPCOptim8bit", "AutomagicCameAMPCOptimLowBit"),
        papers=(*_CAME_PAPERS, EIGHT_BIT),
        capabilities=_CAME_ALL | {"loss_context", "8bit"},
        tags=_CAME_TAGS | {"automatic-lr"},
    ),
)
