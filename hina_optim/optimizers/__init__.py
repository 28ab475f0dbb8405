"""The named optimizers: which techniques, in which order, with which defaults."""

from hina_optim.optimizers.hina_adaptive import HinaAdaptive
from hina_optim.optimizers.inspection import Inspection

__all__ = ["HinaAdaptive", "Inspection"]
