"""Names, presets, and what importing the package does not do."""

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hina_optim
from hina_optim import HinaAdaptive, create_optimizer, get_optimizer_info, list_optimizers, list_presets
from hina_optim.optimizers import ImprovedOptimizerConfig
from hina_optim.parsing import parse_arguments
from hina_optim.presets import PRESETS, Preset
from hina_optim.state.precision import PRECISIONS

ROOT = Path(__file__).resolve().parents[1]
PRESET_IDS = [f"{preset.optimizer}-{preset.name}" for preset in PRESETS]


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))


def train(model, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(3, 6)).square().mean().backward()
        optimizer.step()


# -- names -------------------------------------------------------------------------------------------------------------


NAMES = [
    "AdaptiveHinaAdamW",
    "Automagic_CameAMP",
    "Automagic_CameAMP_8bit",
    "Automagic_CameAMP_COptim",
    "Automagic_CameAMP_COptim8bit",
    "Automagic_CameAMP_Improved",
    "Automagic_CameAMP_Improved_8Bit",
    "HinaAdamWOptimizer",
    "HinaAdaptive",
    "RefactoredAutomagicCameAMP",
]


def test_lists():
    assert list_optimizers() == NAMES
    assert list_optimizers("hina*") == ["HinaAdamWOptimizer", "HinaAdaptive"]
    assert list_optimizers("lora") == NAMES
    assert list_optimizers("8bit") == [name for name in NAMES if name.lower().endswith("8bit")]
    assert list_optimizers("profiles") == ["Automagic_CameAMP_Improved_8Bit"]
    assert list_optimizers("nothing*") == []
    assert list_presets() == sorted({preset.name for preset in PRESETS})
    assert list_presets("hina_adamw") == ["diffusion", "language", "lokr"]


def test_every_optimizer_of_the_package_has_a_record():
    classes = {
        one for one in vars(hina_optim).values() if isinstance(one, type) and issubclass(one, torch.optim.Optimizer)
    }
    assert classes == {get_optimizer_info(name).cls for name in NAMES}


@pytest.mark.parametrize(
    ("name", "spellings"),
    [
        ("HinaAdaptive", "hina_adaptive hinaadaptive HINAADAPTIVE hina-adaptive hina_optim.HinaAdaptive"),
        ("HinaAdamWOptimizer", "HinaAdamW hinaadamw hina_adamw hina_adam_w_optimizer hina_optim.HinaAdamW"),
        ("AdaptiveHinaAdamW", "adaptive_hina_adamw adaptivehinaadamw"),
        ("Automagic_CameAMP", "AutomagicCameAMP automagic_cameamp automagic_came_amp hina_optim.Automagic_CameAMP"),
        ("Automagic_CameAMP_8bit", "Automagic_CameAMP_8Bit AutomagicCameAMP8bit automagic_cameamp_8bit"),
        ("Automagic_CameAMP_Improved", "AutomagicCameAMPImproved automagic_cameamp_improved"),
        ("Automagic_CameAMP_Improved_8Bit", "Automagic_CameAMP_Improved_8bit automagic_cameamp_improved_8bit"),
        ("RefactoredAutomagicCameAMP", "refactored_automagic_came_amp Refactored_Automagic_CameAMP"),
        ("Automagic_CameAMP_COptim", "AutomagicCameAMPCOptim automagic_cameamp_coptim"),
        ("Automagic_CameAMP_COptim8bit", "Automagic_CameAMP_COptim_8bit automagic_cameamp_coptim8bit"),
    ],
)
def test_all_spellings_are_understood(name, spellings):
    assert all(get_optimizer_info(spelling).name == name for spelling in [name, *spellings.split()])


@pytest.mark.parametrize("name", ["HinaAdaptive", "hina_adaptive"])
def test_both_spellings_build_it(name):
    assert type(create_optimizer(name, small_model(), lr=1e-4)) is HinaAdaptive


@pytest.mark.parametrize("name", ["HinaAdaptiv", "hina_adaptve", "HINADAPTIVE"])
def test_a_typo_names_the_nearest(name):
    with pytest.raises(ValueError, match=r"Did you mean 'HinaAdaptive'\?"):
        create_optimizer(name, small_model())


def test_a_name_far_from_all_lists_them():
    with pytest.raises(ValueError, match=r"Known: AdaptiveHinaAdamW, .*HinaAdaptive"):
        get_optimizer_info("sgd")
    with pytest.raises(ValueError, match="no optimizer named 'sgd'"):
        list_presets("sgd")


