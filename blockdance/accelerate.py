"""`accelerate`: BlockDance around an unmodified pipeline."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from blockdance.deciders import Decider, check_kind, check_plan
from blockdance.errors import ConfigError
from blockdance.policy import Policy
from blockdance.replay import Recording
from blockdance.reuser import Reuser
from blockdance.storage import PAPER, StorageRule, check_rule
from blockdance.trace import OnStep, Trace, traced


@contextmanager
def accelerate(
    pipe: Any,
    config: Decider,
    *,
    storage: StorageRule | None = None,
    replay: Recording | None = None,
    on_step: OnStep | None = None,
    compiled: Mapping[str, Any] | None = None,
) -> Iterator[Trace]:
    """Run the unmodified pipeline inside with BlockDance; leaving restores it exactly, whatever happened inside.

    In force wherever the pipeline is called while it is open, also in other threads and contexts. Calls of the transformer that
    are not the run's are plain. If nothing was reused of what was asked for, the trace's note says why and a warning is given.

    Args:
        pipe: a diffusers pipeline with a supported transformer; call it inside as usual, any number of times.
        config: a `ReuseConfig`; a `Schedule` of as many steps as the run will have; a list of such, one for each sample of the
            batch; or a policy (`blockdance.ada`), which decides for each sample in the run. A batch whose samples differ on a
            step is run in parts, so that each pays for its own blocks alone.
        storage: what a reuse step starts from; by default what the policy was trained with, or else the last cache step's
            output, as in the paper. `Extrapolated()` continues the last two.
        replay: a baseline from `record`, made with the same call; its outputs stand in for the steps before the
            first reuse, and the result has the same bits as a full run.
        on_step: called with (finished step, number of steps); raise from it to cancel.
        compiled: options of `torch.compile` for the whole forward, as `{"mode": "reduce-overhead"}`: one graph for calls of all
            blocks, and one for each tail. By default the forward runs as it is.

    Yields:
        The trace of the last run.

    Raises:
        ConfigError: the config or the storage rule is none.
        PolicyError: the policy was trained for another model.
        UnsupportedModelError: no adapter for the transformer, or no scheduler to count steps by.
        ScheduleError: the cutoff does not fit the depth, or the schedule not the number of steps or samples.
        SessionError: the pipeline is accelerated already, another cache is on, its scheduler was replaced or only copies of it
            are stepped, or the recording belongs to another model or call.
    """
    check_kind(config)
    trace = Trace(num_blocks=0)
    if storage is None:
        storage = config.storage if isinstance(config, Policy) else PAPER
    check_rule(storage)
    if compiled is not None and storage.wants_inputs:
        raise ConfigError(f"storage must be a rule of block outputs alone for a compiled forward, got {storage!r}")
    reuser = Reuser(config, trace, replay, storage, compiled)
    with traced(pipe, reuser, trace, on_step) as session:
        if replay is not None:
            replay.check_transformer(session.transformer)
        check_plan(config, session)
        yield trace
        reuser.notes.end()
