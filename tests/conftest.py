"""Fixtures shared by the tests. No test needs a network or a GPU."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import pytest
import torch

from tests.guided import MODELS, TWO, Guided
from tests.tiny import CASES, Case

torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much on a busy machine


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(params=MODELS, ids=lambda tiny: tiny.name)
def pipe(request: pytest.FixtureRequest) -> Guided:
    """A pipeline around a tiny model of every class that has an adapter."""
    return Guided(request.param)


@pytest.fixture(params=TWO, ids=lambda tiny: tiny.name)
def one_of_two(request: pytest.FixtureRequest) -> Guided:
    """For what does not depend on the class."""
    return Guided(request.param)
