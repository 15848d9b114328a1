"""Turn a trained run into what ships, with the facts of its training; `python assets/evaluate.py` then draws the sheets.

    python -m assets.recipe.export --run build/velocity --vae build/vae --out assets/model
    python -m assets.recipe.export --run build/video --out assets/video

A picture model becomes a plain diffusers `PixArtAlphaPipeline`, a video model an `OpenSoraPipeline` of this repository,
both as safetensors in shards under 9 MB.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, PixArtAlphaPipeline

from blockdance.demo import DemoPipeline, DemoVideoPipeline
from blockdance.models.opensora import OpenSoraPipeline

SHIPPED: dict[type, Any] = {DemoPipeline: PixArtAlphaPipeline, DemoVideoPipeline: OpenSoraPipeline}
"""By the class of a run's pipeline, that of what ships."""


def trained_pipeline(folder: Path) -> Any:
    """A run's pipeline with averaged weights."""
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    kind: Any = next(kind for kind in SHIPPED if kind.__name__ == name)
    return kind.from_pretrained(folder)


def last_line(run: Path) -> dict[str, Any]:
    """What a run's log says at its end."""
    told: dict[str, Any] = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    return told


def export(run: Path, vae_folder: Path | None, target: Path, earlier: Sequence[Path] = ()) -> None:
    """Write the averaged weights of a run, and what its log says of them.

    Args:
        run: folder of a training.
        vae_folder: the autoencoder, whose decoder may have been trained on since the run began; None for the run's own.
        target: folder to write.
        earlier: runs that it goes on from, and that no model that ships ended.
    """
    pipe = trained_pipeline(run / "pipeline")
    parts, facts = pipe.components, dict[str, Any]()
    if vae_folder is not None:
        parts |= {"vae": AutoencoderKL.from_pretrained(vae_folder).eval()}
        facts["autoencoder"] = [json.loads(line) for line in (vae_folder / "facts.jsonl").read_text().splitlines()]
    SHIPPED[type(pipe)](**parts).save_pretrained(target, max_shard_size="9MB")
    facts["transformer"] = last_line(run)
    if earlier:
        facts["earlier"] = [last_line(one) for one in earlier]
    (target / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a training")
    parser.add_argument("--vae", type=Path, help="folder of the autoencoder (default: the run's own)")
    parser.add_argument("--earlier", type=Path, nargs="+", default=[], help="folders of trainings that it went on from")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    export(args.run, args.vae, args.out, args.earlier)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{size / 2**20:.1f} MiB in {args.out}")


if __name__ == "__main__":
    main()
