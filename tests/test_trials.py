"""The storage rules that were tried do what their names say, and the command tells of each."""

import numpy as np
import pytest
import torch

from analysis.experiment import with_sampler
from analysis.metrics import shift_tolerant_lpips
from analysis.trials import (
    BLOCK,
    STEPS,
    Fitted,
    HalfSlope,
    ResidualLine,
    corrected,
    donors_of,
    render_trials,
    run_trials,
    schedules,
)
from blockdance import Extrapolated, Schedule, load_demo_pipeline, load_demo_profile
from blockdance.profile import Expected
from blockdance.storage import Kept, Latest


def kept(*states: tuple[float, float], inputs: float = 0.0) -> list[Kept]:
    """By place in the run, what was kept there."""
    return [Kept(place, [], (torch.tensor([inputs]),), (torch.tensor([value]),)) for place, value in states]


def test_half_of_the_slope_lies_half_way_between_the_last_output_and_the_line() -> None:
    both = kept((0, 1.0), (2, 3.0))
    assert HalfSlope().outputs_at(4, both, ())[0].item() == pytest.approx((3 + 5) / 2)


def test_the_line_of_the_residual_is_that_of_what_was_added() -> None:
    both = kept((0, 1.0), (2, 3.0), inputs=0.5)
    assert ResidualLine().outputs_at(4, both, (torch.tensor([10.0]),))[0].item() == pytest.approx(10 + 4.5)


def test_fitted_weights_find_a_state_that_is_a_mixture_of_what_was_kept() -> None:
    states = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, -0.25]])
    rule = Fitted(Expected({BLOCK: states @ states.T}, {}), 2)
    donors = [Kept(step, [], None, (torch.from_numpy(states[step]),)) for step in (0, 1)]
    assert rule.outputs_at(2, donors, ())[0].tolist() == pytest.approx([0.5, -0.25])


def test_reuse_steps_start_from_the_last_steps_that_ran() -> None:
    assert list(donors_of(Schedule.parse("fcrcrr", 3), Latest())) == [(2, [1]), (4, [3]), (5, [3])]
    assert list(donors_of(Schedule.parse("fcrcrr", 3), Extrapolated())) == [(2, [0, 1]), (4, [1, 3]), (5, [1, 3])]


def test_a_correction_brings_a_rule_nearer_on_what_it_was_fitted_on() -> None:
    steps = torch.arange(STEPS, dtype=torch.float32)[:, None, None]
    states = torch.randn(1, 64, 4) * (1 + 0.1 * steps) + 0.5 * steps
    schedule = Schedule.parse("f" * 10 + "cr" * 10, BLOCK)
    rule = corrected(states, Latest(), schedule)
    one = [Kept(10, [], None, (states[10],))]
    before, after = (torch.dist(each.outputs_at(11, one, ())[0], states[11]) for each in (Latest(), rule))
    assert after < 1e-3 < before


def test_the_table_has_a_row_for_every_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, profile = with_sampler(load_demo_pipeline(), "DDIM"), load_demo_profile()
    short = {"N=2": schedules(profile)["N=2"]}
    monkeypatch.setattr("analysis.trials.FITTED_ON", ("rainbow",))
    monkeypatch.setattr("analysis.trials.schedules", lambda _: short)
    found = run_trials(pipe, profile, shift_tolerant_lpips(), ["red apple"])
    assert found["residual"]["N=2"][0] == pytest.approx(found["latest, the paper's"]["N=2"][0], rel=0.5)
    assert found["extrapolated"]["N=2"][0] < found["latest, the paper's"]["N=2"][0]
    assert render_trials(found).count("\n") == len(found) + 1
