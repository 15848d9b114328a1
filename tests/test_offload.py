"""Stored outputs in CPU memory: the same bits, and a device that nobody waits for but itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import blockdance
from blockdance import ConfigError, Extrapolated, ReuseConfig, accelerate, load_demo_profile
from blockdance import offload as module
from blockdance.frontier import Frontier
from blockdance.offload import InCPUMemory, Offloaded
from blockdance.profile import key_of, mixing_weights
from blockdance.storage import Kept, Latest, Residual, StorageRule, mapped, stored_by
from tests.test_storage import RULES
from tests.tiny import Case

COPY = Tensor.copy_
SEED = torch.Generator().manual_seed(0)


def drawn() -> tuple[Tensor, ...]:
    return torch.randn(2, 3, 4, generator=SEED), torch.randn(2, 5, generator=SEED)


def history(rule: StorageRule, keeper: StorageRule, points: list[tuple[Tensor, ...]]) -> list[Kept]:
    """What `keeper` keeps of outputs, each of which the model writes into afterwards."""
    kept = []
    for place, outputs in enumerate(points):
        theirs = tuple(stream.clone() for stream in outputs)
        seen = tuple(stream + 1 for stream in outputs)
        entry = [(tuple(stream.shape), stream.dtype, stream.device) for stream in seen]
        inputs = stored_by(keeper, seen) if rule.wants_inputs else None
        kept.append(Kept(place, entry, inputs, stored_by(keeper, theirs)))
        for stream in (*theirs, *seen):
            stream.fill_(torch.nan)
    return kept


@pytest.mark.parametrize("rule", RULES, ids=repr)
class TestEveryRule:
    def test_on_a_cpu_it_starts_from_the_same_bits(self, rule: StorageRule) -> None:
        outer, points, now = Offloaded(rule), [drawn() for _ in range(rule.points)], drawn()
        plain, offloaded = history(rule, rule, points), history(rule, outer, points)
        expected, started = rule.outputs_at(5, plain, now), outer.outputs_at(5, offloaded, now)
        assert all(map(torch.equal, expected, started))
        held = [stream.data_ptr() for one in offloaded for stream in one.outputs]
        assert not {stream.data_ptr() for stream in started} & set(held)
        assert [one.nbytes for one in offloaded] == [one.nbytes for one in plain]

    def test_a_picture_has_the_same_bits(self, case: Case, rule: StorageRule) -> None:
        pipe, plan = case.build(), ReuseConfig(3, 3, 0.3, 1.0)
        with accelerate(pipe, plan, storage=rule) as plain:
            expected = case.run(pipe)
        with accelerate(pipe, plan, storage=Offloaded(rule)) as trace:
            assert torch.equal(expected, case.run(pipe))
        assert (trace.kinds, trace.cache_bytes) == (plain.kinds, plain.cache_bytes)

    def test_it_mixes_as_the_rule_inside(self, rule: StorageRule) -> None:
        outer = Offloaded(rule)
        assert (outer.points, outer.wants_inputs, key_of(outer)) == (rule.points, rule.wants_inputs, key_of(rule))
        if not rule.wants_inputs:
            donors = list(range(rule.points))
            assert mixing_weights(outer, donors, 5).tolist() == mixing_weights(rule, donors, 5).tolist()


@pytest.mark.parametrize("rule", [Latest(), Extrapolated()], ids=repr)
def test_planning_with_it_is_planning_with_the_rule_inside(rule: StorageRule) -> None:
    profile, outer = load_demo_profile(), Offloaded(rule)
    plain, offloaded = [blockdance.plan(target_speedup=1.5, storage=one, profile=profile) for one in (rule, outer)]
    assert offloaded.schedule == plain.schedule and offloaded.predicted == plain.predicted
    assert offloaded.storage == outer
    frontiers = [Frontier(profile.expected(12), 12, profile.num_blocks, one) for one in (rule, outer)]
    assert frontiers[0].changes.tolist() == frontiers[1].changes.tolist()


@pytest.mark.parametrize("inside", ["latest", Latest, None, 3])
def test_what_is_no_rule_is_refused(inside: Any) -> None:
    with pytest.raises(ConfigError, match="storage must be a rule such as"):
        Offloaded(inside)


def test_bytes_on_the_device_are_told_from_those_in_cpu_memory() -> None:
    home, value = torch.device("meta"), torch.zeros(3)
    entry = [((3,), torch.float32, home)]
    beside = Kept(0, entry, None, (value.to(home), value.to(home)))
    away = Kept(0, entry, (value.to(home),), InCPUMemory([value, value], [home, home]))
    assert (beside.nbytes, beside.device_nbytes) == (24, 24)
    assert (away.nbytes, away.device_nbytes) == (36, 12)


# ---------------------------------------------------------------- a stand-in for CUDA


class Lazy:
    """A device on the CPU whose copying stream does nothing before it must, and whose pinned memory holds NaN until then."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], object]] = []
        self.on_side = self.side_sees_main = False
        self.host_waited = 0
        self.lent: list[int] = []

    # as the computation's stream

    def wait_event(self, event: "Event") -> None:
        event.run()

    # as the copying stream

    def wait_stream(self, other: object) -> None:
        assert other is self
        self.side_sees_main = True

    def record_event(self) -> "Event":
        self.side_sees_main = False
        return Event(self, len(self.queue))

    # as what stands around them

    @contextmanager
    def side(self, stream: object) -> Iterator[None]:
        assert stream is self
        self.on_side = True
        yield
        self.on_side = False

    def copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        assert self.on_side and non_blocking and self.side_sees_main, "or else it reads what is not yet computed"
        self.queue.append(lambda: COPY(target, source))
        return target


