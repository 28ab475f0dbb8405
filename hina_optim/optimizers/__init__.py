"""Named optimizers: each a readable list of techniques."""

from hina_optim.optimizers.adaptive_adamw import AdaptiveHinaAdamW
from hina_optim.optimizers.came_amp import (
    Automagic_CameAMP,
    Automagic_CameAMP_8Bit,
    Automagic_CameAMP_8bit,
    AutomagicCameAMP,
    AutomagicCameAMP8bit,
    AutomagicCameAMPLowBit,
)
from hina_optim.optimizers.came_amp_config import (
    Improved8BitOptimizerConfig,
    ImprovedOptimizerConfig,
    OptimizerConfig,
)
from hina_optim.optimizers.came_amp_improved import (
    Automagic_CameAMP_Improved,
    Automagic_CameAMP_Improved_8Bit,
    AutomagicCameAMPImproved,
    AutomagicCameAMPImproved8Bit,
    AutomagicCameAMPImprovedLowBit,
    create_improved_8bit_optimizer,
)
from hina_optim.optimizers.came_amp_refactored import (
    RefactoredAutomagicCameAMP,
    create_full_finetune_optimizer,
    create_lora_optimizer,
)
from hina_optim.optimizers.coptim import (
    Automagic_CameAMP_COptim,
    Automagic_CameAMP_COptim8bit,
    AutomagicCameAMPCOptim,
    AutomagicCameAMPCOptim8bit,
    AutomagicCameAMPCOptimLowBit,
)
from hina_optim.optimizers.hina_adamw import HinaAdamW, HinaAdamWOptimizer
from hina_optim.optimizers.hina_adaptive import HinaAdaptive

__all__ = [
    "AdaptiveHinaAdamW",
    "AutomagicCameAMP",
    "AutomagicCameAMP8bit",
    "AutomagicCameAMPCOptim",
    "AutomagicCameAMPCOptim8bit",
    "AutomagicCameAMPCOptimLowBit",
    "AutomagicCameAMPImproved",
    "AutomagicCameAMPImproved8Bit",
    "AutomagicCameAMPImprovedLowBit",
    "AutomagicCameAMPLowBit",
    "Automagic_CameAMP",
    "Automagic_CameAMP_8Bit",
    "Automagic_CameAMP_8bit",
    "Automagic_CameAMP_COptim",
    "Automagic_CameAMP_COptim8bit",
    "Automagic_CameAMP_Improved",
    "Automagic_CameAMP_Improved_8Bit",
    "HinaAdamW",
    "HinaAdamWOptimizer",
    "HinaAdaptive",
    "Improved8BitOptimizerConfig",
    "ImprovedOptimizerConfig",
    "OptimizerConfig",
    "RefactoredAutomagicCameAMP",
    "create_full_finetune_optimizer",
    "create_improved_8bit_optimizer",
    "create_lora_optimizer",
]
