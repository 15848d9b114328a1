"""The app's engine: what visitors get, alone and together, to the end and stopped."""

import gc
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from analysis.experiment import Request, run_variant
from analysis.metrics import shift_tolerant_lpips
from app.engine import Engine, Memory, View
from blockdance import ConfigError, ReuseConfig, Schedule, ScheduleError, fixed_schedule, load_demo_pipeline
from blockdance.demo import DemoPipeline

REQUEST = Request("red apple", steps=8)
CONFIG = ReuseConfig(2, 9, 0.25, 1.0)


@pytest.fixture(scope="module")
def pipe() -> DemoPipeline:
    return load_demo_pipeline()


@pytest.fixture
def engine(pipe: DemoPipeline) -> Engine:
    return Engine(pipe, shift_tolerant_lpips())


class Calls:
    """Counts the runs of the transformer's last block, and how many went on at the same time."""

    def __init__(self, pipe: DemoPipeline) -> None:
        self.total = self.now = self.most = 0
        block = pipe.transformer.transformer_blocks[-1]
        self.handles = [block.register_forward_pre_hook(self.enter), block.register_forward_hook(self.leave)]

    def enter(self, *_: object) -> None:
        self.total, self.now = self.total + 1, self.now + 1
        self.most = max(self.most, self.now)

    def leave(self, *_: object) -> None:
        self.now -= 1


@pytest.fixture
def calls(pipe: DemoPipeline) -> Iterator[Calls]:
    calls = Calls(pipe)
    yield calls
    for handle in calls.handles:
        handle.remove()


def last_view(engine: Engine, request: Request = REQUEST, config: ReuseConfig | Schedule = CONFIG) -> View:
    *_, last = engine.views(request, config)
    return last


def test_the_last_view_is_complete_and_has_the_bits_of_a_full_run(engine: Engine) -> None:
    view = last_view(engine)
    assert view.phase == "done" and view.baseline is not None and view.variant is not None and view.control is not None
    full = run_variant(engine.pipe, REQUEST, fixed_schedule(CONFIG, REQUEST.steps, engine.num_blocks))
    assert np.array_equal(view.variant.picture, full.picture)
    assert not np.array_equal(view.variant.picture, view.baseline.picture)
    assert view.variant.figures["replayed_steps"] == 2
    assert view.variant.figures["block_evaluations"] == full.trace.block_evaluations
    assert view.observed is not None and view.observed.cosine.shape == (14, 8)
    assert np.isnan(view.observed.cosine[:, 0]).all() and (view.observed.cosine[:, 1:] > 0).all()
    assert [pictures is not None and pictures.shape for pictures in view.observed.features.values()] == [(8, 8, 8, 3)] * 3
    assert view.yardsticks is not None and view.yardsticks["jpeg"]["lpips"] > 0 and view.yardsticks["seed"]["lpips"] > 0


def test_previews_lead_to_the_picture_and_agree_up_to_the_first_reuse_step(engine: Engine) -> None:
    view = last_view(engine)
    assert view.baseline is not None and view.variant is not None
    assert view.baseline_previews is not None and view.variant_previews is not None
    assert len(view.baseline_previews) == len(view.variant_previews) == 8
    same = [np.array_equal(*pair) for pair in zip(view.baseline_previews, view.variant_previews, strict=True)]
    assert same == [step < 3 for step in range(8)]  # ffcrcrcr
    assert view.variant.step_difference is not None
    assert [difference == 0 for difference in view.variant.step_difference] == same
    far = [np.abs(preview.astype(int) - view.baseline.picture).mean() for preview in view.baseline_previews]
    assert far[-1] == min(far) < 1 < far[0]


def test_a_schedule_by_hand_works_where_a_config_does(engine: Engine) -> None:
    fixed = last_view(engine)
    by_hand = last_view(engine, config=Schedule.parse("ffcrcrcr", 9))
    assert by_hand.variant is fixed.variant and by_hand.note is None
    with pytest.raises(ScheduleError, match="the schedule has 4 steps, the run has 8"):
        last_view(engine, config=Schedule.parse("ffcr", 9))


def test_a_proper_measurement_interleaves_full_runs_and_can_be_left(engine: Engine, calls: Calls) -> None:
    *_, last = engine.measured(REQUEST, CONFIG, rounds=3)
    assert last.timing is not None and last.timing["rounds"] == 3
    low, high = last.timing["speedup_measured_quartiles"]
    assert low <= last.timing["speedup_measured"] <= high
    assert calls.total == 2 * 3 * REQUEST.steps
    views = engine.measured(REQUEST, CONFIG, rounds=50)
    next(views)
    views.close()  # type: ignore[attr-defined]
    assert calls.now == 0 and calls.total < 2 * 3 * REQUEST.steps + 20
    assert last_view(engine).phase == "done"


