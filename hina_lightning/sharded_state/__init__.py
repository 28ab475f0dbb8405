"""One optimizer checkpoint for all engines and numbers of ranks.

Saved by parameter name through torch.distributed.checkpoint, loaded under any other engine and number of ranks::

    sharded_state.save("run/step-100", optimizer, extra={"step": 100})  # on all ranks
    extra = sharded_state.load("run/step-100", optimizer)  # on all ranks, of whatever they are ranks

Nothing in a checkpoint is ever unpickled: JSON and raw numbers, with a checksum of every byte. What is damaged,
incomplete or of something else is refused on all ranks, with everything left as it was.
"""

from hina_lightning.sharded_state.errors import CheckpointError
from hina_lightning.sharded_state.loading import is_complete, latest, load, open_checkpoint
from hina_lightning.sharded_state.saving import save
from hina_lightning.sharded_state.single import consolidate, spread

__all__ = ["CheckpointError", "consolidate", "is_complete", "latest", "load", "open_checkpoint", "save", "spread"]
