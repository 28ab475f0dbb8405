"""Profiles, command lines, and what methods return, as the documents of the original design show them."""

from __future__ import annotations

import ast
import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hina_optim
from hina_optim import (
    AdaptiveHinaAdamW,
    Automagic_CameAMP_Improved_8Bit,
    HinaAdamWOptimizer,
    HinaAdaptive,
    Improved8BitOptimizerConfig,
    create_optimizer,
    get_optimizer_info,
    list_optimizers,
)
from hina_optim.evaluation import analyze_lora_rank, evaluate_background_consistency, evaluate_edge_quality
from hina_optim.profiles import PROFILES
from tests.design_cases import acts, adapted, image_model, learns, train
from tests.design_options import ADAPTIVE_ADAMW, DEFAULTS, HINA_ADAMW, HINA_ADAPTIVE

IMPROVED_8BIT = "Automagic_CameAMP_Improved_8Bit"


class TestProfiles:
    """Three tables, under what is said explicitly."""

    @pytest.mark.parametrize("name", PROFILES)
    def test_values_arrive_and_the_learning_rate_does_not_change(self, name):
        model = image_model()
        optimizer = Automagic_CameAMP_Improved_8Bit(model.parameters(), profile=name, lr=1e-4)
        assert {key: getattr(optimizer.config, key) for key in PROFILES[name]} == dict(PROFILES[name])
        assert {key: optimizer.param_groups[0][key] for key in PROFILES[name]} == dict(PROFILES[name])
        assert optimizer.config.lr == 1e-4
        assert Automagic_CameAMP_Improved_8Bit(image_model().parameters(), profile=name).config.lr == 1e-6
        learns(model, optimizer)

    @pytest.mark.parametrize("name", PROFILES)
    def test_every_value_can_be_overridden(self, name):
        for key, value in PROFILES[name].items():
            other: object = value / 2 + 0.01 if isinstance(value, float) else 2048
            if isinstance(value, (bool, str)):
                other = "bf16" if isinstance(value, str) else not value
            optimizer = Automagic_CameAMP_Improved_8Bit(image_model().parameters(), profile=name, **{key: other})
            assert optimizer.param_groups[0][key] == other

    def test_the_order_is_profile_then_arguments(self):
        optimizer = create_optimizer(
            IMPROVED_8BIT, image_model(), "profile=memory_optimized edge_suppression=True lr=2e-4"
        )
        config = optimizer.config
        assert (config.edge_suppression, config.lr, config.spatial_awareness) == (True, 2e-4, False)

    def test_without_a_profile_all_is_at_its_default(self):
        config = Automagic_CameAMP_Improved_8Bit(image_model().parameters()).config
        for name, value in vars(Improved8BitOptimizerConfig()).items():
            assert getattr(config, name) == ("8bit" if name == "state_precision" else value), name

    def test_the_final_configuration_can_be_read(self):
        optimizer = Automagic_CameAMP_Improved_8Bit(
            image_model().parameters(), profile="balanced", lr=2e-4, verbose=True, edge_penalty=0.12
        )
        config = optimizer.config
        assert f"{config.lr} {config.edge_penalty} {config.edge_suppression}" == "0.0002 0.12 True"

    @pytest.mark.parametrize("bad", ["Balanced", "balancd", "memory", ["balanced", "memory_optimized"]])
    def test_another_name_is_an_error_that_names_the_nearest(self, bad):
        with pytest.raises(ValueError, match=r"balanced|memory_optimized"):
            Automagic_CameAMP_Improved_8Bit(image_model().parameters(), profile=bad)

    def test_memory_falls_and_quality_does_not_stay_behind_by_technique(self):
        """The table of the documents: from least memory to most techniques."""
        sizes, features = [], []
        for name in ("memory_optimized", "balanced", "quality_optimized"):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), nn.Linear(108, 64), nn.GELU(), nn.Linear(64, 8))
            optimizer = Automagic_CameAMP_Improved_8Bit(model.parameters(), profile=name, lr=1e-4)
            train(model, optimizer, 2)
            sizes.append(optimizer.state_bytes())
            features.append(sum(optimizer.get_optimization_info()["features"].values()))
        assert sizes[0] < sizes[1] <= sizes[2]
        assert features[0] < features[1] <= features[2]


