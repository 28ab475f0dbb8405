"""Every use of a public name that the documents of the original design show, as a test: it runs, and does what it says.

One class for each row of optimizers; names of modules map to ``hina_optim``. What the methods return, profiles and
command lines are in test_seeds_methods.py.
"""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hina_optim import (
    AdaptiveHinaAdamW,
    Automagic_CameAMP,
    Automagic_CameAMP_8Bit,
    Automagic_CameAMP_8bit,
    Automagic_CameAMP_COptim,
    Automagic_CameAMP_COptim8bit,
    Automagic_CameAMP_Improved,
    Automagic_CameAMP_Improved_8Bit,
    HinaAdamW,
    HinaAdamWOptimizer,
    HinaAdaptive,
    ImprovedOptimizerConfig,
    MomentumStrategy,
    OptimizerConfig,
    RefactoredAutomagicCameAMP,
    RegularizationStrategy,
    create_full_finetune_optimizer,
    create_improved_8bit_optimizer,
    create_lora_optimizer,
)
from tests.design_cases import acts, adapted, image_model, learns, lines, loss_of, state_dtypes, train, weights_after
from tests.design_options import (
    ADAPTIVE_ADAMW,
    CREATE_LORA,
    HINA_ADAMW,
    HINA_ADAPTIVE,
    IMPROVED,
    REFACTORED,
    REGULARIZATIONS,
    STAGES,
)

#: Nothing but what moves in proportion to the gradient: no decay, no pull back.
PLAIN: dict[str, Any] = {"weight_decay": 0.0, "use_spd": False}


class TestHinaAdaptive:
    """Best practice with latents: configurations by need and by task."""

    @pytest.mark.parametrize("name", HINA_ADAPTIVE)
    def test_configurations(self, name):
        options = HINA_ADAPTIVE[name]
        model = image_model()
        optimizer = HinaAdaptive(model.parameters(), **options)
        learns(model, optimizer)
        info = optimizer.get_optimization_info()
        for feature in ("edge_suppression", "spatial_awareness", "background_regularization", "lora_rank_penalty"):
            assert info["features"][feature] is options.get(feature, False)
        memory = info["memory_optimization"]
        assert memory["memory_efficient"] is options.get("memory_efficient", True)
        assert memory["vram_budget_gb"] == options.get("vram_budget_gb", 16.0)
        assert memory["reduce_precision"] is options.get("reduce_precision", False)
        assert (torch.bfloat16 in state_dtypes(optimizer)) is options.get("reduce_precision", False)
        assert optimizer.get_memory_stats()["buffer_pool_stats"]["max_memory_mb"] == options.get(
            "max_buffer_memory_mb", 500
        )

    @pytest.mark.parametrize(("technique", "options"), REGULARIZATIONS.items())
    def test_each_regularization_acts(self, technique, options):
        assert acts(HinaAdaptive, {"lr": 1e-4, **options}, {technique: False})

    @pytest.mark.parametrize("option", ["edge_penalty", "frequency_penalty"])
    def test_a_lower_strength_is_a_milder_one(self, option):
        """Where a training is unstable, halve them: the weights are closer to those without."""
        strong = {**HINA_ADAPTIVE["unstable"], "edge_penalty": 0.1, "frequency_penalty": 0.05}
        none = {**strong, "edge_penalty": 0.0, "frequency_penalty": 0.0}
        near, far, zero = (
            torch.cat([x.flatten() for x in weights_after(HinaAdaptive, **{**none, **extra})])
            for extra in ({option: strong[option] / 2}, {option: strong[option]}, {})
        )
        assert 0 < (near - zero).norm() < (far - zero).norm()

    def test_stages_add_techniques_one_by_one(self):
        given: dict[str, Any] = {"lr": 1e-4}
        counts = []
        for stage in STAGES:
            given |= stage
            model = image_model()
            optimizer = HinaAdaptive(model.parameters(), **given)
            learns(model, optimizer)
            counts.append(sum(optimizer.get_optimization_info()["features"].values()))
        assert counts[0] < counts[1] < counts[2]

    @pytest.mark.parametrize("name", ["fourier_feature_loss", "super_resolution_mode"])
    def test_what_was_removed_is_an_error_that_says_what_to_use(self, name):
        with pytest.raises(TypeError, match=rf"'{name}' was removed\. .*(edge_suppression|spatial_awareness)"):
            HinaAdaptive(image_model().parameters(), lr=1e-4, **{name: True})


