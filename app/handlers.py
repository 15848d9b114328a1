"""What the page does when a visitor acts: plain functions of an engine, with no layout."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from analysis.experiment import Request, plan
from analysis.machine import describe_machine
from analysis.metrics import Picture
from analysis.plots import blocks_figure, similarity_figure
from app.engine import Engine, View
from app.panels import message_panel, numbers_panel, schedule_panel, status_panel
from blockdance import BlockDanceError, ReuseConfig

Updates = tuple[Any, ...]
"""One value per output of the page: status, three pictures, wipe, numbers, map, bars. `gr.skip()` leaves one as it is."""
OUTPUTS = 8


class Handlers:
    """The page's handlers over one engine; they keep nothing of a visitor."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.machine = describe_machine()

    def update_page(
        self, prompt: str, seed: int, steps: int, guidance: float, sampler: str,
        reuse_interval: int, cutoff_block: int, window_start: float, window_end: float, scale: str,
    ) -> Iterator[Updates]:  # fmt: skip
        """Run a comparison and update the page as it goes. Bad input is a toast, and the page stays as it is."""
        try:
            request = Request(prompt, seed, steps, guidance, sampler)
            config = ReuseConfig(reuse_interval, cutoff_block, window_start, window_end)
            shown = None
            for view in self.engine.views(request, config):
                yield self._updates(view, shown, scale)
                shown = view
        except BlockDanceError as error:
            gr.Warning(f"{error}.")
            yield (gr.skip(),) * OUTPUTS

    def preview(self, steps: int, reuse_interval: int, cutoff_block: int, window_start: float, window_end: float) -> str:
        """What the sliders mean, by arithmetic alone."""
        try:
            config = ReuseConfig(reuse_interval, cutoff_block, window_start, window_end)
            request = Request("preview", steps=steps)
            return schedule_panel(plan(config, request, self.engine.num_blocks), self.engine.num_blocks)
        except BlockDanceError as error:
            return message_panel(f"{error}.")

    def compare(
        self, prompt: str, seed: int, steps: int, guidance: float,
        reuse_interval: int, cutoff_block: int, window_start: float, window_end: float,
    ) -> tuple[Picture, Picture, dict[str, Any]]:  # fmt: skip
        """Draw `prompt` with the plain DDIM sampler and with BlockDance from the same noise.

        Returns the baseline picture, the BlockDance picture (both PNG), and all figures: the keys of the command line's
        result.json, and `unknown_words` and `fewer_steps` besides.
        """
        try:
            request = Request(prompt, seed, steps, guidance)
            config = ReuseConfig(reuse_interval, cutoff_block, window_start, window_end)
            *_, last = self.engine.views(request, config)
        except BlockDanceError as error:
            raise gr.Error(f"{error}.", print_exception=False) from error
        assert last.baseline is not None and last.variant is not None and last.control is not None, "the last view is complete"
        more = {"unknown_words": self.engine.pipe.unknown_words(prompt), "note": last.note, "fewer_steps": last.control.figures}
        return last.baseline, last.variant.picture, last.variant.figures | more

    def _updates(self, view: View, shown: View | None, scale: str) -> Updates:
        """The page for a view: what changed since `shown`. Until its pictures are there, the last comparison stays complete.

        What did not change is not sent again: Gradio would write its file anew while the browser may be reading it.
        """
        status = status_panel(view)
        if view.baseline is None or view.variant is None:
            return (status, *[gr.skip()] * (OUTPUTS - 1))

        def new(name: str) -> bool:
            return shown is None or shown.variant is not view.variant or getattr(shown, name) is not getattr(view, name)

        drawn, controlled, mapped = new("variant"), new("control"), new("cosine")
        numbers = numbers_panel(view, view.variant, self.engine.pipe.unknown_words(view.request.prompt), self.machine)
        control = None if view.control is None else view.control.picture
        similarity = None if view.cosine is None else similarity_figure(view.cosine, view.schedule, scale)
        return (
            status,
            view.baseline if drawn else gr.skip(),
            view.variant.picture if drawn else gr.skip(),
            control if controlled else gr.skip(),
            (view.baseline, view.variant.picture) if drawn else gr.skip(),
            numbers if controlled else gr.skip(),
            similarity if mapped else gr.skip(),
            blocks_figure(view.variant.trace.steps) if drawn else gr.skip(),
        )
