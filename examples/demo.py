"""LoRA fine-tuning of a real pretrained encoder with HinaAdaptive under Lightning, beside torch's AdamW.

`make demo` runs this; examples/README.md says what it does and what its numbers mean. Interrupted or killed, the same
command goes on from the last checkpoint and ends at the same weights.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from demo_files import (
    GRID,
    LEARNING_RATES,
    ROOT,
    SNIPPET_TOKENS,
    STEPS,
    TRAINED_LAYERS,
    TUNING_SEEDS,
    DemoError,
    configuration,
    folder_for,
    optimizer_arguments,
    packaged_model,
    quieten,
    shown,
    write,
)

#: Rows of the table: what it says, key of the result, how it is written.
ROWS = (
    ("held-out loss (cross-entropy)", "loss", "{:.3f}"),
    ("held-out accuracy", "accuracy", "{:.1%}"),
    ("optimizer's part of a step, ms (median)", "optimizer_ms", "{:.2f}"),
    ("whole training step, ms (median)", "step_ms", "{:.1f}"),
    ("optimizer state, bytes per parameter", "state_bytes_per_parameter", "{:.2f}"),
    ("learning rate (tuned)", "learning_rate", "{:g}"),
)


def main() -> int:
    """Run the demo; returns the exit status."""
    args = arguments()
    try:
        args.model = args.model or packaged_model()
        quieten()
        if args.tune:
            from demo_tune import tune

            return tune(args.model, args.steps, args.snippets, args.layers)
        return demo(args)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return interrupted(130)


def arguments() -> argparse.Namespace:
    """The command line; MODEL and FRESH may come from the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=os.environ.get("MODEL"), help="local folder or hub name of an encoder (the packaged MiniLM)")
    add("--out", type=Path, default=ROOT / "runs" / "demo", help="folder of the run (runs/demo)")
    add(
        "--fresh",
        action="store_true",
        default=os.environ.get("FRESH", "0") not in ("", "0"),
        help="start over, whatever is there",
    )
    add("--tune", action="store_true", help="find the learning rates again, and nothing else")
    add("--steps", type=int, default=STEPS, help=f"optimizer steps ({STEPS})")
    add("--seed", type=int, default=0, help="of the initial weights and the order of the snippets (0)")
    add("--snippets", type=float, default=1.0, help="factor on the number of snippets (1)")
    add("--layers", type=int, default=TRAINED_LAYERS, help=f"how many of the last layers get LoRA ({TRAINED_LAYERS})")
    args = parser.parse_args()
    if args.steps < 10 or args.layers < 1 or args.snippets <= 0:
        parser.error("--steps must be at least 10, --layers at least 1, --snippets more than 0")
    return args


def demo(args: argparse.Namespace) -> int:
    """Train with both optimizers, each from its last checkpoint on, then draw and print."""
    out = folder_for(args.out, configuration(args), args.fresh)
    table = out / "table.txt"
    if table.exists():
        print(f"{shown(out)} is finished. FRESH=1 make demo starts over.\n\n{table.read_text(encoding='utf-8')}")
        return 0
    began = time.perf_counter()
    for leftover in out.rglob("*.part"):
        leftover.unlink()

    from demo_run import Stopped, Task, train

    from hina_lightning.report import report

    encoded = out / "encoded.pt"
    try:
        task = Task(args.model, args.layers, args.snippets, encoded)
        print(
            f"{len(task.packages)} packages, "
            + ", ".join(f"{len(s)} {n}" for n, s in task.splits.items())
            + " snippets"
        )
        results = {}
        for name, lr in LEARNING_RATES.items():
            optimizer = optimizer_arguments(name, lr, args.steps)
            results[name] = train(task, name, optimizer, steps=args.steps, seed=args.seed, folder=out / name)
    except Stopped as stop:
        return interrupted(stop.status)
    pictures = report(out / "HinaAdaptive", out)
    write(table, describe(results, task, args, out, [picture.name for picture in pictures]))
    encoded.unlink(missing_ok=True)
    print(f"\n{table.read_text(encoding='utf-8')}\nThis took {time.perf_counter() - began:.0f} s.")
    return 0


def describe(results: dict[str, Any], task: Any, args: argparse.Namespace, out: Path, pictures: list[str]) -> str:
    """The table and what must be said with it."""
    classes, test = len(task.packages), len(task.splits["test"])
    first = next(iter(results.values()))
    width = max(len(label) for label, _, _ in ROWS)
    lines = [
        f"From which of {classes} packages is a snippet of {SNIPPET_TOKENS} tokens? Measured on {test:,} snippets",
        "from files that were not trained on; guessing has "
        f"a loss of {math.log(classes):.3f} and an accuracy of {1 / classes:.1%}.",
        f"Trained: {first['parameters']:,} parameters in {first['tensors']} tensors, LoRA and a linear head, "
        f"in {args.steps} steps.",
        "",
        " " * width + "".join(f"{name:>15}" for name in results),
    ]
    for label, key, form in ROWS:
        lines.append(f"{label:<{width}}" + "".join(f"{form.format(result[key]):>15}" for result in results.values()))
    lines += [
        "",
        f"Both learning rates are the best of {', '.join(f'{lr:g}' for lr in GRID)}",
        f"by the loss on the tuning files, mean over {len(TUNING_SEEDS)} other seeds, same steps and schedule;",
        "python examples/demo.py --tune measures that again.",
        "One seed on one small task: this table does not tell which optimizer is better. --seed N --out FOLDER",
        "runs another seed; examples/README.md says what the numbers mean.",
        "",
        f"In {shown(out)}: {', '.join(pictures)};",
        f"for each optimizer last.ckpt, csv/ and tensorboard/ (tensorboard --logdir {shown(out)}).",
    ]
    if args.model != _packaged():
        lines.insert(-3, f"The learning rates were tuned for MiniLM, not for {args.model}.")
    return "\n".join(lines) + "\n"


def _packaged() -> str | None:
    try:
        return packaged_model()
    except DemoError:
        return None


def interrupted(status: int) -> int:
    """Say how to go on."""
    options = [option for option in sys.argv[1:] if option != "--fresh"]
    again = shlex.join([shown(Path(sys.executable)), shown(Path(__file__)), *options]) if options else "make demo"
    print(f"\nInterrupted before the end. To go on from the last checkpoint: {again}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