class TestAdaptiveHinaAdamW:
    """Importance, relationships and rates for any architecture."""

    @pytest.mark.parametrize("name", ADAPTIVE_ADAMW)
    def test_configurations(self, name):
        options = ADAPTIVE_ADAMW[name]
        for model in (image_model(), adapted()):
            optimizer = AdaptiveHinaAdamW([p for p in model.parameters() if p.requires_grad], **options)
            learns(model, optimizer)
            group = optimizer.param_groups[0]
            assert {key: group[key] for key in options} == options

    def test_learning_rate_goes_to_what_matters(self):
        """Without any name: ten times its peers' gradient ranks first, and learns faster than they do."""
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(4, 5)) for _ in range(4)]
        optimizer = AdaptiveHinaAdamW(params, lr=1e-4, relationship_discovery_interval=1)
        for _ in range(5):
            for i, p in enumerate(params):
                p.grad = torch.randn_like(p) * (10.0 if i == 2 else 1.0)
            optimizer.step()
        analysis = optimizer.get_importance_analysis()
        assert [name for name, _ in analysis["high_importance_params"]] == ["group0.2"]
        rates = [float(optimizer.state[p]["importance_rate"]) for p in params]
        assert rates.index(max(rates)) == 2


class TestHinaAdamW:
    """AdamW for LoRA and LoKr."""

    def test_both_names_are_one_class(self):
        assert HinaAdamW is HinaAdamWOptimizer

    @pytest.mark.parametrize("name", HINA_ADAMW)
    def test_configurations(self, name):
        options = HINA_ADAMW[name]
        for params in ("parameters", "names"):
            model = adapted()
            given = model.named() if params == "names" else [p for p in model.parameters() if p.requires_grad]
            optimizer = HinaAdamWOptimizer(given, **options)
            learns(model, optimizer)
            group = optimizer.param_groups[0]
            assert {key: group[key] for key in options} == options

    def test_lora_is_found_without_names(self):
        model = adapted()
        optimizer = HinaAdamWOptimizer([model.q_lora_A.weight, model.q_lora_B.weight], **HINA_ADAMW["quick_start"])
        assert optimizer.get_optimization_info()["lora_stats"]["lora_pairs"] == 1

    @pytest.mark.parametrize("ratio", [16.0, 18.0, 20.0])
    def test_b_and_w2_step_so_many_times_as_far(self, ratio):
        steps = []
        for alora_ratio in (1.0, ratio):
            model = adapted()
            nn.init.normal_(model.q_lora_B.weight)
            nn.init.normal_(model.k.lokr_w2)
            before = copy.deepcopy(dict(model.named()))
            train(
                model, HinaAdamW(model.named(), lr=1e-4, alora_ratio=alora_ratio, **PLAIN), 2
            )  # ADOPT waits in the 1st
            steps.append({name: p.detach() - before[name].detach() for name, p in model.named()})
        for name, one in steps[0].items():
            factor = ratio if "lora_B" in name or "w2" in name else 1.0
            torch.testing.assert_close(steps[1][name], one * factor, rtol=1e-2, atol=5e-6)
        assert all(one.abs().sum() > 0 for one in steps[0].values())

    def test_decay_shrinks_to_its_floor_without_anyone_s_script(self):
        p = nn.Parameter(torch.ones(4, 4))
        options = dict(wd_transition_steps=5, wd_decay_factor=0.5, wd_min_ratio=0.1, weight_decay=0.5)
        optimizer = HinaAdamW([("q.lora_A.weight", p)], lr=1e-2, use_spd=False, **options)
        shares = []
        for _ in range(40):
            before = p.detach().clone()
            p.grad = torch.zeros_like(p)
            optimizer.step()
            shares.append(float((1 - p.detach() / before).mean()) / (1e-2 * 0.5))
        first = next(i for i, share in enumerate(shares) if share > 0)
        assert shares[first] == pytest.approx(1.0, rel=1e-3)
        assert shares[-1] == pytest.approx(0.1, rel=1e-2)
        assert all(b <= a + 1e-3 for a, b in itertools.pairwise(shares[first:]))

    def test_nine_techniques_can_be_switched_on_and_off(self):
        switches = (
            "use_spd", "use_cautious", "use_orthogonal_grad", "use_adopt_stability", "use_grams", "use_agr", "use_tam",
            "use_alora", "dynamic_weight_decay",
        )  # fmt: skip
        off: dict[str, Any] = {**dict.fromkeys(switches, False), "lr": 1e-3, "wd_transition_steps": 2}
        names = [name for name, _ in adapted().named()]

        def named(params, **options):
            return HinaAdamW(zip(names, params, strict=True), **options)

        for switch in switches:
            assert acts(named, off, {switch: True}, model=adapted(), steps=12), switch


