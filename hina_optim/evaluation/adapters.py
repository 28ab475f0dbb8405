"""Find the adapters among named weights, and what each adds to its layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hina_optim.adapters.roles import role_of
from hina_optim.evaluation.rank import Hadamard, Kronecker, LoraSpectrum, Weights, lora_spectrum

__all__ = ["adapter_spectra", "adapter_weights"]


def adapter_weights(named: Mapping[str, Any]) -> dict[str, Weights]:
    """The change that every adapter makes to its layer, as its factors.

    Args:
        named: Weights by fully qualified name: a state dict, the file of an adapter, or ``named_parameters()`` as a
            dict, of LoRA, LoKr or LoHa in the names of peft, kohya, LyCORIS or OneTrainer.

    Returns:
        By adapter, in the order in which they begin, what :func:`~hina_optim.evaluation.lora_spectrum` takes. An
        adapter is called by the layer that it changes; where one layer has several, by the adapter's name as well
        (``…q_proj:style``). Not there are adapters that are not a plain product: with the core of a Tucker
        decomposition, on a grouped convolution, or with a factor missing. DoRA's magnitude is no part of the product.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name, value in named.items():
        parts = name.split(".")
        for i in reversed(range(len(parts))):
            role = role_of(parts[i], value.shape)
            if role is not None:
                place = (".".join(parts[:i]), ".".join(p for p in parts[i + 1 :] if p != "weight"))
                found.setdefault(place, {})[role] = value
                break
    built = {place: weights for place, roles in found.items() if (weights := _built(roles)) is not None}
    layers = [layer for layer, _ in built]
    return {
        f"{layer}:{adapter}" if layers.count(layer) > 1 else layer or adapter: weights
        for (layer, adapter), weights in built.items()
    }


def adapter_spectra(named: Mapping[str, Any], threshold: float = 0.01, energy: float = 0.9) -> dict[str, LoraSpectrum]:
    """The spectrum of every adapter among named weights.

    Args:
        named: As for :func:`adapter_weights`.
        threshold: As for :func:`~hina_optim.evaluation.lora_spectrum`.
        energy: As for :func:`~hina_optim.evaluation.lora_spectrum`.

    Raises:
        ValueError: There is no adapter, or one has values that are not finite.

    Example:
        >>> import torch
        >>> file = {"q.lora_down.weight": torch.randn(4, 32), "q.lora_up.weight": torch.randn(16, 4)}
        >>> {name: spectrum.effective_rank for name, spectrum in adapter_spectra(file).items()}
        {'q': 4}
    """
    adapters = adapter_weights(named)
    if not adapters:
        raise ValueError(
            f"adapter_spectra: none of the {len(named)} weights is a factor of a LoRA, LoKr or LoHa adapter; names "
            "look like 'q_proj.lora_A.default.weight' or 'q_proj.lokr_w1'."
        )
    return {name: lora_spectrum(weights, threshold, energy) for name, weights in adapters.items()}


def _built(roles: Mapping[str, Any]) -> Weights | None:
    if roles.keys() & {"lora_mid", "lokr_t2", "loha_t1", "loha_t2"}:
        return None
    if "lora_a" in roles and "lora_b" in roles:
        return _pair(roles["lora_a"], roles["lora_b"])
    halves = {
        name: roles.get(name) if name in roles else _pair(roles.get(f"{name}_b"), roles.get(f"{name}_a"))
        for name in ("lokr_w1", "lokr_w2", "loha_w1", "loha_w2")
    }
    for kind, make in (("lokr", Kronecker), ("loha", Hadamard)):
        first, second = halves[f"{kind}_w1"], halves[f"{kind}_w2"]
        if first is not None and second is not None:
            return make(first, second)
    return None


def _pair(a: Any, b: Any) -> tuple[Any, Any] | None:
    """``(A, B)`` where they are the factors of one product: the inner sides agree, and B has no kernel to speak of."""
    if a is None or b is None or a.shape[0] != b.shape[1] or any(side != 1 for side in b.shape[2:]):
        return None
    return a, b
