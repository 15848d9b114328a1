"""Train a policy: `python -m blockdance.ada.train --out DIR`. Several GPUs: `accelerate launch -m blockdance.ada.train ...`."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import diffusers
import transformers
from accelerate import Accelerator

from blockdance.ada import POLICY_FILE
from blockdance.ada.curves import write_curves
from blockdance.ada.policy import RHO
from blockdance.ada.quality import QUALITIES, quality_named
from blockdance.ada.reinforce import BASELINES
from blockdance.ada.rollouts import Environment
from blockdance.ada.trainer import TrainConfig, Trainer
from blockdance.errors import BlockDanceError, ConfigError
from blockdance.paths import AnyPath
from blockdance.presets import DEMO, load_pipeline
from blockdance.profile import Profile
from blockdance.schedule import check_cutoff, default_cutoff
from blockdance.scheduled import depth_of
from blockdance.storage import RULES, rule_named

PROMPTS = POLICY_FILE.with_name("train.txt")


def build_parser() -> argparse.ArgumentParser:
    like = TrainConfig()
    parser = argparse.ArgumentParser(prog="python -m blockdance.ada.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for policy, log and curves; goes on if one is there")
    parser.add_argument("--model", default=DEMO, help="as in `python -m blockdance` (default: %(default)s)")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="one a line (default: assets/ada/train.txt)")
    parser.add_argument("--updates", type=int, default=like.updates, help="in all (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="stop after so many, to go on another time")
    parser.add_argument("--scenes", type=int, default=like.scenes, help="pictures an update and process (default: %(default)s)")
    parser.add_argument("--rollouts", type=int, default=like.rollouts, help="schedules tried for each (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=like.steps, help="sampling steps (default: 30 50)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's own)")
    parser.add_argument("--rho", type=float, default=RHO, help="share of the run before the decision (default: %(default)s)")
    parser.add_argument("--cutoffs", type=int, nargs="+", help="blocks to choose among (default: three quarters of the depth)")
    parser.add_argument("--storage", choices=RULES, default="latest", help="what reuse starts from (default: %(default)s)")
    parser.add_argument("--baseline", choices=BASELINES, default=like.baseline, help="the paper's: none (default: %(default)s)")
    parser.add_argument("--quality", choices=QUALITIES, default="lpips", help="Q of the reward (default: minus LPIPS)")
    parser.add_argument("--quality-weight", type=float, help="lambda, or where it starts (the paper's: 2, for ImageReward)")
    parser.add_argument("--one-saving", action="store_true", help="the paper's: lambda is fixed, no saving is asked for")
    parser.add_argument("--learning-rate", type=float, default=like.learning_rate, help="of Adam (default: %(default)s)")
    parser.add_argument("--entropy-weight", type=float, default=like.entropy_weight, help="default: %(default)s")
    parser.add_argument("--profile", type=Path, help="start from the planner's schedules with this profile, not from chance")
    parser.add_argument("--seed", type=int, default=like.seed, help="default: %(default)s")
    return parser


def read_lines(file: AnyPath) -> list[str]:
    """The lines that are not empty.

    Raises:
        ConfigError: there are none.
    """
    file = Path(file)
    lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"prompts must be a file with at least one line, got {file.name}")
    return lines


def check_at_least(name: str, value: float | None, least: float) -> None:
    """Raise ConfigError unless the option is left out, or a finite number that is large enough."""
    if value is not None and not (math.isfinite(value) and value >= least):
        raise ConfigError(f"{name} must be a number of at least {least}, got {value!r}")


def train(args: argparse.Namespace) -> None:
    """Load, train, draw the curves.

    Raises:
        BlockDanceError: a value outside its range.
    """
    config = TrainConfig(
        updates=args.updates, scenes=args.scenes, rollouts=args.rollouts, steps=tuple(args.steps), baseline=args.baseline,
        savings=None if args.one_saving else TrainConfig.savings, quality_weight=args.quality_weight,
        learning_rate=args.learning_rate, entropy_weight=args.entropy_weight, seed=args.seed,
    )  # fmt: skip
    check_at_least("minutes", args.minutes, 0)
    check_at_least("guidance", args.guidance, 0)
    prompts, quality = read_lines(args.prompts), quality_named(args.quality)
    accelerator = Accelerator()
    pipe = load_pipeline(args.model).to(accelerator.device)
    cutoffs = sorted(set(args.cutoffs or [default_cutoff(depth_of(pipe))]))
    for cutoff in cutoffs:
        check_cutoff(cutoff, depth_of(pipe))
    call = {} if args.guidance is None else {"guidance_scale": args.guidance}
    environment = Environment(pipe, args.rho, rule_named(args.storage), call)
    profile = None if args.profile is None else Profile.load(args.profile)
    trainer = Trainer(environment, quality, prompts, cutoffs, config, args.out, accelerator, args.storage, profile)
    trainer.run(args.minutes)
    accelerator.end_training()  # a process that ends while its group is open may abort
    if accelerator.is_main_process:
        write_curves(args.out / "log.jsonl", args.out / "curves.html")


def main(arguments: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        train(args)
    except (BlockDanceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
