"""Spectrum: at intervals, which directions hold the energy of a matrix; for penalty, emphasis and decay by rank."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hina_optim import arguments as rule
from hina_optim.techniques.base import Flow, ParamInfo, PeriodicTechnique, Relations, Slot

__all__ = ["MAX_SIDE", "RANK_TARGET", "Spectrum", "acts_on_left", "has_spectrum", "multiply", "side"]

#: Longest side of a Gram matrix. Spectra are for adapters and other low-rank factors: three matrices of this side are
#: remembered for each parameter, and the eigenvalues of one cost side³.
MAX_SIDE = 256

RANK_TARGET = rule.Rule(
    "a rank (an integer >= 1) or a share of energy to keep (a float in (0, 1))",
    lambda x: rule.INTERVAL.holds(x) or (isinstance(x, float) and 0 < x < 1),
)


def _view(info: ParamInfo) -> tuple[int, int]:
    rows = info.shape[0]
    return rows, info.numel // rows if rows else 0


def _is_half(info: ParamInfo, role: str) -> bool:
    """Whether this is half of the product ``B·A`` whose inner side is its first (A) or last (B) side."""
    if not info.paired or info.role != role or len(info.shape) < 2:
        return False
    return role == "lora_a" or _view(info)[1] == info.shape[1]


def acts_on_left(info: ParamInfo) -> bool:
    """Whether the Gram matrix is that of the rows (``M·Mᵀ``) rather than of the columns (``Mᵀ·M``).

    Always the inner side for half of a LoRA pair, so that both halves meet there; else the shorter side.
    """
    if _is_half(info, "lora_a"):
        return True
    if _is_half(info, "lora_b"):
        return False
    rows, columns = _view(info)
    return rows <= columns


def side(info: ParamInfo) -> int:
    """Side ``s`` of the Gram matrix: the rank for half of a LoRA pair, else the shorter side of the matrix view."""
    rows, columns = _view(info)
    return rows if acts_on_left(info) else columns


def has_spectrum(info: ParamInfo) -> bool:
    """Whether a parameter is a matrix, not empty, with a side of at most :data:`MAX_SIDE`."""
    return len(info.shape) >= 2 and info.numel > 0 and side(info) <= MAX_SIDE


def multiply(x: Tensor, small: Tensor, info: ParamInfo) -> Tensor:
    """``small · X`` or ``X · small`` in the matrix view of ``x``.

    Args:
        x: ``[N, *info.shape]``.
        small: ``[N, s, s]``, on the side that :func:`acts_on_left` names.
        info: What ``x`` is.

    Returns:
        ``[N, *info.shape]``.
    """
    matrix = x.reshape(x.shape[0], x.shape[1], -1)
    return (small @ matrix if acts_on_left(info) else matrix @ small).reshape(x.shape)


def _wide(x: Tensor) -> Tensor:
    """Float64 where the device has it: a Gram matrix squares the condition number."""
    return x if x.device.type == "mps" else x.to(torch.float64)


class Spectrum(PeriodicTechnique):
    """Remember, from the Gram matrix of a parameter, what lies beyond its leading singular values.

    For a matrix ``M`` (first dimension × all others) with singular values ``σ₁ >= σ₂ >= …``, let ``k`` be
    ``rank_target``, or the least ``k`` whose ``σ₁² + … + σₖ²`` is at least that share of the sum of all. From the
    Gram matrix of one side, ``G = E Σ² Eᵀ`` of shape ``[s, s]``, two small matrices follow, never a singular vector
    of ``M``'s size:

    * ``rank_coefficient`` ``K``: the gradient of the tail ``σₖ₊₁ + σₖ₊₂ + …`` is ``K·M`` (rows) or ``M·K`` (columns)
      with ``K = Eₜ Σₜ⁻¹ Eₜᵀ`` over the tail ``t``.
    * ``emphasis_projection`` ``P = Eₕ Eₕᵀ``: projects on the leading ``k`` singular directions ``h``.
    * ``decay_matrix`` ``D = E·diag(w)·Eᵀ``, on request: ``D·M`` (or ``M·D``) weighs the singular values, those of value
      zero fully (``w = 1``), the others by their rank, ``wᵢ = (i-1)/(r-1)`` with ``r`` the shorter side of ``M``: from
      0 for the leading one to 1 for the last. Zero for a matrix of zeros. Half of a LoRA pair has that of its own.

    For a LoRA pair the tail is that of the *product* ``B·A``, which is never formed. With
    ``G_A = A·Aᵀ = E_a S_a² E_aᵀ``, ``G_B = Bᵀ·B = E_b S_b² E_bᵀ`` and the singular value decomposition
    ``S_b E_bᵀ E_a S_a = X Σ Yᵀ`` (all ``[r, r]``)::

        dA = (E_b S_b  Xₜ Yₜᵀ S_a⁻¹ E_aᵀ) · A
        dB = B · (E_b S_b⁻¹ Xₜ Yₜᵀ S_a  E_aᵀ)

    All are zero where there is no tail (rank <= k), before the first measurement, and where ``B`` is zero. A singular
    value below ``√(s·eps)·σ₁`` (about 1e-3·σ₁ for ``s = 8`` in float32) counts as zero: a Gram matrix does not
    resolve it.

    Applies to matrices with ``s <= MAX_SIDE``; ``s`` is the inner side (the rank) for half of a LoRA pair, else the
    shorter side. State: three or four ``[s, s]`` matrices a parameter, float32, because eigenvalues near zero decide.

    Args:
        rank_target: Rank to keep (an integer >= 1), or share of the energy to keep (a float in (0, 1)).
        interval: Steps from one measurement to the next, an integer >= 1.
        decay: Whether to keep ``decay_matrix``, for
            :class:`~hina_optim.techniques.rank_aware_decay.RankAwareDecay`.

    Raises:
        ValueError: An argument is not what is said above.

    References:
        Subgradient of a sum of singular values: G. A. Watson, "Characterization of the subdifferential of some matrix
        norms", Linear Algebra and its Applications 170 (1992). The Gram form for products is this project's own.
    """

    name: ClassVar[str] = "spectrum"
    whole: ClassVar[tuple[str, ...]] = ("param",)
    whole_is_small: ClassVar[bool] = True
    population: ClassVar[tuple[str, ...]] = ("gram", "rank_coefficient", "emphasis_projection")

    def __init__(self, rank_target: int | float = 0.9, interval: int = 10, decay: bool = False) -> None:
        rule.check("Spectrum", "rank_target", rank_target, RANK_TARGET)
        rule.check("Spectrum", "interval", interval, rule.INTERVAL)
        rule.check("Spectrum", "decay", decay, rule.FLAG)
        self.rank_target = rank_target
        self.interval = interval
        self.decay = decay
        if decay:  # what is not asked for is not remembered
            self.population = (*type(self).population, "decay_matrix")  # type: ignore[misc]

    def applies(self, info: ParamInfo) -> bool:
        """Matrices with a short side only."""
        return has_spectrum(info)

    def measures(self, info: ParamInfo) -> bool:
        """The population is every parameter that has a spectrum."""
        return has_spectrum(info)

    def slots(self, info: ParamInfo) -> tuple[Slot, ...]:
        """The Gram matrix as last measured, and what :meth:`refresh` makes of it."""
        s = side(info)
        return tuple(Slot(name, shape=(s, s), precision="fp32") for name in self.population)

    def whole_matrix(self, flow: Flow, *complete: Tensor) -> Tensor:
        """The Gram matrix ``[N, s, s]``, summed in float64."""
        (param,) = complete
        matrix = _wide(param.reshape(param.shape[0], param.shape[1], -1))
        gram = matrix @ matrix.mT if acts_on_left(flow.info) else matrix.mT @ matrix
        return gram.to(param.dtype)

    def settle(self, flow: Flow, totals: dict[str, Tensor]) -> None:
        """Keep the Gram matrix."""
        flow.new["gram"] = flow["spectrum.whole"]

    def refresh(self, states: dict[str, Tensor], infos: list[ParamInfo], relations: Relations) -> dict[str, Tensor]:
        """Coefficients and projections from the Gram matrices of all parameters with the same ``s``.

        A Gram matrix that is not finite, or a result that is not, leaves the old one in force.
        """
        partners = relations.partners
        gram = states["gram"]
        resolution = gram.shape[-1] * torch.finfo(gram.dtype).eps
        # eigh raises on NaN, for the whole batch
        valid = torch.isfinite(gram).flatten(1).all(1)
        values, vectors = torch.linalg.eigh(_wide(torch.where(valid[:, None, None], gram, 0)))
        values, vectors = values.flip(-1), vectors.flip(-1)
        sigma = torch.where(values > resolution * values[:, :1], values, 0).clamp_min(0).sqrt()

        leading = self._leading(sigma)
        fresh: dict[str, tuple[Tensor, Tensor]] = {}
        if self.decay:
            fresh["decay_matrix"] = _sandwich(vectors, _growth(sigma, infos), vectors), valid
        projection = _sandwich(vectors, (leading & (sigma > 0)).to(sigma.dtype), vectors)
        coefficient = _sandwich(vectors, torch.where(leading, 0, _inverse(sigma)), vectors)
        pairs = [
            (i, j)
            for i, j in enumerate(partners.tolist())
            if j >= 0 and _is_half(infos[i], "lora_a") and _is_half(infos[j], "lora_b")
        ]
        if pairs:
            a, b = torch.tensor(pairs, device=gram.device).unbind(1)
            of_a, of_b = self._product(vectors[a], sigma[a], vectors[b], sigma[b], resolution)
            coefficient = coefficient.index_copy(0, a, of_a).index_copy(0, b, of_b)
            valid = valid.index_copy(0, a, valid[a] & valid[b]).index_copy(0, b, valid[a] & valid[b])
        fresh |= {"rank_coefficient": (coefficient, valid), "emphasis_projection": (projection, valid)}
        return {name: _or_old(value, states[name], usable) for name, (value, usable) in fresh.items()}

    def _leading(self, sigma: Tensor) -> Tensor:
        """Which of the descending singular values ``[P, s]`` are among the leading ``k``."""
        if isinstance(self.rank_target, int):
            return (torch.arange(sigma.shape[-1], device=sigma.device) < self.rank_target).expand_as(sigma)
        energy = sigma.square()
        before = energy.cumsum(-1) - energy
        return before < self.rank_target * energy.sum(-1, keepdim=True)

    def _product(self, e_a: Tensor, s_a: Tensor, e_b: Tensor, s_b: Tensor, resolution: float) -> tuple[Tensor, Tensor]:
        """Coefficients of A and B, ``[Q, r, r]`` each, for the tail of the product ``B·A``."""
        core = s_b[:, :, None] * (e_b.mT @ e_a) * s_a[:, None, :]
        x, sigma, yt = torch.linalg.svd(core)
        sigma = torch.where(sigma > resolution * sigma[:, :1], sigma, 0)
        tail = (~self._leading(sigma) & (sigma > 0)).to(sigma.dtype)
        polar = _sandwich(x, tail, yt.mT)
        of_a = e_b @ (s_b[:, :, None] * polar * _inverse(s_a)[:, None, :]) @ e_a.mT
        of_b = e_b @ (_inverse(s_b)[:, :, None] * polar * s_a[:, None, :]) @ e_a.mT
        return of_a, of_b


def _inverse(sigma: Tensor) -> Tensor:
    """``1/σ``, and 0 where ``σ`` is 0."""
    return torch.where(sigma > 0, 1 / torch.where(sigma > 0, sigma, 1), 0)


def _growth(sigma: Tensor, infos: list[ParamInfo]) -> Tensor:
    """Weights ``[P, s]`` of the descending singular values: 0 for the leading one … 1 for the last, and beyond."""
    last = torch.tensor([max(min(_view(info)) - 1, 1) for info in infos], dtype=sigma.dtype, device=sigma.device)
    order = torch.arange(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device)
    growth = torch.where(sigma > 0, order / last[:, None], 1)
    return growth * (sigma[:, :1] > 0)


def _sandwich(left: Tensor, diagonal: Tensor, right: Tensor) -> Tensor:
    """``left · diag(diagonal) · rightᵀ``, batched."""
    return (left * diagonal[:, None, :]) @ right.mT


def _or_old(new: Tensor, old: Tensor, valid: Tensor) -> Tensor:
    new = new.to(old.dtype)
    usable = valid & torch.isfinite(new).flatten(1).all(1)
    return torch.where(usable[:, None, None], new, old)
