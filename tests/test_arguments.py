"""Rules of arguments, and the errors that name them."""

import math

import pytest
import torch

from hina_optim import arguments as rule

GOOD = {
    "NON_NEGATIVE": [0, 0.0, 1e-3, 5, torch.tensor(1e-3)],
    "POSITIVE": [1e-9, 3, torch.tensor([2.0])],
    "UNIT": [0, 1, 0.5],
    "BELOW_ONE": [0, 0.999],
    "AT_LEAST_ONE": [1, 1.5, 20],
    "COUNT": [0, 7],
    "INTERVAL": [1, 7],
    "INTEGER": [-3, 0, 7],
    "FLAG": [True, False],
    "OPTIONAL_FLAG": [True, False, None],
    "HOST_OR_NONE": ["cpu", None],
    "BETAS": [(0.9, 0.999), [0.0, 0.5]],
}
BAD = {
    "NON_NEGATIVE": [-1e-9, math.nan, math.inf, "0.1", None, True, torch.tensor([1.0, 2.0]), torch.tensor(math.nan)],
    "POSITIVE": [0, -1, math.nan, math.inf, "1", True],
    "UNIT": [-0.1, 1.1, math.nan, None],
    "BELOW_ONE": [1, -0.1, math.nan],
    "AT_LEAST_ONE": [0.99, math.nan],
    "COUNT": [-1, 1.0, True, "1"],
    "INTERVAL": [0, 1.0, True],
    "INTEGER": [1.0, "1", False],
    "FLAG": [0, 1, None, "True"],
    "OPTIONAL_FLAG": [0, "False"],
    "HOST_OR_NONE": ["cuda", "", True],
    "BETAS": [(0.9,), (0.9, 1.0), (0.9, -0.1), (0.9, math.nan), 0.9, "ab", (0.9, 0.99, 0.999)],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_good_values_pass(name, value):
    rule.check("Owner", "argument", value, getattr(rule, name))


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_values_raise_with_owner_argument_value_and_rule(name, value):
    chosen = getattr(rule, name)
    with pytest.raises(ValueError) as error:
        rule.check("Owner", "argument", value, chosen)
    message = str(error.value)
    assert "Owner" in message
    assert f"argument={value!r}" in message
    assert chosen.text in message


def test_every_rule_is_tested():
    rules = {name for name in vars(rule) if isinstance(getattr(rule, name), rule.Rule)}
    assert rules == set(GOOD) == set(BAD)


def test_one_of_names_the_choices():
    choices = rule.one_of("fp32", "bf16")
    rule.check("Owner", "precision", "bf16", choices)
    for bad in ("fp8", None, 32):
        with pytest.raises(ValueError, match="one of 'fp32', 'bf16'"):
            rule.check("Owner", "precision", bad, choices)


def test_check_all_skips_what_is_not_there_and_finds_what_is_bad():
    rules = {"lr": rule.NON_NEGATIVE, "eps": rule.POSITIVE}
    rule.check_all("Owner", {"lr": 0.1}, rules)
    with pytest.raises(ValueError, match="eps=0"):
        rule.check_all("Owner", {"lr": 0.1, "eps": 0}, rules)


@pytest.mark.parametrize(
    ("word", "nearest"), [("warmup_step", "warmup_steps"), ("use_tan", "use_tam"), ("LR", "lr"), ("Betas", "betas")]
)
def test_nearest_names_the_nearest(word, nearest):
    known = ["lr", "betas", "warmup_steps", "use_tam", "use_agr"]
    assert rule.nearest(word, known) == f"Did you mean {nearest!r}?"


def test_nearest_lists_all_when_none_is_near():
    assert rule.nearest("zzzzzz", ["b", "a"]) == "Known: a, b."


def test_unknown_and_removed_arguments():
    removed = {"old_way": "Use new_way instead."}
    rule.reject_unknown("Owner", ["new_way"], ["new_way"], removed)
    with pytest.raises(TypeError, match=r"Owner: unknown argument 'new_wai'\. Did you mean 'new_way'\?"):
        rule.reject_unknown("Owner", ["new_wai"], ["new_way"], removed)
    with pytest.raises(TypeError, match=r"'old_way' was removed\. Use new_way instead\."):
        rule.reject_unknown("Owner", ["old_way"], ["new_way"], removed)
