"""What the inspection methods say: right beside plain loops, before the first step, after a load, without effects."""

import copy
import io
import json
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hina_optim import HinaAdaptive, create_optimizer
from hina_optim.engine.layout import Layout
from hina_optim.optimizers.statistics import resolution

LOW, HIGH = 1e-7, 1e-3
METHODS = (
    "get_optimization_info",
    "get_memory_stats",
    "get_importance_analysis",
    "get_relationship_summary",
    "get_lr_mask_analysis",
    "get_effective_lrs",
    "get_avg_learning_rate",
    "get_learning_rates",
    "lr_mask_statistics",
    "importance_statistics",
    "export_importance",
)


class Adapter(nn.Module):
    """A LoRA pair with peft's names, beside a plain layer."""

    def __init__(self):
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(6, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 5, bias=False)})
        self.head = nn.Linear(5, 5)

    def forward(self, x):
        return self.head(self.lora_B["default"](self.lora_A["default"](x)))


def build(**arguments):
    torch.manual_seed(0)
    model = Adapter()
    arguments = {"lr": 1e-4, "relationship_discovery_interval": 2, "warmup_steps": 10, **arguments}
    groups = [
        {"params": [(n, p) for n, p in model.named_parameters() if "lora" in n], "name": "lora"},
        {"params": [(n, p) for n, p in model.named_parameters() if "lora" not in n], "lr": arguments["lr"] * 2},
    ]
    return model, HinaAdaptive(groups, **arguments)


def train(model, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 6, generator=generator)).square().mean().backward()
        optimizer.step()


