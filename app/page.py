"""The page's layout and wiring."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import gradio as gr
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from analysis.experiment import MAX_STEPS, SAMPLERS, Request
from analysis.metrics import perceptual_distance
from analysis.plots import SCALES
from app.handlers import Handlers
from app.models import Models, Settings
from app.panels import message_panel
from blockdance import BlockDanceError
from blockdance.presets import DEMO, PRESETS

EXAMPLES = ("red apple", "octopus", "pizza", "grinning face", "rocket", "tulip", "cat face", "house with garden")
SYSTEM_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
HEADER = """# BlockDance Explorer
A diffusion transformer draws your prompt twice from the same noise: with the plain sampler, and with **BlockDance**, which
on some steps skips the first blocks and reuses what they put out before. Move a slider and see what it saves and changes."""
MAP_NOTE = """How alike each block's output is to its own output one step earlier, in the plain run; bright means that it
repeats. Hatched cells are reused and never computed. Step 0 is pure noise, block 0 is the shallowest."""
KEEP_SECONDS = 3600
QUEUE_LENGTH = 32


def build_page(handlers: Handlers) -> gr.Blocks:
    """The page over a set of handlers; one event at a time runs the model."""
    models = handlers.models
    start = models.settings(models.first)
    with gr.Blocks(title="BlockDance Explorer", delete_cache=(KEEP_SECONDS, KEEP_SECONDS)) as page:
        gr.Markdown(HEADER, elem_classes="bd-title")
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                prompt = gr.Textbox(start.request.prompt, label="Prompt", lines=1, max_lines=1, submit_btn=True)
                with gr.Column(visible=models.first == DEMO) as only_box:
                    examples = gr.Examples([[text] for text in EXAMPLES], prompt, label="Examples", api_visibility="private")
                reuse = reuse_controls(start)
                plan = gr.HTML(elem_id="schedule")
                with gr.Accordion("Model and sampling", open=False):
                    chosen, current = model_control(models), gr.Textbox(models.first, visible=False)
                    seed, steps, guidance, sampler = sampling_controls(start.request)
                stop = gr.Button("Stop", size="sm", elem_id="stop")
                with gr.Accordion("Words the model knows", open=False, visible=start.known_words is not None) as known:
                    vocabulary = gr.Markdown(", ".join(start.known_words or []))
            with gr.Column(scale=9):
                status = gr.HTML(message_panel(""), elem_id="status")
                with gr.Row():
                    pictures = [picture(label) for label in ("Baseline", "BlockDance", "Fewer steps, same cost")]
                    wipe = gr.ImageSlider(label="Wipe", format="png", interactive=False, height=260,
                                          elem_classes="bd-picture", buttons=[])  # fmt: skip
                numbers = gr.HTML(elem_id="numbers")
                scale = gr.Radio(SCALES, value=SCALES[0], label="Similarity map", info=MAP_NOTE, elem_id="scale")
                similarity = gr.Plot(show_label=False, elem_id="map")
                bars = gr.Plot(show_label=False, elem_id="bars")

        inputs = [prompt, seed, steps, guidance, sampler, *reuse, scale, current]
        outputs = [status, *pictures, wipe, numbers, similarity, bars]
        # Without Gradio's preprocessing the library judges every value, and its message names the value and the range.
        model = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private", "trigger_mode": "always_last",
                 "show_progress": "minimal", "show_progress_on": status, "preprocess": False}  # fmt: skip
        live = [component.input for component in (seed, steps, guidance, sampler, *reuse, scale)]
        run = gr.on([page.load, prompt.submit, *live], handlers.update_page, inputs, outputs, **model)
        picked = examples.load_input_event.then(handlers.update_page, inputs, outputs, **model)
        controls = [prompt, steps, guidance, sampler, *reuse]
        set_up = chosen.input(handlers.choose_model, [chosen, current],
                              [status, chosen, current, *controls, only_box, known, vocabulary],
                              **model | {"trigger_mode": "once", "concurrency_id": "loading"})  # fmt: skip
        switched = set_up.then(handlers.update_page, inputs, outputs, **model)
        # Told in a second event: news of the run may still be on its way while the first one cancels it.
        stopped = stop.click(None, cancels=[run, picked, set_up, switched], queue=False, api_visibility="private")
        stopped.then(lambda name: (message_panel("Stopped."), name), current, [status, chosen], queue=False,
                     api_visibility="private")  # fmt: skip
        plain = {"queue": False, "show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private",
                 "preprocess": False}  # fmt: skip
        sliders = [slider.input for slider in (steps, *reuse)]
        gr.on([page.load, *sliders], handlers.preview, [steps, *reuse, current], plan, **plain)
        set_up.then(handlers.preview, [steps, *reuse, current], plan, **plain)
        add_endpoint(handlers)
    return page.queue(max_size=QUEUE_LENGTH)


def model_control(models: Models) -> gr.Dropdown:
    """Which model draws; the paper's are fetched from the hub when they are chosen."""
    info = f"{DEMO}: the model in the box. The others, the paper's, come from the Hugging Face hub."
    return gr.Dropdown(models.names, value=models.first, label="Model", info=info, elem_id="model", filterable=False)