class TestAutomagic_CameAMP:
    """CAME with masks and phases."""

    def test_learns_and_keeps_factored_state(self):
        model = image_model()
        optimizer = Automagic_CameAMP(model.parameters(), lr=1e-4)
        learns(model, optimizer)
        state = optimizer.state[model[4].weight]
        rows, columns = model[4].weight.shape
        sizes = {name: x.numel() for name, x in state.items() if isinstance(x, Tensor)}
        assert sizes["exp_avg_sq_row"] == sizes["exp_avg_res_row"] == rows
        assert sizes["exp_avg_sq_col"] == sizes["exp_avg_res_col"] == columns
        assert sizes["exp_avg"] == rows * columns
        assert "exp_avg_sq" not in sizes

    def test_came_off_has_no_confidence(self):
        model = image_model()
        optimizer = Automagic_CameAMP(model.parameters(), lr=1e-4, came=False)
        learns(model, optimizer)
        assert not any("res" in name for state in optimizer.state.values() for name in state)

    def test_first_steps_are_of_the_size_of_the_learning_rate(self):
        model = image_model()
        optimizer = Automagic_CameAMP(model.parameters(), lr=1e-4, full_finetune=True, **PLAIN)
        for _ in range(10):
            before = [p.detach().clone() for p in model.parameters()]
            train(model, optimizer, 1)
            for p, old in zip(model.parameters(), before, strict=True):
                assert (p.detach() - old).abs().mean() <= 2.5 * 1e-4


class TestAutomagic_CameAMP_Improved:
    """Control of edges, background and rank."""

    @pytest.mark.parametrize("name", IMPROVED)
    def test_configurations(self, name):
        options = IMPROVED[name]
        config = ImprovedOptimizerConfig(**options)
        model = image_model()
        optimizer = Automagic_CameAMP_Improved(model.parameters(), config)
        learns(model, optimizer)
        assert vars(optimizer.config) == {**vars(config), "state_precision": "fp32"}
        control = optimizer.get_optimization_info()["edge_overfitting_control"]
        assert all(
            control[key] == getattr(config, key) for key in ("edge_penalty", "edge_threshold", "frequency_penalty")
        )
        assert acts(Automagic_CameAMP_Improved, options, {"detail_preservation": 0.5, "edge_penalty": 0.05})

    @pytest.mark.parametrize(
        "switch",
        [
            "edge_suppression",
            "spatial_awareness",
            "background_regularization",
            "lora_rank_penalty",
            "enable_dual_momentum",
        ],
    )
    def test_every_control_is_on_by_default_and_acts(self, switch):
        assert getattr(ImprovedOptimizerConfig(), switch) is True
        assert acts(Automagic_CameAMP_Improved, {"lr": 1e-4}, {switch: False})

    def test_the_rank_of_an_adapter_falls(self):
        ranks = {}
        for penalty in (False, True):
            torch.manual_seed(0)
            model = adapted()
            nn.init.normal_(model.q_lora_B.weight)
            optimizer = Automagic_CameAMP_Improved(
                model.named(),
                lr=1e-3,
                lora_rank_penalty=penalty,
                rank_penalty_strength=0.5,
                rank_target=1,
                rank_interval=1,
            )
            train(model, optimizer, 60)
            sigma = torch.linalg.svdvals(model.q_lora_B.weight.detach() @ model.q_lora_A.weight.detach())
            ranks[penalty] = float(sigma[1:4].sum() / sigma[0])
        assert ranks[True] < ranks[False]


