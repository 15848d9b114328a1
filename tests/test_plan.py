"""The planner: it expects the error that would be, returns the least of it, and says what cannot be."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import blockdance
from analysis.experiment import Request, sample, with_sampler
from blockdance import ConfigError, Extrapolated, Plan, Profile, Schedule, accelerate, load_demo_pipeline, load_demo_profile
from blockdance.frontier import Frontier
from blockdance.plan import Prediction
from blockdance.profile import Expected, mixing_weights, spreading
from blockdance.storage import Latest, Residual, StorageRule
from tests.tiny import BLOCKS, pixart

STEPS, DEPTH = 7, 4
RULES: list[StorageRule] = [Latest(), Extrapolated()]


def trajectory(steps: int, seed: int = 0) -> np.ndarray:
    """A block's outputs, (steps, numbers), that wander."""
    return np.random.default_rng(seed).normal(size=(steps, 5)).cumsum(axis=0)


def expected_of(steps: int) -> Expected:
    states = {block: trajectory(steps, block) for block in (0, 2)}
    sensitivity = np.random.default_rng(9).uniform(0.5, 2, size=(2, steps))
    return Expected({block: h @ h.T for block, h in states.items()}, dict(zip(states, sensitivity, strict=True)))


def pairs_of(schedule: Schedule, points: int) -> list[tuple[int, int, list[int]]]:
    """Of every reuse step: the step, its block, and the steps it looks back to."""
    full = [step for step in range(len(schedule)) if schedule[step].value != "r"]
    reuse = [step for step in range(len(schedule)) if schedule[step].value == "r"]
    return [(step, schedule.cutoff_at(step), [one for one in full if one < step][-points:]) for step in reuse]


def cost(expected: Expected, schedule: Schedule, rule: StorageRule) -> float:
    changes = [
        expected.change(step, block, donors, mixing_weights(rule, donors, step))
        for step, block, donors in pairs_of(schedule, rule.points)
    ]
    return sum(change**2 for change in changes)


def test_rules_mix_as_they_say() -> None:
    assert mixing_weights(Latest(), [3], 5).tolist() == [1]
    assert mixing_weights(Extrapolated(), [2, 3], 5).tolist() == [-2, 3]


def test_the_expected_change_is_the_error_of_what_a_step_would_start_from() -> None:
    expected, states = expected_of(STEPS), trajectory(STEPS, 2)
    would_be = 3 * states[3] - 2 * states[2]
    found = expected.change(5, 2, [2, 3], mixing_weights(Extrapolated(), [2, 3], 5))
    assert found == pytest.approx(expected.sensitivity[2][5] * np.linalg.norm(would_be - states[5]))


def test_states_at_other_steps_lie_on_cubics_through_the_known_ones() -> None:
    assert np.array_equal(spreading(9, 9), np.eye(9))
    places = np.linspace(0, 1, 9)
    cubic = 2 * places**3 - places**2 + 0.5
    finer = np.linspace(0, 1, 14)
    assert spreading(9, 14) @ cubic == pytest.approx(2 * finer**3 - finer**2 + 0.5)


@pytest.mark.parametrize("rule", RULES)
def test_no_schedule_is_better_than_the_planned_one(rule: StorageRule) -> None:
    expected = expected_of(STEPS)
    frontier = Frontier(expected, STEPS, DEPTH, rule)
    best: dict[int, float] = {}
    for steps in itertools.product(("f", "r0", "r2"), repeat=STEPS - 1):
        schedule = Schedule.parse("c" + "".join("c" if step == "f" else step for step in steps), 0)
        saved = STEPS * DEPTH - schedule.block_evaluations(DEPTH)
        best[saved] = min(best.get(saved, np.inf), cost(expected, schedule, rule))
    for saved in range(1, frontier.most + 1):
        least = min(value for other, value in best.items() if other >= saved)
        planned = frontier.schedule(saved)
        assert STEPS * DEPTH - planned.block_evaluations(DEPTH) >= saved
        assert frontier.changes[saved] ** 2 == pytest.approx(least)
        assert cost(expected, planned, rule) == pytest.approx(least)
    assert frontier.most == (STEPS - 1) * 3


