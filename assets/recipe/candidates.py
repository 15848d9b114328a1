"""Draw the evidence for the choice between candidates: sample sheet and similarity map of each, after equal time.

    python -m assets.recipe.candidates build/candidates/velocity build/candidates/noise --out assets/candidates

Each argument is a pipeline folder. Writes NAME.png (eight prompts above the map of log10(1 - cosine), block 0 at the
bottom, step 1 at the left, bright = repeats) and prints how much blocks change over the last third of the run.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from plotly.colors import get_colorscale, sample_colorscale, unlabel_rgb

from assets.recipe.sheet import contact_sheet
from assets.recipe.train import SHEET_PROMPTS
from blockdance import observe
from blockdance.demo import DemoPipeline

STEPS = 30


def measure(pipe: DemoPipeline) -> tuple[list[Image.Image], np.ndarray, np.ndarray]:
    """Eight pictures, and over them the mean cosine and relative change, (blocks, steps) each."""
    with observe(pipe) as observation:
        pictures = pipe(list(SHEET_PROMPTS), num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0)).images
    return pictures, observation.cosine().mean(-1).numpy(), observation.relative_change().mean(-1).numpy()


def draw_map(cosine: np.ndarray, width: int) -> Image.Image:
    """The similarity map as a picture; the colours span log10(1 - cosine) from -4 to -0.5."""
    values = np.log10(np.maximum(1 - cosine[::-1, 1:], 1e-6))
    fractions = ((values + 4) / 3.5).clip(0, 1)
    colours = sample_colorscale(get_colorscale("Viridis_r"), fractions.ravel().tolist())
    pixels = np.array([unlabel_rgb(colour) for colour in colours]).reshape(*values.shape, 3).round().astype(np.uint8)
    return Image.fromarray(pixels).resize((width, width * len(cosine) // STEPS), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("assets/candidates"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for folder in args.pipelines:
        pipe = DemoPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        pictures, cosine, change = measure(pipe)
        sheet = contact_sheet(pictures)
        both = np.vstack([np.asarray(sheet), np.asarray(draw_map(cosine, sheet.width))])
        Image.fromarray(both).save(args.out / f"{folder.name}.png")
        late = change[:, 2 * STEPS // 3 :].mean(1)
        thirds = {name: part.mean() for name, part in zip(("shallow", "middle", "deep"), np.array_split(late, 3), strict=True)}
        print(folder.name, {name: round(float(value), 3) for name, value in thirds.items()})
        print("block by block:", " | ".join(f"{value:.3f}" for value in late))


if __name__ == "__main__":
    main()
