"""Trains a decision network by reinforcement; the diffusion model stays as it is."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from blockdance.ada.imitation import PROBES, Examples, Losses, Teacher, imitate
from blockdance.ada.policy import AdaPolicy, check_rho, new_policy, trained
from blockdance.ada.quality import Quality
from blockdance.ada.reinforce import BASELINES, Price, advantages, entropy, policy_loss, try_some
from blockdance.ada.rollouts import Environment, Scene, Task
from blockdance.errors import ConfigError
from blockdance.paths import AnyPath, ready_for, written
from blockdance.policy import Moment
from blockdance.profile import Profile
from blockdance.schedule import MIN_STEPS, Schedule, StepKind

CLIP_NORM = 1.0
IMITATED = 48
"""Pictures that the planner's schedules are shown with."""
KEEP_EVERY = 25
"""Updates from one checkpoint to the next."""
FIXED = ("steps", "baseline", "savings")
"""Settings that a training keeps when it goes on."""
MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class TrainConfig:
    """What may be chosen.

    Raises:
        ConfigError: a value outside its range.
    """

    updates: int = 800
    scenes: int = 4
    """Pictures in an update, on each process."""
    rollouts: int = 8
    """Schedules that are tried for each of them."""
    steps: tuple[int, ...] = (30, 50)
    """Sampling steps, at least 4; each update draws one of these."""
    baseline: str = "leave-one-out"
    """One of `reinforce.BASELINES`; `none` is the paper's."""
    savings: tuple[float, float] | None = (0.2, 0.8)
    """Range of wanted savings that the network is asked for. None is the paper's form: one network for one saving, which
    follows from the weight of quality."""
    quality_weight: float | None = None
    """lambda, above 0; with wanted savings only where it starts, None for a start at which quality weighs as much as saving."""
    learning_rate: float = 3e-4
    """Of Adam, above 0."""
    entropy_weight: float = 0.0
    """How much a nat of entropy a step adds to the reward, at least 0."""
    seed: int = 0
    """In [0, 2^31 - 1]."""

    def __post_init__(self) -> None:
        for name in ("updates", "scenes", "rollouts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if not self.steps or min(self.steps) < MIN_STEPS:
            raise ConfigError(f"steps must each be at least {MIN_STEPS}, got {self.steps!r}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed must be in [0, {MAX_SEED}], got {self.seed!r}")
        self._check_weights()
        if self.baseline not in BASELINES:
            raise ConfigError(f"baseline must be one of {', '.join(BASELINES)}, got {self.baseline!r}")
        if self.baseline == "leave-one-out" and self.rollouts < 2:
            raise ConfigError(f"leave-one-out needs at least 2 rollouts, got {self.rollouts}")
        if self.savings is None and self.quality_weight is None:
            raise ConfigError("without wanted savings quality_weight must be given, got None")
        if self.savings is not None and not 0 <= self.savings[0] <= self.savings[1] <= 1:
            raise ConfigError(f"savings must be two ascending shares in [0, 1], got {self.savings!r}")

    def _check_weights(self) -> None:
        for name in ("learning_rate", "quality_weight"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a number above 0, got {value!r}")
        if not (math.isfinite(self.entropy_weight) and self.entropy_weight >= 0):
            raise ConfigError(f"entropy_weight must be a number of at least 0, got {self.entropy_weight!r}")


def reuse_share(schedule: Schedule, first: int, deepest: int) -> float:
    """C: the share of the steps from `first` on that reuse; where cutoffs differ, each counts by the blocks it skips."""
    skipped = [
        (schedule.cutoff_at(step) + 1) / (deepest + 1) if schedule[step] is StepKind.REUSE else 0.0
        for step in range(first, len(schedule))
    ]
    return sum(skipped) / len(skipped)


def merged(scenes: Sequence[Scene]) -> Moment:
    """What the policy sees of several scenes with the same number of steps."""
    moments = [scene.moment for scene in scenes]
    text = [moment.text for moment in moments if moment.text is not None]
    masks = [moment.text_mask for moment in moments if moment.text_mask is not None]
    return Moment(
        torch.cat([moment.latent for moment in moments]),
        torch.cat(text) if text else None,
        torch.cat(masks) if masks else None,
        moments[0].num_steps,
    )


class Trainer:
    """One training, which goes on where its folder says it was.

    Args:
        environment: draws.
        quality: Q.
        prompts: what to draw; each always from the same noise, so that its baseline is drawn once.
        cutoffs: blocks to choose among.
        config: the rest.
        folder: for `policy.safetensors`, `log.jsonl` and the state.
        accelerator: shares the scenes of an update among processes.
        storage: what reuse steps start from.
        profile: begin with the planner's schedules, and not with chance.

    Raises:
        ConfigError: rho leaves nothing to decide on, or the folder holds another training or cannot be written to.
        PolicyError: the folder holds a training for other weights.
    """

    def __init__(
        self, environment: Environment, quality: Quality, prompts: Sequence[str], cutoffs: Sequence[int], config: TrainConfig,
        folder: AnyPath, accelerator: Accelerator, storage: str = "latest",
        profile: Profile | None = None,
    ) -> None:  # fmt: skip
        check_rho(environment.rho, config.steps)
        self.environment, self.quality, self.prompts, self.config = environment, quality, prompts, config
        self.folder, self.accelerator = ready_for(Path(folder) / "policy.safetensors").parent, accelerator
        torch.manual_seed(config.seed)
        example = environment.scene(Task(prompts[0], 0, config.steps[0])).moment
        self.policy = new_policy(environment.pipe.transformer, example, cutoffs, rho=environment.rho, storage=storage)
        self.policy.network.to(accelerator.device)
        self.price: Price | None = None
        if profile is not None and not (self.folder / "state.pt").exists():
            self._imitate(profile)
        optimizer = torch.optim.Adam(self.policy.network.parameters(), lr=config.learning_rate)
        self.network, self.optimizer = accelerator.prepare(self.policy.network, optimizer)
        self.update, self.rollouts, self.seconds = 0, 0, 0.0
        if (self.folder / "state.pt").exists():
            self._restore()

    def _imitate(self, profile: Profile) -> None:
        """Draw some pictures at two savings each, and teach the network the planner's schedules for them."""
        generator, teacher = torch.Generator().manual_seed(self.config.seed), Teacher(profile, self.policy)
        examples = []
        for steps in dict.fromkeys(self.config.steps):
            places = torch.randperm(len(self.prompts), generator=generator)[:IMITATED].tolist()
            scenes = [self.environment.scene(Task(self.prompts[place], place, steps)) for place in places]
            probes = [teacher.schedule(saving, steps) for saving in PROBES]
            shown = tqdm(scenes, desc=f"probing, {steps} steps", disable=not self.accelerator.is_main_process)
            lost = [self.quality(one.task.prompt, one.picture, self.environment.play(one, probes)) for one in shown]
            losses = Losses.fitted(torch.tensor(lost))
            examples.append(Examples(merged(scenes), losses.hardness))
            if self.config.savings is not None:
                self.price = self.price or Price(losses.price[0])
                self.price.expect(steps, *losses.price)
        imitate(teacher, examples, self.config.savings or (0.5, 0.5), generator)

    def run(self, minutes: float | None = None) -> AdaPolicy:
        """Train to the last update, or for so many minutes, and keep what came of it."""
        start, before = time.perf_counter(), self.seconds
        shown = self.accelerator.is_main_process
        if shown:
            drop_later_lines(self.folder / "log.jsonl", self.update)
        with tqdm(total=self.config.updates, initial=self.update, desc="ada", disable=not shown) as bar:
            while self.update < self.config.updates:
                told = self._update()
                self.seconds = before + time.perf_counter() - start
                if shown:
                    with (self.folder / "log.jsonl").open("a") as log:
                        log.write(json.dumps(told | {"seconds": round(self.seconds, 1)}) + "\n")
                bar.update()
                bar.set_postfix(saving=f"{told['saving']:.2f}", reward=f"{told['reward']:.3f}")
                late = minutes is not None and time.perf_counter() - start > 60 * minutes
                over = bool(self._gathered(torch.tensor([float(late)])).any())  # else each would go by a clock of its own
                if self.update % KEEP_EVERY == 0 or over or self.update == self.config.updates:
                    self._keep()
                if over:
                    break
        return self.policy

    def _gathered(self, values: Tensor) -> Tensor:
        """The rows of all processes, (processes * rows, ...); on their devices meanwhile, since nccl takes no other tensors."""
        together: Tensor = self.accelerator.gather(values.to(self.accelerator.device))
        return together.cpu()

    def _update(self) -> dict[str, Any]:
        config, processes = self.config, self.accelerator
        generator = torch.Generator().manual_seed(
            (config.seed * 1_000_003 + self.update) * 4096 + 17 * processes.process_index + 1
        )
        num_steps = config.steps[int(torch.randint(len(config.steps), (1,), generator=generator))]
        chosen = torch.randint(len(self.prompts), (config.scenes,), generator=generator).tolist()
        scenes = [self.environment.scene(Task(self.prompts[place], place, num_steps)) for place in chosen]
        low, high = config.savings or (0.5, 0.5)
        wanted = low + (high - low) * torch.rand(config.scenes, generator=generator)
        moment, first = merged(scenes), round(self.environment.rho * num_steps)
        logits, cutoffs = (part.cpu() for part in self.network(moment, first, wanted))
        tried = try_some(logits, cutoffs, config.rollouts, generator)
        saving, quality = self._outcomes(scenes, tried.is_cache, tried.cutoffs, first)
        weight = self._weight(wanted, quality, num_steps)
        rewards = saving + weight[:, None] * quality
        greedy = self._greedy_rewards(scenes, logits, cutoffs, first, weight) if config.baseline == "self-critical" else None
        advantage = advantages(rewards, config.baseline, greedy)
        spread = entropy(logits)
        loss = policy_loss(logits, cutoffs, tried, advantage) - config.entropy_weight * spread
        self.optimizer.zero_grad()
        processes.backward(loss)
        norm = processes.clip_grad_norm_(self.network.parameters(), CLIP_NORM)
        self.optimizer.step()
        if config.savings is not None:
            self._learn_price(wanted, saving.mean(dim=1), num_steps)
        self.update += 1
        figures = torch.stack([one.detach().mean() for one in (rewards, saving, quality, spread, weight, wanted)])
        means = self._gathered(figures[None]).mean(dim=0).tolist()
        self.rollouts += processes.num_processes * config.scenes * config.rollouts
        names = ("reward", "saving", "quality", "entropy", "quality_weight", "wanted")
        return {
            "update": self.update, "rollouts": self.rollouts, "steps": num_steps,
            **dict(zip(names, means, strict=True)), "gradient_norm": float(norm),
        }  # fmt: skip

    def _outcomes(self, scenes: Sequence[Scene], is_cache: Tensor, cutoffs: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """C and Q, (scenes, rollouts), of tried schedules; every picture is drawn."""
        savings, qualities = [], []
        for scene, keeps, which in zip(scenes, is_cache.bool().tolist(), cutoffs.tolist(), strict=True):
            steps = scene.task.steps
            schedules = [self.policy.schedule_of(*one, steps) for one in zip(keeps, which, strict=True)]
            savings.append([reuse_share(schedule, first, self.policy.cutoffs[-1]) for schedule in schedules])
            pictures = self.environment.play(scene, schedules)
            qualities.append(self.quality(scene.task.prompt, scene.picture, pictures))
        return torch.tensor(savings), torch.tensor(qualities)

    def _greedy_rewards(self, scenes: Sequence[Scene], logits: Tensor, cutoffs: Tensor, first: int, weight: Tensor) -> Tensor:
        is_cache, which = (logits.detach() >= 0).float()[:, None], cutoffs.detach().argmax(dim=-1)[:, None]
        saving, quality = self._outcomes(scenes, is_cache, which, first)
        return saving[:, 0] + weight * quality[:, 0]

    def _weight(self, wanted: Tensor, quality: Tensor, num_steps: int) -> Tensor:
        """lambda of each scene."""
        if self.config.savings is None:
            return torch.full_like(wanted, float(self.config.quality_weight or 0))
        if self.price is None:
            typical = self._gathered(quality.abs().mean()[None]).mean().item()
            self.price = Price(self.config.quality_weight or 0.5 / max(typical, 1e-9))
        return self.price(wanted, num_steps)

    def _learn_price(self, wanted: Tensor, saving: Tensor, num_steps: int) -> None:
        """All processes learn from all savings, so that they agree."""
        assert self.price is not None
        rows = torch.stack([wanted, saving, torch.full_like(wanted, num_steps)], dim=1)
        gathered = self._gathered(rows)
        for steps in gathered[:, 2].unique():  # processes may draw different numbers of steps
            some = gathered[gathered[:, 2] == steps]
            self.price.learn(some[:, 0], some[:, 1], int(steps))

    def _keep(self) -> None:
        """Write the policy and all it takes to go on."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        facts = asdict(self.config) | {
            "updates": self.update, "rollouts": self.rollouts, "seconds": round(self.seconds),
            "processes": self.accelerator.num_processes, "prompts": len(self.prompts),
        }  # fmt: skip
        trained(self.policy, **facts).save(self.folder / "policy.safetensors")
        price = None if self.price is None else {"start": self.price.start, "coefficients": self.price.coefficients}
        state = {
            "update": self.update, "rollouts": self.rollouts, "seconds": self.seconds, "price": price,
            "network": self.policy.network.state_dict(), "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        written(self.folder / "state.pt", lambda new: torch.save(state, new))

    def _restore(self) -> None:
        kept = AdaPolicy.load(self.folder / "policy.safetensors")
        if kept.config.model != self.policy.config.model or kept.config.cutoffs != self.policy.config.cutoffs:
            raise ConfigError(f"{self.folder.name} holds a training of another model or other cutoffs; choose another folder")
        kept.check(self.environment.pipe.transformer)
        self._check_settings(kept)
        state = torch.load(self.folder / "state.pt", map_location="cpu", weights_only=True)
        self.policy.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.update, self.rollouts, self.seconds = state["update"], state["rollouts"], state["seconds"]
        if state["price"] is not None:
            self.price = Price(state["price"]["start"])
            self.price.coefficients = state["price"]["coefficients"]

    def _check_settings(self, kept: AdaPolicy) -> None:
        """Raise ConfigError if the folder's training had other settings than those that shall go on."""

        def settings(policy: AdaPolicy, training: dict[str, Any]) -> dict[str, Any]:
            chosen = {"storage": policy.config.storage_name, "rho": policy.config.rho}
            return chosen | {name: training.get(name) for name in FIXED}

        ours = json.loads(json.dumps(settings(self.policy, asdict(self.config))))
        for name, theirs in settings(kept, kept.config.training).items():
            if theirs != ours[name]:
                raise ConfigError(
                    f"{self.folder.name} holds a training with {name} {theirs!r}, got {ours[name]!r}; choose another folder"
                )


def drop_later_lines(log: AnyPath, update: int) -> None:
    """Keep a log's lines up to this update; what was done after the last checkpoint will be done again."""
    log = Path(log)
    if not log.exists():
        return
    whole = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in whole if json.loads(line)["update"] <= update]
    written(log, lambda new: new.write_text("".join(kept)))
