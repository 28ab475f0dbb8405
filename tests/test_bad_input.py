"""Bad input: a clear error that says what, which and what to do, and nothing changed or lost."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hina_optim import HinaAdaptive, create_optimizer
from tests.optim_cases import EVERYTHING, give, named_params

LR = 3e-4
Named = list[tuple[str, nn.Parameter]]


def trained(steps: int = 3, **arguments: Any) -> tuple[Named, HinaAdaptive]:
    named = named_params()
    optimizer = HinaAdaptive(named, **{"lr": LR, **EVERYTHING, **arguments})
    for step in range(steps):
        give(named, step)
        optimizer.step()
    return named, optimizer


def snapshot(named: Named, optimizer: HinaAdaptive) -> Any:
    return copy.deepcopy(([p.detach() for _, p in named], [p.grad for _, p in named], optimizer.state_dict()))


def same(a: Any, b: Any, path: str = "") -> None:
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}.{i}")
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path


@contextlib.contextmanager
def refused(named: Named, optimizer: HinaAdaptive, error: type[Exception], *words: str) -> Iterator[None]:
    """The block raises an error with all these words, and leaves weights, state and groups to the bit as they were."""
    before = snapshot(named, optimizer)
    with pytest.raises(error) as raised:
        yield
    message = str(raised.value)
    for word in words:
        assert word in message, message
    same(snapshot(named, optimizer), before)


# -- arguments -----------------------------------------------------------------------------------------------------

#: One bad value (or more) for every argument with a rule, beyond those of the wrong type.
BAD: dict[str, list[Any]] = {
    "context_window": [3, 0, 4.5],
    "adaptation_rate": [1.1, -0.1, None],
    "min_8bit_size": [-1, 0.5],
    "lr": [-1e-3, math.nan, math.inf],
    "betas": [(0.9,), (1.0, 0.9), (0.9, -0.1), (0.9, math.nan), (0.9, 0.99, 0.999)],
    "eps": [0.0, -1e-8, math.nan],
    "weight_decay": [-0.1, math.inf],
    "spd_lambda": [-1, math.nan],
    "tam_beta": [1.0, -0.1],
    "adaptation_strength": [0, -1.0],
    "relationship_discovery_interval": [0, -1, 1.5],
    "importance_decay": [1.0, -0.5],
    "compatibility_threshold": [1.1, -0.1],
    "warmup_steps": [-1, 0.5],
    "min_lr": [0.0, -1e-7],
    "max_lr": [0.0, math.nan],
    "lr_bump": [-1e-6, math.inf],
    "wd_transition_steps": [0, 1.5],
    "wd_decay_factor": [-0.1, 1.1],
    "wd_min_ratio": [-0.1, 1.1],
    "vram_budget_gb": [0, -1, math.nan],
    "edge_penalty": [-0.1, math.nan],
    "edge_threshold": [0.0, -1],
    "frequency_penalty": [-0.1, 1.1],
    "detail_preservation": [-0.1, math.inf],
    "rank_penalty_strength": [-0.1, math.nan],
    "low_rank_emphasis": [-0.1, math.nan],
    "rank_target": [0, 0.0, 1.0, 1.5, -1, math.nan],
    "rank_interval": [0, 2.5],
    "max_buffer_memory_mb": [0, -5, math.nan],
    "state_precision": ["fp16", "BF16", 8],
    "rounding": ["up", None],
    "seed": [1.5, math.nan],
    "compile": ["yes", 1],
    "state_device": ["cuda", 0, True],
    "anchor_device": ["cuda", 0, True],
}


def test_every_rule_is_tried() -> None:
    flags = {name for name, rule in HinaAdaptive.RULES.items() if rule.text == "True or False"}
    assert set(BAD) | flags == set(HinaAdaptive.RULES)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in HinaAdaptive.RULES for value in [*BAD.get(name, [0, 1, None]), "many"]],
)
def test_a_bad_argument_is_named_with_value_and_rule(name: str, value: Any) -> None:
    """In the constructor and in a group of its own; the text of the rule says what would be right."""
    words = ("HinaAdaptive", f"{name}={value!r}", HinaAdaptive.RULES[name].text)
    with pytest.raises(ValueError) as error:
        HinaAdaptive(named_params(), **{"lr": LR, name: value})
    assert all(word in str(error.value) for word in words), error.value
    with pytest.raises(ValueError) as error:
        HinaAdaptive([{"params": named_params(), name: value}], lr=LR)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("name", ["betas", "eps", "warmup_steps", "use_spd", "state_precision"])
def test_a_bad_option_written_into_a_group(name: str) -> None:
    """Found at the next step, before anything is written."""
    named, optimizer = trained()
    give(named, 3)
    good, optimizer.param_groups[0][name] = optimizer.param_groups[0][name], "many"
    with refused(named, optimizer, ValueError, f"{name}='many'"):
        optimizer.step()
    with refused(named, optimizer, ValueError, f"{name}='many'"):
        optimizer.step()
    optimizer.param_groups[0][name] = good
    optimizer.step()


@pytest.mark.parametrize("value", [-1e-4, math.nan, math.inf])
def test_a_schedule_gone_wrong(value: float) -> None:
    """A negative or undefined learning rate would ruin every weight in one step."""
    named, optimizer = trained()
    give(named, 3)
    optimizer.param_groups[0]["lr"] = value
    before = [p.detach().clone() for _, p in named]
    with pytest.raises(ValueError, match=f"lr={value!r}"):
        optimizer.step()
    same([p.detach() for _, p in named], before)
    optimizer.param_groups[0]["lr"] = LR
    optimizer.step()


@pytest.mark.parametrize("lr", [5e-8, 2e-3])
def test_lr_outside_of_the_mask(lr: float) -> None:
    """An error, not a silent clamp; without the mask there is no such bound."""
    with pytest.raises(ValueError) as error:
        HinaAdaptive(named_params(), lr=lr, min_lr=1e-7, max_lr=1e-3)
    for word in (f"lr={lr}", "min_lr", "max_lr", "use_lr_mask=False"):
        assert word in str(error.value)
    HinaAdaptive(named_params(), lr=lr, use_lr_mask=False)
    with pytest.raises(ValueError, match=r"min_lr=0\.01 is above max_lr=0\.001"):
        HinaAdaptive(named_params(), lr=1e-3, min_lr=1e-2, max_lr=1e-3)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("beta", "betas"), ("warmup_step", "warmup_steps"), ("use_tan", "use_tam"), ("weight_deacy", "weight_decay")],
)
def test_an_unknown_argument_names_the_nearest(given: str, nearest: str) -> None:
    with pytest.raises(TypeError, match=rf"HinaAdaptive: unknown argument '{given}'.*'{nearest}'"):
        HinaAdaptive(named_params(), lr=LR, **{given: 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["fourier_feature_loss", "super_resolution_mode"])
def test_removed_arguments_name_what_to_use(name: str) -> None:
    with pytest.raises(TypeError, match=f"'{name}' was removed.*spatial_awareness=True"):
        HinaAdaptive(named_params(), lr=LR, **{name: True})


def test_typos_in_names() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"HinaAdaptve.*HinaAdaptive"):
        create_optimizer("HinaAdaptve", model, lr=LR)
    with pytest.raises(ValueError, match=r"langage.*language"):
        create_optimizer("HinaAdaptive", model, preset="langage", lr=LR)


# -- parameters ----------------------------------------------------------------------------------------------------


def weight(*shape: int, **options: Any) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, **options))


@pytest.mark.parametrize("params", [[], iter(()), [{"params": []}]], ids=["list", "iterator", "group"])
def test_no_parameters(params: Any) -> None:
    with pytest.raises(ValueError, match=r"HinaAdaptive: .*no parameters"):
        HinaAdaptive(params, lr=LR)


def test_duplicates() -> None:
    p, q = weight(2), weight(3)
    with pytest.raises(ValueError, match=r"parameter w is in group 0 twice.*once"):
        HinaAdaptive([("w", p), ("v", q), ("w", p)], lr=LR)
    with pytest.raises(ValueError, match="twice"):
        HinaAdaptive([p, q, p], lr=LR)
    with pytest.raises(ValueError, match="more than one"):
        HinaAdaptive([{"params": [p]}, {"params": [q, p]}], lr=LR)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: nn.Parameter(torch.randn(2, dtype=torch.complex64)), "complex"),
        (lambda: nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False), "int64"),
        (lambda: nn.Parameter(torch.ones(2, dtype=torch.bool), requires_grad=False), "bool"),
    ],
)
def test_dtypes_that_cannot_be_trained(make: Callable[[], nn.Parameter], word: str) -> None:
    with pytest.raises(ValueError, match=f"HinaAdaptive: odd.*{word}"):
        HinaAdaptive([("fine", weight(2)), ("odd", make())], lr=LR)


def test_what_is_not_a_list_of_parameters() -> None:
    p = weight(2, 3)
    for given in (p, {"params": {p}}, [p * 1], ["weight"], [("w", p), weight(2)]):
        with pytest.raises((TypeError, ValueError)):
            HinaAdaptive([given] if isinstance(given, dict) else given, lr=LR)  # type: ignore[list-item, arg-type]
    with pytest.raises(TypeError, match="iterable"):
        HinaAdaptive(p, lr=LR)
    with pytest.raises(TypeError, match="list"):
        HinaAdaptive([{"params": {p, weight(2)}}], lr=LR)  # the order of a set changes between runs


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (lambda named: {"params": [weight(2), named[0][1]]}, ("more than one",)),
        (lambda named: {"params": [("a", weight(2))] * 2}, ("twice",)),
        (lambda named: {"params": []}, ("no parameters",)),
        (lambda named: {"params": [("a", weight(2))], "lr": -1.0}, ("lr=-1.0",)),
        (lambda named: {"params": [("a", weight(2))], "lr": 0.5}, ("0.5", "max_lr")),
        (lambda named: {"params": [("a", weight(2)), weight(3)]}, ("named",)),
        (lambda named: {"params": [("a", weight(2, dtype=torch.complex64))]}, ("complex",)),
    ],
)
def test_a_bad_group_is_not_added(group: Callable[[Named], dict[str, Any]], words: tuple[str, ...]) -> None:
    named, optimizer = trained(1)
    with refused(named, optimizer, ValueError, *words):
        optimizer.add_param_group(group(named))
    optimizer.add_param_group({"params": [("a", weight(2))], "name": "extra"})
    with refused(named, optimizer, ValueError, "extra", "unique"):
        optimizer.add_param_group({"params": [("b", weight(2))], "name": "extra"})
    give(named, 1)
    optimizer.step()


# -- gradients and parameters at a step ----------------------------------------------------------------------------


def test_a_sparse_gradient_is_named() -> None:
    embedding, linear = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)
    named = [(f"head.{n}", p) for n, p in linear.named_parameters()] + [("table", embedding.weight)]
    optimizer = HinaAdaptive(named, lr=LR)
    for _, p in named:
        p.grad = torch.ones_like(p)
    optimizer.step()
    embedding.weight.grad = None
    linear(embedding(torch.tensor([1, 2]))).sum().backward()
    before = copy.deepcopy(([p.detach() for _, p in named], optimizer.state_dict()))
    with pytest.raises(RuntimeError, match=r"table has a sparse gradient.*sparse=False"):
        optimizer.step()
    same(([p.detach() for _, p in named], optimizer.state_dict()), before)


def test_a_complex_gradient_is_named() -> None:
    """torch refuses one by itself, unless it is told not to."""
    named, optimizer = trained()
    give(named, 3)
    odd = dict(named)["vector"]
    odd.grad = None
    if not hasattr(odd, "grad_dtype"):
        pytest.skip("this torch never lets a complex gradient in")
    odd.grad_dtype = None
    odd.grad = torch.ones(7, dtype=torch.complex64)
    with refused(named, optimizer, RuntimeError, "vector", "complex"):
        optimizer.step()


def test_a_changed_shape_is_named() -> None:
    """Found before anything is written; deleting the state, as the error says, lets the training go on."""
    named, optimizer = trained()
    square = dict(named)["square"]
    give(named, 3)
    square.grad = None
    square.data = torch.randn(3, 4)
    square.grad = torch.randn(3, 4)
    with refused(named, optimizer, RuntimeError, "square", "(3, 4)", "(5, 5)", "delete optimizer.state"):
        optimizer.step()
    del optimizer.state[square]
    optimizer.step()
    assert float(optimizer.state[square]["step"]) == 1


def test_a_gradient_of_the_old_shape_is_named() -> None:
    named, optimizer = trained()
    give(named, 3)
    dict(named)["twin2"].data = torch.randn(2, 2)
    with refused(named, optimizer, RuntimeError, "twin2", "(2, 2)", "(4, 6)", "gradient"):
        optimizer.step()


def test_another_device_is_named() -> None:
    """The model was moved, the state was not; once it is back (or the state loaded again), training goes on."""
    named, optimizer = trained()
    give(named, 3)
    group = optimizer.param_groups[0]
    home = list(group["params"])
    at = [name for name, _ in named].index("conv2d")
    moved = nn.Parameter(torch.empty(home[at].shape, device="meta"))
    moved.grad = torch.empty_like(moved)
    weights = [p.detach().clone() for p in home]
    group["params"][at] = moved
    optimizer.state[moved] = optimizer.state.pop(home[at])
    with pytest.raises(RuntimeError, match=r"conv2d is on meta, but its state .* is on cpu"):
        optimizer.step()
    same([p.detach() for p in home], weights)
    optimizer.state[home[at]] = optimizer.state.pop(moved)
    group["params"][at] = home[at]
    optimizer.step()
    _, expected = trained(4)
    theirs = expected.state_dict()["state"]
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(value, theirs[index][key], rtol=1e-5, atol=1e-6, msg=key)


# -- checkpoints ---------------------------------------------------------------------------------------------------


def damaged(saved: dict[str, Any], how: str) -> dict[str, Any]:
    """A state dict with one thing wrong."""
    saved = copy.deepcopy(saved)
    state, groups, about = saved["state"], saved["param_groups"], saved["hina"]
    if how.startswith("no "):
        del saved[how[3:]]
    elif how == "entry lacks a tensor":
        del state[2]["exp_avg"]
    elif how == "entry lacks its step":
        del state[2]["step"]
    elif how == "entry missing":
        del state[2]
    elif how == "entry is not a dict":
        state[2] = [1.0]
    elif how == "unknown tensor":
        state[2]["momentum_buffer"] = torch.zeros(7)
    elif how == "unknown parameter":
        state[99] = state[2]
    elif how == "shape":
        state[2]["exp_avg"] = torch.zeros(3)
    elif how == "groups missing":
        groups.clear()
    elif how == "group without params":
        del groups[0]["params"]
    elif how == "parameters missing in group":
        groups[0]["params"] = groups[0]["params"][:-1]
    elif how == "bad option":
        groups[0]["betas"] = (0.9, 1.5)
    elif how == "newer":
        about["version"] = 99
    elif how == "other optimizer":
        about["optimizer"] = "CameAMP"
    elif how == "other names":
        about["names"][3] = "decoder.weight"
    else:
        about["shapes"][2] = [8]
    return saved


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no state", ("state", "truncated")),
        ("no param_groups", ("param_groups", "truncated")),
        ("entry lacks a tensor", ("vector", "exp_avg", "truncated")),
        ("entry lacks its step", ("vector", "step", "truncated")),
        ("entry missing", ("13", "14", "truncated")),
        ("entry is not a dict", ("vector", "truncated")),
        ("unknown tensor", ("vector", "momentum_buffer", "another optimizer")),
        ("unknown parameter", ("99",)),
        ("shape", ("vector", "(3,)", "(7,)")),
        ("groups missing", ("truncated",)),
        ("group without params", ("params", "truncated")),
        ("parameters missing in group", ("13", "14", "truncated")),
        ("bad option", ("betas=(0.9, 1.5)",)),
        ("newer", ("version 99",)),
        ("other optimizer", ("CameAMP",)),
        ("other names", ("decoder.weight", "empty", "another model")),
        ("other shapes", ("vector", "(8,)", "another model")),
    ],
)
def test_a_damaged_checkpoint_changes_nothing(how: str, words: tuple[str, ...]) -> None:
    _, source = trained(4)
    named, optimizer = trained(2)
    with refused(named, optimizer, ValueError, "HinaAdaptive", *words):
        optimizer.load_state_dict(damaged(source.state_dict(), how))
    give(named, 2)
    optimizer.step()
    other_named, other = trained(3)
    same(snapshot(named, optimizer), snapshot(other_named, other))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_a_checkpoint_of_another_optimizer(kind: type[torch.optim.Optimizer]) -> None:
    named, optimizer = trained(2)
    other = named_params()
    theirs = kind(other, lr=1e-3)  # type: ignore[call-arg]
    give(other, 0)
    other[3][1].grad = None  # Adafactor does not take empty ones
    theirs.step()
    with refused(named, optimizer, ValueError, "another optimizer"):
        optimizer.load_state_dict(theirs.state_dict())


def test_a_checkpoint_of_another_model() -> None:
    named, optimizer = trained(2)
    for other in (named_params()[:-1], [*named_params(), ("more", weight(2))]):
        source = HinaAdaptive(other, lr=LR, **EVERYTHING)
        for _, p in other:
            p.grad = torch.ones_like(p)
        source.step()
        with refused(named, optimizer, ValueError, "another model"):
            optimizer.load_state_dict(source.state_dict())
    # and without names: by count, then by shapes
    unnamed = HinaAdaptive([weight(2), weight(3)], lr=LR)
    for params, words in (([weight(2)], ("[1]", "[2]")), ([weight(3), weight(2)], ("(2,)", "(3,)"))):
        with pytest.raises(ValueError) as error:
            unnamed.load_state_dict(HinaAdaptive(params, lr=LR).state_dict())
        assert all(word in str(error.value) for word in words), error.value
    # without what a checkpoint says of itself (torch.distributed.checkpoint keeps only state and groups) too
    with refused(named, optimizer, ValueError, "vector", "(9, 4)", "(7,)"):
        saved = trained(2)[1].state_dict()
        del saved["hina"]
        saved["state"][2], saved["state"][4] = saved["state"][4], saved["state"][2]
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_file_cut_off(share: float) -> None:
    """torch's own error; what was there before is still there."""
    named, optimizer = trained(2)
    file = io.BytesIO()
    torch.save(trained(3)[1].state_dict(), file)
    cut = file.getvalue()[: int(share * len(file.getvalue()))]
    before = snapshot(named, optimizer)
    with pytest.raises((RuntimeError, EOFError, ValueError)):
        optimizer.load_state_dict(torch.load(io.BytesIO(cut), weights_only=True))
    same(snapshot(named, optimizer), before)


def test_an_empty_entry_is_no_state() -> None:
    """Looking at ``optimizer.state[p]`` of a parameter that has none makes an empty entry; it saves and loads."""
    p, q = weight(2), weight(3)
    optimizer = HinaAdaptive([("p", p), ("q", q)], lr=LR)
    p.grad = torch.ones(2)
    assert optimizer.state[q] == {}
    optimizer.step()
    other = HinaAdaptive([("p", weight(2)), ("q", weight(3))], lr=LR)
    other.load_state_dict(optimizer.state_dict())
    assert [float(s["step"]) for s in other.state.values() if s] == [1.0]
