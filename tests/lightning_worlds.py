"""One small training under Lightning and Fabric with every strategy, on the CPU.

Lightning has FSDP1 and DeepSpeed on CUDA devices only. Here its strategies are subclassed, which it documents as the
way to extend them; the other strategies are Lightning's own.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader, Dataset

from hina_lightning import configure_optimizers
from hina_lightning.callbacks import ImportanceMonitor, LRMaskMonitor, ShardedOptimizerState
from tests.accelerate_worlds import complete, example, without_builds
from tests.sharded.world import run

ENGINES = ["ddp", "fsdp2", "fsdp2-full", "fsdp1", "zero1", "zero2", "zero3"]
STEPS, HALF, ACCUMULATE, BATCH = 8, 4, 2, 8


class CPUFSDPStrategy(FSDPStrategy):
    """FSDP1 that is told to stay on the CPU."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            **{"device_id": torch.device("cpu"), **self.kwargs},
        )


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeed without the check for CUDA devices."""

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
        import deepspeed

        engine, wrapped, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank),
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, wrapped


def strategy_of(engine: str, size: int) -> Any:
    """A strategy, and nothing that is not Lightning's but the two above."""
    if engine == "one":
        return SingleDeviceStrategy(torch.device("cpu"))
    if engine == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if engine.startswith("fsdp2"):
        return ModelParallelStrategy(
            data_parallel_size=size, tensor_parallel_size=1, process_group_backend="gloo",
            save_distributed_checkpoint=not engine.endswith("full"),
        )  # fmt: skip
    if engine == "fsdp1":
        wrap = {example("model").Block}
        return CPUFSDPStrategy(
            process_group_backend="gloo", state_dict_type="sharded", auto_wrap_policy=wrap, use_orig_params=True
        )
    config = {
        "zero_optimization": {"stage": int(engine[-1]), "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": BATCH // ACCUMULATE // size,
    }
    return CPUDeepSpeedStrategy(config=config, process_group_backend="gloo")


class Part(Dataset):
    """Every world-th sentence of each batch: together the processes see what one would."""

    def __init__(self, rank: int, size: int) -> None:
        self.all, self.rank, self.size = example("model").Sentences(HALF * BATCH), rank, size

    def __len__(self) -> int:
        return len(self.all) // self.size

    def __getitem__(self, index: int) -> Tensor:
        return self.all[index * self.size + self.rank]


class Module(LightningModule):
    """The language model of the examples."""

    def __init__(self, optimizer: str, **options: Any) -> None:
        super().__init__()
        self.optimizer, self.options, self.losses, self.rates = optimizer, options, [], []
        torch.manual_seed(0)
        self.model = example("model").LanguageModel(width=16, heads=2, layers=2)
        for module in self.model.modules():  # a B that is zero hides what an adapter does
            if isinstance(module, example("model").LoRALinear):
                nn.init.normal_(module.lora_B["default"].weight, std=0.05)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(batch)
        self.losses.append(self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean").item())
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        return configure_optimizers(
            self, self.optimizer, lr=5e-4, weight_decay=0.01, warmup=2, total_steps=2 * STEPS, compile=False,
            **self.options,
        )  # fmt: skip

    def train_dataloader(self) -> DataLoader:
        world = self.trainer.world_size
        return DataLoader(Part(self.trainer.global_rank, world), batch_size=BATCH // ACCUMULATE // world)


class Remembering(DummyLogger):
    """A logger that remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics, step=None):
        self.values.setdefault(step, {}).update(metrics)


@dataclass
class Trained:
    """What a rank has to tell of a training."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    logged: dict[int, dict[str, float]] = field(default_factory=dict)


class Reading(Callback):
    """Reads the weights when the training ends."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def on_train_end(self, trainer, module):
        self.weights = complete(trainer.strategy.model, trainer.lightning_module)  # while the engine is there


def train(
    engine: str,
    size: int,
    optimizer: str,
    save: Path | None = None,
    resume: Path | None = None,
    options: dict[str, Any] | None = None,
    callback: bool = True,
) -> Trained:
    """A fit, in a world of that size."""
    seed_everything(0, verbose=False)
    module, logger, reading = Module(optimizer, **(options or {})), Remembering(), Reading()
    callbacks: list[Callback] = [LRMaskMonitor(2), ImportanceMonitor(every_n_steps=2), reading]
    if save is not None:  # after each epoch, which is a half
        callbacks.append(ModelCheckpoint(save, "{epoch}", save_top_k=-1, save_last="link"))
    callbacks += [ShardedOptimizerState()] if callback else []
    trainer = Trainer(
        accelerator="cpu", devices=size, strategy=strategy_of(engine, size), max_epochs=2, callbacks=callbacks,
        accumulate_grad_batches=ACCUMULATE, use_distributed_sampler=False, logger=logger, log_every_n_steps=2,
        enable_checkpointing=save is not None, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=None if resume is None else str(resume))
    return Trained(reading.weights, module.losses, module.rates, logger.values)


def rank_main(rank: int, engine: str, size: int, options: dict[str, Any]) -> Trained:
    """A process of a world."""
    return train(engine, size, **options)


def trained(engine: str, size: int = 2, **options: Any) -> list[Trained]:
    """What every process of a training has to tell."""
    if engine.startswith("zero"):
        without_builds()  # here, too: the processes are forks, and share what is imported
    return run(rank_main, size, engine, size, options, launched=engine != "one")


# -- Fabric ------------------------------------------------------------------------------------------------------------


def fabric_strategy(engine: str, size: int) -> Any:
    """The same strategies, of Fabric."""
    from lightning.fabric.strategies import DDPStrategy as DDP
    from lightning.fabric.strategies import DeepSpeedStrategy as DeepSpeed
    from lightning.fabric.strategies import FSDPStrategy as FSDP
    from lightning.fabric.strategies import ModelParallelStrategy as ModelParallel
    from lightning.fabric.strategies import SingleDeviceStrategy as Single

    class CPUFSDP(FSDP):
        def setup_module(self, module: nn.Module) -> nn.Module:
            return FullyShardedDataParallel(
                module, sharding_strategy=self.sharding_strategy, device_id=torch.device("cpu"), **self._fsdp_kwargs
            )

    class CPUDeepSpeed(DeepSpeed):
        def setup_environment(self) -> None:
            DDP.setup_environment(self)

        def _setup_distributed(self) -> None:
            self._set_world_ranks()
            self._init_deepspeed_distributed()
            self._format_config()

        def _initialize_engine(self, model, optimizer=None, scheduler=None):
            return (*CPUDeepSpeedStrategy._setup_model_and_optimizer(self, model, optimizer), scheduler)

    if engine == "one":
        return Single(torch.device("cpu"))
    if engine == "ddp":
        return DDP(process_group_backend="gloo")
    if engine.startswith("fsdp2"):
        return ModelParallel(
            sharded, data_parallel_size=size, tensor_parallel_size=1, process_group_backend="gloo",
            save_distributed_checkpoint=not engine.endswith("full"),
        )  # fmt: skip
    if engine == "fsdp1":
        wrap = {example("model").Block}
        return CPUFSDP(process_group_backend="gloo", state_dict_type="sharded", auto_wrap_policy=wrap)
    config = {
        "zero_optimization": {"stage": int(engine[-1]), "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": BATCH // size,
        "gradient_clipping": 0.0,
    }
    return CPUDeepSpeed(config=config, process_group_backend="gloo")


def sharded(model: nn.Module, device_mesh: Any) -> nn.Module:
    """What ModelParallelStrategy of Fabric is told to do."""
    mesh = device_mesh["data_parallel"]
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fabric_main(rank: int, engine: str, size: int, save: Path | None, resume: Path | None) -> Trained:
    """A loop of Fabric; saves in the middle, or begins there."""
    from lightning.fabric import Fabric

    from hina_lightning.fabric import load_optimizer, save_optimizer, setup

    fabric = Fabric(accelerator="cpu", devices=size, strategy=fabric_strategy(engine, size))
    fabric.launch()
    torch.manual_seed(0)
    model = example("model").LanguageModel(width=16, heads=2, layers=2)
    model, optimizer = setup(
        fabric,
        model,
        lambda model: configure_optimizers(model, "HinaAdaptive", lr=5e-4, schedule=None, compile=False)["optimizer"],
    )
    start = 0
    if resume is not None:
        fabric.load(resume / "weights", {"model": model}, strict=True)
        start = load_optimizer(fabric, resume / "optimizer", optimizer)["step"]
    loader = DataLoader(Part(rank, size), batch_size=BATCH // size)
    for step, batch in enumerate(loader):
        if step < start:
            continue
        fabric.backward(model(batch))
        optimizer.step()
        optimizer.zero_grad()
        if save is not None and step + 1 == HALF // 2:
            save.mkdir(exist_ok=True)
            fabric.save(save / "weights", {"model": model})
            save_optimizer(fabric, save / "optimizer", optimizer, extra={"step": step + 1})
    return Trained(weights=complete(model._forward_module, model.module))


def fabric_trained(engine: str, size: int = 2, save: Path | None = None, resume: Path | None = None) -> list[Trained]:
    """What every process of a loop of Fabric has to tell."""
    if engine.startswith("zero"):
        without_builds()
    return run(fabric_main, size, engine, size, save, resume, launched=engine != "one")