def plain(x):
    """Tensors as numbers, so that results can be compared."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    return x.item() if isinstance(x, torch.Tensor) else x


def everything(optimizer):
    return {name: plain(getattr(optimizer, name)()) for name in METHODS}


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 3])
def test_promised_keys(steps):
    model, optimizer = build()
    train(model, optimizer, steps)
    info = optimizer.get_optimization_info()
    assert {
        "optimizer_type", "version", "total_params", "features", "adaptation_config", "lr_mask_config",
        "memory_optimization", "edge_overfitting_control", "current_memory_pressure", "training_stats",
    } <= set(info)  # fmt: skip
    assert set(info["memory_optimization"]) >= {
        "memory_efficient", "vram_budget_gb", "cpu_offload_states", "reduce_precision", "adaptive_features",
        "emergency_simplify",
    }  # fmt: skip
    assert set(info["training_stats"]) >= {"global_step", "total_relationships", "avg_importance_score"}
    assert info["training_stats"]["global_step"] == steps
    assert info["optimizer_type"] == "HinaAdaptive"
    assert info["total_params"] == 4
    assert info["total_elements"] == 12 + 10 + 30
    assert all(type(on) is bool for on in info["features"].values())

    memory = optimizer.get_memory_stats()
    assert set(memory) >= {"memory_pressure", "buffer_pool_stats", "state_bytes"}
    assert set(memory["buffer_pool_stats"]) >= {"current_memory_mb", "max_memory_mb"}
    assert ("cuda_memory" in memory) is False

    importance = optimizer.get_importance_analysis()
    assert set(importance) >= {
        "total_parameters", "importance_statistics", "high_importance_params", "low_importance_params",
    }  # fmt: skip
    assert set(importance["importance_statistics"]) == {"mean", "max", "min", "std"}

    assert set(optimizer.get_relationship_summary()) == {"total_relationships", "relationships"}

    mask = optimizer.get_lr_mask_analysis()
    assert set(mask) == {
        "lr_mask_enabled", "configuration", "parameter_analysis", "global_statistics", "training_phase",
    }  # fmt: skip
    assert set(mask["training_phase"]) == {"current_step", "in_warmup", "warmup_progress"}

    wanted = {f"lr_eff/{g}" for g in ("lora", "group1")}
    wanted |= {
        f"lr_mask/{g}/{k}" for g in ("lora", "group1") for k in ("mean", "p05", "p50", "p95", "at_min", "at_max")
    }
    statistics = optimizer.lr_mask_statistics()
    assert wanted <= set(statistics)
    assert ("sign_agree/lora" in statistics) == (steps > 0)
    assert all(x.ndim == 0 for x in statistics.values())
    names = {f"importance/{name}" for name in optimizer.param_names()} if steps else set()
    assert set(optimizer.importance_statistics()) == names


def test_features_follow_the_arguments_and_what_really_runs():
    _, optimizer = build(use_grams=True, use_agr=False, spatial_awareness=True, frequency_penalty=0.0)
    features = optimizer.get_optimization_info()["features"]
    assert features["grams"] and not features["agr"]
    assert not features["cautious"], "Grams leaves nothing for cautious to do"
    assert features["spatial_awareness"] and not features["frequency_penalty"]
    assert not features["low_rank_emphasis"]
    _, optimizer = build(lora_rank_penalty=True, use_lr_mask=False)
    features = optimizer.get_optimization_info()["features"]
    assert features["lora_rank_penalty"] and features["low_rank_emphasis"] and not features["lr_mask"]


def test_a_technique_of_one_group_alone_counts_as_on():
    model = Adapter()
    groups = [{"params": list(model.head.parameters()), "use_grams": True}, {"params": list(model.lora_A.parameters())}]
    assert HinaAdaptive(groups, lr=1e-4).get_optimization_info()["features"]["grams"]


def test_reduce_precision_is_reported_as_what_it_has_become():
    _, optimizer = build()
    assert not optimizer.get_optimization_info()["memory_optimization"]["reduce_precision"]
    optimizer.set_state_precision("bf16")
    options = optimizer.get_optimization_info()["memory_optimization"]
    assert options["reduce_precision"] and options["state_precision"] == "bf16"


# -- before, after, and without effects --------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loaded_optimizer_says_the_same(precision):
    model, optimizer = build(state_precision=precision)
    train(model, optimizer, 5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh, loaded = build(state_precision=precision)
    fresh.load_state_dict(model.state_dict())
    for p, q in zip(fresh.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert everything(loaded) == everything(optimizer)


def test_looking_changes_nothing():
    model, optimizer = build()
    watched_model, watched = build()
    rng = torch.get_rng_state()
    for steps in (0, 1, 4):
        train(model, optimizer, steps, seed=steps)
        train(watched_model, watched, steps, seed=steps)
        before = copy.deepcopy(watched.state_dict())
        everything(watched)
        watched.plan_for_vram(1e-9)
        after = watched.state_dict()
        torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
        assert {**after, "state": None} == {**before, "state": None}
    for p, q in zip(model.parameters(), watched_model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(torch.get_rng_state(), rng)


class Waits(TorchDispatchMode):
    """Records every operation that makes the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.equal,
            torch.ops.aten.masked_select,
            torch.ops.aten.bincount,
        ):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("steps", [0, 3])
def test_statistics_never_wait_for_the_device(steps):
    model, optimizer = build()
    train(model, optimizer, steps)
    with Waits() as waits:
        optimizer.lr_mask_statistics()
        optimizer.importance_statistics()
    assert waits.seen == []
    with Waits() as waits:
        torch.ones(()).item()
    assert waits.seen, "the instrument is blind"


def test_statistics_do_not_change_after_they_were_taken():
    model, optimizer = build()
    train(model, optimizer, 3)
    taken = {**optimizer.lr_mask_statistics(), **optimizer.importance_statistics()}
    numbers = plain(taken)
    train(model, optimizer, 3)
    assert plain(taken) == numbers


# -- rates -------------------------------------------------------------------------------------------------------------