@pytest.mark.parametrize("name", list_optimizers())
def test_records_are_true(name):
    info = get_optimizer_info(name)
    assert info.cls.__name__ == info.name == name
    assert all(getattr(hina_optim, spelling) is info.cls for spelling in (name, *info.aliases))
    if "8bit" in info.capabilities:  # some hosts treat names that end so in their own way: there is another one
        assert any(not alias.lower().endswith("8bit") for alias in info.aliases)
    assert info.description.endswith(".")
    assert all(re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv) and paper.arxiv in paper.url for paper in info.papers)
    assert set(info.state_precisions) <= set(PRECISIONS)
    assert {preset.name for preset in info.presets} == set(list_presets(name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.name = "other"
    for precision in info.state_precisions:
        model = small_model()
        train(model, create_optimizer(name, model, lr=1e-4, state_precision=precision))
        assert all(p.isfinite().all() for p in model.parameters())


# -- parameters --------------------------------------------------------------------------------------------------------


def test_a_model_gives_its_trainable_parameters_by_name():
    model = small_model()
    model[0].weight.requires_grad_(False)
    optimizer = create_optimizer("HinaAdaptive", model, lr=1e-4)
    assert optimizer.param_names() == ["0.bias", "2.weight", "2.bias"]


def test_tied_weights_are_one_parameter():
    model = small_model()
    model[2].weight = nn.Parameter(model[0].weight.detach().T.contiguous())
    model.add_module("tied", nn.Linear(6, 5))
    model.tied.weight = model[0].weight
    optimizer = create_optimizer("HinaAdaptive", model, lr=1e-4)
    assert "tied.weight" not in optimizer.param_names()
    assert len(optimizer.param_names()) == len(list(model.parameters()))


def test_a_frozen_model_is_an_error():
    with pytest.raises(ValueError, match="Sequential has no parameter that requires grad"):
        create_optimizer("HinaAdaptive", small_model().requires_grad_(False))


def test_an_empty_iterable_is_an_error():
    with pytest.raises(ValueError, match="no parameters"):
        create_optimizer("HinaAdaptive", iter([]))


def test_parameters_groups_and_named_parameters():
    model = small_model()
    assert len(create_optimizer("HinaAdaptive", model.parameters(), lr=1e-4).param_groups[0]["params"]) == 4
    named = create_optimizer("HinaAdaptive", model.named_parameters(), lr=1e-4)
    assert named.param_names() == [name for name, _ in model.named_parameters()]
    groups = [{"params": model[0].parameters(), "lr": 3e-4}, {"params": model[2].parameters()}]
    grouped = create_optimizer("HinaAdaptive", groups, preset="language", lr=1e-4)
    assert [group["lr"] for group in grouped.param_groups] == [3e-4, 1e-4]
    assert all(group["lora_rank_penalty"] for group in grouped.param_groups)


# -- arguments and presets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS, ids=PRESET_IDS)
def test_presets_do_what_they_say_and_never_touch_lr(preset):
    model = small_model()
    optimizer = create_optimizer(preset.optimizer, model, preset=preset.name, lr=2.5e-4)
    group = optimizer.param_groups[0]
    assert group["lr"] == 2.5e-4
    assert {name: group[name] for name in preset.arguments} == dict(preset.arguments)
    train(model, optimizer)
    assert all(p.isfinite().all() for p in model.parameters())
    default_lr = inspect.signature(get_optimizer_info(preset.optimizer).cls).parameters["lr"].default
    untouched = create_optimizer(preset.optimizer, small_model(), preset=preset.name)
    assert untouched.param_groups[0]["lr"] == default_lr


@pytest.mark.parametrize("preset", PRESETS, ids=PRESET_IDS)
def test_explicit_arguments_override_every_preset_value(preset):
    defaults = inspect.signature(get_optimizer_info(preset.optimizer).cls).parameters
    for name in preset.arguments:
        default = "fp32" if name == "state_precision" else defaults[name].default
        optimizer = create_optimizer(preset.optimizer, small_model(), preset=preset.name, **{"lr": 1e-4, name: default})
        assert optimizer.param_groups[0][name] == default


def test_only_image_presets_look_for_edges_and_neighborhoods():
    looking = {"edge_suppression", "spatial_awareness", "background_regularization"}
    for preset in PRESETS:
        on = {name for name in looking if preset.arguments.get(name, False)}
        assert bool(on) == preset.name.startswith("image"), preset.name


def test_presets_are_unique_frozen_and_described():
    assert len({(preset.optimizer, preset.name) for preset in PRESETS}) == len(PRESETS)
    assert all(preset.purpose and "\n" not in preset.purpose for preset in PRESETS)
    with pytest.raises(TypeError):
        PRESETS[0].arguments["lr"] = 1.0
    source = {"warmup_steps": 5}
    preset = Preset("x", "HinaAdaptive", "test", source)
    source["warmup_steps"] = 6
    assert preset.arguments["warmup_steps"] == 5


@pytest.mark.parametrize("name", ["lr", "params"])
def test_a_preset_with_lr_cannot_be_made(name):
    with pytest.raises(ValueError, match=f"sets {name}"):
        Preset("x", "HinaAdaptive", "test", {name: 1})


def test_a_typo_in_a_preset_names_the_nearest():
    with pytest.raises(ValueError, match=r"no preset named 'langauge'. Did you mean 'language'\?"):
        create_optimizer("HinaAdaptive", small_model(), preset="langauge")
    with pytest.raises(ValueError, match="Known: full_finetune"):
        create_optimizer("HinaAdaptive", small_model(), preset="zzz")


def test_argument_errors_come_from_the_class():
    model = small_model()
    with pytest.raises(TypeError, match=r"HinaAdaptive: unknown argument 'warmup_step'. Did you mean 'warmup_steps'\?"):
        create_optimizer("HinaAdaptive", model, warmup_step=3)
    with pytest.raises(TypeError, match="'fourier_feature_loss' was removed"):
        create_optimizer("HinaAdaptive", model, fourier_feature_loss=True)
    with pytest.raises(ValueError, match=r"lr=-1\.0 is not valid"):
        create_optimizer("HinaAdaptive", model, lr=-1.0)


# -- text, mappings, configurations ------------------------------------------------------------------------------------


def test_text_is_typed_by_the_class():
    optimizer = create_optimizer(
        "HinaAdamW", small_model(), "lr=1e-3", "use_alora=True", "betas=(0.9,0.99)", "--wd-transition-steps=1e3 seed=3"
    )
    group = optimizer.param_groups[0]
    assert (group["lr"], group["use_alora"], group["betas"]) == (1e-3, True, (0.9, 0.99))
    assert (group["wd_transition_steps"], group["seed"]) == (1000, 3)


def test_text_mappings_and_keywords_add_up_over_a_preset():
    optimizer = create_optimizer(
        "HinaAdaptive", small_model(), "lr=1e-4", {"warmup_steps": 7}, "preset=language", seed=3
    )
    group = optimizer.param_groups[0]
    assert (group["lr"], group["warmup_steps"], group["seed"], group["lora_rank_penalty"]) == (1e-4, 7, 3, True)


def test_any_optimizer_takes_of_a_profile_what_it_has():
    optimizer = create_optimizer(
        "HinaAdamW", small_model(), "lr=1e-3", "use_alora=True", "betas=(0.9,0.99)", "profile=balanced"
    )
    group = optimizer.param_groups[0]
    assert (group["lr"], group["verbose"], group["min_8bit_size"]) == (1e-3, True, 4096)
    group = create_optimizer("HinaAdaptive", small_model(), "profile=quality_optimized", edge_penalty=0.3).param_groups[
        0
    ]
    assert (group["lr"], group["edge_penalty"], group["frequency_penalty"], group["verbose"]) == (1e-3, 0.3, 0.08, True)
    assert create_optimizer("HinaAdaptive", small_model(), profile=None).param_groups[0]["verbose"] is False


def test_a_wrong_profile_names_the_nearest():
    with pytest.raises(ValueError, match=r"no profile named 'balancd'.* Did you mean 'balanced'\?"):
        create_optimizer("HinaAdamW", small_model(), "profile=balancd")


@pytest.mark.parametrize("name", ["HinaAdaptive", "Automagic_CameAMP_Improved_8Bit"])
def test_preset_and_profile_together_are_an_error(name):
    with pytest.raises(ValueError, match=r"preset='image' and profile='balanced' are both given; choose one"):
        create_optimizer(name, small_model(), "profile=balanced preset=image", lr=1e-4)


@pytest.mark.parametrize(
    ("given", "keywords"),
    [
        (["lr=1e-4"], {"lr": 1e-4}),
        (["lr=1e-4", {"lr": 1e-4}], {}),
        ([{"seed": 1}], {"seed": 1, "lr": 1e-4}),
        (["preset=language"], {"preset": "language", "lr": 1e-4}),
        (["lr=1e-4 lr=1e-4"], {}),
    ],
)
def test_given_twice_is_an_error(given, keywords):
    with pytest.raises(TypeError, match=r"HinaAdaptive: (lr|seed|preset) is given twice"):
        create_optimizer("HinaAdaptive", small_model(), *given, **keywords)


def test_a_configuration_object():
    config = ImprovedOptimizerConfig(lr=1e-4, edge_penalty=0.15)
    for optimizer in (
        create_optimizer("Automagic_CameAMP_Improved", small_model(), config, "edge_threshold=0.5"),
        create_optimizer("Automagic_CameAMP_Improved", small_model(), config=config, edge_threshold=0.5),
    ):
        group = optimizer.param_groups[0]
        assert (group["lr"], group["edge_penalty"], group["edge_threshold"]) == (1e-4, 0.15, 0.5)


@pytest.mark.parametrize("bad", [3, None, ["lr=1e-4"], ImprovedOptimizerConfig])
def test_something_else_is_an_error(bad):
    with pytest.raises(TypeError, match=r"HinaAdaptive: .* is neither text of the form name=value"):
        create_optimizer("HinaAdaptive", small_model(), bad)


def test_a_configuration_of_another_class_is_an_error():
    with pytest.raises(TypeError, match="config"):
        create_optimizer("HinaAdaptive", small_model(), ImprovedOptimizerConfig(lr=1e-4))


def test_a_bare_preset_says_how():
    with pytest.raises(ValueError, match=r"'language' is not of the form name=value; a preset is preset=language"):
        create_optimizer("HinaAdaptive", small_model(), "language")


def test_errors_of_text_name_class_and_argument():
    with pytest.raises(TypeError, match=r"HinaAdaptive: unknown argument 'use_tan'. Did you mean 'use_tam'\?"):
        create_optimizer("HinaAdaptive", small_model(), "use_tan=True")
    with pytest.raises(ValueError, match=r"HinaAdaptive: lr='fast' is not valid: lr must be a finite number >= 0"):
        create_optimizer("HinaAdaptive", small_model(), "lr=fast")
    with pytest.raises(ValueError, match=r"HinaAdaptive: lr=-1\.0 is not valid"):
        create_optimizer("HinaAdaptive", small_model(), "lr=-1")
    with pytest.raises(ValueError, match=r"profile='balancd' is not valid: .* Did you mean 'balanced'\?"):
        create_optimizer("Automagic_CameAMP_Improved_8Bit", small_model(), "profile=balancd")


@pytest.mark.parametrize("name", list_optimizers())
def test_every_argument_of_every_optimizer_takes_its_default_as_text(name):
    cls = get_optimizer_info(name).cls
    defaults = {
        key: p.default
        for key, p in inspect.signature(cls).parameters.items()
        if key not in ("params", "regularization", "momentum")
    }
    assert parse_arguments(cls, [f"{key}={value!r}" for key, value in defaults.items()]) == defaults


# -- the package -------------------------------------------------------------------------------------------------------


def test_version_is_that_of_the_distribution():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert hina_optim.__version__ == declared[1]


def test_everything_exported_is_there():
    assert all(hasattr(hina_optim, name) for name in hina_optim.__all__)


def test_importing_needs_torch_alone_and_does_nothing():
    code = """
import logging, sys, threading, time, warnings
import torch
def surroundings():
    flags = {n: str(getattr(torch.backends.cudnn, n)) for n in ("enabled", "benchmark", "deterministic", "allow_tf32")}
    flags["matmul"] = torch.get_float32_matmul_precision()
    flags["dtype"] = str(torch.get_default_dtype())
    flags["threads"] = torch.get_num_threads(), torch.get_num_interop_threads()
    flags["python threads"] = threading.active_count()
    flags["root"] = list(logging.getLogger().handlers), logging.getLogger().level
    flags["rng"] = torch.get_rng_state().sum().item()
    flags["grad"] = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
    return flags
before, modules = surroundings(), set(sys.modules)
start = time.perf_counter()
warnings.simplefilter("error")
import hina_optim
seconds = time.perf_counter() - start
assert surroundings() == before, (before, surroundings())
logger = logging.getLogger("hina_optim")
assert not logger.handlers and logger.level == logging.NOTSET
new = {m.split(".")[0] for m in set(sys.modules) - modules}
foreign = {m for m in new if m not in sys.stdlib_module_names} - {"hina_optim", "torch"}
assert not foreign, foreign
heavy = {m for m in set(sys.modules) - modules if m in ("torch._dynamo", "torch._inductor", "torch.distributed.tensor")}
assert not heavy, heavy
assert seconds < 2.0, seconds
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == result.stderr == ""
