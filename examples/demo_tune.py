"""Learning rates for the demo: the same grid, seeds and split for every optimizer, the optimum bracketed for each."""

from __future__ import annotations

import statistics

from demo_files import GRID, LEARNING_RATES, TUNING_SEEDS, optimizer_arguments
from demo_run import Stopped, Task, trial


def tune(model: str, steps: int, scale: float, layers: int) -> int:
    """Print the mean loss on the tuning split for every learning rate; returns the exit status.

    Where the best of an optimizer lies at an end of the grid, the grid grows there, for all of them.
    """
    task = Task(model, layers, scale, None)
    losses: dict[str, dict[float, float]] = {name: {} for name in LEARNING_RATES}
    grid = list(GRID)
    print(f"loss on the tuning files, mean over seeds {TUNING_SEEDS}, {steps} steps")
    while True:
        for lr in grid:
            for name in LEARNING_RATES:
                if lr in losses[name]:
                    continue
                arguments = optimizer_arguments(name, lr, steps)
                try:
                    found = [trial(task, arguments, steps=steps, seed=seed) for seed in TUNING_SEEDS]
                except Stopped as stop:
                    return stop.status
                losses[name][lr] = statistics.mean(found)
                each = ", ".join(f"{loss:.4f}" for loss in found)
                print(f"{name:>13}  lr {lr:<8g} {losses[name][lr]:.4f}  ({each})", flush=True)
        best = {name: min(measured, key=measured.__getitem__) for name, measured in losses.items()}
        if min(grid) in best.values():
            grid = [min(grid) / 2, *grid]
        elif max(grid) in best.values():
            grid = [*grid, 2 * max(grid)]
        else:
            break
    for name, lr in best.items():
        print(
            f"{name:>13}  best {lr:g} of {', '.join(f'{tried:g}' for tried in grid)}; in use: {LEARNING_RATES[name]:g}"
        )
    return 0
