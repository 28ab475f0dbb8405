"""The float64 reference of HinaAdaptive against the techniques of its own recipe, and against itself."""

import inspect
import math

import pytest
import torch
from harness import initial_state, related, run_technique

from hina_optim.optimizers.hina_adaptive import HinaAdaptive
from hina_optim.reference import core
from hina_optim.reference.hina_adaptive import DEFAULTS, IGNORED, ReferenceHinaAdaptive
from hina_optim.techniques.base import ParamInfo, PeriodicTechnique

#: Both halves of a LoRA pair, a convolution, a matrix, a vector, a number, and nothing.
SHAPES = [(3, 7), (5, 3), (2, 3, 3, 3), (4, 6), (5,), (), (0, 4)]
PAIRS = [(0, 1)]
INTERVAL = 2

EVERYTHING = {
    "use_orthogonal_grad": True,
    "edge_suppression": True,
    "edge_threshold": 0.2,  # of small tensors no element reaches three times the rms
    "spatial_awareness": True,
    "background_regularization": True,
    "lora_rank_penalty": True,
}
NOTHING = {
    "use_spd": False,
    "use_cautious": False,
    "use_adopt_stability": False,
    "use_agr": False,
    "use_tam": False,
    "use_dynamic_adaptation": False,
    "use_lr_mask": False,
    "dynamic_weight_decay": False,
}


