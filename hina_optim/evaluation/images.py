"""Judge generated images against the two ways in which an adapter over-fits: to edges, and to the background.

Images are NumPy arrays, torch tensors, or whatever ``numpy.array`` reads (a PIL image). One image at a time, in one of
these forms:

* *gray*: ``(H, W)``;
* *channels*: ``(H, W, C)`` or ``(C, H, W)`` with ``C`` 1 or 3 (RGB). The axis of such a size holds the channels; where
  the first and the last both have one, it is the first for a torch tensor and the last for everything else.

Values are scaled to [0, 1]: with ``value_range=(low, high)`` from that range, otherwise ``uint8`` from [0, 255] and
everything else as it is. Values outside their range are an error: an image in [-1, 1] is never taken for a dark one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hina_optim import arguments as rule

__all__ = ["evaluate_background_consistency", "evaluate_edge_quality"]

#: Of the structural similarity, in pixels.
_WINDOW = 7
#: By how much rounding may leave the range, as a share of it.
_SLACK = 1e-6

_RANGE = rule.Rule(
    "two finite numbers (low, high) with low < high, or None",
    lambda x: (
        x is None
        or (isinstance(x, (tuple, list)) and len(x) == 2 and all(map(math.isfinite, x)) and float(x[0]) < float(x[1]))
    ),
)
_THRESHOLDS = rule.Rule(
    "two finite numbers (low, high) with 0 <= low <= high",
    lambda x: isinstance(x, (tuple, list)) and len(x) == 2 and all(map(math.isfinite, x)) and 0 <= x[0] <= x[1],
)


def evaluate_edge_quality(
    generated: Any,
    reference: Any,
    *,
    value_range: tuple[float, float] | None = None,
    sigma: float = 1.0,
    thresholds: tuple[float, float] = (50 / 255, 150 / 255),
) -> float:
    """How well the edges of an image match those of its reference.

    Both images are made gray, Canny's detector makes a map of edges of each, and the maps are compared by their mean
    structural similarity over 7 × 7 windows. Edges that are missing (blur) and edges that are too many (over-sharpened
    outlines, halos) both lower it. Edges that moved count as different.

    Args:
        generated: The image to judge; see the module for its forms.
        reference: What it should look like, of the same height and width; at least 7 × 7.
        value_range: The values that mean black and white, in both images. None: see the module.
        sigma: Standard deviation of the smoothing before edges are looked for, in pixels, > 0.
        thresholds: Strength, as the norm of Sobel's derivatives of an image in [0, 1], at which an edge is followed
            and at which it is begun. The default is the usual (50, 150) of 8-bit images.

    Returns:
        A number in [-1, 1]; 1.0 for identical edges (two images without any edge included).

    Raises:
        ValueError: An image of another form, empty, not finite, or out of range; sizes that differ or are below 7; an
            argument that is not what is said above.
        ImportError: scikit-image is not installed; names the extra.

    References:
        J. Canny, "A Computational Approach to Edge Detection", IEEE Trans. PAMI 8 (1986). Z. Wang, A. Bovik, H.
        Sheikh, E. Simoncelli, "Image Quality Assessment: From Error Visibility to Structural Similarity", IEEE Trans.
        Image Processing 13 (2004).
    """
    owner = "evaluate_edge_quality"
    rule.check(owner, "sigma", sigma, rule.POSITIVE)
    rule.check(owner, "thresholds", thresholds, _THRESHOLDS)
    first = _image(owner, "generated", generated, value_range)
    second = _image(owner, "reference", reference, value_range)
    if first.shape[:2] != second.shape[:2]:
        raise ValueError(
            f"{owner}: generated is {_size(first)} and reference {_size(second)} pixels: resize one to the other."
        )
    if min(first.shape[:2]) < _WINDOW:
        raise ValueError(f"{owner}: an image of {_size(first)} pixels is too small: {_WINDOW}×{_WINDOW} at least.")
    try:
        from skimage.feature import canny
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ImportError(f"{owner} needs scikit-image: pip install 'hina-lightning[evaluation]'") from error
    low, high = thresholds
    maps = [
        canny(_gray(image).numpy(), sigma=sigma, low_threshold=low, high_threshold=high).astype(float)
        for image in (first, second)
    ]
    return float(structural_similarity(*maps, data_range=1.0, win_size=_WINDOW))


def evaluate_background_consistency(image: Any, mask: Any, *, value_range: tuple[float, float] | None = None) -> float:
    """How even the background of an image is: ``1 / (1 + variance)`` over its background pixels.

    The variance is that of the values in [0, 1], of each channel around the channel's own mean (an even blue is even),
    averaged over the channels. Only the background counts: the pixels of the subject are left out, not set to black.
    (The original design multiplies by ``1 − mask``, and the black subject then raises the variance of a bright
    background.)

    Args:
        image: See the module for its forms.
        mask: Marks the subject with 1 and the background with 0: ``(H, W)``, ``(H, W, 1)`` or ``(1, H, W)``, boolean
            or numbers in [0, 1]. In between, a pixel is background with the weight ``1 − mask``.
        value_range: The values that mean black and white. None: see the module.

    Returns:
        A number in [0.8, 1]: 1.0 for one even color, 0.8 for black and white in equal parts (the largest variance that
        values in [0, 1] can have is 0.25).

    Raises:
        ValueError: An image or mask of another form, empty, not finite, or out of range; sizes that differ; a mask that
            leaves no background; a ``value_range`` that is not one.

    Example:
        >>> import torch
        >>> image = torch.full((8, 8), 0.9)
        >>> image[2:6, 2:6] = 0.1
        >>> subject = image < 0.5
        >>> evaluate_background_consistency(image, subject)
        1.0
    """
    owner = "evaluate_background_consistency"
    values = _image(owner, "image", image, value_range)
    weight = 1 - _mask(owner, mask, values)
    total = weight.sum()
    if total <= 0:
        raise ValueError(f"{owner}: mask marks every pixel as subject, so that there is no background to judge.")
    mean = (weight * values).sum((0, 1)) / total
    variance = (weight * (values - mean).square()).sum((0, 1)) / total
    return float(1 / (1 + variance.mean()))


def _mask(owner: str, mask: Any, values: Tensor) -> Tensor:
    """A mask as float64 ``[H, W, 1]``."""
    given = _tensor(owner, "mask", mask)
    shape = tuple(given.shape)
    if given.ndim == 3 and 1 in (shape[0], shape[-1]):
        given = given.squeeze(0 if shape[0] == 1 else -1)
    if given.shape != values.shape[:2]:
        raise ValueError(f"{owner}: mask has shape {shape}, but the image is {_size(values)} pixels (H×W).")
    if given.min() < 0 or given.max() > 1:
        raise ValueError(
            f"{owner}: mask has values from {given.min():g} to {given.max():g}; they must be in [0, 1], 1 for the "
            "subject (divide an 8-bit mask by 255)."
        )
    return given.unsqueeze(-1)


def _image(owner: str, name: str, image: Any, value_range: tuple[float, float] | None) -> Tensor:
    """An image as float64 ``[H, W, C]`` in [0, 1], on the CPU."""
    rule.check(owner, "value_range", value_range, _RANGE)
    values = _tensor(owner, name, image)
    shape = tuple(values.shape)
    if values.ndim == 2:
        values = values.unsqueeze(-1)
    elif values.ndim == 3 and (shape[0] in (1, 3) or shape[-1] in (1, 3)):
        channels_first = shape[0] in (1, 3) and (isinstance(image, Tensor) or shape[-1] not in (1, 3))
        values = values.movedim(0, -1) if channels_first else values
    else:
        raise ValueError(
            f"{owner}: {name} has shape {shape}; it must be one image: (H, W), or (H, W, C) or (C, H, W) with 1 or 3 "
            "channels (drop an alpha channel, take one of a batch)."
        )
    low, high = value_range or ((0, 255) if _is_bytes(image, values) else (0, 1))
    scaled = (values - low) / (high - low)
    if scaled.min() < -_SLACK or scaled.max() > 1 + _SLACK:
        raise ValueError(
            f"{owner}: {name} has values from {values.min():g} to {values.max():g}, outside [{low:g}, {high:g}]: give "
            "value_range=(black, white)."
        )
    return scaled.clamp(0, 1)


def _tensor(owner: str, name: str, given: Any) -> Tensor:
    """Anything array-like as a float64 tensor on the CPU, not empty, all finite."""
    if not isinstance(given, Tensor):
        import numpy  # not needed by those who bring tensors

        try:
            given = torch.from_numpy(numpy.array(given))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{owner}: {name} is not an array of numbers: {error}") from error
    if given.is_complex():
        raise ValueError(f"{owner}: {name} is complex; it must be real.")
    values: Tensor = given.detach().to("cpu", torch.float64)
    if values.numel() == 0:
        raise ValueError(f"{owner}: {name} of shape {tuple(values.shape)} is empty.")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{owner}: {name} has values that are not finite (NaN or infinity).")
    return values


def _is_bytes(image: Any, values: Tensor) -> bool:
    dtype = getattr(image, "dtype", None)
    if dtype is None:  # a PIL image and nested lists have no dtype; only the former has a mode
        return getattr(image, "mode", None) in ("L", "RGB")
    return str(dtype).removeprefix("torch.") == "uint8"


def _gray(image: Tensor) -> Tensor:
    """Luminance ``[H, W]`` of ``[H, W, C]``, weights of ITU-R BT.709."""
    if image.shape[-1] == 1:
        return image[..., 0]
    return image @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=image.dtype)


def _size(image: Tensor) -> str:
    return f"{image.shape[0]}×{image.shape[1]}"