class TestCommandLines:
    """Every command line of the documents; ``--optimizer_args`` as the shell hands them over."""

    @pytest.mark.parametrize(
        ("args", "expected"),
        [
            (["profile=memory_optimized"], PROFILES["memory_optimized"]),
            (["profile=quality_optimized"], PROFILES["quality_optimized"]),
            (["profile=balanced"], PROFILES["balanced"]),
            (["profile=quality_optimized", "lr=2e-4"], {**PROFILES["quality_optimized"], "lr": 2e-4}),
            (
                ["profile=balanced", "edge_penalty=0.15", "verbose=True"],
                {**PROFILES["balanced"], "edge_penalty": 0.15, "verbose": True},
            ),
            (
                ["profile=memory_optimized", "lr=3e-4", "warmup_steps=1000", "weight_decay=1e-3"],
                {**PROFILES["memory_optimized"], "lr": 3e-4, "warmup_steps": 1000, "weight_decay": 1e-3},
            ),
            (
                ["lr=1e-4", "edge_suppression=True", "min_8bit_size=2048", "verbose=True"],
                {"lr": 1e-4, "edge_suppression": True, "min_8bit_size": 2048, "verbose": True},
            ),
            (
                ["profile=memory_optimized", "edge_suppression=True", "lr=2e-4"],
                {**PROFILES["memory_optimized"], "edge_suppression": True, "lr": 2e-4},
            ),
            (["profile=memory_optimized", "lr=1e-4"], {**PROFILES["memory_optimized"], "lr": 1e-4}),
            (["profile=quality_optimized", "lr=8e-5"], {**PROFILES["quality_optimized"], "lr": 8e-5}),
            (
                ["profile=balanced", "lr=5e-6", "warmup_steps=100"],
                {**PROFILES["balanced"], "lr": 5e-6, "warmup_steps": 100},
            ),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    @pytest.mark.parametrize("joined", [False, True])
    def test_improved_8bit(self, args, expected, joined):
        model = image_model()
        optimizer = create_optimizer(IMPROVED_8BIT, model, *([" ".join(args)] if joined else args))
        assert {key: optimizer.param_groups[0][key] for key in expected} == dict(expected)
        train(model, optimizer, 2)

    def test_hina_adamw(self):
        model = adapted()
        args = ["use_alora=True", "dynamic_weight_decay=True", "wd_transition_steps=1000"]
        optimizer = create_optimizer("HinaAdamW", model, *args, lr=1e-3)
        group = optimizer.param_groups[0]
        assert (group["use_alora"], group["dynamic_weight_decay"], group["wd_transition_steps"]) == (True, True, 1000)
        learns(model, optimizer)

    @pytest.mark.parametrize("name", list_optimizers())
    def test_as_sd_scripts_builds_it(self, name):
        """A dotted name is imported, texts are literals, and parameters come in groups without names."""
        for spelling in (name, *get_optimizer_info(name).aliases):
            package, _, attribute = f"hina_optim.{spelling}".rpartition(".")
            cls = getattr(importlib.import_module(package), attribute)
            args = ["weight_decay=0.01", "state_precision='bf16'"]
            kwargs = {key: ast.literal_eval(value) for key, value in (arg.split("=") for arg in args)}
            model = adapted()
            parts = {name: p for name, p in model.named_parameters() if p.requires_grad}
            halves = [dict(list(parts.items())[:2]), dict(list(parts.items())[2:])]
            groups = [{"params": half.values(), "lr": lr} for half, lr in zip(halves, (1e-4, 2e-4), strict=True)]
            optimizer = cls(groups, lr=1e-4, **kwargs)
            assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 2e-4]
            assert optimizer.param_groups[0]["weight_decay"] == 0.01
        learns(model, optimizer)


class TestMethodsOfHinaAdaptive:
    """Monitoring and adjusting."""

    def build(self, **extra: Any) -> HinaAdaptive:
        model = image_model()
        optimizer = HinaAdaptive(model.parameters(), **{**HINA_ADAPTIVE["basic"], **extra})
        train(model, optimizer, 3)
        return optimizer

    def test_information(self):
        info = self.build().get_optimization_info()
        assert f"{info['features']} {info['memory_optimization']}"
        assert all(isinstance(on, bool) for on in info["features"].values())
        assert {
            "optimizer_type", "version", "total_params", "features", "adaptation_config", "lr_mask_config",
            "memory_optimization", "edge_overfitting_control", "current_memory_pressure", "training_stats",
        } <= set(info)  # fmt: skip
        assert {
            "memory_efficient", "vram_budget_gb", "cpu_offload_states", "reduce_precision", "adaptive_features",
            "emergency_simplify",
        } <= set(info["memory_optimization"])  # fmt: skip
        assert {"global_step", "total_relationships", "avg_importance_score"} <= set(info["training_stats"])

    def test_memory(self):
        memory_stats = self.build().get_memory_stats()
        pressure = f"{memory_stats['memory_pressure']:.2%}"
        buffers = f"{memory_stats['buffer_pool_stats']['current_memory_mb']:.2f}MB"
        assert pressure.endswith("%") and buffers.endswith("MB")
        assert 0 <= memory_stats["memory_pressure"] < 1
        assert memory_stats["buffer_pool_stats"]["max_memory_mb"] == 500

    def test_adjusted_when_memory_is_short(self):
        optimizer = self.build()
        before = optimizer.state_bytes()
        stats = optimizer.get_memory_stats()
        target = (stats["used_bytes"] - before // 4) / 1024**3
        report = optimizer.optimize_for_vram(target_vram_gb=target)
        assert optimizer.state_bytes() < before
        assert sum(action["bytes_saved"] for action in report["actions"]) >= before - optimizer.state_bytes()

    def test_enough_memory_changes_nothing(self):
        optimizer = self.build()
        before = optimizer.state_bytes()
        optimizer.optimize_for_vram(target_vram_gb=6.0)
        assert optimizer.state_bytes() == before

    def test_masks(self):
        analysis = self.build().get_lr_mask_analysis()
        assert analysis["lr_mask_enabled"] is True
        assert {"configuration", "parameter_analysis", "global_statistics", "training_phase"} <= set(analysis)
        assert {"current_step", "in_warmup", "warmup_progress"} <= set(analysis["training_phase"])
        assert analysis["training_phase"]["current_step"] == 3


class TestMethodsOfAdaptiveHinaAdamW:
    """Debugging: relationships and importance."""

    @pytest.fixture
    def optimizer(self):
        model = adapted()
        optimizer = AdaptiveHinaAdamW(
            model.named(), **{**ADAPTIVE_ADAMW["quick_start"], "relationship_discovery_interval": 1}
        )
        train(model, optimizer, 4)
        return optimizer

    def test_information(self, optimizer):
        info = optimizer.get_optimization_info()
        assert f"{info['features']} {info['training_stats']}"
        assert info["features"]["dynamic_adaptation"] is True
        assert info["training_stats"]["global_step"] == 4

    def test_relationships(self, optimizer):
        relationships = optimizer.get_relationship_summary()
        assert relationships["total_relationships"] == len(relationships["relationships"]) >= 1
        first = relationships["relationships"][0]
        assert {"names", "shapes", "compatibility", "interaction_type"} <= set(first)
        found = {frozenset(one["names"]) for one in relationships["relationships"]}
        assert frozenset({"model.q.lora_A.default.weight", "model.q.lora_B.default.weight"}) in found

    def test_relationships_of_none(self):
        fresh = AdaptiveHinaAdamW(adapted().named(), lr=1e-3)
        assert fresh.get_relationship_summary() == {"total_relationships": 0, "relationships": []}

    def test_importance(self, optimizer):
        importance = optimizer.get_importance_analysis()
        assert f"{importance['high_importance_params']} {importance['low_importance_params']}"
        assert importance["total_parameters"] == 4
        assert {"mean", "max", "min", "std"} <= set(importance["importance_statistics"])


class TestMethodsOfHinaAdamW:
    """Debugging: what of LoRA and LoKr was found."""

    @pytest.fixture
    def optimizer(self):
        return HinaAdamWOptimizer(adapted().named(), **HINA_ADAMW["quick_start"])

    def test_statistics_of_adapters(self, optimizer):
        info = optimizer.get_optimization_info()
        assert {**info["lora_stats"]}.items() >= {"lora_a_params": 1, "lora_b_params": 1, "lora_pairs": 1}.items()
        expected = {"lokr_w1_params": 1, "lokr_w2_params": 1, "lokr_pairs": 1, "lokr_groups": 1}
        assert {**info["lokr_stats"]}.items() >= expected.items()

    def test_diagnosis_of_pairs(self, optimizer):
        diagnosis = optimizer.diagnose_lora_pairing()
        assert diagnosis["total_groups"] == len(diagnosis["groups"]) == 1
        (group,) = diagnosis["groups"].values() if isinstance(diagnosis["groups"], dict) else diagnosis["groups"]
        assert (group["lora_a_count"], group["lora_b_count"], group["pairs_count"]) == (1, 1, 1)
        assert len(group["unpaired_a"]) == len(group["unpaired_b"]) == 0
        assert len(group["parameter_details"]) == 4

    def test_a_factor_without_its_partner_is_named(self):
        optimizer = HinaAdamWOptimizer(adapted().named()[:1], lr=1e-3)
        diagnosis = optimizer.diagnose_lora_pairing()
        (group,) = diagnosis["groups"].values() if isinstance(diagnosis["groups"], dict) else diagnosis["groups"]
        assert group["pairs_count"] == 0
        assert "model.q.lora_A.default.weight" in str(group["unpaired_a"])


class TestMethodsOfImproved8Bit:
    """The report of what 8 bits have saved."""

    def test_report(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(108, 256), nn.GELU(), nn.Linear(256, 8))
        optimizer = Automagic_CameAMP_Improved_8Bit(
            model.parameters(), profile="balanced", lr=2e-4, verbose=True, edge_penalty=0.12
        )
        train(model, optimizer, 2)
        report = optimizer.get_memory_efficiency_report()
        assert {
            "bitsandbytes_available", "total_parameters", "8bit_parameters", "32bit_parameters", "memory_saved_mb",
            "compression_ratio", "states_breakdown",
        } <= set(report)  # fmt: skip
        assert f"{report['compression_ratio']:.2%}".endswith("%")
        assert report["total_parameters"] == report["8bit_parameters"] + report["32bit_parameters"]
        assert 0 < report["compression_ratio"] <= 1
        assert report["memory_saved_mb"] > 0

    def test_saved_is_measured(self):
        """Tensors below the threshold are not in 8 bits, and nothing is counted for them."""
        model = nn.Sequential(nn.Flatten(), nn.Linear(108, 8))
        optimizer = Automagic_CameAMP_Improved_8Bit(model.parameters(), lr=2e-4, min_8bit_size=10**9)
        train(model, optimizer, 2)
        assert optimizer.get_memory_efficiency_report()["8bit_parameters"] == 0


class TestEveryOptimizer:
    """What all of them share."""

    @pytest.mark.parametrize("name", list_optimizers())
    def test_defaults(self, name):
        group = create_optimizer(name, image_model()).param_groups[0]
        assert {key: group.get(key) for key in DEFAULTS[name]} == DEFAULTS[name]

    @pytest.mark.parametrize("name", list_optimizers())
    def test_reports_before_and_after_steps(self, name):
        model = adapted()
        optimizer = create_optimizer(name, model.named(), lr=1e-4)
        for _ in range(2):
            info = optimizer.get_optimization_info()
            assert info["optimizer_type"] == name
            assert info["total_params"] == 4
            assert all(isinstance(on, bool) for on in info["features"].values())
            assert isinstance(optimizer.get_memory_stats()["memory_pressure"], float)
            assert {"total_relationships", "relationships"} <= set(optimizer.get_relationship_summary())
            assert "lr_mask_enabled" in optimizer.get_lr_mask_analysis()
            train(model, optimizer, 2)

    @pytest.mark.parametrize("name", list_optimizers())
    def test_no_learning_rate_no_step(self, name):
        model = adapted()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = create_optimizer(name, model.named(), lr=1e-4)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        train(model, optimizer, 3)
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))

    @pytest.mark.parametrize("name", list_optimizers("loss_context") or ["Automagic_CameAMP_COptim"])
    def test_loss_contexts_are_listed(self, name):
        assert "COptim" in name

    @pytest.mark.parametrize("name", ["HinaAdamW", "AdaptiveHinaAdamW", "Automagic_CameAMP"])
    def test_any_optimizer_can_follow_the_loss(self, name):
        """Automatic tuning from the trend of the loss."""

        def build(params: Any, **options: Any) -> Any:
            optimizer = create_optimizer(name, params, lr=1e-4, context_window=4, **options)
            step, losses = optimizer.step, iter(range(100, 0, -1))
            optimizer.step = lambda: (optimizer.report_loss(float(next(losses))), step())[1]
            return optimizer

        assert acts(build, {"use_loss_context": True}, {"use_loss_context": False})


class TestEvaluation:
    """What an adapter has made."""

    def test_edge_quality(self):
        reference = np.zeros((32, 32), np.uint8)
        reference[8:24, 8:24] = 200
        blurred = (
            torch.nn.functional.avg_pool2d(torch.tensor(reference)[None, None].float(), 9, stride=1, padding=4)
            .numpy()[0, 0]
            .astype(np.uint8)
        )
        assert evaluate_edge_quality(reference, reference) == 1.0
        assert evaluate_edge_quality(blurred, reference) < 0.9

    def test_background_consistency(self):
        image, mask = np.full((16, 16), 0.8), np.zeros((16, 16))
        image[4:12, 4:12], mask[4:12, 4:12] = 0.1, 1
        even = evaluate_background_consistency(image, mask)
        uneven = evaluate_background_consistency(np.where(np.arange(16) % 2 == 0, image, image * 0.2), mask)
        assert uneven < even == 1.0

    def test_rank(self):
        lora_weights = torch.randn(24, 3) @ torch.randn(3, 40)
        assert analyze_lora_rank(lora_weights) == 3

    def test_they_are_of_the_package(self):
        assert hina_optim.evaluation.analyze_lora_rank is analyze_lora_rank
