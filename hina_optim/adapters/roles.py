"""What a parameter is to an adapter, read from its name, and which parameters are two factors of one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

__all__ = ["ROLES", "Role", "find_pairs", "role_of"]

Role = Literal[
    "lora_a",
    "lora_b",
    "lora_mid",
    "lora_magnitude",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
    "lokr_t2",
    "loha_w1_a",
    "loha_w1_b",
    "loha_w2_a",
    "loha_w2_b",
    "loha_t1",
    "loha_t2",
]

#: Every role, in a fixed order.
ROLES: tuple[Role, ...] = get_args(Role)

# The name of a module or parameter, between dots and in lower case, that gives a role; one table for all libraries.
_ROLE_OF_PART: dict[str, Role] = {
    "lora_a": "lora_a",  # peft (lora_A), torchtune
    "lora_b": "lora_b",
    "lora_embedding_a": "lora_a",  # peft, of an embedding: the product B·A is the change of the transposed table
    "lora_embedding_b": "lora_b",
    "lora_down": "lora_a",  # kohya sd-scripts, LyCORIS, OneTrainer
    "lora_up": "lora_b",
    "lora_mid": "lora_mid",  # LyCORIS, the core of a Tucker decomposition
    "lora_magnitude_vector": "lora_magnitude",  # peft, DoRA
    "dora_scale": "lora_magnitude",  # LyCORIS, OneTrainer
    "hada_w1_a": "loha_w1_a",  # LyCORIS, peft, OneTrainer
    "hada_w1_b": "loha_w1_b",
    "hada_w2_a": "loha_w2_a",
    "hada_w2_b": "loha_w2_b",
    "hada_t1": "loha_t1",
    "hada_t2": "loha_t2",
    **{role: role for role in ROLES if role.startswith("lokr_")},  # LyCORIS, peft
}

# Which role is the other factor of a role's product. A whole lokr_w1 or lokr_w2 is a factor of their Kronecker product;
# where one of the two is itself a product, its halves belong to each other and the whole one stays alone.
_PARTNER: dict[Role, Role] = {
    "lora_a": "lora_b",
    "lokr_w1": "lokr_w2",
    "lokr_w1_a": "lokr_w1_b",
    "lokr_w2_a": "lokr_w2_b",
    "loha_w1_a": "loha_w1_b",
    "loha_w2_a": "loha_w2_b",
}


# Where in a model a role was found, the parts of the name before and after: equal for the factors of one adapter.
_Place = tuple[tuple[str, ...], tuple[str, ...]]


def _locate(name: str, shape: Sequence[int]) -> tuple[Role, _Place] | None:
    parts = tuple(name.split("."))
    for i in reversed(range(len(parts))):
        role = _ROLE_OF_PART.get(parts[i].lower())
        if role is not None:
            # the bias of a lora_B layer lies beside its matrix and is not a factor of anything
            is_factor = role != "lora_magnitude"
            return None if is_factor and len(shape) < 2 else (role, (parts[:i], parts[i + 1 :]))
    return None


def role_of(name: str, shape: Sequence[int]) -> Role | None:
    """What a parameter is to an adapter.

    Known are the names of peft (``lora_A.default.weight``, ``lora_embedding_A.default``, ``hada_w1_a.default``,
    ``lora_magnitude_vector.default.weight``), kohya's sd-scripts and OneTrainer (``lora_down.weight``,
    ``lora_up.weight``) and LyCORIS (``lokr_w1``, ``lokr_w2_a``, ``hada_w1_a``, ``lora_mid``, ``dora_scale``), after
    any prefix.

    Args:
        name: Fully qualified name of the parameter, parts separated by dots.
        shape: Its global shape. A factor of a product has two dimensions or more; the bias of such a layer has no role.

    Returns:
        The role, or None for a parameter of no adapter. The two halves of an embedding's LoRA have the roles of any
        other: their product has the same form.

    Examples:
        >>> role_of("base_model.model.query.lora_A.default.weight", (8, 768))
        'lora_a'
        >>> role_of("lora_unet_mid_block_attn.lora_up.weight", (768, 8))
        'lora_b'
        >>> role_of("model.query.weight", (768, 768)) is None
        True
    """
    located = _locate(name, shape)
    return located[0] if located else None


def find_pairs(names: Sequence[str], shapes: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Which parameters are the two factors of one adapter's product.

    Pairs are: LoRA's A and B (inner sizes must agree: those of a grouped convolution do not make one product); LoKr's
    ``w1`` and ``w2`` where both are whole, else the halves ``a`` and ``b`` of the one that is not; LoHa's halves
    ``a`` and ``b`` of each product. Each parameter is in one pair at most; adapters of different names on one layer
    stay apart.

    Args:
        names: Fully qualified names.
        shapes: Global shapes, as many.

    Returns:
        ``[(first, second), …]`` indices into ``names``, in the order of the first: (A, B), (w1, w2) or (a, b).

    Raises:
        ValueError: There are not as many shapes as names.

    Examples:
        >>> find_pairs(["q.lora_A.weight", "v.lora_A.weight", "q.lora_B.weight"], [(4, 16), (4, 16), (16, 4)])
        [(0, 2)]
    """
    if len(names) != len(shapes):
        raise ValueError(f"find_pairs: {len(names)} names but {len(shapes)} shapes; give one shape for each name.")
    located = [_locate(name, shape) for name, shape in zip(names, shapes, strict=True)]
    index = {found: i for i, found in enumerate(located) if found}
    pairs = []
    for i, found in enumerate(located):
        partner = _PARTNER.get(found[0]) if found else None
        if found is None or partner is None:
            continue
        j = index.get((partner, found[1]))
        if j is not None and (partner != "lora_b" or shapes[i][0] == shapes[j][1]):
            pairs.append((i, j))
    return pairs
