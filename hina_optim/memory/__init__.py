"""How much memory there is, how much is needed, and what to give up next."""

from hina_optim.memory.ladder import LADDER, Rung, optimize_for_vram, plan_for_vram, used_bytes
from hina_optim.memory.probes import CudaProbe, MemoryReading, Probe, ProcessProbe, ScriptedProbe, probe_for

__all__ = [
    "LADDER",
    "CudaProbe",
    "MemoryReading",
    "Probe",
    "ProcessProbe",
    "Rung",
    "ScriptedProbe",
    "optimize_for_vram",
    "plan_for_vram",
    "probe_for",
    "used_bytes",
]
