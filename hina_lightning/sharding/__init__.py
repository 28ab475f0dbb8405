"""Optimizers under engines that lay parameters flat: DeepSpeed's ZeRO and FSDP1.

Such an engine hands its optimizer vectors without shapes. :func:`bind` tells the optimizer which elements of which
parameters they hold; from then on it computes what it would in one process. FSDP2, tensor parallelism and DDP need
nothing.
"""

from hina_lightning.sharding.binding import bind

__all__ = ["bind"]
