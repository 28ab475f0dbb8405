"""Judge what a training made: edges and background of images, rank of adapters. Needs torch alone to import."""

from hina_optim.evaluation.adapters import adapter_spectra, adapter_weights
from hina_optim.evaluation.images import evaluate_background_consistency, evaluate_edge_quality
from hina_optim.evaluation.rank import (
    Hadamard,
    Kronecker,
    LoraSpectrum,
    analyze_lora_rank,
    lora_spectrum,
    singular_values,
)

__all__ = [
    "Hadamard",
    "Kronecker",
    "LoraSpectrum",
    "adapter_spectra",
    "adapter_weights",
    "analyze_lora_rank",
    "evaluate_background_consistency",
    "evaluate_edge_quality",
    "lora_spectrum",
    "singular_values",
]
