"""What takes part in a session, and what it is told about."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from blockdance.adapters import Streams
from blockdance.denoiser import Denoiser
from blockdance.errors import ScheduleError
from blockdance.schedule import StepKind


class Run(Protocol):
    """What there is to know of the run that is on."""

    denoisers: list[Denoiser]
    num_steps: int
    steps_done: int
    calls_made: int
    """Of the transformer, as far as they belong to the run."""

    @property
    def num_blocks(self) -> int:
        """L, the depth of the deepest denoiser."""


@dataclass(slots=True)
class ModelCall:
    """One call of a transformer that belongs to a run."""

    step: int
    """Position in sampling order, 0 is the noisiest."""
    stage: int
    """0, or the number of the further evaluation within one step of a second-order scheduler."""
    branch: int
    """Of guidance in calls of their own: numbered in the order in which the denoiser's branches first came in this run."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: int
    """Rows of the batch, both halves of a guided one counted."""
    depth: int
    """Blocks the plain model runs in this call: all but those that skip-layer guidance leaves out."""
    denoiser: Denoiser
    expert: int = 0
    """Which of the pipeline's denoisers is called."""
    order: int = 0
    """Calls before this one in the same evaluation."""
    kind: StepKind = StepKind.FULL
    blocks_evaluated: float = 0
    """Of a batch that is run in parts, the mean over its samples."""
    samples: tuple[int, ...] | None = None
    """Which samples of the batch it is about, if the batch is run in parts; else all."""
    replayed_seconds: float | None = None
    """Seconds the whole step took when it was recorded, if this call's output was replayed."""


class Part:
    """Something that takes part in a session; every hook may be left out."""

    changes_the_run = False
    """Whether it may keep blocks from running."""
    needs_the_baseline = False
    """Whether it makes sense only where every block runs."""
    needs_whole_batches = False
    """Whether it cannot follow a batch that is run in parts."""
    needs_blocks = False
    """Whether it makes no sense where blocks run unseen."""
    hides_blocks = False
    """Whether blocks run unseen with it."""
    unfit: ScheduleError | None = None
    """Why the run that began cannot be."""

    def begin_run(self, run: "Run") -> None:
        """A new run of `run.num_steps` steps begins."""

    def resize_run(self, run: "Run") -> None:
        """The run that is on turns out to have `run.num_steps` steps, as it begins in the middle of the timesteps, or the
        transformer other blocks than it seemed to."""

    def begin_call(self, call: ModelCall) -> Any:
        """Before the transformer runs. Returns its output to have it not run at all, else None."""

    def parts_of(self, call: ModelCall) -> Sequence[Sequence[int]]:
        """Lists of samples that shall be run by themselves in this call; together all of them. Empty for one call of all."""
        return ()

    def begin_part(self, call: ModelCall) -> None:
        """Before some samples of a call are run by themselves; `call` is about these."""

    def watches_blocks(self, call: ModelCall) -> bool:
        """Whether blocks matter in this call, which `begin_call` has seen."""
        return False

    def enter(self, call: ModelCall, inputs: Streams) -> None:
        """The first block of a call is about to see `inputs`."""

    def blocks_skipped(self, call: ModelCall) -> int:
        """How many of the first blocks of an entered call hand on what they are given, and do nothing else."""
        return 0

    def blocks_before(self, call: ModelCall) -> Collection[int]:
        """The blocks of an entered call that `before_block` is asked about."""
        return ()

    def blocks_after(self, call: ModelCall) -> Collection[int]:
        """The blocks of an entered call that `after_block` is told about."""
        return ()

    def before_block(self, call: ModelCall, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams | None:
        """Before block `index` is called with these arguments. Returns its outputs to have it not run, else None."""

    def after_block(self, call: ModelCall, index: int, outputs: Streams) -> None:
        """Block `index` ran."""

    def end_call(self, call: ModelCall, output: Any) -> None:
        """The transformer returned `output`."""

    def drop_branch(self, expert: int, branch: int) -> None:
        """This branch of a denoiser will not come again, or cannot be told from another."""

    def end_step(self, step: int, calls: list[ModelCall], sample_rows: int) -> None:
        """The scheduler finished `step`; its `calls` in order, and the rows of the latent it worked on. Needs a scheduler."""

    def end_run(self, run: "Run") -> None:
        """The run is over, or was given up; `run.steps_done` tells how far it came. Needs a scheduler."""
