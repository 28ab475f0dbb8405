"""State in 8 bits where bitsandbytes is not installed, where it is broken, and where it is there: the same result."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("absent", "broken", "present")


def main(kind: str) -> None:
    """In a process of its own: train, and print what came of it as JSON."""
    if kind == "absent":
        hide()
    elif kind == "broken":
        sys.path.insert(0, str(broken()))
    if kind != "present":
        with pytest.raises(ImportError):
            importlib.import_module("bitsandbytes")
    told: list[str] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    logging.getLogger("hina_optim").setLevel(logging.DEBUG)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = trained()
    told += [str(one.message) for one in warned]
    print(json.dumps({**found, "told": told, "imported": "bitsandbytes" in sys.modules and kind == "present"}))


def trained() -> dict[str, Any]:
    """A few steps of two optimizers, the digest of all weights and state, and what the reports say."""
    import torch

    from hina_optim import create_optimizer

    digest, available = hashlib.sha256(), []
    for name in ("HinaAdaptive", "Automagic_CameAMP_Improved_8Bit"):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((24, 300), (8, 512), (7,))]
        optimizer: Any = create_optimizer(name, params, lr=3e-4, state_precision="8bit")
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        assert optimizer.state[params[0]]["exp_avg"].dtype == torch.uint8
        for tensor in (x for p in params for x in (p.detach(), *optimizer.state[p].values())):
            digest.update(tensor.contiguous().numpy().tobytes())
        available.append(optimizer.get_memory_efficiency_report()["bitsandbytes_available"])
    return {"digest": digest.hexdigest(), "available": available}


def hide() -> None:
    """Make this process one in which the package is not installed."""

    class Finder(importlib.machinery.PathFinder):
        @classmethod
        def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
            return None if fullname.split(".")[0] == "bitsandbytes" else super().find_spec(fullname, path, target)

    sys.meta_path[:] = [Finder if one is importlib.machinery.PathFinder else one for one in sys.meta_path]
    assert importlib.util.find_spec("bitsandbytes") is None


def broken() -> Path:
    """A folder with one that fails when it is imported, as with the wrong CUDA."""
    folder = Path(sys.argv[2])
    (folder / "bitsandbytes.py").write_text("raise ImportError('libcudart.so: cannot open shared object file')\n")
    return folder


def test_the_same_to_the_bit_and_nothing_is_said(tmp_path: Path) -> None:
    kinds = [kind for kind in KINDS if kind != "present" or importlib.util.find_spec("bitsandbytes")]
    found = {}
    for kind in kinds:
        command = [sys.executable, "-m", "tests.test_without_bitsandbytes", kind, str(tmp_path)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        assert "bitsandbytes" not in run.stderr
        found[kind] = json.loads(run.stdout.splitlines()[-1])
    for kind in kinds:
        assert found[kind]["digest"] == found["absent"]["digest"], kind
        assert not [line for line in found[kind]["told"] if "bitsandbytes" in line.lower()], kind
        assert not found[kind]["imported"], "it is there, and not even loaded"
        assert found[kind]["available"] == [kind != "absent"] * 2


if __name__ == "__main__":
    main(sys.argv[1])