def reuse_controls(start: Settings) -> list[gr.Slider]:
    """The knobs of BlockDance: N, cutoff, window."""
    config, deepest = start.config, start.num_blocks - 2
    return [
        gr.Slider(1, 6, config.reuse_interval, step=1, label="Reuse interval N", elem_id="interval",
                  info="One cache step, then N − 1 reuse steps; 1 never reuses."),
        gr.Slider(0, deepest, config.cutoff_block, step=1, label="Cutoff block i", elem_id="cutoff",
                  info="Blocks 0 to i are skipped on reuse steps."),
        gr.Slider(0, 1, config.window_start, step=0.05, label="Window start", info="Fraction of the steps.", elem_id="start"),
        gr.Slider(0, 1, config.window_end, step=0.05, label="Window end", info="Fraction of the steps.", elem_id="end"),
    ]  # fmt: skip


def sampling_controls(request: Request) -> tuple[gr.Number, gr.Slider, gr.Slider, gr.Radio]:
    """What both samplers share."""
    return (
        gr.Number(0, label="Seed", precision=0, elem_id="seed", info="The noise that both start from."),
        gr.Slider(1, MAX_STEPS, request.steps, step=1, label="Steps", elem_id="steps"),
        gr.Slider(1, 20, request.guidance, step=0.5, label="Guidance", elem_id="guidance"),
        gr.Radio(list(SAMPLERS), value=request.sampler, label="Sampler", elem_id="sampler"),
    )


def picture(label: str) -> gr.Image:
    """A lossless picture, shown with its own pixels."""
    return gr.Image(label=label, format="png", interactive=False, height=260, min_width=120, elem_classes="bd-picture",
                    buttons=["download"])  # fmt: skip


def add_endpoint(handlers: Handlers) -> None:
    """`/compare`, for scripts: plain values in, two pictures and the figures out."""
    start = handlers.models.settings(handlers.models.first)
    request, config = start.request, start.config
    defaults = {
        "prompt": request.prompt, "seed": request.seed, "steps": request.steps, "guidance": request.guidance,
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
    """Serve a page in the project's looks; `options` go to Gradio's `launch`."""
    css = Path(__file__).with_name("style.css")
    page.launch(theme=gr.themes.Default(**SYSTEM_FONTS), css_paths=css, ssr_mode=False, **options)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python app.py", description="Serve BlockDance Explorer; a browser opens.")
    parser.add_argument(
        "--model",
        default=DEMO,
        help=f"the model to start with: {DEMO}, {', '.join(PRESETS)}, or the folder of a pipeline that draws pictures "
        "(default: %(default)s, the model in the box)",
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
    # The first comparison is made, and timed, before a browser competes for the processor.
    start = models.settings(args.model)
    list(models.engine(args.model).views(start.request, start.config))
    serve(build_page(Handlers(models)), inbrowser="SPACE_ID" not in os.environ)
