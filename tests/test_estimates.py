"""What the sampler expects at every step, and what blocks hold: watched without changing a bit of the run."""

import numpy as np
import pytest
import torch

from analysis.estimates import after_step, decode_estimates, estimates_of
from analysis.experiment import SAMPLERS, Request, run_observed, sample, with_sampler
from analysis.features import component_pictures, shown_blocks
from blockdance import Schedule, ScheduleError, SessionError, accelerate, load_demo_pipeline, observe
from blockdance.demo import DemoPipeline


@pytest.fixture(scope="module")
def pipe() -> DemoPipeline:
    return load_demo_pipeline()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", [None, Schedule.parse("ffcrcrcr", 9)], ids=["plain", "reuse"])
def test_watching_changes_no_bit_and_gives_one_estimate_a_step(
    pipe: DemoPipeline, sampler: str, schedule: Schedule | None
) -> None:
    view, request = with_sampler(pipe, sampler), Request("octopus", 1, 8, sampler=sampler)
    with accelerate(view, schedule or Schedule.dense(8)):
        plain = sample(view, request)
        with estimates_of(view) as estimates:
            watched = sample(view, request)
    assert np.array_equal(plain, watched)
    assert len(estimates) == 8 and "step" not in vars(view.scheduler)
    pictures = decode_estimates(view, estimates)
    assert pictures is not None
    far = [np.abs(picture.astype(int) - plain).mean() for picture in pictures]
    assert far[-1] == min(far) and far[0] > 4 * far[-1]


def test_what_is_raised_after_a_step_ends_the_run_and_leaves_the_scheduler_as_it_was(pipe: DemoPipeline) -> None:
    view = with_sampler(pipe, "DDIM")
    steps: list[None] = []

    def enough(*_: object) -> None:
        steps.append(None)
        if len(steps) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), after_step(view, enough):
        sample(view, Request("octopus", steps=8))
    assert len(steps) == 3 and "step" not in vars(view.scheduler)


def test_large_pictures_and_other_latents_have_no_previews(pipe: DemoPipeline) -> None:
    assert decode_estimates(pipe, [torch.zeros(1, 16, 64, 64)]) is None
    assert decode_estimates(pipe, [torch.zeros(1, 16, 4, 8, 8)]) is None
    assert decode_estimates(pipe, []) is None


def test_kept_blocks_have_their_output_on_every_step_and_others_none(pipe: DemoPipeline) -> None:
    seen: list[torch.Tensor] = []
    hook = pipe.transformer.transformer_blocks[7].register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    observation = run_observed(pipe, Request("octopus", steps=6))
    hook.remove()
    assert shown_blocks(14) == (1, 7, 12)
    features = observation.features(7)
    assert features.shape == (6, 1, 64, 128)
    assert torch.equal(features[:, 0], torch.stack(seen)[:, 1])  # the second row of guidance is the conditional one
    with pytest.raises(SessionError, match="block must be one that was kept"):
        observation.features(3)
    with pytest.raises(ScheduleError, match=r"keep_blocks must be in \[0, 13\], got 14"), observe(pipe, keep_blocks=(14,)):
        pass


def test_components_show_what_varies_most_with_the_same_colours_on_every_step() -> None:
    """One direction of the features is a ramp over the tokens: it is the first component, on every step, at any scale."""
    ramp = torch.linspace(-1, 1, 16)[:, None] * torch.eye(8)[2]
    noise = 0.01 * torch.randn(5, 16, 8, generator=torch.Generator().manual_seed(0))
    pictures = component_pictures((ramp + noise) * torch.tensor([1.0, 10, 100, 3, 7])[:, None, None] + 5)
    assert pictures is not None and pictures.shape == (5, 4, 4, 3)
    red = pictures[..., 0].reshape(5, 16).astype(int)
    assert (np.diff(red, axis=1) > 0).all() or (np.diff(red, axis=1) < 0).all()
    assert np.abs(red - red[0]).max() < 15
    assert component_pictures(torch.randn(5, 15, 8)) is None