def test_a_step_weighs_less_where_there_are_more_of_them() -> None:
    profile, steps, more = load_demo_profile(), 30, 59
    few, many = profile.expected(steps).sensitivity, profile.expected(more).sensitivity
    for block in profile.blocks:
        assert many[block][::2] == pytest.approx(few[block] * np.sqrt(steps / more))  # so squares add up to the same


def test_cache_steps_of_a_plan_are_those_that_are_looked_back_to() -> None:
    for saved in (3, 8, 12):
        schedule = Frontier(expected_of(STEPS), STEPS, DEPTH, Extrapolated()).schedule(saved)
        wanted = {donor for _, _, donors in pairs_of(schedule, 2) for donor in donors}
        assert {step for step in range(STEPS) if schedule[step].value == "c"} == wanted


def test_a_power_law_and_its_spread_are_found() -> None:
    rng = np.random.default_rng(0)
    changes = np.exp(rng.uniform(-9, -3, size=2000))
    distances = 0.3 * changes**1.7 * np.exp(rng.uniform(-1, 1, size=2000))
    middle, low, high = Prediction.fitted(list(zip(changes, distances, strict=True)))(0.001)
    assert middle == pytest.approx(0.3 * 0.001**1.7, rel=0.1)
    assert (low / middle, high / middle) == pytest.approx((np.exp(-0.9), np.exp(0.9)), rel=0.1)


