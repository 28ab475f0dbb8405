"""Arguments as text: what is read, as what type, and what is refused."""

from __future__ import annotations

import inspect
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hina_optim import HinaAdaptive
from hina_optim.parsing import argument_types, parse_arguments
from hina_optim.profiles import PROFILES, profile_arguments


@dataclass
class Settings:
    """Something that no text can express."""

    lr: float = 1e-3


class Made:
    """One argument of every kind that a constructor here may have."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.8, 0.99, 0.999),
        *,
        steps: int = 500,
        flag: bool = False,
        maybe: bool | None = None,
        ratio: float | None = None,
        target: int | float = 0.9,
        scales: tuple[int, ...] = (1, 5),
        profile: str | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
        choice: Literal["auto"] | float = "auto",
        words: list[str] | None = None,
        pairs: Sequence[tuple[str, float]] = (),
        mapping: Mapping[str, float] | None = None,
        whatever: Any = None,
        config: Settings | None = None,
    ) -> None:
        pass


class Passing(Made):
    """A subclass of a user, with an argument of its own."""

    def __init__(self, params: Any, *, extra: int = 1, **options: Any) -> None:
        super().__init__(params, **options)


def read(*strings: str) -> dict[str, Any]:
    return parse_arguments(Made, strings)


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr=1e-3", {"lr": 1e-3}),
        ("lr=5", {"lr": 5.0}),
        ("lr = .5", {"lr": 0.5}),
        ("--lr=2e-4", {"lr": 2e-4}),
        ("-lr=2e-4,", {"lr": 2e-4}),
        ("'lr=2e-4'", {"lr": 2e-4}),
        ("betas=(0.9,0.99,0.5)", {"betas": (0.9, 0.99, 0.5)}),
        ("betas=[0.9, 0.99, 0.5,]", {"betas": (0.9, 0.99, 0.5)}),
        ("betas=0.9, 0.99, 0.5", {"betas": (0.9, 0.99, 0.5)}),
        ("betas=0.9,0.99,0.5,lr=1", {"betas": (0.9, 0.99, 0.5), "lr": 1.0}),
        ("steps=500", {"steps": 500}),
        ("steps=1e3", {"steps": 1000}),
        ("steps=1_000", {"steps": 1000}),
        ("flag=True", {"flag": True}),
        ("flag=yes", {"flag": True}),
        ("flag=OFF", {"flag": False}),
        ("flag=0", {"flag": False}),
        ("maybe=None", {"maybe": None}),
        ("maybe=1", {"maybe": True}),
        ("ratio=null", {"ratio": None}),
        ("ratio=3", {"ratio": 3.0}),
        ("target=4", {"target": 4}),
        ("target=0.5", {"target": 0.5}),
        ("scales=1,5,20", {"scales": (1, 5, 20)}),
        ("scales=(3,)", {"scales": (3,)}),
        ("scales=7", {"scales": (7,)}),
        ("scales=()", {"scales": ()}),
        ("profile=balanced", {"profile": "balanced"}),
        ("profile='balanced'", {"profile": "balanced"}),
        ('profile="None"', {"profile": "None"}),
        ("profile='a b, lr=3'", {"profile": "a b, lr=3"}),
        ("profile=a/b.c:d-e", {"profile": "a/b.c:d-e"}),
        ("precision=bf16", {"precision": "bf16"}),
        ("precision='bf16'", {"precision": "bf16"}),
        ("choice=auto", {"choice": "auto"}),
        ("choice=2", {"choice": 2.0}),
        ("words=a,b", {"words": ["a", "b"]}),
        ("pairs=(lora,1),(bias,2)", {"pairs": [("lora", 1.0), ("bias", 2.0)]}),
        ("mapping={'a': 1.5}", {"mapping": {"a": 1.5}}),
        ("whatever=(1, 'a')", {"whatever": (1, "a")}),
        ("whatever=word", {"whatever": "word"}),
        ("config=None", {"config": None}),
        ("profile=quality_optimized lr=2e-4", {"profile": "quality_optimized", "lr": 2e-4}),
        ("--profile=balanced --flag=True,  --steps=1000", {"profile": "balanced", "flag": True, "steps": 1000}),
        ("lr=1;flag=no\nsteps=3", {"lr": 1.0, "flag": False, "steps": 3}),
        ("", {}),
        ("  ", {}),
    ],
)
def test_texts_are_read_as_the_annotation_says(text, expected):
    result = read(text)
    assert result == expected
    assert [type(value) for value in result.values()] == [type(value) for value in expected.values()]


def test_strings_add_up_in_order():
    assert list(read("profile=balanced", "lr=1e-4 flag=1", "steps=3")) == ["profile", "lr", "flag", "steps"]


def test_dashes_within_a_name_are_underscores():
    assert parse_arguments(HinaAdaptive, ["--use-tam=no"]) == {"use_tam": False}


def test_arguments_that_a_subclass_passes_on_count():
    assert parse_arguments(Passing, ["extra=3 lr=1"]) == {"extra": 3, "lr": 1.0}
    assert "params" not in argument_types(Passing)
    assert argument_types(Passing)["lr"] is float


def test_functions_and_dataclasses_too():
    def make(params: Any, lr: float, warm: bool = True) -> None: ...

    assert parse_arguments(make, ["lr=1 warm=no"]) == {"lr": 1.0, "warm": False}
    assert parse_arguments(Settings, ["lr=0.5"]) == {"lr": 0.5}


def test_every_argument_of_an_optimizer_takes_its_default_as_text():
    signature = inspect.signature(HinaAdaptive).parameters
    defaults = {name: p.default for name, p in signature.items() if name not in ("self", "params")}
    read_back = parse_arguments(HinaAdaptive, [f"{name}={value!r}" for name, value in defaults.items()])
    assert read_back == defaults
    assert [type(v) for v in read_back.values()] == [
        float if argument_types(HinaAdaptive)[name] is float else type(value) for name, value in defaults.items()
    ]


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr=abc", r"Made: lr='abc' is not valid: lr must be a number"),
        ("lr=", r"lr='' is not valid"),
        ("lr==1", r"'lr==1' is not of the form name=value"),
        ("flag", r"'flag' is not of the form name=value"),
        ("lr=1 flag", r"lr='1 flag' is not valid"),
        ("flag=2", r"flag='2' is not valid: flag must be True or False"),
        ("steps=1.5", r"steps='1.5' is not valid: steps must be an integer"),
        ("steps=1e400", r"steps='1e400' is not valid"),
        ("betas=(0.9,0.99)", r"betas must be \(a number, a number, a number\)"),
        ("betas=(0.9", r"betas='\(0.9' is not valid"),
        ("precision=fp8", r"precision must be one of 'fp32', 'bf16'"),
        ("precision=BF16", r"precision='BF16' is not valid"),
        ("profile=two words", r"profile='two words' is not valid: profile must be a word or None"),
        ("profile=balanced)", r"profile='balanced\)' is not valid"),
        ("mapping=[1]", r"mapping='\[1\]' is not valid"),
        ("lr=__import__('os').getpid()", r"lr="),
        ("whatever=__import__('os').getpid()", r"whatever="),
    ],
)
def test_a_bad_value_names_argument_value_and_rule(text, message):
    with pytest.raises(ValueError, match=message):
        read(text)


def test_the_rules_of_the_class_say_what_it_must_be():
    with pytest.raises(ValueError, match=r"warmup_steps='many' is not valid: warmup_steps must be an integer >= 0\."):
        parse_arguments(HinaAdaptive, ["warmup_steps=many"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stps=1", r"Made: unknown argument 'stps'\. Did you mean 'steps'\?"),
        ("params=1", r"unknown argument 'params'"),
        ("self=1", r"unknown argument 'self'"),
        ("lr=1 lr=2", r"Made: lr is given twice, as 1\.0 and as '2'"),
        ("config=lr", r"Made: config cannot be written as text"),
    ],
)
def test_a_bad_name_is_a_type_error(text, message):
    with pytest.raises(TypeError, match=message):
        read(text)


def test_a_removed_argument_says_what_to_use():
    with pytest.raises(TypeError, match=r"'fourier_feature_loss' was removed\. .*edge_suppression"):
        parse_arguments(HinaAdaptive, ["fourier_feature_loss=True"])


def test_given_twice_in_two_strings():
    with pytest.raises(TypeError, match="lr is given twice"):
        read("lr=1", "--lr=1")


@pytest.mark.parametrize("bad", [None, 3, b"lr=1", {"lr": 1}])
def test_not_a_string(bad):
    with pytest.raises(TypeError, match="is not a string of the form name=value"):
        read(bad)


def test_nothing_is_evaluated(tmp_path):
    target = tmp_path / "made"
    for text in (f"lr=open({str(target)!r},'w')", f"whatever=open({str(target)!r},'w')"):
        with pytest.raises((ValueError, TypeError)):
            read(text)
    assert not target.exists()


# -- any text ----------------------------------------------------------------------------------------------------------

NUMBER = st.floats(allow_nan=False, allow_infinity=False)
WORD = st.text(string.printable, max_size=12)
VALUES = {
    "lr": NUMBER,
    "betas": st.tuples(NUMBER, NUMBER, NUMBER),
    "steps": st.integers(-(10**9), 10**9),
    "flag": st.booleans(),
    "maybe": st.none() | st.booleans(),
    "ratio": st.none() | NUMBER,
    "target": st.integers() | NUMBER,
    "scales": st.lists(st.integers(), max_size=4).map(tuple),
    "profile": st.none() | WORD,
    "precision": st.sampled_from(["fp32", "bf16"]),
    "choice": st.just("auto") | NUMBER,
    "words": st.none() | st.lists(WORD, max_size=3),
    "pairs": st.lists(st.tuples(WORD, NUMBER), max_size=3),
    "mapping": st.none() | st.dictionaries(WORD, NUMBER, max_size=3),
}


@settings(max_examples=150, deadline=None)
@given(st.fixed_dictionaries({}, optional=VALUES), st.sampled_from([" ", ",", ", ", " --", ", --"]), st.booleans())
def test_the_repr_of_a_valid_value_reads_back(values, separator, together):
    strings = [f"{name}={value!r}" for name, value in values.items()]
    result = read(separator.join(strings)) if together else read(*strings)
    assert result == values
    assert [type(v) for v in result.values()] == [type(v) for v in values.values()]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([*VALUES, "config", "whatever"]), st.text(max_size=30) | st.text("()[]{}'\"\\,=-e1. ", max_size=30)
)
def test_any_text_is_read_or_refused_by_name(name, text):
    try:
        result = read(f"{name}={text}")
    except (ValueError, TypeError) as error:
        assert name in str(error) or "unknown argument" in str(error)
    else:
        assert name in result or name == "profile"


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_garbage_is_a_value_or_type_error(text):
    try:
        assert isinstance(read(text), dict)
    except (ValueError, TypeError) as error:
        assert "Made" in str(error)


@pytest.mark.parametrize("text", ["(" * 20000, "[" * 5000 + "]" * 5000, "-" * 9999 + "(", "\x00", "'" + "\\" * 99])
@pytest.mark.parametrize("name", ["lr", "steps", "scales", "profile", "mapping", "whatever"])
def test_monstrous_texts_are_refused(name, text):
    with pytest.raises(ValueError, match=name):
        read(f"{name}={text}")


def test_endless_numbers():
    assert read("lr=" + "9" * 10000) == {"lr": float("inf")}  # the range is the constructor's to check
    with pytest.raises(ValueError, match="steps"):
        read("steps=" + "9" * 10000)


# -- profiles ----------------------------------------------------------------------------------------------------------

#: Written out once more, as the documents of the design have them, but for precision and long momentum of the first.
TABLES = {
    "memory_optimized": dict(
        state_precision="4bit", enable_dual_momentum=False, force_8bit=True, min_8bit_size=1024,
        edge_suppression=False, spatial_awareness=False, background_regularization=False, frequency_penalty=0.0,
        lora_rank_penalty=False, verbose=False,
    ),
    "quality_optimized": dict(
        edge_suppression=True, edge_penalty=0.15, background_regularization=True, spatial_awareness=True,
        lora_rank_penalty=True, frequency_penalty=0.08, rank_penalty_strength=0.02, verbose=True,
    ),
    "balanced": dict(
        state_precision="4bit", factored_image_state=True, min_8bit_size=4096, edge_suppression=True, edge_penalty=0.1,
        background_regularization=True, spatial_awareness=True, lora_rank_penalty=True, frequency_penalty=0.05,
        verbose=True,
    ),
}  # fmt: skip


def test_profiles_have_exactly_these_values():
    assert {name: dict(values) for name, values in PROFILES.items()} == TABLES


def test_profiles_never_set_a_learning_rate():
    assert not any({"lr", "min_lr", "max_lr", "lr_bump", "params"} & set(values) for values in PROFILES.values())


def test_profiles_are_read_only_and_handed_out_as_copies():
    with pytest.raises(TypeError):
        PROFILES["mine"] = {}
    with pytest.raises(TypeError):
        PROFILES["balanced"]["edge_penalty"] = 1.0
    profile_arguments("balanced")["edge_penalty"] = 1.0
    assert profile_arguments("balanced")["edge_penalty"] == 0.1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Balanced", r"no profile named 'Balanced' \(names are case-sensitive\)\. Did you mean 'balanced'\?"),
        ("memory_optimised", r"Did you mean 'memory_optimized'\?"),
        ("balanced,memory_optimized", r"no profile named"),
        (["balanced", "memory_optimized"], r"cannot be combined"),
        (None, r"profile=None is not valid"),
    ],
)
def test_a_wrong_profile_is_an_error(name, message):
    with pytest.raises(ValueError, match=message):
        profile_arguments(name)
