"""What a method costs and changes at one setting, over all prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.records import Record
from analysis.rivals import METHODS
from analysis.speedup import Speedup, speedup_in, speedup_of

RESAMPLES = 2000


@dataclass(frozen=True)
class Point:
    """One method at one setting, over all prompts."""

    method: str
    knob: str
    prompts: int
    measured: Speedup
    """Over prompts, whose runs are timed one after the other."""
    ideal: float
    """The baseline's multiply-accumulates in the blocks over ours, mean over prompts."""
    lpips: float
    """Mean difference from the baseline."""
    interval: tuple[float, float]
    """Of the mean, 95 %, by resampling prompts."""
    worst: float
    ssim: float
    ssim_interval: tuple[float, float]
    ssim_worst: float
    psnr: float
    """Mean in dB over the pictures that differ from the baseline at all; infinite if none does."""
    psnr_interval: tuple[float, float]
    psnr_worst: float
    peak_bytes: int
    """That tensors of one run take at most."""

    @property
    def speedup(self) -> float:
        """The median over prompts of the baseline's seconds over ours."""
        assert self.measured.median is not None
        return self.measured.median


def points(lines: Sequence[Record]) -> list[Point]:
    """One for each method and setting, in the order of METHODS and of their speed."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for line in lines:
        groups.setdefault((line["method"], line["knob"]), []).append(line)
    found = [point(name, knob, group) for (name, knob), group in groups.items()]
    order = list(METHODS)
    return sorted(found, key=lambda one: (order.index(one.method), one.speedup))


def point(name: str, knob: str, lines: Sequence[Record]) -> Point:
    """One method at one setting."""
    lpips, ssim = (np.array([line[metric] for line in lines]) for metric in ("lpips", "ssim"))
    psnr = np.array([line["psnr"] for line in lines if line["psnr"] is not None])
    baseline, ours = ([line[whose] for line in lines] for whose in ("baseline_seconds", "seconds"))
    return Point(
        name,
        knob,
        len(lines),
        speedup_in(speedup_of(baseline, ours)),
        float(np.mean([line["speedup_ideal"] for line in lines])),
        float(lpips.mean()),
        bootstrap(lpips),
        float(lpips.max()),
        float(ssim.mean()),
        bootstrap(ssim),
        float(ssim.min()),
        float(psnr.mean()) if len(psnr) else np.inf,
        bootstrap(psnr) if len(psnr) else (np.inf, np.inf),
        float(psnr.min(initial=np.inf)),
        max(line["peak_bytes"] for line in lines),
    )


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean, by drawing as many values again and again, with a fixed seed."""
    chosen = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[chosen].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def short(value: float) -> str:
    """Two digits that count, without an exponent."""
    return np.format_float_positional(value, precision=2, fractional=False, trim="-")
