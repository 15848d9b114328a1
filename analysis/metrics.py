"""How far two pictures are apart: LPIPS (or Shift-Tolerant LPIPS), SSIM and PSNR. A difference, not a quality."""

import functools
import importlib.util
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from analysis.pictures import Picture, Video, is_video

SQUEEZENET_URL = "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth"
REACH_SECONDS = 3.0
"""How long to wait for the backbone's host before doing without."""
SHIFT = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
SCALE = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)


@dataclass(frozen=True)
class PerceptualDistance:
    """A named distance of two pictures, 0 for equal ones; call it with two `Picture`s of one size."""

    name: str
    distance: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, ours: Picture, theirs: Picture) -> float:
        with torch.no_grad():
            return float(self.distance(_signed(ours), _signed(theirs)))


def ssim(ours: Picture, theirs: Picture) -> float:
    """Structural similarity in [-1, 1], 1 for equal pictures (scikit-image, 7x7 window, mean over channels)."""
    return float(structural_similarity(ours, theirs, channel_axis=-1, data_range=255))


def psnr(ours: Picture, theirs: Picture) -> float:
    """Peak signal-to-noise ratio in dB, infinite for equal pictures."""
    if np.array_equal(ours, theirs):
        return float("inf")
    return float(peak_signal_noise_ratio(ours, theirs, data_range=255))


def difference(ours: Picture | Video, theirs: Picture | Video, distance: PerceptualDistance) -> dict[str, Any]:
    """LPIPS, SSIM and PSNR (None if infinite); of videos the means over frames, each frame's, and which frame is the worst."""
    if not is_video(ours):
        ratio = psnr(ours, theirs)
        return {"lpips": distance(ours, theirs), "ssim": ssim(ours, theirs), "psnr": ratio if np.isfinite(ratio) else None}
    pairs = list(zip(ours, theirs, strict=True))
    lpips, similarity = [distance(a, b) for a, b in pairs], [ssim(a, b) for a, b in pairs]
    ratio = psnr(ours, theirs)
    return {
        "lpips": float(np.mean(lpips)),
        "ssim": float(np.mean(similarity)),
        "psnr": ratio if np.isfinite(ratio) else None,
        "lpips_of_frames": lpips,
        "ssim_of_frames": similarity,
        "worst_frame": int(np.argmax(lpips)),
    }


@functools.cache
def perceptual_distance() -> PerceptualDistance:
    """LPIPS with SqueezeNet where its backbone is cached or can be fetched, else Shift-Tolerant LPIPS from its wheel."""
    backbone = squeezenet_file()
    return lpips_squeeze(backbone) if backbone else shift_tolerant_lpips()


def squeezenet_file() -> Path | None:
    """The SqueezeNet backbone in torch's hub cache, fetched if its host answers at once; None without."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / SQUEEZENET_URL.rsplit("/", 1)[-1]
    if path.exists():
        return path
    try:
        urllib.request.urlopen(SQUEEZENET_URL, timeout=REACH_SECONDS).close()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(SQUEEZENET_URL, str(path), hash_prefix="b8a52dc0", progress=False)
    except (OSError, urllib.error.URLError, RuntimeError):
        return None
    return path


def lpips_squeeze(backbone: Path) -> PerceptualDistance:
    """The `lpips` package (Zhang et al. 2018) with SqueezeNet. The weights are read without unpickling code."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips builds its network with arguments that torchvision calls old
        model = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False).eval()
    weights = torch.load(backbone, map_location="cpu", weights_only=True)
    for part in (part for name, part in model.net.named_children() if name.startswith("slice")):
        for name, layer in part.named_children():
            prefix = f"features.{name}."
            layer.load_state_dict({key.removeprefix(prefix): w for key, w in weights.items() if key.startswith(prefix)})
    return PerceptualDistance("LPIPS (SqueezeNet)", model)


def shift_tolerant_lpips() -> PerceptualDistance:
    """Shift-Tolerant LPIPS (Ghildyal and Liu 2022) with the AlexNet weights that its wheel carries.

    Only the weight file is used: importing the package would need IPython and torchsummary.
    """
    spec = importlib.util.find_spec("stlpips_pytorch")
    assert spec is not None and spec.submodule_search_locations, "requirements.txt installs stlpips-pytorch"
    file = Path(next(iter(spec.submodule_search_locations))) / "weights" / "vST0.0" / "alex_shift_tolerant.pth"
    weights = torch.load(file, map_location="cpu", weights_only=True)

    def distance(ours: Tensor, theirs: Tensor) -> Tensor:
        pairs = zip(_alex_features(weights, ours), _alex_features(weights, theirs), strict=True)
        terms = [
            F.conv2d((F.normalize(a, eps=1e-10) - F.normalize(b, eps=1e-10)).square(), weights[f"lin{k}.model.1.weight"]).mean()
            for k, (a, b) in enumerate(pairs)
        ]
        return torch.stack(terms).sum()

    return PerceptualDistance("Shift-Tolerant LPIPS (AlexNet)", distance)


def _alex_features(weights: dict[str, Tensor], picture: Tensor) -> list[Tensor]:
    """The five feature maps of the anti-aliased AlexNet; after each stride a 3x3 blur takes every second value."""

    def conv(place: str, x: Tensor, padding: int) -> Tensor:
        return F.conv2d(x, weights[f"net.{place}.weight"], weights[f"net.{place}.bias"], padding=padding)

    def blur(place: str, x: Tensor) -> Tensor:
        kernel = weights[f"net.{place}.filt"]
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=len(kernel))

    first = F.relu(blur("slice1.1", conv("slice1.0", (picture - SHIFT) / SCALE, 2)))
    second = F.relu(conv("slice2.5", blur("slice2.4", F.max_pool2d(first, 3, 1)), 2))
    third = F.relu(conv("slice3.9", blur("slice3.8", F.max_pool2d(second, 3, 1)), 1))
    fourth = F.relu(conv("slice4.11", third, 1))
    fifth = F.relu(conv("slice5.13", fourth, 1))
    return [first, second, third, fourth, fifth]


def _signed(picture: Picture) -> Tensor:
    """uint8 (h, w, 3) -> float (1, 3, h, w) in [-1, 1]."""
    return torch.tensor(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
