"""Each extension of Ada beside the paper's form: short trainings that differ in one thing, and what came of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from analysis.ada import Rivals, held_out
from analysis.experiment import Request, run_baseline, run_variant
from analysis.metrics import PerceptualDistance, difference
from analysis.points import short
from analysis.records import RESULTS, Record, provenance, read_records
from analysis.tables import table
from blockdance import Profile, StepKind
from blockdance.ada import AdaPolicy
from blockdance.ada.train import main as train
from blockdance.demo import PROFILE_FILE

ABLATION_RESULTS = RESULTS.with_name("ada_ablation.jsonl")
STEPS = 20
UPDATES = 50
PICTURES = 32
SAVING = 0.5
COMMON = ("--steps", str(STEPS), "--updates", str(UPDATES), "--scenes", "2", "--learning-rate", "1e-3")
FIXED = ("--one-saving", "--quality-weight", "100")
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (*FIXED, "--cutoffs", "12", "--baseline", "none"),
    "leave-one-out": (*FIXED, "--cutoffs", "12"),
    "self-critical": (*FIXED, "--cutoffs", "12", "--baseline", "self-critical"),
    "saving-input": ("--cutoffs", "12"),
    "planner-start": ("--cutoffs", "12", "--profile", str(PROFILE_FILE)),
    "cutoff-head": (*FIXED, "--cutoffs", "6", "9", "12"),
    "ssim": ("--one-saving", "--quality-weight", "20", "--quality", "ssim", "--cutoffs", "12"),
}
"""By name, the options of `python -m blockdance.ada.train`; `plain` is the paper's form with minus LPIPS as Q."""
SAID = {
    "plain": "the paper's form: no baseline term, fixed lambda, one cutoff",
    "leave-one-out": "with the mean of the other rollouts as baseline term",
    "self-critical": "with the greedy schedule's reward as baseline term",
    "saving-input": "leave-one-out, and the wanted saving as an input",
    "planner-start": "the same, from an order of the steps that the planner's profile gives",
    "cutoff-head": "leave-one-out, and a cutoff of 6, 9 or 12 on each step",
    "ssim": "leave-one-out, with SSIM as Q",
}


def train_all(folder: Path) -> None:
    """Train every variant that the folder does not hold yet; about five minutes each on one core."""
    for name, options in VARIANTS.items():
        train(["--out", str(folder / name), *COMMON, *options])


def measure(pipe: Any, profile: Profile, folder: Path, distance: PerceptualDistance, out: Path) -> list[Record]:
    """What each trained variant decides greedily on held-out pictures, beside the planner's schedule of as many reuse steps.

    Returns:
        One line per variant and picture, which the file now holds.
    """
    requests = [Request(prompt, steps=STEPS) for prompt in held_out()[:: len(held_out()) // PICTURES]]
    baselines = [run_baseline(pipe, request) for request in requests]
    lines = []
    for name in tqdm(VARIANTS, desc="ablation"):
        policy = AdaPolicy.load(folder / name / "policy.safetensors", SAVING)
        last = json.loads((folder / name / "log.jsonl").read_text().splitlines()[-1])
        late = Rivals(policy, profile).late(STEPS)
        for request, baseline in zip(requests, baselines, strict=True):
            ours = run_variant(pipe, request, policy, baseline.recording)
            decided = list(ours.schedule)[policy.decides_at(STEPS) :]
            share = float(np.mean([kind is StepKind.REUSE for kind in decided]))
            saved = round(share * len(decided)) * (policy.cutoffs[-1] + 1)
            planned = run_variant(pipe, request, late.schedule(min(late.most, saved)), baseline.recording)
            lines.append(
                provenance()
                | {"bench": "ada-ablation", "variant": name, "prompt": request.prompt, "steps": STEPS, "share": share}
                | {"rollouts": last["rollouts"], "seconds": last["seconds"], "entropy": last["entropy"]}
                | {"schedule": str(ours.schedule), "speedup_ideal": ours.trace.speedup_ideal}
                | difference(baseline.picture, ours.picture, distance)
                | {"planned_lpips": difference(baseline.picture, planned.picture, distance)["lpips"]}
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def render_ablation(lines: Sequence[Record]) -> str:
    """A row for each variant."""
    rows = []
    for name, text in SAID.items():
        some = [line for line in lines if line["variant"] == name]
        ours, planned = (float(np.mean([line[key] for line in some])) for key in ("lpips", "planned_lpips"))
        share, speedup = (float(np.mean([line[key] for line in some])) for key in ("share", "speedup_ideal"))
        schedules = len({line["schedule"] for line in some})
        rows.append(
            [f"{name}: {text}", f"{some[0]['rollouts']}", f"{some[0]['seconds'] / 60:.0f} min", f"{some[0]['entropy']:.2f}",
             f"{share:.2f}", f"{speedup:.2f}x", short(ours), short(planned), f"{schedules}"]
        )  # fmt: skip
    head = ["variant", "rollouts", "training", "entropy left, nats", "share of reuse", "ideal", "LPIPS, mean"]
    return table([*head, "the planner's with as many reuse steps", "different schedules"], rows)


def read_ablation(file: Path = ABLATION_RESULTS) -> list[Record]:
    """The lines of a results file; none if there is none."""
    return read_records(file) if file.exists() else []
