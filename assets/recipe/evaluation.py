"""How good the models in the box are: does what they draw look most like what was asked for, and how much is memorised?

    python assets/evaluate.py                     # all three; writes assets/results/model.json and the contact sheets
    python assets/evaluate.py --model FOLDER --out FILE    # another picture model in place of the first

Fetches the training pictures and clips with npm unless `build/` holds them.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lpips
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from analysis.metrics import lpips_squeeze, squeezenet_file
from analysis.records import ROOT, provenance
from assets.recipe import data, video_data
from assets.recipe.autoencoder import to_tensor
from assets.recipe.data import Pack
from assets.recipe.sheet import CAPTIONS, CLIPS, COMPOSITIONS, STYLED, clip_sheet, labelled_sheet
from blockdance import BlockDanceError
from blockdance.demo import (
    MODEL_FOLDER,
    STEPS,
    STYLES,
    STYLES_FOLDER,
    VIDEO_FOLDER,
    DemoPipeline,
    DemoVideoPipeline,
    load_demo_pipeline,
    load_demo_styles_pipeline,
    load_demo_video_pipeline,
)

RESULTS = ROOT / "assets" / "results" / "model.json"
SHEETS = {name: ROOT / "assets" / f"contact_sheet{name}.png" for name in ("", "_styles", "_video")}
PICTURES = 200
VIDEOS = 40
BATCH = 8


class EvaluationError(BlockDanceError):
    """The evaluation cannot run."""


class Embedding:
    """Pictures as points whose squared distance is LPIPS (SqueezeNet), so that each is embedded once.

    Raises:
        EvaluationError: the backbone is neither cached nor within reach.
    """

    def __init__(self) -> None:
        backbone = squeezenet_file()
        if backbone is None:
            raise EvaluationError("the SqueezeNet backbone is neither in torch's hub cache nor can it be fetched")
        self.model: Any = lpips_squeeze(backbone).distance

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """(n, 3, h, w) in [-1, 1] -> (n, numbers)."""
        return torch.cat([self._batch(part) for part in pictures.split(32)])

    def _batch(self, pictures: Tensor) -> Tensor:
        layers = self.model.net.forward(self.model.scaling_layer(pictures))
        scaled = [
            lpips.normalize_tensor(layer) * (lin.model[-1].weight / layer[0, 0].numel()).sqrt()
            for layer, lin in zip(layers, self.model.lins, strict=True)
        ]
        return torch.cat([layer.flatten(1) for layer in scaled], dim=1)


def squared_distances(ours: Tensor, theirs: Tensor) -> Tensor:
    """(n, k) and (m, k) -> (n, m)."""
    return torch.cdist(ours, theirs).square()


def chosen_captions(pack: Pack, count: int) -> list[int]:
    """Which pictures' names are drawn: the same ones every time."""
    return sorted(random.Random(0).sample(range(len(pack.captions)), min(count, len(pack.captions))))


def prompt_of(pack: Pack, index: int) -> str:
    """A picture's name, after its style where there are several."""
    return f"{pack.styles[index]} {pack.captions[index][0]}" if pack.styles else pack.captions[index][0]


def draw(pipe: Any, prompts: Sequence[str], batch: int) -> np.ndarray:
    """A picture or clip of each prompt, from the noise of seed 0, in batches; float in [0, 1]."""
    generator, drawn = torch.Generator().manual_seed(0), []
    for place in tqdm(range(0, len(prompts), batch), desc="drawing"):
        drawn.append(pipe(list(prompts[place : place + batch]), generator=generator, output_type="np")[0])
    return np.concatenate(drawn)


def evaluate_pictures(pipe: DemoPipeline, pack: Pack, embed: Embedding) -> dict[str, Any]:
    """Top-1 retrieval of training captions, and how near what is drawn comes to the training pictures."""
    chosen = chosen_captions(pack, PICTURES)
    known = embed(to_tensor(pack.pictures))
    drawn = draw(pipe, [prompt_of(pack, k) for k in chosen], BATCH)
    distances = squared_distances(embed(torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1), known)
    nearest = distances.min(dim=1)
    among = squared_distances(known, known).fill_diagonal_(float("inf")).min(dim=1).values
    found = nearest.indices.tolist()
    pairs = list(zip(chosen, found, strict=True))
    missed = {prompt_of(pack, k): prompt_of(pack, n) for k, n in pairs if pack.captions[k][0] != pack.captions[n][0]}
    right = {"style_retrieval": np.mean([pack.styles[k] == pack.styles[n] for k, n in pairs])} if pack.styles else {}
    return {
        "top1_retrieval": round(1 - len(missed) / len(chosen), 4),
    } | {name: round(float(share), 4) for name, share in right.items()} | {
        "mean_nearest_distance": round(float(nearest.values.mean()), 5),
        "mean_distance_to_own_subject": round(float(distances[range(len(chosen)), chosen].mean()), 5),
        "mean_nearest_distance_among_training_pictures": round(float(among.mean()), 5),
        "captions": len(chosen), "training_pictures": len(pack.captions), "missed": missed,
    }  # fmt: skip


