"""Our optimizers in scripts for ``accelerate launch``: one call prepares, checks, binds, and sees to checkpoints.

::

    from accelerate import Accelerator
    from hina_lightning.accelerate import StatisticsTracker, guard_memory, prepare

    accelerator = Accelerator(log_with="tensorboard", project_dir="runs")
    model, optimizer, loader, scheduler = prepare(accelerator, model, optimizer, loader, scheduler)
    accelerator.init_trackers("finetune")
    StatisticsTracker(accelerator, optimizer)

The training loop is the usual one, and so are ``accelerator.save_state`` and ``load_state``.
"""

try:
    import accelerate as _accelerate  # noqa: F401
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "accelerate":
        raise
    raise ModuleNotFoundError(
        "hina_lightning.accelerate needs accelerate: pip install 'hina-lightning[accelerate]'.", name=error.name
    ) from error

from hina_lightning.accelerate.memory import guard_memory
from hina_lightning.accelerate.preparation import prepare
from hina_lightning.accelerate.tracking import StatisticsTracker
from hina_optim.unwrapping import unwrap_optimizer

__all__ = ["StatisticsTracker", "guard_memory", "prepare", "unwrap_optimizer"]
