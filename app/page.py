"""The page: the explorer (`analysis/web`) in one HTML component, and the events between it and the handlers."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr
import plotly
from diffusers.utils import logging as diffusers_logging
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from transformers.utils import logging as transformers_logging

from analysis.atlas import ATLAS
from analysis.experiment import SAMPLERS
from analysis.metrics import perceptual_distance
from analysis.scene import Json
from analysis.site import WEB
from app.handlers import Handlers, chosen
from app.models import Models
from blockdance import BlockDanceError
from blockdance.presets import DEMO, DEMO_STYLES, PRESETS

KEEP_SECONDS = 3600
QUEUE_LENGTH = 32
HEAD = '<link rel="stylesheet" href="web/explorer.css"><script src="web/explorer.js"></script>'
ON_LOAD = """
// Its events, which Gradio knows from here: 'run', 'measure', 'animate', 'choose', 'plan', 'decide',
// 'stop_run', 'stop_measure', 'stop_animate', 'stop_choose', 'stop_plan', 'stop_decide'.
const explorer = BlockDance.mount(element.querySelector('.bd-root'), {
  atlas: 'atlas/', plotly: 'plotly/plotly.min.js', live: trigger, settings: SETTINGS});
watch('value', () => { if (props.value) explorer.receive(JSON.parse(props.value)); });
"""
"""Orders are events of the component; the app's answers come back as its value."""


def build_page(handlers: Handlers) -> gr.Blocks:
    """The page over a set of handlers; one event at a time runs the model."""
    with gr.Blocks(title="BlockDance Explorer", delete_cache=(KEEP_SECONDS, KEEP_SECONDS)) as page:
        queue = gr.HTML("", elem_id="queue", container=False)
        explorer = gr.HTML(
            html_template='<div class="bd-root"></div>', apply_default_css=False, head=HEAD, elem_id="explorer",
            js_on_load=ON_LOAD.replace("SETTINGS", json.dumps(settings_of(handlers.models))),
        )  # fmt: skip
        common = {"outputs": explorer, "api_visibility": "private", "trigger_mode": "multiple", "show_progress": "minimal",
                  "show_progress_on": queue}  # fmt: skip
        model = common | {"concurrency_id": "model", "concurrency_limit": 1}
        running = {
            "run": explorer.run(answering(handlers.run), None, **model),
            "measure": explorer.measure(answering(handlers.measure), None, **model),
            "animate": explorer.animate(answering(handlers.animate), None, **model),
            "decide": explorer.decide(answering(handlers.decide), None, **model),
            "choose": explorer.choose(answering(handlers.choose), None, **common, concurrency_id="loading"),
            "plan": explorer.plan(answering(handlers.plan), None, **common, concurrency_id="planning"),
        }
        for name, job in running.items():  # one event for all would also stop what is ordered while it stops the first
            getattr(explorer, f"stop_{name}")(stopped, None, cancels=[job], queue=False, **common)
        add_endpoint(handlers)
    return page.queue(max_size=QUEUE_LENGTH)


def stopped() -> str:
    """Tell the page that what ran is stopped, so that it places its next order."""
    return json.dumps({"stopped": time.time_ns()})


def answering(handler: Callable[[Json], Iterator[Json]]) -> Callable[[gr.EventData], Iterator[str]]:
    """A handler of orders as one of events: its news are the component's value, as JSON text."""

    def answer(event: gr.EventData) -> Iterator[str]:
        for news in handler(event._data or {}):
            yield json.dumps(news)

    return answer


def settings_of(models: Models) -> Json:
    """What the explorer needs to know of the app."""
    start = chosen(models.first, models.settings(models.first))
    defaults = {name: start[name] for name in ("model", "request", "config")}
    return start | {
        "defaults": defaults,
        "samplers": list(SAMPLERS),
        "models": models.names,
        "lpips_name": models.distance.name,
    }


def add_endpoint(handlers: Handlers) -> None:
    """`/compare`, for scripts: plain values in, two pictures and the figures out."""
    start = handlers.models.settings(handlers.models.first)
    request, config = asdict(start.request), start.config
    defaults = {name: request[name] for name in ("prompt", "seed", "steps", "guidance")} | {
        "reuse_interval": config.reuse_interval, "cutoff_block": config.cutoff_block, "window_start": config.window_start,
        "window_end": config.window_end, "model": handlers.models.first,
    }  # fmt: skip
    with gr.Group(visible=False):
        inputs = [
            gr.Textbox(value, label=name) if isinstance(value, str) else gr.Number(value, label=name)
            for name, value in defaults.items()
        ]
        outputs = [
            gr.Image(label="baseline", format="png"),
            gr.Image(label="blockdance", format="png"),
            gr.JSON(label="figures"),
        ]
        gr.Button().click(handlers.compare, inputs, outputs, api_name="compare", concurrency_id="model", concurrency_limit=1)


def serve(page: gr.Blocks, **options: Any) -> None:
    """Serve a page with the explorer's files and the atlas beside it; `options` go to Gradio's `launch`."""
    folders = {"/web": WEB, "/atlas": ATLAS, "/plotly": Path(plotly.__file__).parent / "package_data"}
    routes = [Mount(path, StaticFiles(directory=folder, check_dir=False)) for path, folder in folders.items()]
    css = Path(__file__).with_name("style.css")
    page.launch(css_paths=css, ssr_mode=False, app_kwargs={"routes": routes}, **options)


def build_parser() -> argparse.ArgumentParser:
    drawing = [name for name, preset in PRESETS.items() if not preset.checkpoint]
    parser = argparse.ArgumentParser(prog="python app.py", description="Serve BlockDance Explorer; a browser opens.")
    parser.add_argument(
        "--model",
        default=DEMO,
        help=f"the model to start with: {DEMO}, {DEMO_STYLES}, {', '.join(drawing)}, or the folder of a pipeline that draws "
        "pictures (default: %(default)s, the model in the box)",
    )
    return parser


def main() -> None:
    """Load the model once and serve the page; a browser opens, except on a Hugging Face Space."""
    args = build_parser().parse_args()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        models = Models(perceptual_distance(), args.model)
    except BlockDanceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    serve(build_page(Handlers(models)), inbrowser="SPACE_ID" not in os.environ)
