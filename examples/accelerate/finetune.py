"""Fine-tune adapters with any engine that accelerate knows; save, resume, and log what the optimizer does.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/accelerate/finetune.py --output runs/lora
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/accelerate/finetune.py --output runs/lora \
        --resume runs/lora/step_20 --steps 60
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from model import LanguageModel, Sentences
from torch.utils.data import DataLoader

from hina_lightning import configure_optimizers
from hina_lightning.accelerate import StatisticsTracker, guard_memory, prepare
from hina_optim.memory import MemoryGuard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", default="HinaAdaptive", help="a name of hina_optim.list_optimizers()")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of the whole training")
    parser.add_argument("--batch", type=int, default=16, help="sentences a step, over all processes")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches a step")
    parser.add_argument("--memory", type=float, default=None, help="GiB that the training may use")
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--resume", type=Path, default=None, help="a folder step_<n> of an earlier run")
    options = parser.parse_args()

    accelerator = Accelerator(
        gradient_accumulation_steps=options.accumulate,
        # a batch is split over the processes: the training is the same whatever their number
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with="tensorboard",
        project_dir=options.output,
    )
    set_seed(0)
    model = LanguageModel()
    configured = configure_optimizers(
        model, options.optimizer, lr=options.lr, weight_decay=0.01, warmup=4, total_steps=options.steps
    )
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    loader = DataLoader(Sentences(1600), batch_size=options.batch // options.accumulate)

    # accelerator.prepare, checked; from here on save_state and load_state fit any engine
    model, optimizer, loader, scheduler = prepare(accelerator, model, optimizer, loader, scheduler)
    accelerator.init_trackers("finetune")
    StatisticsTracker(accelerator, optimizer, every_n_steps=5)
    guard = guard_memory(accelerator, MemoryGuard(options.memory, every_n_steps=10), optimizer)

    step = 0
    if options.resume is not None:
        accelerator.load_state(str(options.resume))
        step = int(options.resume.name.removeprefix("step_"))
    batches = iter(accelerator.skip_first_batches(loader, step * options.accumulate))

    with guard.watching():
        while step < options.steps:
            total = torch.zeros((), device=accelerator.device)
            for _ in range(options.accumulate):
                with accelerator.accumulate(model):
                    loss = model(next(batches))
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                total += loss.detach() / options.accumulate
            step += 1
            mean = accelerator.reduce(total, "mean").item()
            accelerator.log({"loss": mean}, step=step)
            if step % 10 == 0 or step == options.steps:
                accelerator.print(f"step {step}: loss {mean:.6f}")
            if step % options.save_every == 0:
                accelerator.save_state(str(options.output / f"step_{step}"))
    accelerator.end_training()


if __name__ == "__main__":
    main()