def test_before_the_first_step_every_rate_is_the_groups():
    _, optimizer = build()
    assert optimizer.get_effective_lrs() == pytest.approx({"lora": 1e-4, "group1": 2e-4}, rel=1e-6)
    assert optimizer.get_learning_rates() == pytest.approx([1e-4, 2e-4], rel=1e-6)
    assert optimizer.get_avg_learning_rate() == pytest.approx((22 * 1e-4 + 30 * 2e-4) / 52, rel=1e-6)
    statistics = plain(optimizer.lr_mask_statistics())
    assert statistics["lr_mask/lora/mean"] == pytest.approx(1e-4, rel=1e-6)
    for key in ("p05", "p50", "p95"):
        assert statistics[f"lr_mask/lora/{key}"] == pytest.approx(1e-4, rel=resolution(LOW, HIGH) - 1)
    analysis = optimizer.get_lr_mask_analysis()["parameter_analysis"]
    assert analysis["head.weight"] == pytest.approx({"mean": 2e-4, "min": 2e-4, "max": 2e-4, "std": 0, "elements": 25})


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("adaptation", [True, False])
def test_effective_rates_are_those_that_the_weights_feel(mask, adaptation):
    """A constant gradient and plain Adam make every element move by exactly its own rate."""
    model, optimizer = build(
        use_lr_mask=mask, use_dynamic_adaptation=adaptation, use_adopt_stability=False, use_agr=False, use_tam=False,
        use_cautious=False, use_spd=False, weight_decay=0.0, eps=1e-30,
    )  # fmt: skip
    model.double()
    gradients = [torch.randn_like(p).sign() * (i + 1) for i, p in enumerate(model.parameters())]
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["start_lr"]) * (1.0 if step < 3 else 0.5))
        before = [p.detach().clone() for p in model.parameters()]
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
        moved = {id(p): (p.detach() - b).abs().sum() for p, b in zip(model.parameters(), before, strict=True)}
        felt = [
            float(sum(moved[id(p)] for p in group["params"]) / sum(p.numel() for p in group["params"]))
            for group in optimizer.param_groups
        ]
        assert optimizer.get_learning_rates() == pytest.approx(felt, rel=2e-6), step
    rates = optimizer.get_effective_lrs()
    assert (rates["lora"] != pytest.approx(5e-5, rel=1e-3)) == (mask or adaptation)


def test_mask_statistics_against_plain_numbers():
    model, optimizer = build(lr_bump=3e-5)
    train(model, optimizer, 8)
    statistics = plain(optimizer.lr_mask_statistics())
    analysis = optimizer.get_lr_mask_analysis()
    every = []
    for name, group in zip(("lora", "group1"), optimizer.param_groups, strict=True):
        values = torch.cat([optimizer.state[p]["lr_mask"].reshape(-1) for p in group["params"]]).double()
        every.append(values)
        assert statistics[f"lr_mask/{name}/mean"] == pytest.approx(values.mean().item(), rel=1e-5)
        ordered = values.sort().values
        for key, share in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
            exact = ordered[math.ceil(share * len(ordered)) - 1].item()
            assert statistics[f"lr_mask/{name}/{key}"] == pytest.approx(exact, rel=resolution(LOW, HIGH) - 1 + 1e-4)
    everything_at_once = torch.cat(every)
    pooled = analysis["global_statistics"]
    assert pooled["mean"] == pytest.approx(everything_at_once.mean().item(), rel=1e-5)
    assert pooled["std"] == pytest.approx(everything_at_once.std(correction=0).item(), rel=1e-4)
    assert pooled["min"] == pytest.approx(everything_at_once.min().item())
    assert pooled["max"] == pytest.approx(everything_at_once.max().item())
    assert pooled["elements"] == 52


def test_share_of_elements_at_the_bounds():
    model, optimizer = build(min_lr=9e-5, max_lr=2.1e-4, lr_bump=1e-3, state_precision="bf16")
    gradients = [torch.ones_like(p) for p in model.parameters()]
    for _ in range(2):
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
    statistics = plain(optimizer.lr_mask_statistics())
    assert statistics["lr_mask/lora/at_max"] == 1
    assert statistics["lr_mask/lora/at_min"] == 0
    for p, g in zip(model.parameters(), gradients, strict=True):
        p.grad = -g
    optimizer.step()
    statistics = plain(optimizer.lr_mask_statistics())
    assert statistics["lr_mask/group1/at_max"] == 0
    assert statistics["lr_mask/group1/at_min"] == 1


