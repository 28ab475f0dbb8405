"""What a parameter is to an adapter, read from its name, and which parameters are one adapter or one product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

__all__ = ["ROLES", "Role", "clean_name", "find_adapters", "find_pairs", "role_of"]

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

#: Parts of a parameter's name that a wrapper adds: the same parameter keeps one name, compiled or not, wrapped or not.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})

# The name of a module or parameter, between dots and in lower case, that gives a role; one table for all libraries.
_ROLE_OF_PART: dict[str, Role] = {
    "lora_a": "lora_a",  # peft (lora_A), torchtune, sd-scripts' DyLoRA (a list of ranks)
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
    **{role: role for role in ROLES if role.startswith("lokr_")},  # LyCORIS, peft, OneTrainer
}

# (first factor, second factor, the core of a Tucker decomposition that may stand between them). A whole lokr_w1 or
# lokr_w2 is a factor of their Kronecker product; where one of the two is itself a product, its halves belong to each
# other and the whole one stays alone.
_PRODUCTS: tuple[tuple[Role, Role, Role | None], ...] = (
    ("lora_a", "lora_b", "lora_mid"),
    ("lokr_w1", "lokr_w2", None),
    ("lokr_w1_a", "lokr_w1_b", None),
    ("lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    ("loha_w1_a", "loha_w1_b", "loha_t1"),
    ("loha_w2_a", "loha_w2_b", "loha_t2"),
)


# Where in a model a role was found, the parts of the name before and after: equal for the parameters of one adapter.
_Place = tuple[tuple[str, ...], tuple[str, ...]]


def clean_name(name: str) -> str:
    """A fully qualified name without the parts that torch.compile, checkpoint wrappers and FSDP add.

    Examples:
        >>> clean_name("_fsdp_wrapped_module.q._orig_mod.weight")
        'q.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _locate(name: str, shape: Sequence[int]) -> tuple[Role, _Place] | None:
    parts = tuple(clean_name(name).split("."))
    for i in reversed(range(len(parts))):
        role = _ROLE_OF_PART.get(parts[i].lower())
        if role is not None:
            # the bias of a lora_B layer lies beside its matrix and is not a factor of anything
            if role != "lora_magnitude" and len(shape) < 2:
                return None
            # lora_A.default.weight is a module, lora_magnitude_vector.default may be a parameter: one adapter
            after = parts[i + 1 :]
            return role, (parts[:i], after[:-1] if after and after[-1] == "weight" else after)
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


def find_adapters(names: Sequence[str], shapes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Which parameters belong to one adapter of one layer.

    One adapter is all that has a role and the same name around it: LoRA's A and B with the core of a Tucker
    decomposition and DoRA's magnitude; all of ``lokr_w1*``, ``lokr_w2*`` and ``lokr_t2``; all of ``hada_*``. Adapters
    of different names on one layer are different ones, as are the numbered parts of a split layer
    (``lora_down.0.weight``, sd-scripts) and of DyLoRA, each of which has a product of its own.

    Args:
        names: Fully qualified names.
        shapes: Global shapes, as many.

    Returns:
        Ascending indices into ``names``, one list an adapter, in the order of their first. A list may have one member
        (a factor whose counterpart is frozen, for one); a parameter of no adapter is in none.

    Raises:
        ValueError: There are not as many shapes as names.

    Examples:
        >>> find_adapters(["q.lokr_w1", "q.weight", "q.lokr_w2_a", "q.lokr_w2_b"], [(2, 2), (8, 8), (4, 1), (1, 4)])
        [[0, 2, 3]]
    """
    return [sorted(roles.values()) for roles in _adapters(names, shapes, "find_adapters")]


def find_pairs(names: Sequence[str], shapes: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Which parameters are the two factors of one product.

    Pairs are: LoRA's A and B (inner sizes must agree: those of a grouped convolution do not make one product); LoKr's
    ``w1`` and ``w2`` where both are whole, else the halves ``a`` and ``b`` of the one that is not; LoHa's halves
    ``a`` and ``b`` of each product. Each parameter is in one pair at most; adapters of different names on one layer
    stay apart. Factors with the core of a Tucker decomposition between them (``lora_mid``, ``lokr_t2``, ``hada_t1``)
    are no pair: turned against the core they leave the layer as it is and give another product of their own.
    :func:`find_adapters` keeps them together.

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
    return sorted(pair for roles in _adapters(names, shapes, "find_pairs") for pair in _products(roles, shapes))


def _adapters(names: Sequence[str], shapes: Sequence[Sequence[int]], caller: str) -> list[dict[Role, int]]:
    """The parameters of each adapter by role, in the order of the first."""
    if len(names) != len(shapes):
        raise ValueError(f"{caller}: {len(names)} names but {len(shapes)} shapes; give one shape for each name.")
    found: dict[_Place, dict[Role, int]] = {}
    for i, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        located = _locate(name, shape)
        if located:
            found.setdefault(located[1], {})[located[0]] = i
    return list(found.values())


def _products(roles: dict[Role, int], shapes: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    for first, second, core in _PRODUCTS:
        if first in roles and second in roles and core not in roles:
            i, j = roles[first], roles[second]
            if first != "lora_a" or shapes[i][0] == shapes[j][1]:
                yield i, j