class TestRefactoredAutomagicCameAMP:
    """Strategies, phases, and a configuration that is there to read."""

    @pytest.mark.parametrize("name", REFACTORED)
    def test_configurations(self, name, caplog):
        options = REFACTORED[name]
        model = image_model()
        optimizer = RefactoredAutomagicCameAMP(model.parameters(), OptimizerConfig(**options))
        with caplog.at_level("INFO", logger="hina_optim"):
            learns(model, optimizer)
        assert {key: getattr(optimizer.config, key) for key in options} == options
        features = optimizer.get_optimization_info()["features"]
        assert features["edge_suppression"] is options.get("edge_suppression", True)
        assert features["spatial_awareness"] is options.get("spatial_awareness", True)
        assert any("learning rate" in line for line in lines(caplog)) is options.get("verbose", False)

    def test_a_regularizer_of_one_s_own_changes_the_step(self):
        class CustomRegularizer(RegularizationStrategy):
            def apply(self, grad, **kwargs):
                modified_grad = grad.clone()
                modified_grad[:1] = 0  # the first row is to stay as it is
                return modified_grad

        model = image_model()
        before = model[4].weight.detach().clone()
        quiet = dict(lora_rank_penalty=False, edge_suppression=False, spatial_awareness=False, weight_decay=0.0)
        optimizer = RefactoredAutomagicCameAMP(
            model.parameters(), OptimizerConfig(lr=1e-4, **quiet), regularization=[CustomRegularizer()]
        )
        train(model, optimizer)
        assert torch.equal(model[4].weight[0], before[0])
        assert not torch.equal(model[4].weight[1:], before[1:])

    def test_a_momentum_of_one_s_own_takes_its_place(self):
        class Heavy(MomentumStrategy):
            def apply(self, grad, moment, **kwargs):
                return 0.5 * moment + grad

        assert acts(RefactoredAutomagicCameAMP, {"lr": 1e-4}, {"momentum": Heavy()})

    def test_four_phases(self):
        model = image_model()
        optimizer = RefactoredAutomagicCameAMP(model.parameters(), OptimizerConfig(lr=1e-4, warmup_steps=6))
        phases = []
        for _ in range(14):
            phases.append(optimizer.phase)
            train(model, optimizer, 1)
        # update t: early t < 3, late t < 6, stable t < 12
        assert phases == ["early_warmup"] * 2 + ["late_warmup"] * 3 + ["stable"] * 6 + ["mature"] * 3

    def test_checkpoint(self):
        model = image_model()
        config = OptimizerConfig(lr=1e-4, warmup_steps=10)
        optimizer = RefactoredAutomagicCameAMP(model.parameters(), config)
        train(model, optimizer, 5)
        file = io.BytesIO()
        torch.save(
            {
                "model_state_dict": model.state_dict(),
                "optimizer_state_dict": optimizer.state_dict(),
                "config": optimizer.config.__dict__,
            },
            file,
        )
        file.seek(0)
        checkpoint = torch.load(file, weights_only=True)
        new_model = image_model()
        new_model.load_state_dict(checkpoint["model_state_dict"])
        new_optimizer = RefactoredAutomagicCameAMP(new_model.parameters(), OptimizerConfig(**checkpoint["config"]))
        new_optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        assert train(new_model, new_optimizer, 5) == train(model, optimizer, 5)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), new_model.parameters(), strict=True))


class TestAutomagic_CameAMP_8bit:
    """State in 8 bits."""

    def test_both_spellings_are_one_class(self):
        assert Automagic_CameAMP_8Bit is Automagic_CameAMP_8bit

    def test_learns_in_8_bits_as_in_32(self):
        losses, sizes = {}, {}
        for cls in (Automagic_CameAMP, Automagic_CameAMP_8bit):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), nn.Linear(108, 256), nn.GELU(), nn.Linear(256, 8))
            optimizer = cls(model.parameters(), lr=1e-4)
            losses[cls] = train(model, optimizer, 30)
            sizes[cls] = optimizer.state_bytes()
            assert (torch.uint8 in state_dtypes(optimizer)) is (cls is Automagic_CameAMP_8bit)
        assert sizes[Automagic_CameAMP_8bit] < 0.5 * sizes[Automagic_CameAMP]
        full, small = losses[Automagic_CameAMP], losses[Automagic_CameAMP_8bit]
        assert small[-1] < small[0]
        assert small[0] - small[-1] == pytest.approx(full[0] - full[-1], rel=0.1)


