"""The Lightning layer: :func:`configure_optimizers`, its groups and schedules, and the callbacks.

Callbacks are in :mod:`hina_lightning.callbacks`.
"""

try:
    import lightning.pytorch  # noqa: F401
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "lightning":
        raise
    raise ModuleNotFoundError(
        "hina_lightning needs Lightning: pip install 'hina-lightning[lightning]'. (hina_optim needs torch alone.)",
        name=error.name,
    ) from error

from hina_lightning.configure import configure_optimizers
from hina_lightning.groups import ParameterGroup, group_parameters
from hina_lightning.schedules import Schedule, ScheduleLR

__all__ = ["ParameterGroup", "Schedule", "ScheduleLR", "configure_optimizers", "group_parameters"]
