"""What the page does when a visitor acts: plain functions of the models, with no layout. They keep nothing of a visitor."""

from collections.abc import Generator, Iterator
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import gradio as gr

from analysis.experiment import Request, RequestError, default_sampler
from analysis.machine import describe_machine
from analysis.pictures import Picture
from analysis.scene import Json
from app.engine import Engine
from app.models import Models, Settings
from app.news import animation_of, decided_part, milestones, parse_order, progress, scene_of, timed_scene
from app.zero import Work, lent_gpu
from blockdance import BlockDanceError, Plan, ReuseConfig, UnsupportedModelError, load_demo_profile, plan
from blockdance.ada import AdaPolicy, load_demo_policy
from blockdance.presets import DEMO
from blockdance.storage import rule_named

MOST_PROMPTS = 2


@cache
def demo_policy() -> AdaPolicy:
    """The network is only read, so visitors share it."""
    return load_demo_policy()


class Handlers:
    """The page's handlers over the models."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.machine = describe_machine()
        self._works: dict[str, Work] = {"draw": self._draw, "time": self._time, "film": self._film, "decide": self._decide}
        self._on_gpu = {name: lent_gpu(work) for name, work in self._works.items()}

    def run(self, order: Json) -> Iterator[Json]:
        """Draw what a page asks for, and tell it as it goes. Bad input is a toast, and the page stays as it is."""
        return self._answer(order, "draw")

    def measure(self, order: Json) -> Iterator[Json]:
        """Time the baseline and the asked schedule in interleaved rounds."""
        return self._answer(order, "time")

    def animate(self, order: Json) -> Iterator[Json]:
        """Both samplers step by step, as a GIF to download."""
        return self._answer(order, "film")

    def decide(self, order: Json) -> Iterator[Json]:
        """Let Ada decide on the prompt, or on each of several."""
        name = order.get("model")
        if name == DEMO:
            yield from self._answer(order, "decide")
        else:
            error = f"model must be {DEMO} to let Ada decide, as it alone ships with a policy, got {name!r}"
            yield refused(order, UnsupportedModelError(error))

    def _answer(self, order: Json, what: str) -> Iterator[Json]:
        """Do the work where the model is; a ZeroGPU Space lends its GPU for this alone, and only to a model that uses it."""
        try:
            parse_order(order)
            engine = yield from self._engine(order)
            on_gpu = engine.pipe.device.type == "cuda"
            yield from (self._on_gpu if on_gpu else self._works)[what](order)
        except BlockDanceError as error:
            yield refused(order, error)

    def _draw(self, order: Json) -> Iterator[Json]:
        request, schedule, storage = parse_order(order)
        engine = self.models.engine(str(order["model"]))
        known: list[int] = []
        for view in engine.views(request, schedule, storage):
            fresh = milestones(view) != known
            known = milestones(view)
            words = engine.unknown_words(request.prompt) if view.phase == "done" else []
            scene = scene_of(view, engine, self.machine) if fresh else None
            yield progress(order, view, scene=scene, unknown_words=words, nearest_words=engine.nearest_words(words))

    def _time(self, order: Json) -> Iterator[Json]:
        engine = self.models.engine(str(order["model"]))
        for view in engine.measured(*parse_order(order)):
            yield progress(order, view, scene=timed_scene(view, engine, self.machine) if view.timing else None)

    def _film(self, order: Json) -> Iterator[Json]:
        for view in self.models.engine(str(order["model"])).views(*parse_order(order)):
            animation = animation_of(view) if view.phase == "done" else None
            if view.phase == "done" and animation is None:
                gr.Warning("There is no animation of pictures this large.")
            yield progress(order, view, animation=animation)

    def _decide(self, order: Json) -> Iterator[Json]:
        request, prompts = parse_order(order)[0], order.get("prompts")
        if prompts is not None and not (isinstance(prompts, list) and 1 <= len(prompts) <= MOST_PROMPTS):
            raise RequestError(f"prompts must be a list of 1 to {MOST_PROMPTS} texts, got {prompts!r}")
        policy = demo_policy().with_saving(order.get("saving"))  # type: ignore[arg-type]  # judged by the policy itself
        requests = [replace(request, prompt=prompt) for prompt in prompts or [request.prompt]]
        for view in self.models.engine(str(order["model"])).decided(requests, policy):
            told = [decided_part(one, policy) for one in view.decided] if view.phase == "done" else None
            yield progress(order, view, decided=told)

    def choose(self, order: Json) -> Iterator[Json]:
        """Load a model and tell the page what its controls shall show. If that cannot be, it is a toast."""
        name = str(order.get("model"))
        yield {"key": order.get("key"), "phase": f"loading {name}", "progress": 0}
        try:
            yield {"key": order.get("key"), "phase": "done", "chosen": chosen(name, self.models.settings(name))}
        except BlockDanceError as error:
            yield refused(order, error) | {"model": order.get("current")}

    def plan(self, order: Json) -> Iterator[Json]:
        """Find a schedule for the speedup that the page asks for."""
        try:
            name, steps = order.get("model"), parse_order(order)[0].steps
            if name != DEMO:
                raise UnsupportedModelError(
                    f"model must be {DEMO} to plan here, as it alone ships with a profile, got {name!r}"
                )
            found = plan(
                target_speedup=order.get("target_speedup"),
                steps=steps,
                storage=rule_named(order.get("storage", "latest")),
                profile=load_demo_profile(),
                one_cutoff=True,
            )
            yield {"key": order.get("key"), "phase": "done", "planned": planned(found, order.get("storage", "latest"))}
        except BlockDanceError as error:
            yield refused(order, error)

    def compare(
        self, prompt: str, seed: int, steps: int, guidance: float,
        reuse_interval: int, cutoff_block: int, window_start: float, window_end: float, model: str = DEMO,
    ) -> tuple[Picture, Picture, dict[str, Any]]:  # fmt: skip
        """Draw `prompt` plainly (with DDIM where it fits) and with BlockDance from the same noise.

        `model` is one the page offers.

        Returns the baseline picture, the BlockDance picture (both PNG), and all figures: the keys of the command line's
        result.json, and `unknown_words`, `nearest_words` (those spelled like them) and `fewer_steps` besides.
        """
        try:
            config = ReuseConfig(reuse_interval, cutoff_block, window_start, window_end)
            Request(prompt, seed, steps, guidance)  # refused before a model is loaded
            engine = self.models.engine(model)
            request = Request(prompt, seed, steps, guidance, default_sampler(engine.pipe))
            *_, last = engine.views(request, config)
        except BlockDanceError as error:
            raise gr.Error(f"{error}.", print_exception=False) from error
        assert last.baseline is not None and last.variant is not None and last.control is not None, "the last view is complete"
        words = engine.unknown_words(prompt)
        more: Json = {"unknown_words": words, "nearest_words": engine.nearest_words(words)}
        more |= {"note": last.note, "fewer_steps": last.control.figures}
        return last.baseline.picture, last.variant.picture, last.variant.figures | more

    def _engine(self, order: Json) -> Generator[Json, None, Engine]:
        """The engine of the model an order names; loads it, and says so, if another visitor's took its place."""
        name = str(order.get("model"))
        engine = self.models.loaded(name)
        if engine is None:
            yield {"key": order.get("key"), "phase": f"loading {name}", "progress": 0}
            engine = self.models.engine(name)
        return engine


def chosen(name: str, settings: Settings) -> Json:
    """What the page shows for a model, under the names of its own state."""
    config, deepest = settings.config, settings.num_blocks - 2
    return {
        "model": name,
        "request": asdict(settings.request),
        "config": {
            "interval": config.reuse_interval,
            "cutoff": min(config.cutoff_block or 0, deepest),
            "start": config.window_start,
            "end": config.window_end,
        },
        "num_blocks": settings.num_blocks,
        "known_words": settings.known_words,
        "styles": settings.styles,
        "examples": settings.examples,
    }


def planned(found: Plan, storage: str) -> Json:
    """What the page shows of a plan."""
    return {
        "schedule": str(found.schedule),
        "cutoff_block": found.schedule.cutoff_block,
        "storage": storage,
        "speedup_ideal": found.speedup_ideal,
        "predicted": found.predicted,
        "interval": list(found.interval),
        "distance": found.distance,
    }


def refused(order: Json, error: BlockDanceError) -> Json:
    """The sentence as a toast, and the news that ends the page's waiting."""
    gr.Warning(f"{error}.")
    return {"key": order.get("key"), "phase": "done", "error": str(error)}
