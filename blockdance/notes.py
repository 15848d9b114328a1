"""Why nothing was reused although it was asked for: one sentence in the trace, and one warning."""

import warnings

from blockdance.errors import BlockDanceWarning
from blockdance.part import Run
from blockdance.schedule import StepKind
from blockdance.trace import Trace

GRADIENTS = "Gradients are on, so every step ran all blocks; call the pipeline under torch.no_grad()."
NOTHING_FITS = (
    "No call found what the last cache step had stored for its branch, as its conditioning, its shape or the model's adapters "
    "changed with every step, so every step ran all blocks."
)
NEVER = (
    "Nothing was reused in {calls} calls: none found what a cache step had stored for its branch, as its conditioning or its "
    "shape was another, or none came to a step that reuses."
)
NOT_STEPPED = "The transformer was called and the pipeline's scheduler was not stepped, so no step was told from another."
NO_CALLS = "The transformer was not called by the loop that steps the scheduler, so its calls ran all blocks."
ALL_CACHE = "The policy decided that every step runs all blocks."
NO_RUN = "No run was begun inside: the pipeline's scheduler was never set to timesteps, so nothing was reused."


class Notes:
    """Remembers what kept a run from reusing, and tells it.

    Args:
        trace: where the sentence goes.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.is_planned = False
        """Whether anything shall be reused in the run that is on."""
        self.had_gradients = False
        self.is_undecided = False
        """Whether a policy has not decided yet."""
        self._reused = 0
        self._has_warned = False

    def count(self, found: bool) -> None:
        """A call that was to reuse did so, or ran all blocks instead."""
        self._reused += found

    def end_run(self, run: Run) -> None:
        """Say why the run reused nothing, if it was asked to."""
        if not self.is_planned or not (run.steps_done or run.calls_made) or StepKind.REUSE in self.trace.ran:
            return
        if self.trace.note is None:
            self.trace.note = self._why_nothing(run)
        self._warn(self.trace.note)

    def _why_nothing(self, run: Run) -> str:
        if self.had_gradients:
            return GRADIENTS
        if not run.steps_done:
            return NOT_STEPPED
        reuse = min((one.first_reuse for one in self.trace.schedules if one.first_reuse is not None), default=None)
        if self.is_undecided or (reuse is not None and run.steps_done <= reuse):
            return f"The run ended after {run.steps_done} of {run.num_steps} steps, before any step that reuses."
        if reuse is None:
            return ALL_CACHE
        return NOTHING_FITS if self.trace.block_evaluations else NO_CALLS

    def end(self) -> None:
        """Nothing runs any more: say so if nothing ever did."""
        if self.trace.schedule is None:
            self.trace.note = NO_RUN
            self._warn(NO_RUN)

    def tell_misses(self, calls: int) -> None:
        """Where runs have no known end: say so if nothing was reused in so many calls."""
        if calls and not self._reused:
            self._warn(GRADIENTS if self.had_gradients else NEVER.format(calls=calls))

    def _warn(self, note: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(note, BlockDanceWarning, stacklevel=2)
