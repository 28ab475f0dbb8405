"""The examples, launched for real: `accelerate launch` with every configuration that is shipped.

accelerate has FSDP and DeepSpeed on accelerator devices only; `launch_shim` makes it take the CPU for one.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

import pytest

from tests.accelerate_worlds import ENGINES, EXAMPLES, ROOT

#: Every process imports all it needs: some ten seconds a launch, more on a busy machine.
pytestmark = [pytest.mark.slow, pytest.mark.sharded]
STEPS = ("--steps", "20", "--save-every", "10")
LINE = re.compile(r"step (\d+): loss ([\d.]+)")


def launch(configuration: str | None, *arguments: str, cpu: bool = False) -> str:
    """What a launched example printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "launch_shim"), str(ROOT)]),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if cpu:
        environment["ACCELERATE_USE_CPU"] = "true"
    if configuration is None:
        command = [sys.executable]
    else:
        given = ["--config_file", str(EXAMPLES / f"{configuration}.yaml"), "--main_process_port", str(port)]
        command = [sys.executable, "-m", "accelerate.commands.launch", *given]
    done = subprocess.run(
        [*command, str(EXAMPLES / "finetune.py"), *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def losses(printed: str) -> dict[int, float]:
    """Step → loss."""
    return {int(step): float(loss) for step, loss in LINE.findall(printed)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[int, float]:
    """In one process, without a launcher."""
    found = losses(launch(None, *STEPS, "--output", str(tmp_path_factory.mktemp("alone"))))
    assert sorted(found) == [10, 20]
    assert found[20] < found[10]
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_the_example_trains_as_one_process_and_goes_on(engine, alone, tmp_path):
    cpu = engine == "ddp"
    first = losses(launch(engine, *STEPS, "--output", str(tmp_path), cpu=cpu))
    assert first == pytest.approx(alone, rel=2e-5)
    assert (tmp_path / "step_10" / "hina_optimizer_0").is_dir()
    assert list((tmp_path / "finetune").glob("events.out.tfevents*"))
    arguments = (*STEPS, "--output", str(tmp_path / "again"), "--resume", str(tmp_path / "step_10"))
    again = losses(launch(engine, *arguments, cpu=cpu))
    assert again == {20: first[20]}
