"""The demo as a user runs it: a process of its own, killed and interrupted in the middle, and what it leaves behind."""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "demo.py"
SMALL = ["--steps", "40", "--snippets", "0.05", "--layers", "1"]
sys.path.insert(0, str(DEMO.parent))

import demo_files  # noqa: E402
import demo_model  # noqa: E402
import demo_task  # noqa: E402

from hina_lightning.report import load_metrics  # noqa: E402

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("MODEL", "FRESH"):
        environment.pop(name, None)
    return subprocess.Popen(
        [sys.executable, str(DEMO), "--out", str(out), *(options or SMALL)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )


def stop_after(out: Path, optimizer: str, step: int, how: signal.Signals) -> tuple[int, str]:
    """Start the demo, and send a signal once it has saved a checkpoint at ``step`` or later; exit status and stderr."""
    process, deadline = start(out), time.monotonic() + 90
    while (demo_model.read_checkpoint(out / optimizer / "last.ckpt") or 0) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)  # a step or two further on, so that it has work to lose
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert not (out / optimizer / "result.json").exists(), "it had ended before the signal came"
    return process.returncode, errors


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    """An uninterrupted run: its folder, what it printed, and its peak of memory in bytes."""
    out = tmp_path_factory.mktemp("demo") / "whole"
    process = start(out)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert process.stderr is not None
    assert os.waitstatus_to_exitcode(status) == 0, process.stderr.read()
    return out, printed, usage.ru_maxrss * 1024


@pytest.mark.slow
def test_outputs(whole: tuple[Path, str, int]) -> None:
    from matplotlib.image import imread
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, printed, _ = whole
    for row in ("held-out loss", "held-out accuracy", "optimizer's part", "bytes per parameter"):
        assert row in printed
    assert "One seed" in printed and "--tune" in printed
    for picture in ("lr_mask", "importance", "effective_lr", "memory", "loss"):
        assert imread(out / f"{picture}.png").std() > 0.01
    for optimizer in ("HinaAdaptive", "AdamW"):
        events = EventAccumulator(str(out / optimizer / "tensorboard"))
        events.Reload()
        assert "train/loss" in events.Tags()["scalars"]
        result = json.loads((out / optimizer / "result.json").read_text())
        assert 0 < result["accuracy"] <= 1 and 0 < result["optimizer_ms"] < result["step_ms"]
    assert result["state_bytes_per_parameter"] == pytest.approx(8, rel=0.01)  # AdamW: two moments in float32
    metrics = load_metrics(out / "HinaAdaptive")
    layer = "encoder.base_model.model.encoder.layer.5"
    for name in (f"lr_mask/{layer}/mean", f"importance/{layer}", "lr_eff/decay", "mem/used_gb", "tuning/loss"):
        assert len(metrics[name].steps) >= 3
    assert not list(out.rglob("*.part")) and not (out / "encoded.pt").exists()


@pytest.mark.slow
def test_memory(whole: tuple[Path, str, int]) -> None:
    snippets = demo_task.CLASSES * sum(demo_task.SIZES.values())
    states = snippets * (demo_files.SNIPPET_TOKENS + 2) * 384 * 4
    assert whole[2] + 2 * states < 4e9  # as large as they are without --snippets, and once more while they are joined


@pytest.mark.slow
def test_finished_run_is_shown_again_at_once(whole: tuple[Path, str, int]) -> None:
    out, printed, _ = whole
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    process = start(out)
    again, _ = process.communicate(timeout=60)  # a run takes longer; of this, importing torch is nearly all
    assert process.returncode == 0
    table = (out / "table.txt").read_text()
    assert "is finished" in again and table in again and table in printed
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}


@pytest.mark.slow
def test_killed_and_interrupted_runs_end_at_the_same_weights(whole: tuple[Path, str, int], tmp_path: Path) -> None:
    expected, out = whole[0], tmp_path / "broken"
    status, _ = stop_after(out, "HinaAdaptive", 10, signal.SIGKILL)
    assert status == -signal.SIGKILL
    (out / "HinaAdaptive" / "last.part").write_bytes(b"half of a checkp")  # as a kill in the middle of a save leaves it
    status, errors = stop_after(out, "HinaAdaptive", 20, signal.SIGINT)
    assert status == 130 and "go on from the last checkpoint" in errors and "Traceback" not in errors
    assert not (out / "table.txt").exists()
    stop_after(out, "AdamW", 10, signal.SIGKILL)
    process = start(out)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "goes on after step" in printed and "HinaAdaptive:" not in printed  # the first of the two had ended

    for optimizer in ("HinaAdaptive", "AdamW"):
        one, two = (torch.load(f / optimizer / "last.ckpt", weights_only=True) for f in (expected, out))
        assert one["global_step"] == two["global_step"] == 40
        assert one["state_dict"].keys() == two["state_dict"].keys() and len(one["state_dict"]) > 10
        assert all(torch.equal(x, two["state_dict"][name]) for name, x in one["state_dict"].items())
        for parameter, state in one["optimizer_states"][0]["state"].items():
            other = two["optimizer_states"][0]["state"][parameter]
            assert all(torch.equal(x, other[name]) for name, x in state.items() if isinstance(x, torch.Tensor))
        results = [json.loads((f / optimizer / "result.json").read_text()) for f in (expected, out)]
        assert results[0]["loss"] == results[1]["loss"]
        logged = [load_metrics(f / optimizer) for f in (expected, out)]
        for name in ("train/loss", "tuning/loss", "test/loss"):
            assert logged[0][name] == logged[1][name], name