def test_the_control_costs_about_the_same_with_fewer_steps(engine: Engine) -> None:
    view = last_view(engine)
    assert view.variant is not None and view.control is not None
    assert view.control.figures["steps"] == round(8 / view.variant.figures["speedup_ideal"])
    assert view.control.trace.kinds == "f" * view.control.figures["steps"]


def test_later_views_never_know_less(engine: Engine) -> None:
    views = list(engine.views(REQUEST, CONFIG))
    known = [
        sum(fact is not None for fact in (v.baseline, v.variant, v.observed, v.control, v.variant_previews, v.yardsticks))
        for v in views
    ]
    assert known == sorted(known) and known[-1] == 6


def test_what_was_computed_once_is_remembered(engine: Engine, calls: Calls) -> None:
    first = last_view(engine)
    ran = calls.total
    again = last_view(engine)
    assert calls.total == ran
    assert again.variant is first.variant and again.observed is first.observed


def test_another_setting_costs_only_the_rest_of_the_run(engine: Engine, calls: Calls) -> None:
    last_view(engine, config=ReuseConfig(2, 9, 0.5, 1.0))
    ran = calls.total
    view = last_view(engine, config=ReuseConfig(2, 8, 0.5, 1.0))
    assert view.variant is not None
    assert view.variant.figures["replayed_steps"] == 4
    assert calls.total - ran == 4


@pytest.mark.parametrize("phase", ["plain sampler", "BlockDance", "similarity map", "fewer steps", "another seed"])
def test_leaving_stops_the_run_within_a_step_and_spoils_nothing(engine: Engine, calls: Calls, phase: str) -> None:
    expected = last_view(Engine(engine.pipe, engine.distance))
    whole, calls.total = calls.total, 0
    views = engine.views(REQUEST, CONFIG)
    assert any(view.phase == phase for view in views)
    views.close()  # type: ignore[attr-defined]
    left_at = calls.total
    assert calls.now == 0 and left_at < whole
    got = last_view(engine)
    assert calls.total > left_at
    assert got.variant is not None and expected.variant is not None
    assert np.array_equal(got.variant.picture, expected.variant.picture)


def test_visitors_at_the_same_time_get_their_own_pictures_and_take_turns(engine: Engine, calls: Calls) -> None:
    requests = [Request("red apple", 1, 6), Request("octopus", 2, 6), Request("pizza", 3, 7)]
    alone = [last_view(Engine(engine.pipe, engine.distance), request) for request in requests]
    calls.most = 0
    got: dict[int, View] = {}

    def visit(index: int) -> None:
        got[index] = last_view(engine, requests[index])

    threads = [threading.Thread(target=visit, args=(index,)) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls.most == 1
    for index, expected in enumerate(alone):
        mine = got[index]
        assert mine.request == requests[index]
        assert mine.baseline is not None and expected.baseline is not None
        assert mine.variant is not None and expected.variant is not None
        assert np.array_equal(mine.baseline.picture, expected.baseline.picture)
        assert np.array_equal(mine.variant.picture, expected.variant.picture)


def test_an_error_inside_the_model_reaches_the_visitor_and_the_next_one_is_served(engine: Engine) -> None:
    broken = engine.pipe.transformer.transformer_blocks[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        last_view(engine)
    broken.remove()
    assert last_view(engine).phase == "done"


def test_a_setting_that_does_not_fit_is_refused_before_anything_runs(engine: Engine, calls: Calls) -> None:
    with pytest.raises(ScheduleError, match=r"cutoff_block must be in \[0, 12\] for 14 blocks, got 13"):
        last_view(engine, config=ReuseConfig(2, 13))
    with pytest.raises(ConfigError):
        last_view(engine, config=ReuseConfig(0))
    assert calls.total == 0


def test_a_dense_setting_says_why(engine: Engine) -> None:
    view = last_view(engine, config=ReuseConfig(1))
    assert view.note is not None and "reuse_interval is 1" in view.note
    assert view.variant is not None and view.baseline is not None
    assert np.array_equal(view.variant.picture, view.baseline.picture)
    assert view.variant.figures["lpips"] == 0.0


def test_memory_forgets_what_was_unused_for_longest() -> None:
    memory = Memory(2)
    for key in "aba":
        memory.recall(key, lambda key=key: key.upper())  # type: ignore[misc]
    memory.recall("c", lambda: "C")
    assert len(memory) == 2
    assert memory.recall("a", lambda: "new") == "A"
    assert memory.recall("b", lambda: "new") == "new"


def test_memory_stays_flat_over_many_requests(pipe: DemoPipeline) -> None:
    engine = Engine(pipe, shift_tolerant_lpips(), capacity=1)

    def tensors_after(seeds: range) -> int:
        for seed in seeds:
            last_view(engine, Request("red apple", seed, 4), ReuseConfig(2, 9, 0.0, 1.0))
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    assert tensors_after(range(9)) == tensors_after(range(9, 18))
