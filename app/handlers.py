"""What the page does when a visitor acts: plain functions of an engine, with no layout."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from analysis.experiment import Request, plan
from analysis.machine import describe_machine
from analysis.pictures import Picture
from analysis.plots import blocks_figure, similarity_figure
from app.engine import Engine, View
from app.models import Models
from app.panels import message_panel, numbers_panel, schedule_panel, status_panel
from blockdance import BlockDanceError, ReuseConfig
from blockdance.presets import DEMO

Updates = tuple[Any, ...]
"""One value per output of the page: status, three pictures, wipe, numbers, map, bars. `gr.skip()` leaves one as it is."""
OUTPUTS = 8
MODEL_OUTPUTS = 14
"""Of a choice of model: status, the model twice (shown, and current), prompt, the other controls, examples, and known words."""


class Handlers:
    """The page's handlers over the models; they keep nothing of a visitor."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.machine = describe_machine()

    def choose_model(self, name: str, current: str) -> Iterator[Updates]:
        """Load a model and set the controls for it. If that cannot be, it is a toast, and the model stays the current one."""
        if self.models.loaded(name) is None:
            yield (message_panel(f"loading {name} …"), *[gr.skip()] * (MODEL_OUTPUTS - 1))
        try:
            settings = self.models.settings(name)
        except BlockDanceError as error:
            gr.Warning(f"{error}.")
            yield (message_panel(""), current, *[gr.skip()] * (MODEL_OUTPUTS - 2))
            return
        request, config, deepest = settings.request, settings.config, settings.num_blocks - 2
        words = settings.known_words
        yield (
            message_panel(""),
            name,
            name,
            request.prompt,
            request.steps,
            request.guidance,
            request.sampler,
            config.reuse_interval,
            gr.update(maximum=deepest, value=min(config.cutoff_block or 0, deepest)),
            config.window_start,
            config.window_end,
            gr.update(visible=name == DEMO),
            gr.update(visible=words is not None),
            ", ".join(words or []),
        )

    def update_page(
        self, prompt: str, seed: int, steps: int, guidance: float, sampler: str,
        reuse_interval: int, cutoff_block: int, window_start: float, window_end: float, scale: str, model: str = DEMO,
    ) -> Iterator[Updates]:  # fmt: skip
        """Run a comparison and update the page as it goes. Bad input is a toast, and the page stays as it is."""
        try:
            engine = self.models.loaded(model)
            if engine is None:  # another visitor's took its place
                yield (message_panel(f"loading {model} …"), *[gr.skip()] * (OUTPUTS - 1))
                engine = self.models.engine(model)
            request = Request(prompt, seed, steps, guidance, sampler)
            config = ReuseConfig(reuse_interval, cutoff_block, window_start, window_end)
            shown = None
            for view in engine.views(request, config):
                yield self._updates(engine, view, shown, scale)
                shown = view
        except BlockDanceError as error:
            gr.Warning(f"{error}.")
            yield (gr.skip(),) * OUTPUTS

    def preview(
        self, steps: int, reuse_interval: int, cutoff_block: int, window_start: float, window_end: float, model: str = DEMO
    ) -> Any:
        """What the sliders mean, by arithmetic alone."""
        engine = self.models.loaded(model)
        if engine is None:
            return gr.skip()
        num_blocks = engine.num_blocks
        try:
            config = ReuseConfig(reuse_interval, cutoff_block, window_start, window_end)
            request = Request("preview", steps=steps)
            return schedule_panel(plan(config, request, num_blocks), num_blocks)
        except BlockDanceError as error:
            return message_panel(f"{error}.")

    def compare(
        self, prompt: str, seed: int, steps: int, guidance: float,
        reuse_interval: int, cutoff_block: int, window_start: float, window_end: float, model: str = DEMO,
    ) -> tuple[Picture, Picture, dict[str, Any]]:  # fmt: skip
        """Draw `prompt` with the plain DDIM sampler and with BlockDance from the same noise; `model` is one the page offers.

        Returns the baseline picture, the BlockDance picture (both PNG), and all figures: the keys of the command line's
        result.json, and `unknown_words` and `fewer_steps` besides.
        """
        try:
            request = Request(prompt, seed, steps, guidance)
            config = ReuseConfig(reuse_interval, cutoff_block, window_start, window_end)
            engine = self.models.engine(model)
            *_, last = engine.views(request, config)
        except BlockDanceError as error:
            raise gr.Error(f"{error}.", print_exception=False) from error
        assert last.baseline is not None and last.variant is not None and last.control is not None, "the last view is complete"
        more = {"unknown_words": engine.unknown_words(prompt), "note": last.note, "fewer_steps": last.control.figures}
        return last.baseline, last.variant.picture, last.variant.figures | more

    def _updates(self, engine: Engine, view: View, shown: View | None, scale: str) -> Updates:
        """The page for a view: what changed since `shown`. Until its pictures are there, the last comparison stays complete.

        What did not change is not sent again: Gradio would write its file anew while the browser may be reading it.
        """
        status = status_panel(view)
        if view.baseline is None or view.variant is None:
            return (status, *[gr.skip()] * (OUTPUTS - 1))

        def new(name: str) -> bool:
            return shown is None or shown.variant is not view.variant or getattr(shown, name) is not getattr(view, name)

        drawn, controlled, mapped = new("variant"), new("control"), new("cosine")
        numbers = numbers_panel(view, view.variant, engine.unknown_words(view.request.prompt), self.machine)
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
