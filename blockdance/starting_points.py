"""Where to start with large models: the paper's fractions, or what was measured elsewhere, and which of both it is.

point = starting_point(pipe)
with accelerate(pipe, point.config, storage=point.storage) as trace:
    video = pipe("a red apple falls").frames[0]

`plan` finds a schedule of one's own: it measures the very model, with one's own prompts, steps and resolution.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from blockdance.adapters import transformer_of
from blockdance.errors import ConfigError
from blockdance.schedule import ReuseConfig, check_cutoff, fixed_schedule
from blockdance.scheduled import depth_of
from blockdance.storage import PAPER, StorageRule


@dataclass(frozen=True)
class Measured:
    """What somebody else measured with these settings, on a machine that is not known here."""

    speedup: float
    """Baseline seconds over those with reuse."""
    decibels: float
    """PSNR, as it was reported."""

    def __str__(self) -> str:
        return f"{self.speedup:g}x at {self.decibels:g} dB"


@dataclass(frozen=True)
class StartingPoint:
    """Settings to begin with, for one model."""

    model: str
    transformer: str
    """Its diffusers class."""
    num_blocks: int
    """L."""
    steps: int
    """Sampling steps: those that were measured with, or else the default of the model's diffusers pipeline."""
    skipped: Fraction
    """The share of the blocks that a reuse step skips, in (0, 1): the cutoff block as a fraction of the depth."""
    reuse_interval: int
    """The paper's N."""
    window: tuple[float, float]
    """Where reuse starts and ends, in fractions of the steps."""
    source: str
    """Where the numbers are from; it begins with `the paper's`, `measured elsewhere` or `derived`."""
    measured: Measured | None = None
    """None: nobody is known to have measured these settings on this model."""
    storage: StorageRule = PAPER
    """To be given to `accelerate` with the config."""

    @property
    def cutoff_block(self) -> int:
        """The paper's i."""
        return min(max(0, round(self.skipped * self.num_blocks) - 1), self.num_blocks - 2)

    @property
    def config(self) -> ReuseConfig:
        return ReuseConfig(self.reuse_interval, self.cutoff_block, *self.window)

    def ideal_speedup(self, steps: int | None = None) -> float:
        """From exact block counts; with as many sampling steps, by default `self.steps`."""
        schedule = fixed_schedule(self.config, self.steps if steps is None else steps, self.num_blocks)
        return schedule.ideal_speedup(self.num_blocks)


PAPERS = Fraction(21, 28)
FLUX = Fraction(19, 57)
WAN = Fraction(19, 30)
OWN = "the paper's"
PICTURES = "derived: the paper's fractions for PixArt-alpha"
VIDEOS = "derived: the paper's fractions for Open-Sora"
NO_WINDOW = "measured elsewhere; the window is not known, so it is derived: with this one the ideal is what was measured"
FROM_FLUX = "derived: the cutoff of FLUX.1-dev, whose blocks are laid out alike, and the paper's window for Open-Sora"
FROM_WAN = "derived: as Wan 2.1 1.3B"

