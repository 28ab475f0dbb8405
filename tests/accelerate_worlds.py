"""One small training under accelerate, with the configurations that are shipped, on every engine, on the CPU.

accelerate has FSDP and DeepSpeed on accelerator devices only; :func:`as_device` makes it take a CPU for one, here in
the tests and nowhere else.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.sharded.world import run

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "accelerate"
ENGINES = ["ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3"]
STEPS, HALF, ACCUMULATE, BATCH = 8, 4, 2, 8


def example(name: str) -> ModuleType:
    """A module of the examples, under a name that nothing else has."""
    known = f"accelerate_example_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


def as_device() -> None:
    """Have accelerate take the CPU for an accelerator device, with gloo."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def backend(self, cpu=False, sagemaker_dp=False, backend=None):
        return "gloo", DistributedType.MULTI_GPU

    def set_device(self):
        if self.device is None:
            self.device = torch.device("cpu")

    PartialState._prepare_backend, PartialState.set_device = backend, set_device


def without_builds() -> None:
    """Have DeepSpeed go on the CPU, and not compile kernels for it, which would take minutes."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed = pytest.importorskip("deepspeed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def launch_environment(engine: str, processes: int) -> dict[str, str]:
    """What ``accelerate launch`` would put into the environment for a shipped configuration."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    given = ["--config_file", str(EXAMPLES / f"{engine}.yaml"), "--num_processes", str(processes), "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args([*given]))
    arguments.main_process_port, arguments.deepspeed_fields_from_accelerate_config = 0, ""
    made = prepare_deepspeed_cmd_env(arguments)[1] if engine.startswith("zero") else prepare_multi_gpu_env(arguments)
    return {key: value for key, value in made.items() if key.startswith(("ACCELERATE_", "FSDP_", "DEEPSPEED"))}


def enter(engine: str, processes: int) -> None:
    """Become a process that ``accelerate launch`` has started; ``"one"`` is a script that was started by itself."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if engine == "one":
        for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "MASTER_"))]:
            del os.environ[name]
        return
    os.environ.update(launch_environment(engine, processes))
    if engine == "ddp":  # which accelerate has on the CPU, too
        os.environ["ACCELERATE_USE_CPU"] = "true"
        return
    as_device()
    if engine.startswith("zero"):
        os.environ["ACCELERATE_GRADIENT_CLIPPING"] = "0.0"  # what the others do; accelerate drops it


@dataclass
class Trained:
    """What a rank has to tell of a training.

    Attributes:
        weights: Name → complete trained parameter.
        losses: Mean over the processes, a step.
        logged: Step → what was given to the trackers (of the main process).
        rates: The learning rate after each step.
        statistics: Those that every rank had last.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    logged: dict[int, dict[str, float]] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    statistics: dict[str, float] = field(default_factory=dict)


def tracker(into: dict[int, dict[str, float]]) -> Any:
    """A tracker of accelerate that remembers."""
    from accelerate.tracking import GeneralTracker

    class Remembering(GeneralTracker):
        name = "remembering"
        requires_logging_directory = False
        tracker = None
        main_process_only = False

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **kwargs):
            into.setdefault(step, {}).update(values)

    return Remembering()


