"""Record a baseline once, and play its model outputs back wherever the inputs are the same, bit for bit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor, nn

from blockdance.arguments import Leaf, leaves_of, same_value
from blockdance.denoiser import Denoiser, first_denoiser
from blockdance.errors import SessionError
from blockdance.modelstate import ModelState, state_of
from blockdance.part import ModelCall, Part, Run
from blockdance.schedule import Schedule
from blockdance.trace import OnStep, Trace, traced

Key = tuple[int, int, int]
"""Step, stage, and how many calls came before in the evaluation."""


@dataclass
class Recording:
    """A baseline run: for every call of the transformer what went in and what came out, the model's state, and the trace."""

    trace: Trace
    transformer: ReferenceType[nn.Module] | None
    """Of which model; None after it was pickled."""
    inputs: dict[Key, list[Tensor]] = field(default_factory=dict)
    """The tensors among a call's arguments, at any depth."""
    outputs: dict[Key, Any] = field(default_factory=dict)
    facts: dict[Key, list[Leaf]] = field(default_factory=dict)
    """Where each of these tensors stood, and all other arguments."""
    models: list[ModelState] = field(default_factory=list)
    """Of each denoiser when the run began."""

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"transformer": None}

    def check_transformer(self, transformer: nn.Module) -> None:
        """Raise SessionError if it was made with another one."""
        if self.transformer is not None and self.transformer() is not transformer:
            raise SessionError("the recording was made with another transformer; record the baseline with this pipeline")

    def check_models(self, denoisers: Sequence[Denoiser]) -> None:
        """Raise SessionError if weights or adapters are not what they were; looks at a few numbers of each weight."""
        now = [state_of(denoiser.transformer) for denoiser in denoisers] if self.models else []
        changed = [word for before, after in zip(self.models, now, strict=False) if (word := before.difference(after))]
        if changed or len(now) != len(self.models):
            what = changed[0] if changed else "transformers"
            raise SessionError(f"no step can be replayed: the recording was made with other {what}; record the baseline again")

    def output_for(self, call: ModelCall) -> Any:
        """The recorded output of this call, as fresh tensors.

        Raises:
            SessionError: the call was not recorded, or was recorded with other inputs.
        """
        key = key_of(call)
        if not (call.step < len(self.trace.ran) and key in self.outputs and self._has_inputs(key, call)):
            raise SessionError(
                f"step {call.step} cannot be replayed: the recording was made with another prompt, seed, "
                "scheduler, number of steps, argument or guidance"
            )
        return copied(self.outputs[key])

    def _has_inputs(self, key: Key, call: ModelCall) -> bool:
        tensors, facts = inputs_of(call)
        ours, theirs = self.facts.get(key), self.inputs[key]
        return (
            (ours is None or (len(ours) == len(facts) and all(map(same_leaf, ours, facts))))
            and len(theirs) == len(tensors)
            and all(map(same_value, theirs, tensors))
        )


def inputs_of(call: ModelCall) -> tuple[list[Tensor], list[Leaf]]:
    """The tensors among a call's arguments at any depth; and every leaf, where a tensor is one by its place alone."""
    leaves = list(leaves_of({"": call.expert} | call.denoiser.named(call.args, call.kwargs)))
    tensors = [value for _, value in leaves if isinstance(value, Tensor)]
    return tensors, [(path, Tensor if isinstance(value, Tensor) else value) for path, value in leaves]


def same_leaf(ours: Leaf, theirs: Leaf) -> bool:
    """Whether the same value stands at the same place."""
    return ours[0] == theirs[0] and same_value(ours[1], theirs[1])


class Recorder(Part):
    """Fills a recording while a baseline runs."""

    needs_the_baseline = True

    def __init__(self, recording: Recording) -> None:
        self.recording = recording

    def begin_run(self, run: Run) -> None:
        self.resize_run(run)
        for memory in (self.recording.inputs, self.recording.outputs, self.recording.facts):
            memory.clear()
        self.recording.models = [state_of(denoiser.transformer) for denoiser in run.denoisers]

    def resize_run(self, run: Run) -> None:
        self.recording.trace.schedule = Schedule.dense(run.num_steps)

    def begin_call(self, call: ModelCall) -> None:
        tensors, self.recording.facts[key_of(call)] = inputs_of(call)
        self.recording.inputs[key_of(call)] = [tensor.clone() for tensor in tensors]

    def end_call(self, call: ModelCall, output: Any) -> None:
        self.recording.outputs[key_of(call)] = copied(output)


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
    recording = Recording(Trace(num_blocks=0), ref(first_denoiser(pipe)))
    with traced(pipe, Recorder(recording), recording.trace, on_step):
        yield recording


def key_of(call: ModelCall) -> Key:
    """Where a call stands in its run."""
    return call.step, call.stage, call.order


def copied(output: Any) -> Any:
    """A transformer's output with fresh tensors: one, or several in lists, tuples or a diffusers output class."""
    if isinstance(output, Tensor):
        return output.clone()
    if type(output) in (list, tuple):
        return type(output)(map(copied, output))
    return type(output)(**{name: copied(value) for name, value in output.items() if value is not None})
