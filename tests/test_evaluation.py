"""Edges, backgrounds and ranks: against what is known of each image and matrix, and against plain SVDs of products."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hina_optim.evaluation import (
    Hadamard,
    Kronecker,
    adapter_spectra,
    adapter_weights,
    analyze_lora_rank,
    evaluate_background_consistency,
    evaluate_edge_quality,
    lora_spectrum,
    singular_values,
)
from hina_optim.evaluation.grams import factors, gram_sides, spectra_of_many

F64 = torch.float64


def picture(size: int = 64) -> np.ndarray:
    """A bright square, a disk and a soft slope, in [0, 1]."""
    y, x = np.mgrid[:size, :size] / size
    image = 0.2 + 0.2 * x
    image[(abs(x - 0.3) < 0.15) & (abs(y - 0.3) < 0.15)] = 0.9
    image[(x - 0.7) ** 2 + (y - 0.65) ** 2 < 0.03] = 0.0
    return image


def colored(image: np.ndarray) -> np.ndarray:
    return np.stack([image, image**2, 1 - image], axis=-1)


def svd_of(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(matrix.to(F64).flatten(1))


# -- edges -------------------------------------------------------------------------------------------------------------


def test_identical_edges_are_one():
    image = picture()
    assert evaluate_edge_quality(image, image) == 1.0
    assert evaluate_edge_quality(np.full((9, 9), 0.5), np.zeros((9, 9))) == 1.0  # no edges in either


def test_blur_lowers_it_the_more_the_stronger():
    image = picture()
    scores = [evaluate_edge_quality(ndimage.gaussian_filter(image, s), image) for s in (0, 2, 5)]
    assert scores[0] == 1.0 and scores[0] > scores[1] > scores[2]


def test_over_sharpening_and_halos_lower_it():
    rng = np.random.default_rng(0)
    image = np.clip(ndimage.gaussian_filter(picture() + 0.05 * rng.standard_normal((64, 64)), 1), 0, 1)

    def sharpened(amount):
        return np.clip(image + amount * (image - ndimage.gaussian_filter(image, 2)), 0, 1)

    scores = [evaluate_edge_quality(sharpened(amount), image) for amount in (0, 3, 12)]
    assert scores[0] == 1.0 and scores[0] > scores[1] > scores[2]


def test_it_judges_edges_and_not_brightness():
    image = picture()
    assert evaluate_edge_quality(0.05 + 0.9 * image, image) > 0.95
    assert evaluate_edge_quality(np.roll(image, 8, axis=1), image) < 0.8  # the same edges elsewhere


@pytest.mark.parametrize("make", [picture, lambda: colored(picture())], ids=["gray", "rgb"])
def test_every_form_of_one_image_has_the_same_score(make):
    image, other = make(), ndimage.gaussian_filter(make(), 1.5)
    expected = evaluate_edge_quality(other, image)
    assert expected < 1
    first = np.moveaxis(image, -1, 0) if image.ndim == 3 else image[None]
    forms = {
        "tensor": torch.from_numpy(image).float(),
        "channels first": torch.from_numpy(first.copy()),
        "numpy channels first": first,
        "requires grad": torch.from_numpy(image).requires_grad_(),
        "nested lists": image.tolist(),
        "flipped twice": image[::-1].copy()[::-1],
    }
    for name, form in forms.items():
        assert evaluate_edge_quality(other, form) == pytest.approx(expected, abs=1e-9), name
    scaled = evaluate_edge_quality(other * 2 - 1, image * 2 - 1, value_range=(-1, 1))
    assert scaled == pytest.approx(expected, abs=1e-9)


def test_bytes_and_pil_images_are_scaled_by_255():
    from PIL import Image

    image = (colored(picture()) * 255).round().astype(np.uint8)
    other = (colored(ndimage.gaussian_filter(picture(), 1.5)) * 255).round().astype(np.uint8)
    expected = evaluate_edge_quality(other / 255, image / 255)
    assert expected < 1
    assert evaluate_edge_quality(other, image) == expected
    assert evaluate_edge_quality(torch.from_numpy(other), torch.from_numpy(image)) == expected
    assert evaluate_edge_quality(Image.fromarray(other), Image.fromarray(image)) == expected


def test_where_two_axes_could_hold_the_channels_the_library_decides():
    values = np.random.default_rng(0).random((3, 20, 3))
    values[..., 1] = 0.5
    mask = np.zeros((3, 20))
    last = evaluate_background_consistency(values, mask)
    assert last == pytest.approx(1 / (1 + values.reshape(-1, 3).var(0).mean()))
    first = evaluate_background_consistency(torch.from_numpy(values), torch.zeros(20, 3))
    assert first == pytest.approx(1 / (1 + values.reshape(3, -1).var(1).mean()))


def test_thresholds_and_sigma_decide_what_is_an_edge():
    image = np.full((32, 32), 0.5)
    image[:, 16:] = 0.53
    flat = np.full((32, 32), 0.5)
    assert evaluate_edge_quality(image, flat) == 1.0
    assert evaluate_edge_quality(image, flat, thresholds=(0.01, 0.02)) < 1
    noisy = np.clip(picture() + 0.2 * np.random.default_rng(0).standard_normal((64, 64)), 0, 1)
    assert evaluate_edge_quality(noisy, picture(), sigma=3) > evaluate_edge_quality(noisy, picture(), sigma=0.5)


GOOD = np.zeros((16, 16))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((np.full((16, 16), 2.0), GOOD), r"generated has values from 2 to 2, outside \[0, 1\]: give value_range"),
        ((GOOD, np.full((16, 16), -0.5)), "reference has values from -0.5"),
        ((np.full((16, 16), np.nan), GOOD), "generated has values that are not finite"),
        ((GOOD, np.zeros((16, 17))), "generated is 16×16 and reference 16×17 pixels"),
        ((np.zeros((6, 9)), np.zeros((6, 9))), "6×9 pixels is too small: 7×7"),
        ((np.zeros((0, 9)), GOOD), r"generated of shape \(0, 9\) is empty"),
        ((np.zeros(16), GOOD), r"generated has shape \(16,\); it must be one image"),
        ((np.zeros((16, 16, 4)), GOOD), "drop an alpha channel"),
        ((np.zeros((1, 3, 16, 16)), GOOD), "take one of a batch"),
        ((np.zeros((16, 16), complex), GOOD), "complex"),
        (("picture.png", GOOD), "generated is not an array of numbers"),
    ],
)  # fmt: skip
def test_images_that_are_none(images, message):
    with pytest.raises(ValueError, match=rf"evaluate_edge_quality: .*{message}"):
        evaluate_edge_quality(*images)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (dict(value_range=(1, 0)), r"value_range=\(1, 0\) is not valid"),
        (dict(value_range=(0, math.inf)), "value_range"),
        (dict(value_range=255), "value_range=255"),
        (dict(sigma=0), "sigma=0 is not valid"),
        (dict(thresholds=(0.3, 0.1)), "thresholds"),
        (dict(thresholds=0.1), "thresholds=0.1"),
    ],
)
def test_arguments_that_are_none(argument, message):
    with pytest.raises(ValueError, match=message):
        evaluate_edge_quality(GOOD, GOOD, **argument)


# -- background --------------------------------------------------------------------------------------------------------


def test_an_even_background_is_one_whatever_the_subject():
    image = np.full((12, 12), 0.9)
    image[3:6, 3:6] = np.random.default_rng(0).random((3, 3))
    mask = np.zeros((12, 12))
    mask[3:6, 3:6] = 1
    assert evaluate_background_consistency(image, mask) == pytest.approx(1.0, abs=1e-12)
    # multiplying by 1 - mask would count the black hole of the subject
    assert evaluate_background_consistency(image * (1 - mask), np.zeros((12, 12))) < 0.96


def test_it_is_one_over_one_plus_the_variance_of_the_background_pixels():
    rng = np.random.default_rng(0)
    image, mask = rng.random((20, 30, 3)), rng.random((20, 30)) < 0.4
    expected = 1 / (1 + image[~mask].var(0).mean())
    assert evaluate_background_consistency(image, mask) == pytest.approx(expected, rel=1e-12)
    for form in (torch.from_numpy(mask), mask[..., None], mask[None].astype(np.uint8)):
        assert evaluate_background_consistency(image, form) == pytest.approx(expected, rel=1e-12)


def test_its_range():
    board = np.indices((8, 8)).sum(0) % 2
    assert evaluate_background_consistency(board.astype(float), np.zeros((8, 8))) == pytest.approx(0.8)
    blue = np.zeros((8, 8, 3))
    blue[..., 2] = 1
    assert evaluate_background_consistency(blue, np.zeros((8, 8))) == 1.0  # an even color is even


def test_a_soft_mask_weighs():
    image = np.random.default_rng(0).random((9, 9))
    mask = np.random.default_rng(1).random((9, 9))
    mean = np.average(image, weights=1 - mask)
    expected = 1 / (1 + np.average((image - mean) ** 2, weights=1 - mask))
    assert evaluate_background_consistency(image, mask) == pytest.approx(expected, rel=1e-12)


def test_noise_lowers_it_and_bytes_equal_floats():
    rng = np.random.default_rng(0)
    scores = []
    for strength in (0, 20, 60):
        image = (128 + strength * rng.standard_normal((32, 32))).clip(0, 255).astype(np.uint8)
        scores.append(evaluate_background_consistency(image, np.zeros((32, 32))))
        assert scores[-1] == pytest.approx(evaluate_background_consistency(image / 255, np.zeros((32, 32))))
    assert scores[0] == 1.0 and scores[0] > scores[1] > scores[2] > 0.8


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((16, 16)), "no background"),
        (np.zeros((16, 15)), r"mask has shape \(16, 15\), but the image is 16×16"),
        (np.zeros((2, 16, 16)), r"mask has shape \(2, 16, 16\)"),
        (np.full((16, 16), 255, np.uint8), "divide an 8-bit mask by 255"),
        (np.full((16, 16), -1.0), "mask has values from -1 to -1"),
        (np.full((16, 16), np.nan), "mask has values that are not finite"),
    ],
)
def test_masks_that_are_none(mask, message):
    with pytest.raises(ValueError, match=rf"evaluate_background_consistency: .*{message}"):
        evaluate_background_consistency(GOOD, mask)


# -- rank --------------------------------------------------------------------------------------------------------------


def test_the_effective_rank_is_a_number_to_compare():
    weights = torch.randn(6, 40) * torch.tensor([1.0, 1.0, 1.0, 1.0, 1e-4, 0.0])[:, None]
    effective_rank = analyze_lora_rank(weights)
    assert type(effective_rank) is int and effective_rank == 4
    assert effective_rank < 5 and f"{effective_rank}" == "4"
    assert analyze_lora_rank(torch.zeros(3, 4)) == 0


def test_the_threshold_is_relative_to_the_largest():
    sigma = torch.tensor([5.0, 0.6, 0.051, 0.049, 0.0])
    for scale in (1.0, 1e-12, 1e12):
        assert analyze_lora_rank(torch.diag(sigma) * scale) == 3
        assert analyze_lora_rank(torch.diag(sigma) * scale, threshold=0.1) == 2


def test_measures_of_known_spectra():
    flat = lora_spectrum(3 * torch.eye(7))
    assert flat[:4] == (7, pytest.approx(7), pytest.approx(7), 7)
    one = lora_spectrum(torch.outer(torch.randn(5), torch.randn(9)))
    assert one[:4] == (1, pytest.approx(1, abs=1e-5), pytest.approx(1), 1)
    zero = lora_spectrum(torch.zeros(4, 4))
    assert zero[:4] == (0, 0.0, 0.0, 0) and zero.singular_values.tolist() == [0.0] * 4
    two = lora_spectrum(torch.diag(torch.tensor([3.0, 1.0])), energy=0.9)
    p = np.array([0.75, 0.25])
    assert two.entropy_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert two.stable_rank == pytest.approx(10 / 9)
    assert two.energy_rank == 1 and lora_spectrum(torch.diag(torch.tensor([3.0, 1.0])), energy=0.91).energy_rank == 2
    assert lora_spectrum(torch.full((3, 3), 1e-200, dtype=F64)).stable_rank == pytest.approx(1)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.integers(0, 2**16))
def test_a_pair_is_its_product(rows, columns, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, columns, generator=generator, dtype=F64)
    b = torch.randn(rows, rank, generator=generator, dtype=F64)
    found, expected = singular_values((a, b)), svd_of(b @ a)
    assert len(found) == min(rows, columns, rank)
    assert torch.allclose(found, expected[: len(found)], atol=1e-10)
    assert lora_spectrum((a, b))[:4] == pytest.approx(lora_spectrum(b @ a)[:4], rel=1e-6)


def test_a_pair_never_makes_the_product():
    """The product would need 8 TB."""
    a, b = torch.randn(4, 10**6), torch.randn(10**6, 4)
    b[:, 3] = 0
    assert analyze_lora_rank((a, b)) == 3


def test_kernels_are_matrices():
    kernel = torch.randn(5, 3, 3, 3)
    assert torch.allclose(singular_values(kernel), svd_of(kernel))
    down, up = torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1)
    product = torch.einsum("orxy,rihw->oihw", up, down)
    assert torch.allclose(singular_values((down, up)), svd_of(product)[:2], rtol=1e-5)
    assert analyze_lora_rank([down, up]) == 2
    assert analyze_lora_rank((down.numpy(), up.numpy())) == 2


def test_kronecker_and_hadamard_products():
    w1, a, b = torch.randn(3, 4, dtype=F64), torch.randn(2, 6, dtype=F64), torch.randn(5, 2, dtype=F64)
    expected = svd_of(torch.kron(w1, b @ a))
    found = singular_values(Kronecker(w1, (a, b)))
    assert torch.allclose(found, expected[: len(found)]) and expected[len(found) :].max() < 1e-10
    pairs = [(torch.randn(2, 11, dtype=F64), torch.randn(9, 2, dtype=F64)) for _ in range(2)]
    expected = svd_of((pairs[0][1] @ pairs[0][0]) * (pairs[1][1] @ pairs[1][0]))
    assert torch.allclose(singular_values(Hadamard(*pairs)), expected[:4])
    assert analyze_lora_rank(Hadamard(*pairs)) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32])
def test_dtypes_and_gradients(dtype):
    weights = torch.diag(torch.tensor([4, 2, 1])).to(dtype)
    assert analyze_lora_rank(weights) == 3
    assert singular_values(weights).dtype == F64
    assert analyze_lora_rank(nn.Parameter(torch.eye(3))) == 3


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.randn(4), r"weights has shape \(4,\); it must be a matrix"),
        (torch.randn(0, 4), "not empty"),
        (torch.tensor([[1.0, math.nan]]), "not finite"),
        ((torch.randn(2, 4), torch.full((3, 2), math.inf)), "B of shape .* not finite"),
        ((torch.randn(2, 4), torch.randn(3, 4)), r"A \(2, 4\) and B \(3, 4\); the first side of A"),
        ((torch.randn(2, 4), torch.randn(3, 2, 3, 3)), "a kernel of B is 1×1"),
        (torch.randn(2, 2, dtype=torch.complex64), "complex"),
        ("lora.safetensors", "not a matrix, nor a pair"),
        ({"lora_A": torch.randn(2, 2)}, "not a matrix, nor a pair"),
        (Hadamard(torch.randn(2, 2), torch.randn(2, 2)), "must be a pair"),
        (Hadamard(*[(torch.randn(2, n), torch.randn(5, 2)) for n in (3, 4)]), r"\(5, 3\) and \(5, 4\)"),
    ],
)  # fmt: skip
def test_weights_that_are_none(weights, message):
    with pytest.raises(ValueError, match=rf"analyze_lora_rank: .*{message}"):
        analyze_lora_rank(weights)


@pytest.mark.parametrize("value", [0, 1, -0.1, math.nan, "a"])
def test_shares_that_are_none(value):
    with pytest.raises(ValueError, match="threshold"):
        analyze_lora_rank(torch.eye(2), value)
    with pytest.raises(ValueError, match="energy"):
        lora_spectrum(torch.eye(2), energy=value)


# -- adapters of real libraries ----------------------------------------------------------------------------------------


def adapted(config) -> nn.Module:
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8, bias=False)), config)
    for name, p in model.named_parameters():
        if "lora" in name or "lokr" in name or "hada" in name:
            nn.init.normal_(p)
    return model


def peft_config(kind: str):
    import peft

    both = {"target_modules": ["0", "1"]}
    return {
        "lora": lambda: peft.LoraConfig(r=3, **both),
        "dora": lambda: peft.LoraConfig(r=3, use_dora=True, **both),
        "loha": lambda: peft.LoHaConfig(r=2, **both),
        "lokr": lambda: peft.LoKrConfig(r=2, **both),
        "lokr both": lambda: peft.LoKrConfig(r=1, decompose_both=True, **both),
    }[kind]()


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "lokr both"])
def test_adapters_of_peft_have_the_rank_of_what_they_add(kind):
    model = adapted(peft_config(kind))
    found = adapter_spectra(dict(model.named_parameters()))
    assert list(found) == ["base_model.model.0", "base_model.model.1"]
    for name, spectrum in found.items():
        delta = model.get_submodule(name).get_delta_weight("default").detach()
        expected = lora_spectrum(delta)
        # the factor alpha / r is no part of a rank
        assert spectrum[:4] == pytest.approx(expected[:4], rel=1e-3)


def test_two_adapters_on_one_layer_are_told_apart():
    model = adapted(peft_config("lora"))
    model.add_adapter("style", peft_config("lora"))
    assert list(adapter_weights(dict(model.named_parameters()))) == [
        f"base_model.model.{i}:{adapter}" for i in (0, 1) for adapter in ("default", "style")
    ]


def test_names_of_kohya_and_what_is_no_plain_product():
    file = {
        "lora_unet_q.lora_down.weight": torch.randn(4, 10),
        "lora_unet_q.lora_up.weight": torch.randn(6, 4),
        "lora_unet_q.alpha": torch.tensor(4.0),
        "conv.lora_down.weight": torch.randn(4, 3, 1, 1),
        "conv.lora_mid.weight": torch.randn(4, 4, 3, 3),
        "conv.lora_up.weight": torch.randn(6, 4, 1, 1),
        "half.lora_down.weight": torch.randn(4, 10),
        "grouped.lora_down.weight": torch.randn(4, 2, 3, 3),
        "grouped.lora_up.weight": torch.randn(6, 2, 1, 1),
    }
    assert {name: s.effective_rank for name, s in adapter_spectra(file).items()} == {"lora_unet_q": 4}
    with pytest.raises(ValueError, match="none of the 1 weights is a factor"):
        adapter_spectra({"q.weight": torch.randn(4, 4)})


# -- many at once ------------------------------------------------------------------------------------------------------


def everything() -> dict[str, object]:
    torch.manual_seed(0)
    a, b, c, d = torch.randn(3, 20), torch.randn(9, 3), torch.randn(2, 20), torch.randn(9, 2)
    return {
        "tall": torch.randn(30, 4),
        "wide kernel": torch.randn(4, 5, 3),
        "pair": (a, b),
        "deficient": (torch.cat([a[:2], a[:1]]), b),
        "zero": (a, torch.zeros(9, 3)),
        "kron": Kronecker(torch.randn(3, 4), (a, b)),
        "hadamard": Hadamard((a, b), (c, d)),
        "bf16": (a.bfloat16(), b.bfloat16()),
    }


def test_gram_matrices_give_the_same_ranks():
    named = everything()
    found = spectra_of_many(named)
    assert list(found) == list(named)
    for name, weights in named.items():
        assert found[name][:4] == pytest.approx(lora_spectrum(weights)[:4], rel=1e-6), name
    assert found["zero"].effective_rank == 0 and found["deficient"].effective_rank == 2
    assert spectra_of_many({}) == {}
    assert [gram_sides(w) for w in named.values()] == [[4], [4], [3, 3], [3, 3], [3, 3], [3, 3, 3], [6, 6], [3, 3]]
    assert sum(1 for _ in factors(named["hadamard"])) == 4


def test_weights_that_are_not_finite_spoil_only_themselves():
    named = everything()
    named["pair"][0][0, 0] = math.nan
    found = spectra_of_many({"pair": named["pair"], "tall": named["tall"]})
    assert found["pair"] is None and found["tall"].effective_rank == 4


def sharded(rank: int, folder: str) -> None:
    """One of two processes: weights cut by rows, columns, and not evenly."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    named = everything()
    a, b = (distribute_tensor(x, mesh, [Shard(dim)]) for x, dim in zip(named["pair"], (0, 1), strict=True))
    cut = {"pair": (a, b), "tall": distribute_tensor(named["tall"], mesh, [Shard(0)])}
    found = spectra_of_many(cut)
    for name in cut:
        assert found[name][:4] == pytest.approx(lora_spectrum(named[name])[:4]), name
        assert lora_spectrum(cut[name])[:4] == pytest.approx(found[name][:4], rel=1e-6)
    dist.destroy_process_group()


def test_shards_count_as_the_whole(tmp_path):
    torch.multiprocessing.start_processes(sharded, (str(tmp_path),), nprocs=2, start_method="fork")


# -- what it needs -----------------------------------------------------------------------------------------------------


def test_torch_is_enough_for_all_but_edges():
    code = """
import sys
for name in ("skimage", "numpy", "scipy"):
    sys.modules[name] = None
import torch
from hina_optim.evaluation import analyze_lora_rank, evaluate_background_consistency, evaluate_edge_quality
print(analyze_lora_rank(torch.eye(3)), evaluate_background_consistency(torch.ones(4, 4), torch.zeros(4, 4)))
try:
    evaluate_edge_quality(torch.ones(9, 9), torch.ones(9, 9))
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "3 1.0",
        "evaluate_edge_quality needs scikit-image: pip install 'hina-lightning[evaluation]'",
    ]