def draw(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights():
    return [draw(shape, i) for i, shape in enumerate(SHAPES)]


def gradients(t):
    # of very different sizes
    return [draw(shape, 100 * t + i) * 10.0 ** (i % 4 - 2) for i, shape in enumerate(SHAPES)]


class Chain:
    """The recipe of one group, run technique by technique on one parameter after the other, in float64."""

    def __init__(self, params, group):
        self.params = [p.clone() for p in params]
        self.anchors = [p.clone() for p in params]
        self.group = {**DEFAULTS, "start_lr": group.get("lr", DEFAULTS["lr"]), **group}
        roles = {0: "lora_a", 1: "lora_b"}
        self.infos = [ParamInfo(tuple(p.shape), roles.get(i), i in roles) for i, p in enumerate(params)]
        self.chains = [HinaAdaptive.recipe(None, self.group, info) for info in self.infos]
        self.chains = [
            [one for one in chain if one.applies(info)] for chain, info in zip(self.chains, self.infos, strict=True)
        ]
        self.states = [
            {
                name: value
                for one in chain
                for name, value in initial_state(one, info, p[None], self.group["start_lr"]).items()
            }
            for chain, info, p in zip(self.chains, self.infos, params, strict=True)
        ]
        self.t = 0

    def step(self, grads):
        if self.t > 0 and (self.t - 1) % INTERVAL == 0:
            self.refresh()
        measuring = self.t % INTERVAL == 0
        self.t += 1
        for i, grad in enumerate(grads):
            lr = torch.tensor(self.group["lr"], dtype=torch.float64)
            values = {"grad": grad[None], "param": self.params[i][None], "lr": lr, "rate": lr}
            values, self.states[i] = run_technique(
                self.chains[i],
                values,
                self.states[i],
                t=self.t,
                info=self.infos[i],
                measuring=measuring,
                start_lr=self.group["start_lr"],
            )
            param = values["param"]
            step = values["rate"] * values.get("scale", 1) * values["update"]
            moved = param - values.get("decay", 0) * param - step
            self.params[i] = (moved - values.get("pull", 0) * (moved - self.anchors[i][None]))[0]

    def refresh(self):
        """Every periodic technique, on every population of state of one size."""
        populations = {}
        for i, chain in enumerate(self.chains):
            for one in chain:
                if isinstance(one, PeriodicTechnique):
                    sizes = tuple(self.states[i][name].shape for name in one.population)
                    populations.setdefault((one.name, sizes), []).append((i, one))
        for members in populations.values():
            places = [i for i, _ in members]
            one = members[0][1]
            other = {0: 1, 1: 0}
            partners = [places.index(other[i]) if other.get(i) in places else -1 for i in places]
            states = {name: torch.cat([self.states[i][name] for i in places]) for name in one.population}
            new = one.refresh(states, [self.infos[i] for i in places], related(torch.tensor(partners)))
            for name, value in new.items():
                for k, i in enumerate(places):
                    self.states[i][name] = value[k : k + 1]


SETTINGS = {
    "defaults": {},
    "everything": EVERYTHING,
    "everything, Adam and Grams": {**EVERYTHING, "use_adopt_stability": False, "use_grams": True},
    "AdamW": NOTHING,
    "ADOPT": {**NOTHING, "use_adopt_stability": True},
    "AGR and TAM": {**NOTHING, "use_agr": True, "use_tam": True},
    "cautious and SPD": {**NOTHING, "use_cautious": True, "use_spd": True, "spd_lambda": 2.0},
    "mask": {**NOTHING, "use_lr_mask": True, "spatial_awareness": True, "warmup_steps": 6},
    "adaptation": {**NOTHING, "use_dynamic_adaptation": True, "importance_decay": 0.5},
    "rank": {**NOTHING, "lora_rank_penalty": True, "rank_target": 2, "rank_penalty_strength": 0.5},
    "decay": {**NOTHING, "dynamic_weight_decay": True, "weight_decay": 0.5, "wd_transition_steps": 3},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_reference_is_the_recipe(name):
    options = {
        "lr": 5e-4,
        "relationship_discovery_interval": INTERVAL,
        "rank_interval": INTERVAL,
        "warmup_steps": 100,
        **SETTINGS[name],
    }
    chain = Chain(weights(), options)
    reference = ReferenceHinaAdaptive(weights(), pairs=PAIRS, **options)
    for t in range(1, 9):
        lr = 5e-4 if t < 6 else 2e-4
        chain.group["lr"] = reference.param_groups[0]["lr"] = lr
        chain.step(gradients(t))
        reference.step(gradients(t))
    for ours, theirs, start in zip(chain.params, reference.params, weights(), strict=True):
        # of what was moved, not of the weights
        torch.testing.assert_close(ours - start, theirs - start, rtol=1e-6, atol=1e-12)
        assert start.numel() == 0 or (theirs - start).abs().max() > 1e-5, "nothing moved"


SWITCHES = [*NOTHING, "use_grams", *(name for name, value in EVERYTHING.items() if value is True)]


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_of_the_reference_does_something(switch):
    # Cautious hides among many others when most elements agree, and orthogonal gradients hide SPD.
    base = NOTHING if switch == "use_cautious" else {**EVERYTHING, "use_orthogonal_grad": False, "use_cautious": False}
    base = {**base, "relationship_discovery_interval": INTERVAL, "rank_interval": INTERVAL, "wd_transition_steps": 1}
    ends = []
    for value in (False, True):
        reference = ReferenceHinaAdaptive(weights(), pairs=PAIRS, **{**base, switch: value})
        for t in range(1, 6):
            reference.step([g + p for g, p in zip(gradients(t), reference.params, strict=True)])
        ends.append(torch.cat([p.flatten() for p in reference.params]))
    assert (ends[0] - ends[1]).abs().max() > 1e-9


def test_defaults_are_those_of_the_optimizer():
    arguments = inspect.signature(HinaAdaptive.__init__).parameters
    theirs = {k: p.default for k, p in arguments.items() if k not in ("self", "params")}
    assert {k: v for k, v in theirs.items() if k not in IGNORED} == DEFAULTS
    assert set(theirs) >= IGNORED
    with pytest.raises(TypeError, match="use_mask"):
        ReferenceHinaAdaptive([torch.ones(2)], use_mask=True)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_reference_with_all_off_is_torch_adamw(weight_decay):
    options = {"lr": 1e-2, "weight_decay": weight_decay, "eps": 1e-6}
    reference = ReferenceHinaAdaptive(weights(), **NOTHING, **options)
    theirs = [p.requires_grad_() for p in weights()]
    optimizer = torch.optim.AdamW(theirs, foreach=False, **options)
    for t in range(1, 20):
        for p, g in zip(theirs, gradients(t), strict=True):
            p.grad = g
        optimizer.step()
        reference.step(gradients(t))
    for ours, p in zip(reference.params, theirs, strict=True):
        torch.testing.assert_close(ours, p.detach(), rtol=1e-12, atol=1e-12)


def test_groups_have_their_own_options_and_start():
    both = ReferenceHinaAdaptive([{"params": weights()[:2], "lr": 1e-4}, {"params": weights()[2:]}], lr=1e-3)
    first = ReferenceHinaAdaptive(weights()[:2], lr=1e-4, use_dynamic_adaptation=False)
    for group in both.param_groups:
        group["use_dynamic_adaptation"] = False
    for t in range(1, 4):
        both.step(gradients(t))
        first.step(gradients(t)[:2])
    assert both.params[0].equal(first.params[0])
    assert both.state[0].lr_mask.max() <= 1e-4 + 3 * 3e-6
    assert both.state[3].lr_mask.max() == 1e-3


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_missing_or_non_finite_gradient_leaves_a_parameter_and_its_clock_alone(bad):
    options = {**EVERYTHING, "use_dynamic_adaptation": False, "warmup_steps": 100, "rank_interval": 100}
    plain = ReferenceHinaAdaptive(weights(), pairs=PAIRS, **options)
    disturbed = ReferenceHinaAdaptive(weights(), pairs=PAIRS, **options)
    for t in range(1, 6):
        plain.step(gradients(t))
        disturbed.step(gradients(t))
        if t in (2, 4):
            grads = gradients(50 + t)
            before = [p.clone() for p in disturbed.params]
            for i in range(len(grads)):
                if bad is None:
                    grads[i] = None
                elif grads[i].numel():
                    grads[i].view(-1)[-1] = bad
            disturbed.step(grads)
            assert all(a.equal(b) for a, b in zip(before, disturbed.params, strict=True))
    for a, b in zip(plain.params[:-1], disturbed.params[:-1], strict=True):
        assert a.equal(b)
    assert disturbed.state[0].seen == (5 if bad is None else 7)
    assert disturbed.state[0].skipped == (0 if bad is None else 2)


def test_what_is_measured_is_in_force_one_step_later():
    reference = ReferenceHinaAdaptive(weights(), pairs=PAIRS, relationship_discovery_interval=3)
    rates = []
    for t in range(1, 7):
        reference.step(gradients(t))
        rates.append([reference.state[i].importance_rate for i in range(3)])
    assert rates[0] == [1.0, 1.0, 1.0], "measured at step 1, not yet in force"
    assert rates[1] != rates[0]
    assert rates[3] == rates[2] == rates[1], "measured again at step 4"
    assert rates[4] != rates[3]
    assert reference.state[0].relation_score == reference.state[1].relation_score == 1.0
    everyone = [s.importance_rate for s in reference.state.values() if s.measurement is not None]
    assert sum(everyone) / len(everyone) == pytest.approx(1.0)


def test_learning_rate_zero_changes_no_weight():
    reference = ReferenceHinaAdaptive(weights(), pairs=PAIRS, **EVERYTHING)
    reference.step(gradients(1))
    reference.step(gradients(2))
    before = [p.clone() for p in reference.params]
    reference.param_groups[0]["lr"] = 0.0
    reference.step(gradients(3))
    assert all(a.equal(b) for a, b in zip(before, reference.params, strict=True))


def test_core_rules_by_hand():
    assert core.adaptive_gradient_regularization(torch.tensor([1.0, -3.0])).tolist() == [0.75, -0.75]
    assert core.orthogonal(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])).tolist() == [5.0, 0.0]
    assert core.cautious(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, -1.0, 0.0, 1.0])).tolist() == [
        2,
        0,
        0,
        8,
    ]
    assert core.grams(torch.tensor([1.0, -2.0]), torch.tensor([-5.0, 0.0])).tolist() == [-1.0, 0.0]
    assert core.torque(torch.tensor([0.0, 2.0]), torch.tensor([0.0, -5.0]), 0.5, 0.5) == (1e-8 + 0.375, -0.25)
    incoming, v = core.adopt(torch.tensor([8.0, -0.5]), torch.tensor([4.0, 4.0]), 17, 0.75, 1e-8)
    assert incoming.tolist() == [2.0, -0.25]
    assert v.tolist() == [19.0, 3.0625]
    assert core.decay_strength(3000, 0.1, 1000, 0.5, 0.1) == pytest.approx(0.025)
    pulled = core.selective_projection_decay(
        torch.tensor([4.0]), torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([1.0]), 0.5
    )
    assert pulled.tolist() == [3.0]  # half of the distance is new, and half of that is taken back
