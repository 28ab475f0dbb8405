"""What an optimizer tells about itself: techniques, rates, masks, importance, relationships, memory.

Statistics come as 0-d tensors on the device and wait for nothing; ``get_…`` methods return plain numbers, and wait for
the device when called. All work before the first step, after a load, and on any device, and none changes anything but
:meth:`Inspection.optimize_for_vram`.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hina_optim import arguments as rule
from hina_optim.adapters.roles import find_pairs
from hina_optim.engine.everything import about_all
from hina_optim.memory.ladder import VramReport, optimize_for_vram, plan_for_vram, used_bytes
from hina_optim.memory.probes import GIB, CudaProbe
from hina_optim.optimizers.rates import LR_MASK, RateInspection, numbers
from hina_optim.optimizers.statistics import rank_pattern
from hina_optim.techniques.base import ParamInfo
from hina_optim.techniques.importance import analyze_importance
from hina_optim.techniques.relationships import describe_relationships

__all__ = ["Inspection"]

#: Feature → names of the techniques that are it.
FEATURES: dict[str, frozenset[str]] = {
    "agr": frozenset({"agr"}),
    "tam": frozenset({"tam"}),
    "adopt_stability": frozenset({"adopt"}),
    "grams": frozenset({"grams"}),
    "cautious": frozenset({"cautious"}),
    "orthogonal_grad": frozenset({"orthogonal"}),
    "spd": frozenset({"spd"}),
    "lr_mask": frozenset({"lr_mask"}),
    "dynamic_adaptation": frozenset({"importance", "relationships"}),
    "edge_suppression": frozenset({"edge"}),
    "spatial_awareness": frozenset({"spatial"}),
    "frequency_penalty": frozenset({"frequency"}),
    "background_regularization": frozenset({"background"}),
    "lora_rank_penalty": frozenset({"rank_penalty"}),
    "low_rank_emphasis": frozenset({"low_rank_emphasis"}),
    "rank_aware_decay": frozenset({"rank_aware_decay"}),
    "alora": frozenset({"alora", "alora_ratio", "lokr"}),
    "came": frozenset({"confidence"}),
    "dual_momentum": frozenset({"dual_momentum"}),
    "multi_scale_momentum": frozenset({"multi_scale"}),
    "ada_decay": frozenset({"ada_decay"}),
    "loss_context": frozenset({"context"}),
}
#: A parameter of each kind that recipes tell apart: what acts on any of them is a feature of the optimizer.
KINDS = (ParamInfo((8, 8)), ParamInfo((8, 8), "lora_b", True), ParamInfo((8, 8), "lokr_w2", True))
ADAPTATION = (
    "adaptation_strength",
    "relationship_discovery_interval",
    "importance_decay",
    "compatibility_threshold",
)
MEMORY = (
    "memory_efficient",
    "vram_budget_gb",
    "cpu_offload_states",
    "reduce_precision",
    "adaptive_features",
    "emergency_simplify",
    "state_precision",
    "max_buffer_memory_mb",
)
EDGES = (
    "edge_suppression",
    "edge_penalty",
    "edge_threshold",
    "background_regularization",
    "spatial_awareness",
    "frequency_penalty",
    "detail_preservation",
)
LORA = ("rank_penalty_strength", "low_rank_emphasis", "rank_target", "rank_interval")


class Inspection(RateInspection):
    """Methods for whoever wants to know what an optimizer does; mixed into the optimizers.

    Groups go by their option ``name``, or ``group0``, ``group1``, … where there is none. Of sharded parameters, figures
    of masks, rates and importance are of the whole parameters (what adds up over masks and rates must be called by
    every rank), bytes are of what is here.
    """

    # -- importance and relationships ----------------------------------------------------------------------------------

    @about_all
    def importance_statistics(self) -> dict[str, Tensor]:
        """``importance/<parameter>``: its score, about 1 on average, a 0-d tensor on the device; waits for nothing.

        Parameters have a score from their first step on.
        """
        known = [(name, state["importance"]) for name, _, state in self._params() if "importance" in state]
        if not known:
            return {}
        home = known[0][1].device
        scores = torch.stack([score.to(home) for _, score in known])  # a copy: the state goes on changing
        return {f"importance/{name}": score for (name, _), score in zip(known, scores.unbind(), strict=True)}

    @about_all
    def get_importance_analysis(self) -> dict[str, Any]:
        """Statistics of the importance scores, and the parameters that stand out (one deviation from the mean)."""
        names, scores = self._importance()
        return analyze_importance(names, torch.tensor(scores, dtype=torch.float64))

    @about_all
    def get_relationship_summary(self) -> dict[str, Any]:
        """Pairs of parameters that belong together: names, shapes, compatibility and kind, the closest first."""
        known = [(name, p, state) for name, p, state in self._params() if "relation_partners" in state]
        relationships: list[dict[str, Any]] = []
        if known:
            names = [name for name, _, _ in known]
            shapes = [self._layout.shard(p).shape for _, p, _ in known]
            partners = torch.full((len(known),), -1)
            told = dict(zip(self.param_names(), self._adapter_names()[0], strict=True))
            for i, j in find_pairs([told[name] for name in names], shapes):
                partners[i], partners[j] = j, i
            home = known[0][1].device
            found, scores = (
                torch.stack([state[key].to(home) for _, _, state in known]).cpu()
                for key in ("relation_partners", "relation_scores")
            )
            relationships = describe_relationships(names, [ParamInfo(s) for s in shapes], partners, found, scores)
        return {"total_relationships": len(relationships), "relationships": relationships}

    @about_all
    def export_importance(self, path: str | Path | None = None, *, rank: int = 8) -> dict[str, Any]:
        """Importance and learning rate multiplier of every parameter, and LoRA ranks in proportion to importance.

        Args:
            path: Where to write it as JSON; directories are made. None: nowhere.
            rank: The uniform LoRA rank that ``rank_pattern`` redistributes.

        Returns:
            ``{"optimizer", "step", "parameters": {name: {"importance", "normalized", "lr_multiplier"}}, "rank",
            "rank_pattern"}``. ``normalized`` is the score over the mean score. ``rank_pattern`` has the form of peft's
            ``LoraConfig(r=rank, rank_pattern=…)``. Both are empty before anything was measured.

        Raises:
            ValueError: The rank is not an integer >= 1.
        """
        rule.check("export_importance", "rank", rank, rule.INTERVAL)
        names, scores = self._importance()
        states = [state for _, _, state in self._params() if "importance" in state]
        factors = numbers([state["importance_rate"] for state in states])
        average = sum(scores) / max(1, len(scores)) or 1.0
        result = {
            "optimizer": type(self).__name__,
            "step": self._global_step(),
            "parameters": {
                name: {"importance": score, "normalized": score / average, "lr_multiplier": factor}
                for name, score, factor in zip(names, scores, factors, strict=True)
            },
            "rank": rank,
            "rank_pattern": rank_pattern(dict(zip(names, scores, strict=True)), rank),
        }
        if path is not None:
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        return result

    # -- everything, and memory ----------------------------------------------------------------------------------------

    @about_all
    def get_optimization_info(self) -> dict[str, Any]:
        """What is switched on, with which options, and how far the training is."""
        return {
            "optimizer_type": type(self).__name__,
            "version": self.VERSION,
            "total_params": sum(1 for _ in self._params()),
            "total_elements": sum(math.prod(self._layout.shard(p).shape) for _, p, _ in self._params()),
            "features": self._features(),
            "adaptation_config": self._options(ADAPTATION),
            "lr_mask_config": self._options(LR_MASK),
            "memory_optimization": self._memory_options(),
            "edge_overfitting_control": self._options(EDGES),
            "lora_config": self._options(LORA),
            **self._adapter_stats(),
            "current_memory_pressure": self._memory()[0],
            "training_stats": self._training_stats(),
        }

    @about_all
    def get_memory_stats(self) -> dict[str, Any]:
        """Memory in use, and the bytes of state by precision, device and name."""
        pressure, used, budget = self._memory()
        by: dict[str, Counter[str]] = {"by_precision": Counter(), "by_device": Counter(), "by_name": Counter()}
        for _, p, state in self._params():
            for name, x in state.items():
                if isinstance(x, Tensor):
                    size = self._layout.unwrap(p, x).nbytes
                    by["by_precision"][str(x.dtype).removeprefix("torch.")] += size
                    by["by_device"][str(x.device)] += size
                    by["by_name"][name] += size
        stats: dict[str, Any] = {
            "memory_pressure": pressure,
            "used_bytes": used,
            "budget_bytes": budget,
            "buffer_pool_stats": {
                "current_memory_mb": self.scratch_bytes() / 1e6,
                "max_memory_mb": float(self._options(("max_buffer_memory_mb",)).get("max_buffer_memory_mb", 0)),
            },
            "state_bytes": {"total": by["by_device"].total(), **{key: dict(counts) for key, counts in by.items()}},
        }
        devices = sorted({str(p.device) for _, p, _ in self._params() if p.is_cuda})
        if devices:
            stats["cuda_memory"] = {device: CudaProbe(device).read()._asdict() for device in devices}
        return stats

    @about_all
    def get_memory_efficiency_report(self) -> dict[str, Any]:
        """What storing state in few bits saves: bytes held, beside those of the same state in fp32.

        Returns:
            ``bitsandbytes_available``; ``total_parameters``, ``8bit_parameters`` and ``32bit_parameters``, elements of
            all parameters, of those with any state in 8 bits, and of those whose moments are in fp32;
            ``compression_ratio``, the share of elements with state in 8 bits; ``state_bytes`` as held,
            ``fp32_state_bytes`` of the same state in fp32, ``memory_saved_mb`` (10⁶ bytes) the difference;
            ``states_breakdown``, ``{state name: {dtype: bytes}}``. Before the first step nothing is held, and nothing
            saved.
        """
        counts: Counter[str] = Counter()
        breakdown: dict[str, Counter[str]] = {}
        for _, p, state in self._params():
            numel = math.prod(self._layout.shard(p).shape)
            counts["total"] += numel
            dtypes = {name: x.dtype for name, x in state.items() if isinstance(x, Tensor)}
            counts["8bit"] += numel if torch.uint8 in dtypes.values() else 0
            moments = [dtype for name, dtype in dtypes.items() if name.startswith(("exp_avg", "momentum_"))]
            counts["32bit"] += numel if moments and all(d.itemsize >= 4 for d in moments) else 0
            for name, dtype in dtypes.items():
                size = self._layout.unwrap(p, state[name]).nbytes
                breakdown.setdefault(name, Counter())[str(dtype).removeprefix("torch.")] += size
        held = self.state_bytes()
        full = self.state_bytes("fp32") if held else 0
        return {
            "bitsandbytes_available": importlib.util.find_spec("bitsandbytes") is not None,
            "total_parameters": counts["total"],
            "8bit_parameters": counts["8bit"],
            "32bit_parameters": counts["32bit"],
            "compression_ratio": counts["8bit"] / max(1, counts["total"]),
            "state_bytes": held,
            "fp32_state_bytes": full,
            "memory_saved_mb": (full - held) / 1e6,
            "states_breakdown": {name: dict(sizes) for name, sizes in breakdown.items()},
        }

    @about_all
    def optimize_for_vram(self, target_vram_gb: float) -> VramReport:
        """Give memory back until at most ``target_vram_gb`` (GiB) is in use, the cheapest in quality first.

        Existing state is converted, nothing learned is thrown away; see :mod:`hina_optim.memory.ladder`. Returns what
        was done, and what each action saved.

        Raises:
            ValueError: The target is not a finite number > 0.
        """
        return optimize_for_vram(self, target_vram_gb)

    @about_all
    def plan_for_vram(self, target_vram_gb: float) -> VramReport:
        """What :meth:`optimize_for_vram` would do. Changes nothing."""
        return plan_for_vram(self, target_vram_gb)

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _features(self) -> dict[str, bool]:
        """Techniques that act in at least one group, in some phase, on the parameters that they are for."""
        acting = {
            one.name
            for group in self.param_groups
            for info in KINDS
            for one in self.recipe(group, info)
            if one.applies(info)
        }
        features = {feature: bool(names & acting) for feature, names in FEATURES.items()}
        features["dynamic_weight_decay"] = any(bool(g.get("dynamic_weight_decay")) for g in self.param_groups)
        return features

    def _memory_options(self) -> dict[str, Any]:
        options = self._options(MEMORY)
        # another word for the same thing, and the precision may have been lowered since
        return {**options, "reduce_precision": options["state_precision"] != "fp32"}

    def _training_stats(self) -> dict[str, Any]:
        _, scores = self._importance()
        counted = [(name, state["skipped"]) for name, _, state in self._params() if "skipped" in state]
        skipped = zip((name for name, _ in counted), numbers([x for _, x in counted]), strict=True)
        return {
            "global_step": self._global_step(),
            "total_relationships": self.get_relationship_summary()["total_relationships"],
            "avg_importance_score": sum(scores) / len(scores) if scores else 0.0,
            "skipped_nonfinite": {name: int(count) for name, count in skipped if count > 0},
        }

    def _importance(self) -> tuple[list[str], list[float]]:
        scores = self.importance_statistics()
        return [name.removeprefix("importance/") for name in scores], numbers(list(scores.values()))

    def _memory(self) -> tuple[float, int, int | None]:
        """Pressure, bytes used, and the budget; 0 and None where ``memory_efficient=False`` has switched it off."""
        used = used_bytes(self)
        options = self._options(("memory_efficient", "vram_budget_gb"))
        if not options.get("memory_efficient", True) or "vram_budget_gb" not in options:
            return 0.0, used, None
        budget = int(options["vram_budget_gb"] * GIB)
        return used / budget, used, budget
