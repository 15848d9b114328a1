"""The core of the contract for every adapter, on tiny random models that a bare sampling loop drives."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from blockdance import ReuseConfig, Schedule, accelerate, observe, record
from blockdance.adapters import REFUSED, STACKS, blocks_of, stack_of
from tests.tiny import dit, pixart
from tests.zoo import ZOO, Tiny

STEPS = 6
REUSING = "fccrrf"


def each(change: Callable[[Any], Any], value: Any) -> Any:
    """Change a tensor, or all in a list of tensors; else the value as it is."""
    if isinstance(value, list) and all(isinstance(one, Tensor) for one in value):
        return [change(one) for one in value]
    return change(value) if isinstance(value, Tensor) else value


class Loop:
    """The smallest pipeline: a transformer, a scheduler and a loop."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny = tiny
        self.transformer: Any = tiny.build()
        self.scheduler = DDIMScheduler()
        self.dtype = torch.float32

    def predict(self, latent: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> Tensor:
        inputs = {
            name: each(lambda one: one.to(self.dtype) if one.is_floating_point() else one, value)
            for name, value in inputs.items()
        }
        moment = torch.full_like(inputs["timestep"], timestep.item())
        output: Tensor = self.transformer(**(inputs | {self.tiny.latent: latent, "timestep": moment}), return_dict=False)[0]
        return output

    def __call__(
        self, batch: int = 1, steps: int = STEPS, seed: int = 0, guidance: float | None = None, only: int | None = None
    ) -> Tensor:
        """Sample; with a guidance, by two calls a step, the second with another text; or `only` one sample of the batch."""
        inputs = self.tiny.inputs(batch)
        generator = torch.Generator().manual_seed(seed)
        latent = torch.randn(inputs[self.tiny.latent].shape, generator=generator).to(self.dtype)
        if only is not None:
            latent = latent[only : only + 1]
            inputs = {
                name: value[only : only + 1]
                if isinstance(value, list) and len(value) == batch
                else each(lambda one: one[only : only + 1] if len(one) == batch else one, value)
                for name, value in inputs.items()
            }
        self.scheduler.set_timesteps(steps)
        with torch.no_grad():
            for timestep in self.scheduler.timesteps:
                output = self.predict(latent, timestep, inputs)
                if guidance is not None:
                    other = self.predict(-latent, timestep, inputs)
                    output = other + guidance * (output - other)
                latent = self.scheduler.step(output, timestep, latent, return_dict=False)[0]
        return latent

    @property
    def blocks(self) -> list[nn.Module]:
        stack = stack_of(self.transformer)
        assert stack is not None
        return [block.module for block in blocks_of(self.transformer, stack)]


@pytest.fixture(params=[tiny for tiny in ZOO if tiny.name not in REFUSED], ids=lambda tiny: tiny.name)
def loop(request: pytest.FixtureRequest) -> Loop:
    return Loop(request.param)


def ran_blocks(loop: Loop) -> list[int]:
    """Filled, from now on, with the index of every block that runs."""
    ran: list[int] = []
    for index, block in enumerate(loop.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    return ran


def step_outputs(loop: Loop, schedule: Schedule, latents: list[Tensor], timesteps: list[float]) -> list[Tensor]:
    """Call the transformer once a step inside `accelerate`, on given latents at given timesteps."""
    inputs = loop.tiny.inputs(len(latents[0]))
    outputs = []
    with torch.no_grad(), accelerate(loop, schedule):
        loop.scheduler.set_timesteps(len(schedule))
        for latent, timestep, moment in zip(latents, timesteps, loop.scheduler.timesteps, strict=True):
            outputs.append(loop.predict(latent, torch.tensor(timestep), inputs))
            loop.scheduler.step(latent, moment, latent)
    return outputs


def test_every_adapter_has_a_model_here() -> None:
    covered = {tiny.name for tiny in ZOO} | {type(build().transformer).__name__ for build in (dit, pixart)}
    assert STACKS.keys() <= covered


def test_the_depth_axis_is_in_the_order_in_which_blocks_run(loop: Loop) -> None:
    ran = ran_blocks(loop)
    loop(steps=1)
    assert ran == list(range(loop.tiny.num_blocks))


def test_without_reuse_no_bit_changes(loop: Loop) -> None:
    plain = loop(batch=2)
    with accelerate(loop, ReuseConfig(1)) as trace:
        assert torch.equal(plain, loop(batch=2))
    with record(loop):
        assert torch.equal(plain, loop(batch=2))
    assert trace.kinds == "f" * STEPS


def test_a_reuse_step_runs_exactly_the_blocks_after_the_cutoff(loop: Loop) -> None:
    depth = loop.tiny.num_blocks
    ran = ran_blocks(loop)
    for cutoff in range(depth - 1):
        ran.clear()
        with accelerate(loop, Schedule.parse(REUSING, cutoff)) as trace:
            loop()
        everything, tail = list(range(depth)), list(range(cutoff + 1, depth))
        assert ran == everything * 3 + tail * 2 + everything
        assert trace.block_evaluations == len(ran)


@pytest.mark.parametrize("guidance", [None, 3.0], ids=["one call", "two calls"])
def test_samples_of_a_batch_get_what_their_own_schedules_give_them_alone(loop: Loop, guidance: float | None) -> None:
    deep = loop.tiny.num_blocks - 2
    schedules = [Schedule.parse(text, deep) for text in ("fcrrcr", "ffcr1rr", "fcrcrr")]
    with accelerate(loop, schedules) as trace:
        together = loop(batch=3, guidance=guidance)
    assert trace.schedules == tuple(schedules)
    for sample, schedule in enumerate(schedules):
        with accelerate(loop, schedule) as alone:
            expected = loop(batch=3, guidance=guidance, only=sample)
        torch.testing.assert_close(together[sample : sample + 1], expected, rtol=1e-4, atol=1e-4)
        assert alone.block_evaluations < trace.baseline_block_evaluations
    calls = 1 if guidance is None else 2
    wanted = sum(one.block_evaluations(loop.tiny.num_blocks) for one in schedules) / 3
    assert trace.block_evaluations == pytest.approx(calls * wanted)


def test_the_same_input_twice_gives_the_same_bits_at_every_cutoff(loop: Loop) -> None:
    latent = torch.randn(loop.tiny.inputs(2)[loop.tiny.latent].shape)
    for cutoff in range(loop.tiny.num_blocks - 1):
        cached, reused, again = step_outputs(loop, Schedule.parse("crr", cutoff), [latent] * 3, [500.0] * 3)
        assert torch.equal(cached, reused) and torch.equal(cached, again)


def test_a_reuse_step_sees_the_current_timestep_and_not_the_current_latent(loop: Loop) -> None:
    latent = torch.randn(loop.tiny.inputs(1)[loop.tiny.latent].shape)
    schedule = Schedule.parse("crrr", loop.tiny.num_blocks // 2 - 1)
    latents = [latent, latent, latent + 1, latent]
    cached, same, other_latent, other_time = step_outputs(loop, schedule, latents, [500.0, 500.0, 500.0, 900.0])
    assert torch.equal(cached, same) and torch.equal(same, other_latent)
    assert not torch.equal(same, other_time)


def test_guidance_in_two_calls_keeps_the_branches_apart(loop: Loop) -> None:
    latent = torch.randn(loop.tiny.inputs(1)[loop.tiny.latent].shape)
    inputs = loop.tiny.inputs(1)
    both = []
    with torch.no_grad(), accelerate(loop, Schedule.parse("cr", loop.tiny.num_blocks - 2)) as trace:
        loop.scheduler.set_timesteps(2)
        for moment in loop.scheduler.timesteps:
            both.append([loop.predict(one, torch.tensor(500.0), inputs) for one in (latent, -latent)])
            loop.scheduler.step(latent, moment, latent)
    (first, second), (first_again, second_again) = both
    assert torch.equal(first, first_again) and torch.equal(second, second_again) and not torch.equal(first, second)
    assert trace.baseline_block_evaluations == 4 * loop.tiny.num_blocks


def test_reuse_changes_the_result_and_leaving_restores_everything(loop: Loop) -> None:
    before, plain = [type(module) for module in loop.transformer.modules()], loop()
    with accelerate(loop, Schedule.parse(REUSING, 1)):
        assert not torch.equal(plain, loop())
        twin = copy.deepcopy(loop.transformer)
    with pytest.raises(KeyError), accelerate(loop, Schedule.parse(REUSING, 1)):
        loop()
        raise KeyError
    assert [type(module) for module in loop.transformer.modules()] == before == [type(module) for module in twin.modules()]
    assert torch.equal(plain, loop())


def test_another_batch_and_number_of_steps_in_the_next_run(loop: Loop) -> None:
    config = ReuseConfig(2, 1, 0.25, 1.0)
    expected = []
    for batch, steps in ((1, 6), (2, 6), (2, 8)):
        with accelerate(loop, config):
            expected.append(loop(batch, steps))
    with accelerate(loop, config):
        assert all(torch.equal(one, loop(*how)) for one, how in zip(expected, ((1, 6), (2, 6), (2, 8)), strict=True))


def test_another_dtype_in_the_next_run(loop: Loop) -> None:
    loop()
    with accelerate(loop, Schedule.parse(REUSING, 1)) as trace:
        loop()
        single = trace.cache_bytes
        loop.transformer.to(torch.float64)
        loop.dtype = torch.float64
        doubled = loop()
    assert doubled.dtype == torch.float64 and doubled.isfinite().all()
    assert trace.kinds == REUSING and trace.cache_bytes == 2 * single


def test_four_threads_on_one_model(loop: Loop) -> None:
    schedules = [
        Schedule.dense(STEPS),
        *(Schedule.parse(kinds, cutoff) for kinds, cutoff in (("crcrcr", 0), ("fcrrrr", 1), (REUSING, 2))),
    ]

    def run(seed: int) -> Tensor:
        own = copy.copy(loop)
        own.scheduler = DDIMScheduler()
        with accelerate(own, schedules[seed]):
            return own(seed=seed)

    alone = [run(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(run, range(4)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_cancel_in_mid_run_leaves_nothing_behind(loop: Loop) -> None:
    def cancel(step: int, _: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    plain, schedule = loop(), Schedule.parse(REUSING, 1)
    with accelerate(loop, schedule):
        expected = loop()
    with pytest.raises(KeyboardInterrupt), accelerate(loop, schedule, on_step=cancel):
        loop(seed=1)
    with accelerate(loop, schedule):
        assert torch.equal(expected, loop())
    assert torch.equal(plain, loop())


def test_observe_measures_every_block_and_changes_no_bit(loop: Loop) -> None:
    with accelerate(loop, Schedule.parse(REUSING, 1)):
        expected = loop(batch=2)
    with observe(loop) as observation, accelerate(loop, Schedule.parse(REUSING, 1)):
        assert torch.equal(expected, loop(batch=2))
    with observe(loop) as observation:
        loop(batch=2)
    cosine = observation.cosine()
    assert cosine.shape == (loop.tiny.num_blocks, STEPS, 2)
    assert cosine[:, 1:].isfinite().all() and (cosine[:, 1:] <= 1 + 1e-5).all()


def test_the_replayed_prefix_gives_the_same_bits(loop: Loop) -> None:
    schedule = Schedule.parse("ffccrr", 1)
    with record(loop) as recording:
        loop()
    with accelerate(loop, schedule):
        full = loop()
    with accelerate(loop, schedule, replay=recording) as trace:
        assert torch.equal(full, loop())
    assert sum(step.replayed for step in trace.steps) == 3
