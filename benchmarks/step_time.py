"""Time of one optimizer step beside torch's AdamW, all in one run, interleaved: ``make bench``.

Two workloads: 500 LoRA tensors (rank 16, widths 512 to 4096), and the shapes of a 50M-parameter transformer. Absolute
times mean
little on a shared machine; the ratios to fused AdamW of the same run do. Gradients are fixed; every variant steps in
turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hina_optim import HinaAdaptive

Shapes = list[tuple[int, ...]]


def lora_shapes() -> Shapes:
    """250 pairs of rank 16."""
    widths = (512, 768, 1024, 2048, 4096)
    return [shape for i in range(250) for shape in ((16, widths[i % 5]), (widths[i % 5], 16))]


def model_shapes() -> Shapes:
    """A decoder of 50M parameters: embedding 16k x 512, 12 blocks of width 512 with norms and biases."""
    block: Shapes = [(1536, 512), (1536,), (512, 512), (512,), (2048, 512), (2048,), (512, 2048), (512,), *[(512,)] * 4]
    return [(16384, 512), *(block * 12), (512,), (512,)]


def build(shapes: Shapes, device: str) -> list[torch.nn.Parameter]:
    """Parameters with fixed gradients."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        p = torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(device))
        p.grad = (torch.randn(shape, generator=generator) * 1e-3).to(device)
        params.append(p)
    return params


def variants(device: str, quick: bool) -> dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]]:
    """Name → how to build it."""
    plain = {
        "use_spd": False,
        "use_cautious": False,
        "use_adopt_stability": False,
        "use_agr": False,
        "use_tam": False,
        "use_dynamic_adaptation": False,
        "use_lr_mask": False,
        "dynamic_weight_decay": False,
    }
    result: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
        "torch AdamW fused": lambda ps: torch.optim.AdamW(ps, lr=1e-4, fused=True),
        "torch AdamW foreach": lambda ps: torch.optim.AdamW(ps, lr=1e-4, foreach=True),
        "HinaAdaptive eager": lambda ps: HinaAdaptive(ps, lr=1e-4, compile=False),
        "HinaAdaptive eager, techniques off": lambda ps: HinaAdaptive(ps, lr=1e-4, compile=False, **plain),  # type: ignore[arg-type]
    }
    if not quick:
        result["HinaAdaptive compiled"] = lambda ps: HinaAdaptive(ps, lr=1e-4, compile=True)
        result["HinaAdaptive compiled, techniques off"] = lambda ps: HinaAdaptive(ps, lr=1e-4, compile=True, **plain)  # type: ignore[arg-type]
    return result


def measure(shapes: Shapes, device: str, rounds: int, quick: bool) -> dict[str, dict[str, float]]:
    """Median and quartiles of the step time of every variant, in milliseconds, and what its first step took."""
    optimizers, first = {}, {}
    for name, make in variants(device, quick).items():
        optimizers[name] = make(build(shapes, device))
        begin = time.perf_counter()
        for _ in range(3):  # state, compilation (a measuring and an ordinary step), warm caches
            optimizers[name].step()
        first[name] = time.perf_counter() - begin
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            if device == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - begin) * 1e3)
    base = times["torch AdamW fused"]
    rows = {}
    for name, t in times.items():
        ratios = sorted(a / b for a, b in zip(t, base, strict=True))
        rows[name] = {
            "ms": statistics.median(t),
            "ratio": statistics.median(ratios),
            "ratio_low": ratios[len(ratios) // 4],
            "ratio_high": ratios[3 * len(ratios) // 4],
            "first_three_steps_s": first[name],
        }
    return rows


def main() -> None:
    """Print the tables and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workload", choices=("lora", "model", "both"), default="both")
    parser.add_argument("--quick", action="store_true", help="leave the compiled variants out")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/step_time.json"))
    args = parser.parse_args()
    tables = {}
    workloads = {
        "lora": ("500 LoRA tensors, rank 16", lora_shapes()),
        "model": ("a 50M-parameter transformer", model_shapes()),
    }
    for title, shapes in [workloads[w] for w in workloads if args.workload in (w, "both")]:
        count = sum(torch.Size(s).numel() for s in shapes)
        rows = tables[title] = measure(shapes, args.device, args.rounds, args.quick)
        print(
            f"\n{title}: {count / 1e6:.1f}M elements, {args.device}, {torch.get_num_threads()} threads, "
            f"{args.rounds} rounds"
        )
        print(f"{'optimizer':<40} {'ms/step':>9} {'x fused AdamW':>14} {'quartiles':>15} {'first 3 steps':>14}")
        for name, row in rows.items():
            spread = f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}"
            print(
                f"{name:<40} {row['ms']:>9.2f} {row['ratio']:>14.2f} {spread:>15} {row['first_three_steps_s']:>12.1f} s"
            )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
