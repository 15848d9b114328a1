"""Where a session is in force: wherever its pipeline is called while it is open, and for no other visitor."""

import contextvars
import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from blockdance import ReuseConfig, SessionError, accelerate, observe, record
from blockdance.patch import ACTIVE
from tests.guided import MODELS, Guided

REUSING = ReuseConfig(2, 1, 0.3, 1.0)
KINDS = "fffcrcrcrc"
Result = TypeVar("Result")


@pytest.fixture
def wan() -> Guided:
    return Guided(next(tiny for tiny in MODELS if tiny.name == "WanTransformer3DModel"))


def elsewhere(stream: Iterator[Result]) -> Result:
    """The next of a stream, in a fresh context, as Gradio and Starlette run it."""
    return contextvars.Context().run(next, stream)


def accelerated(pipe: Guided, seed: int = 0) -> Tensor:
    with accelerate(pipe, REUSING):
        return pipe(seed=seed)


def twin_of(pipe: Guided) -> Guided:
    """Another visitor's: the same transformer, a scheduler of his own."""
    twin = copy.copy(pipe)
    twin.scheduler = copy.deepcopy(pipe.scheduler)
    return twin


def handler(pipe: Guided, seed: int = 0, config: ReuseConfig = REUSING) -> Iterator[Any]:
    with accelerate(pipe, config) as trace:
        yield "entered"
        yield pipe(seed=seed), trace.kinds
    yield "left"


def test_a_streaming_handler_is_accelerated_and_leaves_in_peace(pipe: Guided) -> None:
    expected, before = accelerated(pipe), type(pipe.transformer)
    stream = handler(pipe)
    assert elsewhere(stream) == "entered"
    picture, kinds = elsewhere(stream)
    assert torch.equal(picture, expected) and kinds == KINDS
    assert elsewhere(stream) == "left"
    assert type(pipe.transformer) is before and ACTIVE.get() == ()


def test_a_handler_that_streams_every_step_is_accelerated(one_of_two: Guided) -> None:
    pipe = one_of_two
    expected = accelerated(pipe)

    @torch.no_grad()
    def steps() -> Iterator[Tensor]:
        with accelerate(pipe, REUSING):
            latent = pipe.latent()
            pipe.scheduler.set_timesteps(10)
            for timestep in pipe.scheduler.timesteps:
                outputs = []
                for condition in pipe.conditions:
                    inputs = {pipe.tiny.latent: latent, "timestep": timestep.expand(1)}
                    with torch.no_grad():
                        outputs.append(pipe.transformer(**condition | inputs, return_dict=False)[0])
                latent = pipe.scheduler.step(torch.stack(outputs).mean(dim=0), timestep, latent, return_dict=False)[0]
                yield latent

    stream, latest = steps(), None
    for _ in range(10):
        latest = elsewhere(stream)
    assert latest is not None and torch.equal(latest, expected)
    stream.close()  # type: ignore[attr-defined]


def test_a_worker_thread_is_accelerated(one_of_two: Guided) -> None:
    pipe = one_of_two
    expected = accelerated(pipe)
    with accelerate(pipe, REUSING) as trace, ThreadPoolExecutor(1) as threads:
        assert torch.equal(threads.submit(pipe).result(), expected)
    assert trace.kinds == KINDS and trace.note is None


@pytest.mark.parametrize("face", [observe, record], ids=lambda face: face.__name__)
def test_observe_and_record_follow_a_worker_thread_too(wan: Guided, face: Callable[[Any], Any]) -> None:
    with face(wan) as here:
        wan()
    with face(wan) as there, ThreadPoolExecutor(1) as threads:
        threads.submit(wan).result()
    if face is observe:
        assert torch.equal(here.cosine()[:, 1:], there.cosine()[:, 1:])
    else:
        assert here.outputs.keys() == there.outputs.keys() and len(here.outputs) == 20


def test_two_visitors_with_streams_never_see_each_other(one_of_two: Guided) -> None:
    pipe = one_of_two
    twin, other = twin_of(pipe), ReuseConfig(3, 0, 0.0, 1.0)
    expected = accelerated(pipe, seed=1)
    with accelerate(twin, other):
        theirs = twin(seed=2)
    streams = [handler(pipe, 1), handler(twin, 2, other)]
    for stream in streams:
        elsewhere(stream)
    assert torch.equal(elsewhere(streams[1])[0], theirs)
    assert torch.equal(elsewhere(streams[0])[0], expected)
    for stream in streams:
        elsewhere(stream)


def test_two_streams_on_one_scheduler_are_refused_rather_than_mixed(wan: Guided) -> None:
    streams = [handler(wan), handler(wan)]
    for stream in streams:
        elsewhere(stream)
    with pytest.raises(SessionError, match="2 sessions follow this pipeline's scheduler"):
        elsewhere(streams[0])
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]
    assert torch.equal(accelerated(wan), accelerated(wan))


def test_a_plain_visitor_stays_plain_while_others_run(one_of_two: Guided) -> None:
    """In the middle of an accelerated run, another thread draws with the same transformer and a scheduler of its own."""
    pipe = one_of_two
    twin = twin_of(pipe)
    plain, expected, pictures = twin(seed=5), accelerated(pipe), []

    def visit(*_: Any) -> None:
        thread = threading.Thread(target=lambda: pictures.append(twin(seed=5)))
        thread.start()
        thread.join()

    with accelerate(pipe, REUSING) as trace:
        assert torch.equal(expected, pipe(after=visit))
    assert trace.kinds == KINDS
    assert len(pictures) == 10 and all(torch.equal(plain, picture) for picture in pictures)


def test_a_run_that_is_overtaken_by_another_of_its_session_goes_on_plainly(wan: Guided) -> None:
    """The same pipeline is called in a second thread while a run is on in the first; neither sees what the other stored."""
    twin = twin_of(wan)
    expected = accelerated(wan, seed=3)
    overtaker: list[Tensor] = []

    def overtake(pipe: Guided, step: int, latent: Tensor) -> None:
        if step == 4:
            scheduler = copy.deepcopy(pipe.scheduler)
            threads = ThreadPoolExecutor(1)
            overtaker.append(threads.submit(pipe, seed=3).result())
            pipe.scheduler.__dict__.update(scheduler.__dict__)

    with accelerate(wan, REUSING):
        late = wan(seed=4, after=overtake)
    assert torch.equal(overtaker[0], expected)
    with accelerate(twin, ReuseConfig(2, 1, 0.3, 0.5)):  # reuses at step 4, and runs all blocks from step 5 on
        assert torch.equal(late, twin(seed=4))


def test_leaving_in_another_context_never_raises(wan: Guided) -> None:
    entered = accelerate(wan, REUSING)
    contextvars.Context().run(entered.__enter__)
    contextvars.Context().run(entered.__exit__, None, None, None)
    assert torch.equal(accelerated(wan), accelerated(wan))
    outer, inner = accelerate(wan, REUSING), observe(wan)
    contextvars.Context().run(lambda: (outer.__enter__(), inner.__enter__()))
    contextvars.Context().run(outer.__exit__, None, None, None)
    contextvars.Context().run(inner.__exit__, None, None, None)
    assert ACTIVE.get() == ()


def test_a_context_that_outlives_the_session_is_plain(one_of_two: Guided) -> None:
    pipe = one_of_two
    plain = pipe()
    with accelerate(pipe, REUSING):
        inherited = contextvars.copy_context()
        pipe()
    assert torch.equal(plain, inherited.run(pipe))
