"""The contract of the mechanism, run against every supported model: reuse is exact, or it is refused."""

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
)

from blockdance import (
    ConfigError,
    Extrapolated,
    ReuseConfig,
    Schedule,
    ScheduleError,
    SessionError,
    UnsupportedModelError,
    accelerate,
    observe,
    record,
)
from blockdance.patch import ACTIVE
from tests.tiny import BLOCKS, STEPS, Case, pixart, run_pixart

REUSING = ReuseConfig(2, 3, 0.3, 1.0)


def class_names(pipe: Any) -> list[type]:
    blocks = pipe.transformer.transformer_blocks
    return [type(thing) for thing in (pipe.transformer, pipe.scheduler, *blocks)]


def drive(case: Case, pipe: Any, kwargs_per_step: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Call the transformer directly, once per step, with the given arguments."""
    pipe.scheduler.set_timesteps(len(kwargs_per_step))
    outputs = []
    with torch.no_grad():
        for timestep, kwargs in zip(pipe.scheduler.timesteps, kwargs_per_step, strict=True):
            outputs.append(pipe.transformer(**kwargs, return_dict=False)[0])
            pipe.scheduler.step(torch.zeros(1, 4, 8, 8), timestep, torch.zeros(1, 4, 8, 8))
    return outputs


def test_a_schedule_without_reuse_changes_no_bit(case: Case) -> None:
    pipe = case.build()
    plain = case.run(pipe)
    with accelerate(pipe, ReuseConfig(1)) as trace:
        accelerated = case.run(pipe)
    assert torch.equal(plain, accelerated)
    assert trace.kinds == "f" * STEPS
    assert trace.speedup_ideal == 1.0
    assert trace.note is not None and "reuse_interval is 1" in trace.note


def test_a_run_that_never_reuses_does_not_touch_the_blocks(case: Case) -> None:
    pipe = case.build()
    before = class_names(pipe)[2:]
    with accelerate(pipe, ReuseConfig(1)):
        case.run(pipe)
        assert class_names(pipe)[2:] == before
    with accelerate(pipe, REUSING):
        case.run(pipe)
        assert class_names(pipe)[2:] != before


def test_reuse_changes_the_result_and_leaves_the_pipeline_as_it_was(case: Case) -> None:
    pipe = case.build()
    before, weights = class_names(pipe), copy.deepcopy(pipe.transformer.state_dict())
    plain = case.run(pipe)
    with accelerate(pipe, REUSING):
        assert not torch.equal(plain, case.run(pipe))
    assert class_names(pipe) == before
    assert torch.equal(plain, case.run(pipe))
    assert all(torch.equal(weights[name], value) for name, value in pipe.transformer.state_dict().items())
    assert not any("blockdance" in name for name in vars(pipe.transformer))


@pytest.mark.parametrize("cutoff", range(BLOCKS - 1))
def test_a_reuse_step_runs_exactly_the_blocks_after_the_cutoff(case: Case, cutoff: int) -> None:
    pipe = case.build()
    ran: list[int] = []
    for index, block in enumerate(pipe.transformer.transformer_blocks):
        block.attn1.register_forward_hook(lambda *_, index=index: ran.append(index))
    with accelerate(pipe, Schedule.parse("fccrrf", cutoff)) as trace:
        case.run(pipe, steps=6)
    everything, tail = list(range(BLOCKS)), list(range(cutoff + 1, BLOCKS))
    assert ran == everything * 3 + tail * 2 + everything
    assert [step.blocks_evaluated for step in trace.steps] == [BLOCKS] * 3 + [len(tail)] * 2 + [BLOCKS]
    assert trace.block_evaluations == len(ran)
    assert trace.baseline_block_evaluations == 6 * BLOCKS
    assert trace.schedule is not None and trace.speedup_ideal == trace.schedule.ideal_speedup(BLOCKS)


def test_every_reuse_step_runs_exactly_the_blocks_after_its_own_cutoff(case: Case) -> None:
    pipe = case.build()
    ran: list[int] = []
    for index, block in enumerate(pipe.transformer.transformer_blocks):
        block.attn1.register_forward_hook(lambda *_, index=index: ran.append(index))
    with accelerate(pipe, Schedule.parse("fcr1r3cr2f", 0)) as trace:
        case.run(pipe, steps=7)
    everything = list(range(BLOCKS))
    assert ran == everything * 2 + everything[2:] + everything[4:] + everything + everything[3:] + everything
    assert trace.kinds == "fcrrcrf" and trace.block_evaluations == len(ran)


def test_each_step_of_several_cutoffs_gets_what_it_would_get_with_one(case: Case) -> None:
    pipe = case.build()
    kwargs = [case.inputs() for _ in range(3)]
    with accelerate(pipe, Schedule.parse("cr1r3", 0)):
        several = drive(case, pipe, kwargs)
    for step, cutoff in ((1, 1), (2, 3)):
        with accelerate(pipe, Schedule.parse("crr", cutoff)):
            assert torch.equal(several[step], drive(case, pipe, kwargs)[step])


@pytest.mark.parametrize("cutoff", range(BLOCKS - 1))
def test_the_same_input_twice_is_bit_exact_at_every_cutoff(case: Case, cutoff: int) -> None:
    pipe = case.build()
    kwargs = case.inputs()
    with accelerate(pipe, Schedule.parse("ccrr", cutoff)):
        outputs = drive(case, pipe, [kwargs] * 4)
    assert all(torch.equal(outputs[0], output) for output in outputs[1:])


def test_a_reuse_step_sees_the_current_timestep_and_not_the_current_latent(case: Case) -> None:
    pipe = case.build()
    first, other = case.inputs(), case.inputs()
    later = first | {"timestep": torch.full((2,), 100)}
    with accelerate(pipe, Schedule.parse("crrr", 3)):
        outputs = drive(case, pipe, [first, later, first | {"hidden_states": other["hidden_states"]}, first])
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_the_stored_cache_is_one_tensor_for_a_guided_batch(case: Case) -> None:
    pipe = case.build()
    with accelerate(pipe, REUSING) as trace:
        case.run(pipe)
    tokens, width = 16, 16
    assert trace.cache_bytes == 2 * tokens * width * 4 if case.name == "dit" else trace.cache_bytes > 0


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("guided", [True, False])
def test_any_batch_size_with_and_without_guidance(case: Case, batch: int, guided: bool) -> None:
    pipe = case.build()
    with accelerate(pipe, REUSING) as trace:
        case.run(pipe, batch=batch, guided=guided)
    assert trace.kinds == "fffcrcrcrc"


def test_a_sample_of_a_batch_gets_what_it_would_get_alone(case: Case) -> None:
    pipe = case.build()
    kwargs = case.inputs(batch=2)
    alone = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
    schedule = Schedule.parse("crr", 2)
    with accelerate(pipe, schedule):
        together = drive(case, pipe, [kwargs] * 3)
    with accelerate(pipe, schedule):
        single = drive(case, pipe, [alone] * 3)
    torch.testing.assert_close(together[2][:1], single[2])


def test_guidance_in_two_calls_keeps_the_branches_apart(case: Case) -> None:
    pipe = case.build()
    branches = [case.inputs(), case.inputs()]
    with accelerate(pipe, Schedule.parse("crcr", 3)) as trace:
        pipe.scheduler.set_timesteps(4)
        outputs: list[list[torch.Tensor]] = []
        with torch.no_grad():
            for timestep in pipe.scheduler.timesteps:
                outputs.append([pipe.transformer(**kwargs, return_dict=False)[0] for kwargs in branches])
                pipe.scheduler.step(torch.zeros(1, 4, 8, 8), timestep, torch.zeros(1, 4, 8, 8))
    for step in (1, 2, 3):
        assert torch.equal(outputs[step][0], outputs[0][0])
        assert torch.equal(outputs[step][1], outputs[0][1])
    assert not torch.equal(outputs[0][0], outputs[0][1])
    assert trace.cache_bytes == 2 * 2 * 16 * 16 * 4
    assert trace.steps[1].blocks_evaluated == 2 * (BLOCKS - 4)


@pytest.mark.parametrize(
    ("scheduler", "calls"),
    [
        (DPMSolverMultistepScheduler(), 10),
        (HeunDiscreteScheduler(), 19),
        (KDPM2DiscreteScheduler(), 19),
        (PNDMScheduler(), 19),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_scheduler_counts_ten_steps(scheduler: Any, calls: int) -> None:
    pipe = pixart()
    pipe.scheduler = scheduler
    with accelerate(pipe, REUSING) as trace:
        run_pixart(pipe)
    assert trace.kinds == "fffcrcrcrc"
    assert trace.baseline_block_evaluations == calls * BLOCKS


def test_image_to_image_counts_only_the_steps_it_runs(case: Case) -> None:
    pipe = case.build()
    pipe.scheduler = DPMSolverMultistepScheduler()
    with torch.no_grad(), accelerate(pipe, ReuseConfig(2, 3, 0.5, 1.0)) as trace:
        pipe.scheduler.set_timesteps(10)
        pipe.scheduler.set_begin_index(4)
        inputs = case.inputs(1)
        for timestep in pipe.scheduler.timesteps[4:]:
            pipe.transformer(**inputs)
            pipe.scheduler.step(torch.zeros(1, 4, 8, 8), timestep, torch.zeros(1, 4, 8, 8))
    assert trace.kinds == "fffcrc"


def test_a_stored_tensor_that_does_not_fit_is_never_used(case: Case) -> None:
    pipe = case.build()
    large, small = case.inputs(batch=4), case.inputs(batch=2)
    with torch.no_grad():
        expected = pipe.transformer(**small, return_dict=False)[0]
    with accelerate(pipe, Schedule.parse("crr", 3)) as trace:
        outputs = drive(case, pipe, [large, small, small])
    assert torch.equal(outputs[1], expected)
    assert trace.kinds == "ccr"


def test_another_size_batch_and_step_count_in_the_next_run(case: Case) -> None:
    pipe = case.build()
    with accelerate(pipe, REUSING) as trace:
        case.run(pipe)
        case.run(pipe, steps=20, batch=2, size=16)
    assert trace.kinds == "ffffff" + "cr" * 7
    with accelerate(pipe, REUSING):
        alone = case.run(pipe, steps=20, batch=2, size=16)
    with accelerate(pipe, REUSING):
        case.run(pipe)
        assert torch.equal(alone, case.run(pipe, steps=20, batch=2, size=16))


def test_an_exception_in_the_body_restores_the_model(case: Case) -> None:
    pipe = case.build()
    before, plain = class_names(pipe), case.run(pipe)
    with pytest.raises(KeyError), accelerate(pipe, REUSING):
        case.run(pipe)
        raise KeyError("body")
    assert class_names(pipe) == before
    assert ACTIVE.get() == ()
    assert torch.equal(plain, case.run(pipe))


def test_a_cancel_within_the_run_stops_after_that_step_and_spoils_nothing(case: Case) -> None:
    pipe = case.build()
    plain = case.run(pipe)
    finished: list[int] = []

    def stop(step: int, num_steps: int) -> None:
        finished.append(step)
        if step == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError), accelerate(pipe, REUSING, on_step=stop) as trace:
        case.run(pipe)
    assert finished == list(range(6)) and len(trace.steps) == 6
    assert torch.equal(plain, case.run(pipe))


def test_a_failed_run_leaves_nothing_for_the_next_one_inside_the_same_with(case: Case) -> None:
    pipe = case.build()
    with accelerate(pipe, REUSING):
        expected = case.run(pipe, seed=2)
    block = pipe.transformer.transformer_blocks[-1]
    with accelerate(pipe, REUSING):
        failing = block.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            case.run(pipe, seed=1)
        failing.remove()
        assert torch.equal(expected, case.run(pipe, seed=2))


def test_with_gradients_every_block_runs(case: Case) -> None:
    pipe = case.build()
    kwargs = case.inputs()
    with accelerate(pipe, Schedule.parse("crr", 3)) as trace:
        pipe.scheduler.set_timesteps(3)
        for timestep in pipe.scheduler.timesteps:
            pipe.transformer(**kwargs, return_dict=False)[0].sum().backward()
            pipe.scheduler.step(torch.zeros(1, 4, 8, 8), timestep, torch.zeros(1, 4, 8, 8))
    assert trace.kinds == "fff"
    assert pipe.transformer.transformer_blocks[0].attn1.to_q.weight.grad is not None


def test_accelerate_inside_accelerate_is_refused_and_the_outer_goes_on(case: Case) -> None:
    pipe = case.build()
    with accelerate(pipe, REUSING):
        expected = case.run(pipe)
        with pytest.raises(SessionError, match="accelerated already"), accelerate(pipe, ReuseConfig(3)):
            pass
        assert torch.equal(expected, case.run(pipe))


def test_record_cannot_be_combined_with_accelerate(case: Case) -> None:
    pipe = case.build()
    with accelerate(pipe, REUSING), pytest.raises(SessionError, match="baseline"), record(pipe):
        pass
    with record(pipe), pytest.raises(SessionError, match="baseline"), accelerate(pipe, REUSING):
        pass


def test_observe_nests_either_way_and_changes_no_bit(case: Case) -> None:
    pipe = case.build()
    with accelerate(pipe, REUSING):
        expected = case.run(pipe)
    with accelerate(pipe, REUSING), observe(pipe):
        inner = case.run(pipe)
    with observe(pipe), accelerate(pipe, REUSING):
        outer = case.run(pipe)
    assert torch.equal(expected, inner) and torch.equal(expected, outer)


def test_a_deepcopy_made_inside_is_independent_and_unpatched(case: Case) -> None:
    pipe = case.build()
    with accelerate(pipe, REUSING) as trace:
        case.run(pipe)
        finished = list(trace.steps)
        twin = copy.deepcopy(pipe.transformer)
        kwargs = case.inputs()
        with torch.no_grad():
            twin(**kwargs)
        assert trace.steps == finished
    assert [type(module) for module in twin.modules()] == [type(module) for module in pipe.transformer.modules()]


def test_saving_inside_writes_the_original_classes(case: Case, tmp_path: Path) -> None:
    pipe = case.build()
    with accelerate(pipe, REUSING):
        case.run(pipe)
        pipe.transformer.save_pretrained(tmp_path)
        pipe.scheduler.save_pretrained(tmp_path)
        torch.save(pipe.transformer, tmp_path / "whole.pt")  # refuses a class that is not importable by its name
    assert type(pipe.transformer).from_pretrained(tmp_path).config["_class_name"] == type(pipe.transformer).__name__


def test_threads_on_one_model_do_not_see_each_other(case: Case) -> None:
    base = case.build()

    def pipe_on_the_same_model() -> Any:
        parts = {name: part for name, part in base.components.items() if name != "scheduler"}
        twin = type(base)(**parts, scheduler=copy.deepcopy(base.scheduler))
        twin.set_progress_bar_config(disable=True)
        return twin

    plans: list[ReuseConfig | None] = [ReuseConfig(2, 3, 0.2, 1.0), ReuseConfig(3, 1, 0.0, 1.0), ReuseConfig(1), None]

    def run(plan: ReuseConfig | None, seed: int) -> torch.Tensor:
        pipe = pipe_on_the_same_model()
        if plan is None:
            return case.run(pipe, seed=seed)
        with accelerate(pipe, plan):
            return case.run(pipe, seed=seed)

    expected = [run(plan, seed) for seed, plan in enumerate(plans)]
    got: dict[int, list[torch.Tensor]] = {seed: [] for seed in range(len(plans))}
    barrier = threading.Barrier(len(plans))

    def work(seed: int, plan: ReuseConfig | None) -> None:
        barrier.wait()
        for _ in range(4):
            got[seed].append(run(plan, seed))

    threads = [threading.Thread(target=work, args=item) for item in enumerate(plans)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(results) == 4 for results in got.values())
    assert all(torch.equal(expected[seed], result) for seed, results in got.items() for result in results)
    assert class_names(base) == class_names(case.build())


def test_compiled_blocks_give_the_same_tail(case: Case) -> None:
    pipe = case.build()
    kwargs = case.inputs()
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager", fullgraph=True)
    with accelerate(pipe, Schedule.parse("crr", 3)) as trace:
        outputs = drive(case, pipe, [kwargs] * 3)
    assert torch.equal(outputs[0], outputs[2])
    assert trace.kinds == "crr"


def test_a_schedule_of_another_length_is_refused_before_anything_runs(case: Case) -> None:
    pipe = case.build()
    with pytest.raises(ScheduleError, match="the schedule has 5 steps, the run has 10"), accelerate(pipe, Schedule.dense(5)):
        case.run(pipe)
    assert ACTIVE.get() == ()


@pytest.mark.parametrize("plan", [ReuseConfig(2, BLOCKS - 1), Schedule.parse("cr", BLOCKS)])
def test_a_cutoff_too_deep_for_the_model_is_refused_at_once(case: Case, plan: ReuseConfig | Schedule) -> None:
    pipe = case.build()
    before = class_names(pipe)
    with pytest.raises(ScheduleError, match=r"cutoff_block must be in \[0, 4\] for 6 blocks"), accelerate(pipe, plan):
        pass
    assert class_names(pipe) == before


@pytest.mark.parametrize("plan", [None, "x", 5, [1, 2], [ReuseConfig()], ReuseConfig], ids=str)
def test_what_is_no_plan_is_refused_at_once(plan: Any) -> None:
    with pytest.raises(ConfigError, match="config must be a ReuseConfig, a Schedule, a list of Schedules or a policy, got"):
        accelerate(pixart(), plan).__enter__()


@pytest.mark.parametrize("storage", ["extrapolated", 2, Extrapolated], ids=str)
def test_what_is_no_storage_rule_is_refused_at_once(storage: Any) -> None:
    with pytest.raises(ConfigError, match=r"storage must be a rule such as Latest\(\) or Extrapolated\(\), got"):
        accelerate(pixart(), ReuseConfig(), storage=storage).__enter__()


def test_a_call_outside_a_run_is_plain_and_changes_nothing(case: Case) -> None:
    pipe, inputs = case.build(), case.inputs()
    with torch.no_grad():
        plain = pipe.transformer(**inputs)[0]
    with accelerate(pipe, REUSING):
        expected = case.run(pipe)
    with accelerate(pipe, REUSING) as trace, torch.no_grad():
        for _ in range(2):
            assert torch.equal(plain, pipe.transformer(**inputs)[0])
            assert torch.equal(expected, case.run(pipe))
        assert torch.equal(plain, pipe.transformer(**inputs)[0])
    assert len(trace.steps) == STEPS


def test_steps_outside_a_run_are_refused_with_the_reason(case: Case) -> None:
    pipe, inputs = case.build(), case.inputs()

    def loop() -> None:
        with torch.no_grad():
            for timestep in pipe.scheduler.timesteps:
                pipe.transformer(**inputs)
                pipe.scheduler.step(torch.zeros(1, 4, 8, 8), timestep, torch.zeros(1, 4, 8, 8))

    pipe.scheduler.set_timesteps(4)
    with accelerate(pipe, REUSING), pytest.raises(SessionError, match="set_timesteps was called before the with block"):
        loop()
    with accelerate(pipe, REUSING):
        pipe.scheduler.set_timesteps(4)
        loop()
        with pytest.raises(SessionError, match="the run of 4 steps is over"):
            loop()


class _Other(torch.nn.Module):
    pass


class _Pipe:
    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


@pytest.mark.parametrize(
    ("pipe", "words"),
    [
        (_Pipe(unet=_Other(), scheduler=object()), "DeepCache"),
        (_Pipe(), "no transformer"),
        (_Pipe(transformer=_Other()), "_Other has no list of blocks"),
        (_Pipe(transformer=pixart().transformer, scheduler=object()), "needs set_timesteps and step.*use apply_block_dance"),
    ],
)
def test_what_cannot_be_accelerated_is_refused_with_the_reason(pipe: Any, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words), accelerate(pipe, ReuseConfig()):
        pass