def built(optimizer: str, **options: Any) -> tuple[nn.Module, Any, Any, DataLoader]:
    """Model, optimizer, scheduler and loader, as a script makes them."""
    from hina_lightning import configure_optimizers

    torch.manual_seed(0)
    example_model = example("model")
    model = example_model.LanguageModel(width=16, heads=2, layers=2)
    for module in model.modules():  # a B that is zero hides what an adapter does
        if isinstance(module, example_model.LoRALinear):
            nn.init.normal_(module.lora_B["default"].weight, std=0.05)
    configured = configure_optimizers(
        model, optimizer, lr=5e-4, weight_decay=0.01, warmup=2, total_steps=2 * STEPS, compile=False, **options
    )
    loader = DataLoader(example_model.Sentences(2 * STEPS * BATCH), batch_size=BATCH // ACCUMULATE)
    return model, configured["optimizer"], configured["lr_scheduler"]["scheduler"], loader


def accelerator_with(logged: dict[int, dict[str, float]], **options: Any) -> Any:
    """An accelerator whose batches do not depend on the number of processes."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    made = Accelerator(
        gradient_accumulation_steps=ACCUMULATE,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with=[tracker(logged)],
        **options,
    )
    made.init_trackers("test")
    return made


def train(
    optimizer_name: str,
    first: int = 0,
    last: int = STEPS,
    resume: Path | None = None,
    save: Path | None = None,
    options: dict[str, Any] | None = None,
) -> Trained:
    """Train from step ``first`` up to ``last``, in a world that was entered; ``save`` after step :data:`HALF`."""
    from hina_lightning.accelerate import StatisticsTracker, prepare

    result = Trained()
    accelerator = accelerator_with(result.logged)
    model, optimizer, scheduler, loader = built(optimizer_name, **(options or {}))
    model, optimizer, loader, scheduler = prepare(accelerator, model, optimizer, loader, scheduler)
    statistics = StatisticsTracker(accelerator, optimizer, every_n_steps=2)
    if resume is not None:
        accelerator.load_state(str(resume))
    batches = iter(accelerator.skip_first_batches(loader, first * ACCUMULATE))
    for step in range(first, last):
        total = torch.zeros(())
        for _ in range(ACCUMULATE):
            with accelerator.accumulate(model):
                loss = model(next(batches))
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            total += loss.detach() / ACCUMULATE
        result.losses.append(accelerator.reduce(total, "mean").item())
        result.rates.append(scheduler.get_last_lr()[0])
        if save is not None and step + 1 == HALF:
            accelerator.save_state(str(save))
    result.statistics = statistics.values
    result.weights = complete(model, getattr(model, "module", model))
    return result


def complete(engine: Any, inner: nn.Module) -> dict[str, Tensor]:
    """The trained weights, whole, on every rank.

    Args:
        engine: The model as it was prepared.
        inner: The module in it.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.tensor import DTensor

    from hina_optim.state.names import plain_name

    def read() -> dict[str, Tensor]:
        return {
            plain_name(name): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in inner.named_parameters()
            if p.requires_grad
        }

    if isinstance(engine, FSDP):
        with FSDP.summon_full_params(engine):
            return read()
    if type(engine).__name__ == "DeepSpeedEngine":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(engine.parameters())):
            return read()
    return read()


def rank_main(rank: int, engine: str, size: int, options: dict[str, Any]) -> Trained:
    """A process of a world."""
    enter(engine, size)
    return train(**options)


def trained(engine: str, size: int = 2, **options: Any) -> list[Trained]:
    """What every process of a training has to tell."""
    if engine.startswith("zero"):
        without_builds()  # here, too: the processes are forks, and share what is imported
    return run(rank_main, size, engine, size, options, launched=engine != "one")


def masters_main(rank: int, engine: str, size: int, folder: Path, resume: bool) -> dict[str, Tensor]:
    """Weights in full precision of a training in bf16 under DeepSpeed, after two steps or as they were saved."""
    import deepspeed

    from hina_lightning.accelerate import prepare

    enter(engine, size)
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    accelerator = accelerator_with({})
    model, optimizer, scheduler, loader = built("HinaAdaptive")
    model, optimizer, loader, scheduler = prepare(accelerator, model, optimizer, loader, scheduler)
    if resume:
        accelerator.load_state(str(folder))
    else:
        batches = iter(loader)
        for _ in range(2 * ACCUMULATE):
            with accelerator.accumulate(model):
                accelerator.backward(model(next(batches)))
        accelerator.save_state(str(folder))
    return {
        name: deepspeed.utils.safe_get_full_fp32_param(p).detach().cpu().clone()
        for name, p in model.module.named_parameters()
        if p.requires_grad
    }
