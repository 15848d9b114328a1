"""Results and settings are values: a copy and what comes back from a pickle equal them."""

import copy
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import blockdance
from blockdance import BlockDanceError, Extrapolated, Profile, ReuseConfig, Schedule, load_demo_profile
from blockdance.offload import Offloaded
from blockdance.policy import Decision
from blockdance.presets import PRESETS
from blockdance.starting_points import STARTING_POINTS
from blockdance.storage import Latest, Residual

PROFILE = load_demo_profile()
SCHEDULES = [Schedule.parse("ffcrcrf", 3), Schedule.parse("ffcr1rccr", 3), Schedule.dense(4)]
VALUES: list[Any] = [
    PROFILE,
    blockdance.plan(target_speedup=1.4, profile=PROFILE),
    blockdance.plan(target_speedup=1.4, profile=PROFILE, storage=Offloaded(Extrapolated()), one_cutoff=True),
    *SCHEDULES,
    *(Decision(schedule, (0.25, 0.75)) for schedule in SCHEDULES),
    ReuseConfig(),
    ReuseConfig(3, 20, 0.25, 0.5),
    *PRESETS.values(),
    *STARTING_POINTS,
    *(Offloaded(rule) for rule in (Latest(), Extrapolated(3), Residual())),
]


def unpickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("again", [unpickled, copy.deepcopy, copy.copy], ids=lambda one: one.__name__)
@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_copy_is_equal(value: Any, again: Any) -> None:
    other = again(value)
    assert other is not value and other == value
    if not isinstance(value, Profile):
        assert repr(other) == repr(value)


@pytest.mark.parametrize("name", ["products", "sensitivity", "steps", "outcomes"])
def test_profiles_differ_where_a_number_does(name: str) -> None:
    other = copy.deepcopy(PROFILE)
    if name == "products":
        other.products[other.blocks[0]][2, 1] += 1e-12
    else:
        changed: dict[str, Any] = {name: 29 if name == "steps" else {}}
        other = replace(other, **changed)
    assert other != PROFILE and PROFILE != "a profile"


def test_a_copied_profile_shares_no_numbers() -> None:
    other = copy.deepcopy(PROFILE)
    assert not any(np.shares_memory(other.products[block], PROFILE.products[block]) for block in PROFILE.blocks)


@pytest.mark.parametrize("kind", BlockDanceError.__subclasses__())
def test_an_error_crosses_processes(kind: type[Exception]) -> None:
    assert str(unpickled(kind("steps must be at least 4, got 3"))) == "steps must be at least 4, got 3"