STARTING_POINTS = (
    StartingPoint("DiT-XL/2", "DiTTransformer2DModel", 28, 50, PAPERS, 2, (0.25, 0.95), OWN),
    StartingPoint("PixArt-alpha", "PixArtTransformer2DModel", 28, 20, PAPERS, 2, (0.40, 0.95), OWN),
    StartingPoint("SD 3 and 3.5 Medium", "SD3Transformer2DModel", 24, 28, PAPERS, 2, (0.40, 0.95), PICTURES),
    StartingPoint("SD 3.5 Large", "SD3Transformer2DModel", 38, 28, PAPERS, 2, (0.40, 0.95), PICTURES),
    StartingPoint("FLUX.1-dev", "FluxTransformer2DModel", 57, 50, FLUX, 2, (0.30, 0.95), NO_WINDOW, Measured(1.12, 33.1)),
    StartingPoint(
        "FLUX.1-dev, faster", "FluxTransformer2DModel", 57, 50, Fraction(25, 57), 3, (0.35, 0.95), NO_WINDOW,
        Measured(1.215, 31.4),
    ),
    StartingPoint("Qwen-Image", "QwenImageTransformer2DModel", 60, 50, PAPERS, 2, (0.40, 0.95), PICTURES),
    StartingPoint("Sana 1.6B", "SanaTransformer2DModel", 20, 20, PAPERS, 2, (0.40, 0.95), PICTURES),
    StartingPoint("Wan 2.1 1.3B", "WanTransformer3DModel", 30, 50, WAN, 2, (0.30, 0.95), NO_WINDOW, Measured(1.254, 35.3)),
    StartingPoint("Wan 2.1 14B", "WanTransformer3DModel", 40, 50, WAN, 2, (0.30, 0.95), FROM_WAN),
    StartingPoint("Wan 2.2 5B", "WanTransformer3DModel", 30, 50, WAN, 2, (0.30, 0.95), FROM_WAN),
    StartingPoint("Wan 2.2 A14B, each expert", "WanTransformer3DModel", 40, 50, WAN, 2, (0.30, 0.95), FROM_WAN),
    StartingPoint("LTX-Video", "LTXVideoTransformer3DModel", 28, 50, PAPERS, 2, (0.25, 0.95), VIDEOS),
    StartingPoint("CogVideoX 2B", "CogVideoXTransformer3DModel", 30, 50, PAPERS, 2, (0.25, 0.95), VIDEOS),
    StartingPoint("HunyuanVideo", "HunyuanVideoTransformer3DModel", 60, 50, FLUX, 2, (0.25, 0.95), FROM_FLUX),
)  # fmt: skip
"""Of several for one class and depth the first is the one to begin with."""


def starting_point(model: Any, num_blocks: int | None = None) -> StartingPoint:
    """Settings to begin with. Nothing is measured: `plan` does that, and finds better ones.

    Args:
        model: a diffusers pipeline, or the class name of its transformer, as `FluxTransformer2DModel`.
        num_blocks: L, at least 2; a pipeline's own by default, and with a class name that of the first of its models.

    Raises:
        ConfigError: no starting point for that class.
        ScheduleError: fewer than two blocks.
        UnsupportedModelError: a pipeline that cannot be accelerated.
    """
    names = [model] if isinstance(model, str) else [base.__name__ for base in type(transformer_of(model)).__mro__]
    alike = [point for point in STARTING_POINTS if point.transformer in names]
    if not alike:
        known = ", ".join(dict.fromkeys(point.transformer for point in STARTING_POINTS))
        raise ConfigError(f"model must have one of {known}, got {names[0]}; plan() finds settings for any")
    if num_blocks is None:
        num_blocks = alike[0].num_blocks if isinstance(model, str) else depth_of(model)
    check_cutoff(0, num_blocks)
    return next((point for point in alike if point.num_blocks == num_blocks), at_depth(alike[0], num_blocks))


def at_depth(point: StartingPoint, num_blocks: int) -> StartingPoint:
    """The same fractions at another depth, at which nobody is known to have measured them."""
    model, source = f"{point.transformer} of {num_blocks} blocks", f"derived: as {point.model}"
    return replace(point, model=model, num_blocks=num_blocks, source=source, measured=None)


def table() -> str:
    """All starting points in Markdown, as README.md beside this file has them."""
    head = ("model", "blocks", "cutoff", "of the depth", "N", "window", "stored", "steps", "ideal", "measured", "source")
    lines = [head, ("---",) * len(head), *map(row, STARTING_POINTS)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def row(point: StartingPoint) -> tuple[str, ...]:
    start, end = point.window
    return (
        point.model, str(point.num_blocks), str(point.cutoff_block), f"{float(point.skipped):.0%}", str(point.reuse_interval),
        f"{start:g}-{end:g}", repr(point.storage), str(point.steps), f"{point.ideal_speedup():.3f}x",
        "-" if point.measured is None else str(point.measured), point.source,
    )  # fmt: skip