def test_nothing_is_promised_beyond_what_was_measured() -> None:
    profile = load_demo_profile()
    known = profile.outcomes["Extrapolated(points=2)"]
    middle = sorted(change for change, _ in known)[len(known) // 2]
    cut = replace(profile, outcomes={"Extrapolated(points=2)": [pair for pair in known if pair[0] <= middle]})
    with pytest.raises(ConfigError, match="target_speedup must be above 1 and at most") as caught:
        blockdance.plan(target_speedup=2.5, storage=Extrapolated(), profile=cut)
    fastest = float(str(caught.value).split("at most ")[1].split(" ")[0])
    assert 1.2 < fastest < 2.5


def test_a_profile_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    profile = load_demo_profile()
    profile.save(tmp_path / "profile.json")
    back = Profile.load(tmp_path / "profile.json")
    assert {name: vars(back)[name] for name in vars(back) if name != "products"} == {
        name: vars(profile)[name] for name in vars(profile) if name != "products"
    }
    assert all(np.array_equal(back.products[block], profile.products[block]) for block in profile.blocks)
    (tmp_path / "profile.json").write_text('{"steps": 3}')
    with pytest.raises(ConfigError, match=r"profile.json holds no profile of a model"):
        Profile.load(tmp_path / "profile.json")


def test_the_shipped_profile_belongs_to_the_model_in_the_box() -> None:
    profile, pipe = load_demo_profile(), load_demo_pipeline()
    assert profile.num_blocks == len(pipe.transformer.transformer_blocks)
    assert profile.outcomes.keys() == {"Latest()", "Extrapolated(points=2)"}
    assert all(np.all(np.linalg.eigvalsh(products) > -1e-9) for products in profile.products.values())


@pytest.mark.parametrize("steps", [30, 50])
@pytest.mark.parametrize("rule", RULES)
def test_a_plan_reaches_the_speedup_it_was_asked_for_and_runs(steps: int, rule: StorageRule) -> None:
    plan = blockdance.plan(target_speedup=1.6, steps=steps, storage=rule, profile=load_demo_profile())
    assert 1.6 <= plan.speedup_ideal < 1.64
    assert plan.interval[0] < plan.predicted < plan.interval[1]
    pipe = with_sampler(load_demo_pipeline(), "DDIM")
    with accelerate(pipe, plan.schedule, storage=plan.storage) as trace:
        sample(pipe, Request("red apple", steps=steps))
    assert trace.speedup_ideal == plan.speedup_ideal
    assert trace.kinds == "".join(kind.value for kind in plan.schedule)


def test_more_speed_is_predicted_to_change_more() -> None:
    plans = [plan_for(target_speedup=target) for target in (1.2, 1.5, 2.0)]
    assert plans[0].predicted < plans[1].predicted < plans[2].predicted


def plan_for(**goal: float) -> Plan:
    return blockdance.plan(**goal, storage=Extrapolated(), profile=load_demo_profile())  # type: ignore[arg-type]


def test_a_distance_is_kept_with_as_much_speed_as_it_allows() -> None:
    loose, tight = plan_for(max_lpips=3e-4), plan_for(max_lpips=3e-5)
    assert tight.interval[1] <= 3e-5 and loose.interval[1] <= 3e-4
    assert loose.speedup_ideal > tight.speedup_ideal > 1
    faster = plan_for(target_speedup=tight.speedup_ideal + 0.04)
    assert faster.interval[1] > 3e-5


def test_one_cutoff_is_one_cutoff() -> None:
    plan = blockdance.plan(target_speedup=1.7, storage=Extrapolated(), profile=load_demo_profile(), one_cutoff=True)
    assert not plan.schedule.cutoffs and plan.speedup_ideal >= 1.7


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: plan_for(), "give one goal, target_speedup or max_lpips, got None and None"),
        (lambda: plan_for(target_speedup=1.5, max_lpips=0.1), "give one goal"),
        (lambda: plan_for(target_speedup=1.0), "target_speedup must be above 1 and at most .* got 1.0"),
        (lambda: plan_for(target_speedup=50), r"target_speedup must be above 1 and at most \d\.\d\d with this model"),
        (lambda: plan_for(target_speedup="fast"), "got 'fast'"),  # type: ignore[arg-type]
        (
            lambda: blockdance.plan(target_speedup=1.3, profile=load_demo_profile(), steps=4),
            "nothing can be reused in 4 steps with this model; take more steps for a target_speedup, got 1.3",
        ),
        (
            lambda: blockdance.plan(max_lpips=0.1, profile=load_demo_profile(), steps=4),
            "nothing can be reused in 4 steps with this model; take more steps for a max_lpips, got 0.1",
        ),
        (lambda: plan_for(max_lpips=1e-12), r"max_lpips must be at least 0\.0\d+, which a single reuse step"),
        (lambda: blockdance.plan(target_speedup=2, profile=load_demo_profile(), steps=3), "steps must be at least 4"),
        (lambda: blockdance.plan(target_speedup=2, profile=load_demo_profile(), storage=Residual()), "storage must be a rule"),
        (lambda: blockdance.plan(pixart(), target_speedup=2), "prompts must name at least one thing to draw, got none"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_what_can(ask: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ask()


def test_the_nearest_goal_that_a_refusal_names_can_be_reached() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_for(target_speedup=50)
    fastest = float(str(caught.value).split("at most ")[1].split(" ")[0])
    assert plan_for(target_speedup=fastest).speedup_ideal >= fastest
    with pytest.raises(ConfigError) as caught:
        plan_for(max_lpips=1e-12)
    least = float(str(caught.value).split("at least ")[1].split(",")[0])
    assert plan_for(max_lpips=least).interval[1] <= least


def test_a_profile_of_another_pipeline_is_measured_and_planned_with() -> None:
    pipe = pixart()
    prompts = [{"prompt_embeds": embeds(seed), "prompt_attention_mask": torch.ones(1, 5)} for seed in (0, 1)]
    told: list[tuple[int, int]] = []
    found = blockdance.own_profile(
        pipe,
        prompts,
        steps=8,
        rules=RULES,
        call={
            "negative_prompt": None,
            "negative_prompt_embeds": embeds(2),
            "negative_prompt_attention_mask": torch.ones(1, 5),
            "use_resolution_binning": False,
            "height": 8,
            "width": 8,
        },
        distance=lambda ours, theirs: float(np.abs(ours.astype(float) - theirs).mean()),
        distance_name="mean difference",
        on_run=lambda finished, runs: told.append((finished, runs)),
    )
    assert (found.num_blocks, found.steps, found.prompts, found.distance) == (BLOCKS, 8, 2, "mean difference")
    assert told[-1][0] == told[-1][1]
    plan = blockdance.plan(target_speedup=1.3, steps=12, profile=found, storage=Extrapolated())
    assert len(plan.schedule) == 12 and plan.speedup_ideal >= 1.3
    assert replace(plan, predicted=0) != plan


def embeds(seed: int) -> torch.Tensor:
    return torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(seed))
