"""Turn a trained run into what ships: the pipeline in `assets/model`, and a contact sheet of 32 prompts.

    python -m assets.recipe.export --run build/velocity

The pipeline is a plain diffusers one (`PixArtAlphaPipeline`), safetensors in shards under 9 MB.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PixArtAlphaPipeline
from PIL import Image, ImageDraw

from assets.recipe.sheet import contact_sheet
from blockdance.demo import MODEL_FOLDER, DemoPipeline, load_demo_pipeline

SHEET_PROMPTS = (
    "red apple", "green apple", "lemon", "strawberry", "watermelon", "slice of pizza", "hamburger", "doughnut",
    "grinning face", "smiling face with sunglasses", "pouting face", "robot face", "ghost", "blue heart", "broken heart",
    "pile of poo", "cat face", "dog face", "panda face", "pig", "octopus", "tropical fish", "lady beetle", "penguin",
    "tulip", "sunflower", "cactus", "house with garden", "rocket", "police car", "sailboat", "rainbow",
)  # fmt: skip
LABEL_PIXELS = 12


def export(run: Path, vae_folder: Path, target: Path) -> None:
    """Write the averaged weights of a run as a plain pipeline, with the facts of its training beside it.

    The autoencoder is the folder's, whose decoder may have been trained on since the run began.
    """
    parts = DemoPipeline.from_pretrained(run / "pipeline").components
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    PixArtAlphaPipeline(**(parts | {"vae": vae})).save_pretrained(target, max_shard_size="9MB")
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    facts = [json.loads(line) for line in (vae_folder / "facts.jsonl").read_text().splitlines()]
    (target / "training.json").write_text(json.dumps({"transformer": last, "autoencoder": facts}, indent=2) + "\n")


def labelled(picture: Image.Image, text: str) -> Image.Image:
    """A picture at twice its size over its prompt."""
    tile = Image.new("RGB", (2 * picture.width, 2 * picture.height + LABEL_PIXELS + 4), "white")
    tile.paste(picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.BICUBIC))
    ImageDraw.Draw(tile).text((tile.width / 2, tile.height - 3), text[:22], fill="#444444", anchor="ms")
    return tile


def draw_sheet(pipe: DemoPipeline, seed: int) -> Image.Image:
    """32 prompts, 30 DDIM steps, one seed for the whole batch."""
    generator = torch.Generator().manual_seed(seed)
    pictures = pipe(list(SHEET_PROMPTS), num_inference_steps=30, generator=generator).images
    return contact_sheet([labelled(picture, text) for picture, text in zip(pictures, SHEET_PROMPTS, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--vae", type=Path, default=Path("build/vae"))
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--sheet", type=Path, default=MODEL_FOLDER.parent / "contact_sheet.png")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    export(args.run, args.vae, args.out)
    draw_sheet(load_demo_pipeline(args.out), args.seed).save(args.sheet)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{size / 2**20:.1f} MiB in {args.out}, {len(SHEET_PROMPTS)} prompts in {args.sheet}")


if __name__ == "__main__":
    main()
