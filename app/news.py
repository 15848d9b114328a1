"""What the page is told, as JSON: how far a run is, and the scene (`analysis.scene`) of what it has drawn."""

import base64
from collections.abc import Sequence
from typing import Any

from analysis.experiment import Request, RequestError
from analysis.pictures import Picture, side_by_side_gif
from analysis.scene import Json, features_part, map_part, new_scene, run_part, tile
from analysis.sprites import LOSSLESS, QUICK_PREVIEW, data_url, sheet
from app.engine import Decided, Engine, View
from blockdance import Schedule
from blockdance.ada import AdaPolicy

REQUEST_FIELDS = ("prompt", "seed", "steps", "guidance", "sampler")


def parse_order(order: Json) -> tuple[Request, Schedule, str]:
    """What a page asks for.

    Raises:
        BlockDanceError: a value is missing, or outside its range.
    """
    asked, kinds = order.get("request"), order.get("kinds")
    if not isinstance(asked, dict) or not isinstance(kinds, str) or not all(name in asked for name in REQUEST_FIELDS):
        raise RequestError(f"a request needs {', '.join(REQUEST_FIELDS)} and a schedule, got {sorted(order)}")
    request = Request(**{name: asked[name] for name in REQUEST_FIELDS})
    schedule = Schedule.parse(kinds, order.get("cutoff_block"))  # type: ignore[arg-type]  # judged by Schedule itself
    return request, schedule, order.get("storage", "latest")


def progress(order: Json, view: View, **more: Any) -> Json:
    """How far the run is that answers an order."""
    return {"key": order.get("key"), "scene_key": order.get("scene_key"), "phase": view.phase, "progress": view.progress} | more


def milestones(view: View) -> list[int]:
    """Which things worth drawing a view has; the page is sent a scene when one of them is new."""
    return [id(thing) for thing in (view.variant, view.observed, view.control, view.variant_previews, view.yardsticks)]


def scene_of(view: View, engine: Engine, machine: str) -> Json | None:
    """Everything a view knows, with the pictures in it; None before there are any."""
    if view.baseline is None or view.variant is None:
        return None
    scene = new_scene(view.request, engine.num_blocks, view.baseline.picture, machine)
    scene["baseline"] = {
        "picture": inline([view.baseline.picture]),
        "previews": previews(view.baseline_previews),
        "seconds": view.baseline.seconds,
    }
    live = {"live": True, "machine": machine}
    told = view.variant.figures | {"step_difference": view.variant.step_difference} | live
    scene["runs"] = [run_part(told, inline([view.variant.picture]), previews(view.variant_previews))]
    if view.observed is not None:
        scene["map"] = map_part(view.observed.cosine)
        features = view.observed.features
        rows = [list(pictures) for pictures in features.values() if pictures is not None]
        scene["features"] = features_part(features, data_url(sheet(rows), **LOSSLESS)) if rows else None
    if view.control is not None:
        scene["controls"] = [run_part(view.control.figures | live, inline([view.control.picture]))]
    scene["yardsticks"] = view.yardsticks
    return scene


def inline(pictures: Sequence[Picture], **options: Any) -> Json:
    """Pictures side by side in a `data:` address, without loss."""
    return tile(data_url(sheet([pictures]), **(options or LOSSLESS)))


def previews(pictures: Sequence[Picture] | None) -> Json | None:
    """Pictures that nothing is measured on, side by side in a `data:` address."""
    return None if pictures is None else inline(pictures, **QUICK_PREVIEW)


def timed_scene(view: View, engine: Engine, machine: str) -> Json:
    """A scene that knows only how long its run took."""
    told = {
        "schedule": str(view.schedule),
        "cutoff_block": view.schedule.cutoff_block,
        "storage": view.storage,
        "live": True,
        "machine": machine,
    }
    empty: Json = {"baseline": None, "map": None, "features": None, "yardsticks": None, "controls": []}
    return empty | {"num_blocks": engine.num_blocks, "runs": [told | (view.timing or {})]}


def decided_part(decided: Decided, policy: AdaPolicy) -> Json:
    """What a policy decided on one picture; `probabilities` are of a cache step, from step `first` on."""
    schedule, probabilities = decided.decision.schedule, decided.decision.probabilities
    return decided.drawn.figures | {
        "prompt": decided.request.prompt,
        "saving": policy.saving,
        "first": len(schedule) - len(probabilities),
        "probabilities": [round(probability, 4) for probability in probabilities],
        "baseline": inline([decided.baseline]),
        "picture": inline([decided.drawn.picture]),
    }


def animation_of(view: View) -> str | None:
    """Both runs of a complete view, step by step, as a GIF in a `data:` address."""
    if view.baseline_previews is None or view.variant_previews is None:
        return None
    gif = side_by_side_gif(view.baseline_previews, view.variant_previews)
    return f"data:image/gif;base64,{base64.b64encode(gif).decode()}"
