"""The metrics against published reference values, and what must hold for any picture."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis.metrics import lpips_squeeze, psnr, shift_tolerant_lpips, ssim

SHARED = Path(__file__).resolve().parents[2] / "shared"
BACKBONE = SHARED / "torch_home" / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"


def pair(name: str) -> np.ndarray:
    file = SHARED / "lpips_pairs" / f"{name}.png"
    if not file.exists():
        pytest.skip("the reference pictures are not beside this checkout")
    return np.asarray(Image.open(file).convert("RGB"))


def noisy(strength: float) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    picture = np.zeros((64, 64, 3)) + np.linspace(40, 200, 64)[:, None, None]
    return picture.astype(np.uint8), (picture + strength * random.standard_normal(picture.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("other", "expected"), [("ex_p0", 0.71105), ("ex_p1", 0.14790)])
def test_lpips_gives_the_packages_own_values(other: str, expected: float) -> None:
    if not BACKBONE.exists():
        pytest.skip("the SqueezeNet backbone is not beside this checkout")
    assert lpips_squeeze(BACKBONE)(pair("ex_ref"), pair(other)) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(("other", "expected"), [("ex_p0", 0.77776), ("ex_p1", 0.13202)])
def test_shift_tolerant_lpips_gives_its_packages_values(other: str, expected: float) -> None:
    assert shift_tolerant_lpips()(pair("ex_ref"), pair(other)) == pytest.approx(expected, abs=2e-5)


def test_shift_tolerant_lpips_is_zero_for_equal_pictures_and_grows_with_noise() -> None:
    distance = shift_tolerant_lpips()
    assert distance(noisy(0)[0], noisy(0)[1]) == 0.0
    assert 0 < distance(*noisy(5)) < distance(*noisy(40))


def test_ssim_and_psnr_of_equal_and_of_noisy_pictures() -> None:
    picture, same = noisy(0)
    assert ssim(picture, same) == 1.0
    assert math.isinf(psnr(picture, same))
    assert ssim(*noisy(40)) < ssim(*noisy(5)) < 1


def test_psnr_is_its_definition() -> None:
    black, gray = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 16, np.uint8)
    assert psnr(black, gray) == pytest.approx(20 * math.log10(255 / 16))