class Event:
    def __init__(self, device: Lazy, end: int) -> None:
        self.device, self.end = device, end

    def run(self) -> None:
        for place in range(self.end):
            self.device.queue[place]()
            self.device.queue[place] = lambda: None

    def synchronize(self) -> None:
        self.device.host_waited += 1
        self.run()


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> Lazy:
    device = Lazy()
    monkeypatch.setattr(module, "on_cuda", lambda _: True)
    monkeypatch.setattr(module, "pinned_like", lambda stream: torch.full_like(stream, torch.nan))
    monkeypatch.setattr(module, "pinned", lambda stream: stream)
    monkeypatch.setattr(module, "copying_stream", lambda _: device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: device)
    monkeypatch.setattr(torch.cuda, "stream", device.side)
    monkeypatch.setattr(Tensor, "copy_", lambda target, source, **how: device.copy(target, source, **how))
    monkeypatch.setattr(Tensor, "record_stream", lambda stream, side: device.lent.append(stream.data_ptr()))
    return device


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_device_that_copies_late_brings_back_the_same_bits_and_the_host_never_waits(lazy: Lazy, rule: StorageRule) -> None:
    outer, points, now = Offloaded(rule), [drawn() for _ in range(rule.points)], drawn()
    offloaded = history(rule, outer, points)
    assert all(stream.isnan().all() for one in offloaded for stream in one.outputs), "nothing has been copied yet"
    assert len(lazy.lent) == len(lazy.queue) == 2 * len(points) * (1 + rule.wants_inputs)
    started = outer.outputs_at(5, offloaded, now)
    assert all(map(torch.equal, rule.outputs_at(5, history(rule, rule, points), now), started))
    assert lazy.host_waited == 0


def test_what_is_taken_apart_on_the_host_has_arrived(lazy: Lazy) -> None:
    outputs = drawn()
    kept = history(Latest(), Offloaded(), [outputs])[0]
    part = mapped(kept.outputs, lambda stream: stream[:1].clone())
    assert lazy.host_waited and isinstance(part, InCPUMemory) and part.homes == tuple(stream.device for stream in outputs)
    assert all(torch.equal(ours, whole[:1]) for ours, whole in zip(part, outputs, strict=True))


def test_a_rule_that_does_not_say_how_keeps_a_copy_beside_the_original() -> None:
    outputs = drawn()
    for rule in (Latest(), Residual()):
        kept = stored_by(rule, outputs)
        assert all(map(torch.equal, kept, outputs))
        assert all(ours.data_ptr() != theirs.data_ptr() for ours, theirs in zip(kept, outputs, strict=True))
    halves = mapped(outputs, lambda stream: stream[:1])
    assert [len(stream) for stream in halves] == [1, 1]
