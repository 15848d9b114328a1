"""What decides on the schedule of a run: a setting, schedules by hand or from a planner, or a policy that looks at the run."""

from collections.abc import Sequence

from blockdance.agenda import check_length
from blockdance.denoiser import Denoiser
from blockdance.errors import ConfigError, PolicyError, ScheduleError
from blockdance.policy import Policy
from blockdance.schedule import ReuseConfig, Schedule, fixed_schedule
from blockdance.session import Session

Given = ReuseConfig | Schedule | Sequence[Schedule]
"""What is known before a run: a setting, a schedule, or one for each sample of the batch."""
Decider = Given | Policy


def alike(schedules: Sequence[Schedule]) -> Sequence[Schedule]:
    """One for the whole batch, if all are the same."""
    return schedules[:1] if len(set(schedules)) == 1 else schedules


def check_kind(plan: object) -> None:
    """Raise ConfigError unless it is a plan of some kind."""
    is_list = isinstance(plan, Sequence) and all(isinstance(one, Schedule) for one in plan)
    if isinstance(plan, type) or not (is_list or isinstance(plan, (ReuseConfig, Schedule, Policy))):
        raise ConfigError(f"config must be a ReuseConfig, a Schedule, a list of Schedules or a policy, got {plan!r}")


def check_plan(plan: Decider, session: Session) -> None:
    """Raise what can be known to be wrong before a run begins: PolicyError, or ScheduleError."""
    if isinstance(plan, Policy):
        if len(session.denoisers) > 1:
            raise PolicyError(f"a policy decides for one transformer, this pipeline has {len(session.denoisers)}")
        plan.check(session.transformer)
    elif session.num_blocks > 1:
        for one, denoiser in zip(plans_for(plan, len(session.denoisers)), session.denoisers, strict=True):
            steps = 1 if isinstance(one, ReuseConfig) or not listed(one) else len(listed(one)[0])
            schedules_for(one, steps, depth_for(one, denoiser, session.num_blocks))


def depth_for(plan: Given, denoiser: Denoiser, deepest: int) -> int:
    """The depth that a plan must fit: a setting its denoiser's; schedules by hand the deepest, as any may run a step."""
    return denoiser.num_blocks if isinstance(plan, ReuseConfig) else deepest


def plans_for(plan: Given, num_denoisers: int) -> Sequence[Given]:
    """The plan as it is for each denoiser: all steps the same, a cutoff of its own if several are given.

    Raises:
        ScheduleError: not one cutoff for each.
    """
    return plan.of_each(num_denoisers) if isinstance(plan, ReuseConfig) else [plan] * num_denoisers


def listed(plan: Schedule | Sequence[Schedule]) -> list[Schedule]:
    return [plan] if isinstance(plan, Schedule) else list(plan)


def schedules_for(plan: Given, num_steps: int, num_blocks: int) -> list[Schedule]:
    """The schedules that a plan means for a run, one for the whole batch, or one for each sample.

    Raises:
        ScheduleError: none, the cutoff does not fit the depth, or a given schedule has another number of steps.
    """
    if isinstance(plan, ReuseConfig):
        return [fixed_schedule(plan, num_steps, num_blocks)]
    schedules = listed(plan)
    if not schedules:
        raise ScheduleError("a batch needs one schedule for each sample, got none")
    for schedule in schedules:
        schedule.check_depth(num_blocks)
    check_length(schedules, num_steps)
    return list(alike(schedules))
