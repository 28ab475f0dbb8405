"""Parameter groups of a module: who decays, who is the B of an adapter, who learns at another rate.

They are made where roles of adapters are known, in :mod:`hina_optim.adapters.groups`, which needs torch alone;
:func:`hina_lightning.configure_optimizers` builds an optimizer from them.
"""

from __future__ import annotations

from hina_optim.adapters.groups import ParameterGroup, group_parameters
from hina_optim.adapters.roles import clean_name

__all__ = ["ParameterGroup", "clean_name", "group_parameters"]
