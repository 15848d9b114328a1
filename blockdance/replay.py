"""Record a baseline once, and play its model outputs back wherever the inputs are the same, bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor, nn

from blockdance.adapters import transformer_of
from blockdance.errors import SessionError
from blockdance.schedule import Schedule
from blockdance.session import ModelCall, Part, Session, same_tensors, tensors_of
from blockdance.trace import OnStep, Trace, traced

Key = tuple[int, int, int]


@dataclass
class Recording:
    """A baseline run: for every call of the transformer what went in and what came out, and the trace."""

    trace: Trace
    transformer: ReferenceType[nn.Module]
    inputs: dict[Key, list[Tensor]] = field(default_factory=dict)
    outputs: dict[Key, Any] = field(default_factory=dict)

    def output_for(self, call: ModelCall) -> Any:
        """The recorded output of this call, as fresh tensors.

        Raises:
            SessionError: the call was not recorded, or was recorded with other inputs.
        """
        key = _key(call)
        finished = call.step < len(self.trace.steps) and key in self.outputs
        same = finished and same_tensors(self.inputs[key], tensors_of(call.args, call.kwargs))
        if not same:
            raise SessionError(
                f"step {call.step} cannot be replayed: the recording was made with another prompt, seed, "
                "scheduler, number of steps or guidance"
            )
        return _copied(self.outputs[key])


class Recorder(Part):
    """Fills a recording while a baseline runs."""

    needs_the_baseline = True

    def __init__(self, recording: Recording) -> None:
        self.recording = recording

    def begin_run(self, session: Session) -> None:
        self.recording.trace.schedule = Schedule.dense(session.num_steps)
        self.recording.inputs.clear()
        self.recording.outputs.clear()

    def begin_call(self, call: ModelCall) -> None:
        self.recording.inputs[_key(call)] = [tensor.clone() for tensor in tensors_of(call.args, call.kwargs)]

    def end_call(self, call: ModelCall, output: Any) -> None:
        self.recording.outputs[_key(call)] = _copied(output)


@contextmanager
def record(pipe: Any, *, on_step: OnStep | None = None) -> Iterator[Recording]:
    """Run the plain pipeline inside and keep its model outputs for `accelerate(..., replay=recording)`.

    Args:
        pipe: a diffusers pipeline with a supported transformer.
        on_step: called with (finished step, number of steps); raise from it to cancel.

    Yields:
        The recording; its `trace` is the baseline's.

    Raises:
        SessionError: inside `accelerate`, whose outputs are not the baseline's.
        UnsupportedModelError: the pipeline's transformer or scheduler is not supported.
    """
    recording = Recording(Trace(num_blocks=0), ref(transformer_of(pipe)))
    with traced(pipe, Recorder(recording), recording.trace, on_step):
        yield recording


def _key(call: ModelCall) -> Key:
    return call.step, call.stage, call.branch


def _copied(output: Any) -> Any:
    """The transformer's output (a tensor, a tuple, or a diffusers output class around one tensor) with its tensor cloned."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, tuple):
        return tuple(value.clone() for value in output)
    return type(output)(sample=output.sample.clone())