@pytest.mark.slow
def test_damaged_checkpoint_is_not_gone_on_from(
    whole: tuple[Path, str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "last.ckpt"
    assert demo_model.read_checkpoint(path) is None
    shutil.copy(whole[0] / "AdamW" / "last.ckpt", path)
    assert demo_model.read_checkpoint(path) == 40
    path.write_bytes(path.read_bytes()[:20000])
    assert demo_model.read_checkpoint(path) is None
    assert "cannot be read" in capsys.readouterr().out


def test_another_configuration_has_another_folder(
    whole: tuple[Path, str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "demo"
    args = argparse.Namespace(model=demo_files.packaged_model(), steps=30, seed=0, snippets=1.0, layers=1)
    config = demo_files.configuration(args)
    assert demo_files.folder_for(base, config, fresh=False) == base
    (base / "table.txt").write_text("of the first run")
    assert demo_files.folder_for(base, config, fresh=False) == base
    assert capsys.readouterr().out == ""
    args.steps = 40
    changed = demo_files.configuration(args)
    other = demo_files.folder_for(base, changed, fresh=False)
    assert other != base and not (other / "table.txt").exists() and (base / "table.txt").exists()
    assert "another steps" in capsys.readouterr().out
    assert demo_files.folder_for(base, changed, fresh=False) == other  # found again: it can be resumed
    assert demo_files.folder_for(base, changed, fresh=True) == base
    assert not (base / "table.txt").exists()


def test_fresh_removes_runs_of_the_demo_only(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(demo_files.DemoError, match="not a run of the demo"):
        demo_files.folder_for(tmp_path, {"steps": 1}, fresh=True)
    assert (tmp_path / "thesis.tex").exists()


def test_model_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    process = start(tmp_path / "out", "--model", str(tmp_path / "model"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "MODEL=" in errors and str(tmp_path / "model") in errors and "Traceback" not in errors


def test_splits_share_no_file_and_no_snippet() -> None:
    _, tokenizer = demo_task.load_encoder(demo_files.packaged_model())
    packages, splits = demo_task.snippets(tokenizer, 0.2)
    assert len(packages) >= 8
    for split in splits.values():
        assert torch.bincount(split.labels, minlength=len(packages)).min() >= 2
    stdlib = Path(os.__file__).parent
    for name in packages:
        train, tuning, test = (set(files) for files in demo_task._deal(stdlib / name))
        assert train and tuning and test and not train & tuning and not train & test and not tuning & test


@pytest.mark.parametrize("kind", ["bert", "modernbert", "mpnet", "deberta-v2"])
def test_replayed_layers_change_nothing(kind: str) -> None:
    """A model whose frozen layers are replaced by what they gave does what the whole model does.

    They differ in what a layer returns (the states alone, a tuple of one or of two) and in what the model reads off it.
    """
    from transformers import AutoConfig, AutoModel

    size = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 48}
    tokens = dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"), 1)
    encoder = AutoModel.from_config(AutoConfig.for_model(kind, vocab_size=100, **size, **tokens)).eval()
    ids = torch.randint(5, 100, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    with torch.no_grad():
        expected = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    tail = copy.deepcopy(encoder)
    split = demo_task.Split(ids, mask, torch.zeros(4, dtype=torch.long))
    encoded, outputs = demo_task.encode(encoder, {"train": split}, 2, lambda done, total: None)
    last = demo_task.replay(tail, 2, outputs)
    assert last is not None and len([m for m in tail.modules() if isinstance(m, demo_task.StandIn)]) == 2
    last.states = encoded["train"].states
    with torch.no_grad():
        torch.testing.assert_close(tail(input_ids=ids, attention_mask=mask).last_hidden_state, expected)


def test_batches_go_on_where_they_were() -> None:
    split = demo_task.Split(torch.arange(50)[:, None], torch.ones(50, 1), torch.arange(50))
    whole = [batch["labels"].tolist() for batch in demo_model.Batches(split, 8, 20, 0, 0)]
    assert [batch["labels"].tolist() for batch in demo_model.Batches(split, 8, 20, 0, 13)] == whole[13:]
    assert len({tuple(batch) for batch in whole}) == 20
    assert len({label for batch in whole[:6] for label in batch}) == 48  # no snippet twice in one pass