class TestAutomagic_CameAMP_Improved_8Bit:
    """Profiles in Python; the tables and command lines are in test_seeds_methods.py."""

    def test_directly(self):
        model = image_model()
        optimizer = Automagic_CameAMP_Improved_8Bit(
            model.parameters(), profile="quality_optimized", lr=2e-4, verbose=True
        )
        learns(model, optimizer)
        assert (optimizer.config.lr, optimizer.config.edge_penalty, optimizer.config.verbose) == (2e-4, 0.15, True)

    def test_a_dictionary_as_a_training_script_builds_it(self):
        optimizer_kwargs = {"profile": "quality_optimized", "lr": 2e-4, "verbose": True, "edge_penalty": 0.12}
        lr = optimizer_kwargs.pop("lr", 1e-6)
        model = image_model()
        optimizer = Automagic_CameAMP_Improved_8Bit(model.parameters(), lr=lr, **optimizer_kwargs)
        learns(model, optimizer)
        assert (optimizer.config.lr, optimizer.config.edge_penalty, optimizer.config.frequency_penalty) == (
            2e-4,
            0.12,
            0.08,
        )


class TestAutomagic_CameAMP_COptim:
    """The learning rate follows the loss."""

    @pytest.mark.parametrize("cls", [Automagic_CameAMP_COptim, Automagic_CameAMP_COptim8bit])
    def test_learns_with_a_closure(self, cls):
        model = image_model()
        optimizer = cls(model.parameters(), lr=1e-4)

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(20)]
        assert losses[-1] < losses[0]

    def test_a_falling_loss_goes_faster_than_a_rising_one(self):
        moved = {}
        for trend in (-1, 0, 1):
            model = image_model()
            before = [p.detach().clone() for p in model.parameters()]
            optimizer = Automagic_CameAMP_COptim(model.parameters(), lr=1e-4, context_window=8, **PLAIN)
            for i in range(30):
                optimizer.zero_grad()
                loss_of(model).backward()
                optimizer.report_loss(10.0 + trend * 0.25 * i)
                optimizer.step()
            moved[trend] = sum(
                float((p.detach() - old).norm()) for p, old in zip(model.parameters(), before, strict=True)
            )
        assert moved[1] < moved[-1]
        assert moved[0] < moved[-1]

    def test_without_a_loss_it_says_so_once(self, caplog):
        model = image_model()
        with caplog.at_level("WARNING", logger="hina_optim"):
            learns(model, Automagic_CameAMP_COptim(model.parameters(), lr=1e-4))
        assert sum("no loss was reported" in record.getMessage() for record in caplog.records) == 1

    def test_moments_of_four_scales(self):
        model = image_model()
        optimizer = Automagic_CameAMP_COptim(model.parameters(), lr=1e-4)
        group = optimizer.param_groups[0]
        assert (group["momentum_scales"], group["context_window"], group["adaptation_rate"]) == (
            (1, 5, 20, 100),
            30,
            0.25,
        )
        train(model, optimizer, 2)
        assert {"momentum_5", "momentum_20", "momentum_100"} <= set(optimizer.state[model[4].weight])


class TestCreateFunctions:
    """The calls of the documents, as they stand there."""

    @pytest.mark.parametrize("options", CREATE_LORA)
    def test_create_lora_optimizer(self, options):
        model = adapted()
        optimizer = create_lora_optimizer([p for p in model.parameters() if p.requires_grad], **options)
        assert type(optimizer) is RefactoredAutomagicCameAMP
        learns(model, optimizer)
        config = optimizer.config
        assert (config.full_finetune, config.lora_rank_penalty) == (False, True)
        assert {name: getattr(config, name) for name in options} == options

    @pytest.mark.parametrize("options", [dict(lr=5e-5), dict(lr=5e-5, warmup_steps=200, edge_suppression=False)])
    def test_create_full_finetune_optimizer(self, options):
        model = image_model()
        optimizer = create_full_finetune_optimizer(model.parameters(), **options)
        assert type(optimizer) is RefactoredAutomagicCameAMP
        learns(model, optimizer)
        config = optimizer.config
        assert (config.full_finetune, config.lora_rank_penalty) == (True, False)
        assert {name: getattr(config, name) for name in options} == options

    @pytest.mark.parametrize(
        "options",
        [dict(profile="balanced"), dict(profile="memory_optimized", lr=1e-4, warmup_steps=800)],
        ids=lambda options: options["profile"],
    )
    def test_create_improved_8bit_optimizer(self, options):
        model = image_model()
        optimizer = create_improved_8bit_optimizer(model.parameters(), **options)
        assert type(optimizer) is Automagic_CameAMP_Improved_8Bit
        assert optimizer.config.lr == options.get("lr", 1e-6)
        assert optimizer.config.warmup_steps == options.get("warmup_steps", 500)
        assert optimizer.config.min_8bit_size == (4096 if options["profile"] == "balanced" else 1024)
        train(model, optimizer, 3)