def test_sign_agreement_before_the_step():
    model, optimizer = build()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.lr_mask_statistics()["sign_agree/lora"] == 1
    lora = optimizer.param_groups[0]["params"]
    lora[0].grad.neg_()
    share = lora[1].numel() / (lora[0].numel() + lora[1].numel())
    assert optimizer.lr_mask_statistics()["sign_agree/lora"].item() == pytest.approx(share)
    optimizer.zero_grad()
    assert "sign_agree/lora" not in optimizer.lr_mask_statistics()


def test_without_masks():
    model, optimizer = build(use_lr_mask=False)
    train(model, optimizer, 2)
    assert set(optimizer.lr_mask_statistics()) == {"lr_eff/lora", "lr_eff/group1"}
    analysis = optimizer.get_lr_mask_analysis()
    assert not analysis["lr_mask_enabled"]
    assert analysis["parameter_analysis"] == analysis["global_statistics"] == {}
    assert not analysis["training_phase"]["in_warmup"]


@pytest.mark.parametrize(
    ("warmup", "step", "expected"), [(10, 5, (True, 0.5)), (4, 5, (False, 1.0)), (0, 1, (False, 1.0))]
)
def test_training_phase(warmup, step, expected):
    model, optimizer = build(warmup_steps=warmup)
    train(model, optimizer, step)
    phase = optimizer.get_lr_mask_analysis()["training_phase"]
    assert phase == {"current_step": step, "in_warmup": expected[0], "warmup_progress": expected[1]}


class Shards(Layout):
    """The layout of several shards in one process: each adds what the others have handed in."""

    sharded = True

    def __init__(self):
        self.handed_in = []
        self.others = []

    def reduce(self, parts, largest=False):
        values = super().reduce(parts)
        self.handed_in.append(values)
        return [a + b for a, b in zip(values, self.others.pop(0), strict=True)] if self.others else values


def test_rates_of_shards_add_up_to_those_of_the_whole():
    whole = nn.Parameter(torch.randn(7, 3))
    parts = [nn.Parameter(whole.detach()[:5].clone()), nn.Parameter(whole.detach()[5:].clone())]
    masks = torch.empty(7, 3).uniform_(-7, -3).exp2() * 1e-3
    optimizers = [HinaAdaptive([p], lr=1e-4) for p in (whole, *parts)]
    for optimizer, mask in zip(optimizers, (masks, masks[:5], masks[5:]), strict=True):
        optimizer.init_state()
        p = optimizer.param_groups[0]["params"][0]
        optimizer.state[p]["lr_mask"].copy_(mask)
        optimizer.state[p]["importance_rate"].fill_(1.5)
    first, second = Shards(), Shards()
    optimizers[1]._layout, optimizers[2]._layout = first, second
    for ask in ("lr_mask_statistics", "get_effective_lrs", "get_avg_learning_rate"):
        getattr(optimizers[1], ask)()
        second.others, first.handed_in = first.handed_in, []
        assert plain(getattr(optimizers[2], ask)()) == pytest.approx(plain(getattr(optimizers[0], ask)()), rel=1e-5)


# -- importance and relationships --------------------------------------------------------------------------------------


