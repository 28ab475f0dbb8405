"""What a parameter is to LoRA, LoKr, LoHa or DoRA."""

from hina_optim.adapters.roles import ROLES, Role, find_pairs, role_of

__all__ = ["ROLES", "Role", "find_pairs", "role_of"]