def evaluate_clips(pipe: DemoVideoPipeline, pack: Pack, embed: Embedding) -> dict[str, Any]:
    """The same for the video model, frame by frame, and whether its clips move as much as those it was trained on."""
    chosen = chosen_captions(pack, VIDEOS)
    frames = pack.pictures.shape[1]
    drawn = draw(pipe, [pack.captions[k][0] for k in chosen], 1)
    ours = embed(torch.from_numpy(drawn).flatten(0, 1).permute(0, 3, 1, 2) * 2 - 1).unflatten(0, (-1, frames))
    theirs = [embed(to_tensor(clip)) for clip in tqdm(pack.pictures, desc="embedding clips")]
    distances = torch.stack([(ours - one).square().sum(dim=2).mean(dim=1) for one in theirs], dim=1)  # (drawn, clips)
    hits = distances.argmin(dim=1) == torch.tensor(chosen)
    motions = [video_data.motion(255 * clip) for clip in drawn]
    return {
        "top1_retrieval": round(float(hits.float().mean()), 4),
        "mean_nearest_distance": round(float(distances.min(dim=1).values.mean()), 5),
        "motion": round(float(np.mean(motions)), 2),
        "motion_of_training_clips": round(float(np.mean([video_data.motion(pack.pictures[k]) for k in chosen])), 2),
        "captions": len(chosen), "training_clips": len(pack.captions), "frames": frames,
    }  # fmt: skip


def packed(file: Path, fetch: Any, *options: str) -> Pack:
    """The training set; fetched unless the file is there."""
    if not file.exists():
        fetch.main([*options, "--out", str(file)])
    return Pack.load(file)


def check_compositions(pack: Pack) -> None:
    """Raise EvaluationError if the model was trained with a caption that the sheet shows as a combination of its own."""
    trained = {caption for group in pack.captions for caption in group} & set(COMPOSITIONS)
    if trained:
        raise EvaluationError(f"compositions must be no training captions, got {', '.join(sorted(trained))}")


def seen(folder: Path) -> dict[str, Any]:
    """What the export wrote about the training."""
    told = json.loads((folder / "training.json").read_text())
    runs = [told["transformer"], *told.get("earlier", [])]
    return {
        "images_seen": sum(run["images_seen"] for run in runs),
        "training_seconds": sum(run["seconds"] for run in runs),
        "trained_on": told["transformer"]["hardware"],
    }


def styled_prompts() -> list[tuple[str, str]]:
    """Prompts and their styles, row by row: each eight names in one style after the other, then combinations in the first and
    the last."""
    halves = [(part[:8], part[8:]) for part in (STYLED, COMPOSITIONS)]
    names = [(prompt, style) for row in halves[0] for style in STYLES for prompt in row]
    return names + [(prompt, style) for row, style in zip(halves[1], STYLES[::2], strict=True) for prompt in row]


def draw_sheets(pictures: DemoPipeline, styled: DemoPipeline, clips: DemoVideoPipeline) -> None:
    """64 pictures of each picture model from one seed, and eight clips."""
    prompts = [*CAPTIONS, *COMPOSITIONS]
    drawn = pictures(prompts, generator=torch.Generator().manual_seed(0)).images
    labelled_sheet(drawn, prompts).save(SHEETS[""])
    asked = styled_prompts()
    drawn = styled([styled.in_style(*one) for one in asked], generator=torch.Generator().manual_seed(0)).images
    labelled_sheet(drawn, [prompt for prompt, _ in asked]).save(SHEETS["_styles"])
    strips = [clips(prompt, generator=torch.Generator().manual_seed(0)).frames[0] for prompt in CLIPS]
    clip_sheet(strips, CLIPS).save(SHEETS["_video"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python assets/evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER, help="picture model (default: assets/model)")
    parser.add_argument("--styles", type=Path, default=STYLES_FOLDER, help="the one in three styles (default: assets/styles)")
    parser.add_argument("--video", type=Path, default=VIDEO_FOLDER, help="video model (default: assets/video)")
    parser.add_argument("--data", type=Path, default=ROOT / "build" / "pictures.npz")
    parser.add_argument("--styles-data", type=Path, default=ROOT / "build" / "styles.npz")
    parser.add_argument("--clips", type=Path, default=ROOT / "build" / "clips.npz")
    parser.add_argument("--out", type=Path, default=RESULTS, help="(default: assets/results/model.json)")
    args = parser.parse_args(arguments)
    try:
        embed = Embedding()
        pictures, clips = load_demo_pipeline(args.model), load_demo_video_pipeline(args.video)
        styled = load_demo_styles_pipeline(args.styles)
        pack, moving = packed(args.data, data), packed(args.clips, video_data)
        many = packed(args.styles_data, data, *data.STYLES_OPTIONS)
        check_compositions(pack)
        check_compositions(many)
    except (BlockDanceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    about = provenance()
    result = (
        {"model": "picture", "hardware": about["machine"], "steps": STEPS, "seed": 0} | seen(args.model)
        | evaluate_pictures(pictures, pack, embed)
        | {"styles": seen(args.styles) | evaluate_pictures(styled, many, embed)}
        | {"video": seen(args.video) | evaluate_clips(clips, moving, embed)}
        | {"lpips_name": "LPIPS (SqueezeNet)"} | about
    )  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "missed"}, indent=2))
    if args.out == RESULTS:
        draw_sheets(pictures, styled, clips)
    print(f"written             {args.out}")


if __name__ == "__main__":
    main()
