"""What a parameter is to LoRA, LoKr, LoHa or DoRA: roles, pairs, adapters, statistics and parameter groups."""

from hina_optim.adapters.groups import ParameterGroup, group_parameters
from hina_optim.adapters.inference import Inferred, infer_roles
from hina_optim.adapters.roles import ROLES, Role, find_adapters, find_pairs, role_of
from hina_optim.adapters.splitting import adapter_groups
from hina_optim.adapters.statistics import diagnose_lora_pairing, lokr_stats, lora_stats

__all__ = [
    "ROLES",
    "Inferred",
    "ParameterGroup",
    "Role",
    "adapter_groups",
    "diagnose_lora_pairing",
    "find_adapters",
    "find_pairs",
    "group_parameters",
    "infer_roles",
    "lokr_stats",
    "lora_stats",
    "role_of",
]
