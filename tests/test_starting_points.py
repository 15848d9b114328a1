"""Where to start with large models: no number without a source, and the README has the data's."""

import inspect
import math
from pathlib import Path

import diffusers
import pytest

import blockdance
from blockdance import ConfigError, ScheduleError, accelerate, fixed_schedule
from blockdance.adapters import STACKS
from blockdance.presets import DIT, PIXART
from blockdance.schedule import default_cutoff
from blockdance.starting_points import STARTING_POINTS, StartingPoint, starting_point, table
from blockdance.storage import Latest
from tests.tiny import BLOCKS, Case
from tests.zoo import sd3_pipeline

README = Path(blockdance.__file__).with_name("README.md")
PIPELINES = {
    "DiT": "DiTPipeline", "PixArt": "PixArtAlphaPipeline", "SD3": "StableDiffusion3Pipeline", "Qwen": "QwenImagePipeline",
    "Sana": "SanaPipeline", "Wan": "WanPipeline", "LTX": "LTXPipeline", "CogVideoX": "CogVideoXPipeline",
    "Hunyuan": "HunyuanVideoPipeline",
}  # fmt: skip
"""By how the transformer's class begins; Flux was measured with other steps than its default."""
OTHER_DEPTHS = {"SD 3 and 3.5 Medium", "SD 3.5 Large", "Wan 2.1 1.3B", "Wan 2.2 5B"}
"""Models that are not as deep as diffusers' class is by default."""


@pytest.mark.parametrize("point", STARTING_POINTS, ids=lambda point: point.model)
class TestEveryStartingPoint:
    def test_it_reuses_and_fits_a_class_that_is_supported(self, point: StartingPoint) -> None:
        assert point.transformer in STACKS
        schedule = fixed_schedule(point.config, point.steps, point.num_blocks)
        assert 1.1 < point.ideal_speedup() == schedule.ideal_speedup(point.num_blocks) < 1.4
        assert (point.cutoff_block + 1) / point.num_blocks == pytest.approx(float(point.skipped), abs=0.51 / point.num_blocks)

    def test_its_numbers_say_where_they_are_from(self, point: StartingPoint) -> None:
        assert point.source.startswith(("the paper's", "measured elsewhere", "derived: "))
        assert (point.measured is not None) == point.source.startswith("measured elsewhere")

    def test_what_was_measured_is_what_the_blocks_say(self, point: StartingPoint) -> None:
        if point.measured is not None:
            assert point.steps == 50
            assert point.measured.speedup == pytest.approx(point.ideal_speedup(), abs=0.0025)

    def test_no_flow_model_is_extrapolated(self, point: StartingPoint) -> None:
        assert point.storage == Latest()

    def test_depth_and_steps_are_those_of_diffusers(self, point: StartingPoint) -> None:
        default = inspect.signature(getattr(diffusers, point.transformer).__init__).parameters
        depth = default["num_layers"].default
        depth += default["num_single_layers"].default if "num_single_layers" in default else 0
        assert point.num_blocks == depth or point.model in OTHER_DEPTHS
        for name, pipeline in PIPELINES.items():
            if point.transformer.startswith(name):
                call = inspect.signature(getattr(diffusers, pipeline).__call__)
                assert point.steps == call.parameters["num_inference_steps"].default


def test_the_numbers_of_the_measurements_are_theirs() -> None:
    """As the notes on the paper have them."""
    found = {
        (point.model.split(",")[0], point.num_blocks, point.cutoff_block, point.reuse_interval): str(point.measured)
        for point in STARTING_POINTS
        if point.measured
    }
    assert found == {
        ("FLUX.1-dev", 57, 18, 2): "1.12x at 33.1 dB",
        ("FLUX.1-dev", 57, 24, 3): "1.215x at 31.4 dB",
        ("Wan 2.1 1.3B", 30, 18, 2): "1.254x at 35.3 dB",
    }


def test_the_papers_models_start_with_the_papers_settings() -> None:
    assert starting_point("DiTTransformer2DModel").config == DIT
    assert starting_point("PixArtTransformer2DModel").config == PIXART
    for depth in (8, 24, 28, 60):
        assert starting_point("SD3Transformer2DModel", depth).cutoff_block == default_cutoff(depth)


def test_the_readme_has_the_data() -> None:
    """Write what `table()` returns where they differ."""
    assert table() in README.read_text()
    assert len(table().splitlines()) == 2 + len(STARTING_POINTS)


def test_every_model_that_was_asked_for_has_one() -> None:
    told = " ".join(point.model for point in STARTING_POINTS)
    for name in ("SD 3", "FLUX", "Wan 2.1", "Wan 2.2", "LTX", "CogVideoX", "HunyuanVideo", "Qwen-Image", "Sana"):
        assert name in told


@pytest.mark.parametrize("name", sorted({point.transformer for point in STARTING_POINTS}))
def test_at_another_depth_the_fractions_are_kept_and_nothing_counts_as_measured(name: str) -> None:
    first = starting_point(name)
    other = starting_point(name, 101)
    assert (other.cutoff_block + 1) / 101 == pytest.approx(float(first.skipped), abs=1 / 101)
    assert other.measured is None and other.source == f"derived: as {first.model}"
    assert other.config.window(50) == first.config.window(50)
    assert starting_point(name, 2).cutoff_block == 0


def test_a_pipeline_starts_at_its_own_depth_and_runs(case: Case) -> None:
    for pipe in (case.build(), sd3_pipeline()):
        point = starting_point(pipe)
        assert point.transformer == type(pipe.transformer).__name__
    pipe = case.build()
    point = starting_point(pipe)
    assert point.num_blocks == BLOCKS
    with accelerate(pipe, point.config, storage=point.storage) as trace:
        case.run(pipe)
    assert trace.speedup_ideal is not None and math.isclose(trace.speedup_ideal, point.ideal_speedup(len(trace.kinds)))


def test_what_has_no_starting_point_is_answered_with_those_that_have() -> None:
    with pytest.raises(ConfigError, match=r"one of DiTTransformer2DModel, .*got MochiTransformer3DModel; plan\(\) finds"):
        starting_point("MochiTransformer3DModel")
    with pytest.raises(ScheduleError, match="for 1 blocks"):
        starting_point("FluxTransformer2DModel", 1)