def test_the_loudest_parameter_ranks_first_everywhere(tmp_path):
    model, optimizer = build(relationship_discovery_interval=1, importance_decay=0.5)
    torch.manual_seed(3)
    for _ in range(6):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p) * (10.0 if name == "head.weight" else 1.0)
        optimizer.step()
    analysis = optimizer.get_importance_analysis()
    assert analysis["high_importance_params"][0][0] == "head.weight"
    scores = plain(optimizer.importance_statistics())
    assert max(scores, key=scores.get) == "importance/head.weight"
    path = tmp_path / "new" / "importance.json"
    exported = optimizer.export_importance(path)
    assert json.loads(path.read_text(encoding="utf-8")) == exported
    parameters = exported["parameters"]
    assert max(parameters, key=lambda name: parameters[name]["normalized"]) == "head.weight"
    assert sum(x["normalized"] for x in parameters.values()) / 4 == pytest.approx(1)
    assert parameters["head.weight"]["lr_multiplier"] > 1 > parameters["head.bias"]["lr_multiplier"]
    assert exported["step"] == 6
    info = optimizer.get_optimization_info()["training_stats"]
    assert info["avg_importance_score"] == pytest.approx(analysis["importance_statistics"]["mean"])


def test_the_adapter_pair_is_named():
    model, optimizer = build(relationship_discovery_interval=1)
    train(model, optimizer, 3)
    summary = optimizer.get_relationship_summary()
    assert summary["total_relationships"] == len(summary["relationships"]) >= 1
    best = summary["relationships"][0]
    assert set(best["names"]) == {"lora_A.default.weight", "lora_B.default.weight"}
    assert best["interaction_type"] == "adapter_pair"
    assert best["compatibility"] == pytest.approx(1)
    assert [tuple(shape) for shape in best["shapes"]] == [(2, 6), (5, 2)]


def test_nothing_measured_is_said_plainly():
    _, optimizer = build()
    assert optimizer.get_relationship_summary() == {"total_relationships": 0, "relationships": []}
    assert optimizer.get_importance_analysis()["total_parameters"] == 0
    exported = optimizer.export_importance()
    assert exported["parameters"] == exported["rank_pattern"] == {}
    for bad in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="rank"):
            optimizer.export_importance(rank=bad)


def test_adaptation_off_leaves_no_trace():
    model, optimizer = build(use_dynamic_adaptation=False)
    train(model, optimizer, 3)
    assert optimizer.importance_statistics() == {}
    assert optimizer.get_relationship_summary()["relationships"] == []


def test_a_skipped_gradient_is_counted_and_named():
    model, optimizer = build()
    train(model, optimizer, 1)
    assert optimizer.get_optimization_info()["training_stats"]["skipped_nonfinite"] == {}
    for _ in range(2):
        for name, p in model.named_parameters():
            p.grad = torch.full_like(p, math.nan if name == "head.bias" else 1e-3)
        optimizer.step()
    assert optimizer.get_optimization_info()["training_stats"]["skipped_nonfinite"] == {"head.bias": 2}


def test_parameters_without_elements_gradients_or_names():
    params = [nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.ones(3, 2))]
    optimizer = HinaAdaptive(params, lr=1e-4, relationship_discovery_interval=1)
    everything(optimizer)
    for _ in range(2):
        params[1].grad, params[0].grad = torch.tensor(1.0), torch.zeros(0, 3)
        optimizer.step()
    said = everything(optimizer)
    assert set(said["get_lr_mask_analysis"]["parameter_analysis"]) == {"group0.1", "group0.2"}
    assert math.isfinite(said["get_avg_learning_rate"])


def test_rank_pattern_is_what_peft_takes():
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0", "1"]))
    optimizer = create_optimizer(
        "HinaAdaptive", model, lr=1e-4, relationship_discovery_interval=1, importance_decay=0.0
    )
    torch.manual_seed(0)
    for _ in range(3):
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.grad = torch.randn_like(p) * (20 if ".0." in name else 1)
        optimizer.step()
    pattern = optimizer.export_importance(rank=4)["rank_pattern"]
    assert set(pattern) == {"0", "1"}
    assert pattern["0"] > pattern["1"] >= 1
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    again = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0", "1"], rank_pattern=pattern))
    shapes = {name: tuple(p.shape) for name, p in again.named_parameters()}
    assert shapes["base_model.model.0.lora_A.default.weight"] == (pattern["0"], 8)
    assert shapes["base_model.model.1.lora_A.default.weight"] == (pattern["1"], 8)
