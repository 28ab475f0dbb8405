"""How much memory there is, how much is needed, and what to give up next."""

from hina_optim.memory.account import as_size, pending_bytes, used_bytes
from hina_optim.memory.guard import MemoryGuard
from hina_optim.memory.ladder import LADDER, Change, Rung, VramReport, optimize_for_vram, plan_for_vram, relax_vram
from hina_optim.memory.planning import BudgetError, MemoryPlan, PlannedRung, plan, plan_of
from hina_optim.memory.probes import CudaProbe, MemoryReading, Probe, ProcessProbe, ScriptedProbe, probe_for
from hina_optim.memory.trainer import trainer_callback

__all__ = [
    "LADDER",
    "BudgetError",
    "Change",
    "CudaProbe",
    "MemoryGuard",
    "MemoryPlan",
    "MemoryReading",
    "PlannedRung",
    "Probe",
    "ProcessProbe",
    "Rung",
    "ScriptedProbe",
    "VramReport",
    "as_size",
    "optimize_for_vram",
    "pending_bytes",
    "plan",
    "plan_for_vram",
    "plan_of",
    "probe_for",
    "relax_vram",
    "trainer_callback",
    "used_bytes",
]
