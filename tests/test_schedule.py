"""A schedule is data: tables that can be read, and errors that name the value."""

from collections.abc import Callable

import pytest

from blockdance import ConfigError, ReuseConfig, Schedule, ScheduleError, StepKind, fixed_schedule


def test_the_papers_dit_setting_reaches_its_published_speedup() -> None:
    schedule = fixed_schedule(ReuseConfig(2, 20, 0.25, 0.95), num_steps=50, num_blocks=28)
    assert 1.36 <= schedule.ideal_speedup(28) <= 1.38


def test_the_papers_pixart_setting_reaches_its_published_speedup() -> None:
    schedule = fixed_schedule(ReuseConfig(2, 20), num_steps=30, num_blocks=28)
    assert 1.25 <= schedule.ideal_speedup(28) <= 1.27


@pytest.mark.parametrize(
    ("interval", "start", "end", "expected"),
    [
        (2, 0.4, 0.9, "ffffcrcrcf"),
        (3, 0.4, 1.0, "ffffcrrcrr"),
        (4, 0.0, 0.9, "crrrcrrrcf"),
        (9, 0.0, 1.0, "crrrrrrrrc"),
        (2, 0.29, 0.71, "fffcrcrfff"),
    ],
)
def test_groups_of_one_cache_step_and_n_minus_one_reuse_steps(interval: int, start: float, end: float, expected: str) -> None:
    assert str(fixed_schedule(ReuseConfig(interval, 2, start, end), 10, 6)) == expected


def test_window_fractions_are_rounded_and_not_cut() -> None:
    assert ReuseConfig(window_start=0.29, window_end=0.57).window(100) == range(29, 57)


@pytest.mark.parametrize(("num_blocks", "cutoff"), [(2, 0), (3, 1), (4, 2), (14, 9), (28, 20), (57, 42)])
def test_the_default_cutoff_is_three_quarters_of_the_depth(num_blocks: int, cutoff: int) -> None:
    assert fixed_schedule(ReuseConfig(), 20, num_blocks).cutoff_block == cutoff


@pytest.mark.parametrize(
    ("config", "steps", "reason"),
    [
        (ReuseConfig(1), 30, "reuse_interval is 1"),
        (ReuseConfig(2, None, 0.5, 0.5), 30, "window"),
        (ReuseConfig(2, None, 0.0, 1.0), 3, "3 steps are too few"),
    ],
)
def test_a_config_that_cannot_reuse_runs_dense_and_says_so(config: ReuseConfig, steps: int, reason: str) -> None:
    schedule = fixed_schedule(config, steps, 14)
    assert set(schedule) == {StepKind.FULL}
    assert schedule.ideal_speedup(14) == 1.0
    assert reason in (config.why_dense(steps) or "")


def test_a_schedule_parses_back_from_what_it_prints() -> None:
    schedule = Schedule.parse("ffffcrcrf", cutoff_block=20)
    assert Schedule.parse(str(schedule), 20) == schedule
    assert schedule.cutoff_block == 20
    assert schedule.block_evaluations(28) == 7 * 28 + 2 * 7


def test_the_cost_outside_the_blocks_lowers_the_ideal() -> None:
    schedule = Schedule.parse("crcr", cutoff_block=2)
    assert schedule.ideal_speedup(4) == 16 / 10
    assert schedule.ideal_speedup(4, overhead_blocks=1.0) == 20 / 14


@pytest.mark.parametrize(("text", "prefix"), [("ffffcrcrf", 4), ("ccrf", 1), ("cfr", 0), ("ffff", 4), ("ffc", 3)])
def test_the_shared_prefix_ends_before_the_cache_step_of_the_first_reuse(text: str, prefix: int) -> None:
    assert Schedule.parse(text, 1).shared_prefix == prefix


def test_reuse_steps_may_differ_in_their_block() -> None:
    schedule = Schedule.parse("fcr9r12cr12f", cutoff_block=3)
    assert str(schedule) == "fcr9r12cr12f" and Schedule.parse(str(schedule), 0) == schedule
    assert schedule.cutoff_block == 12
    assert [schedule.blocks_at(step, 14) for step in range(7)] == [14, 14, 4, 1, 14, 1, 14]
    assert Schedule.parse("fcr9rcr12f", cutoff_block=12) == schedule
    assert Schedule.parse("fcr9r9f", cutoff_block=3) == Schedule.parse("fcrrf", cutoff_block=9)


def test_a_cache_step_keeps_what_later_reuse_steps_start_from() -> None:
    schedule = Schedule.parse("fcr9r12cr12cf", cutoff_block=0)
    assert [sorted(schedule.blocks_kept_at(step)) for step in (1, 4, 6)] == [[9, 12], [12], []]
    assert [sorted(schedule.blocks_kept_at(step, points=2)) for step in (0, 1, 4)] == [[9, 12], [9, 12], [12]]


def test_a_cache_step_keeps_nothing_for_groups_that_have_newer_ones() -> None:
    schedule = Schedule.parse("fcr9cr12cr5cf", cutoff_block=0)
    assert [sorted(schedule.blocks_kept_at(step)) for step in (1, 3, 5)] == [[9], [12], [5]]
    assert [sorted(schedule.blocks_kept_at(step, points=2)) for step in (1, 3, 5)] == [[9, 12], [5, 12], [5]]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ReuseConfig(0), "reuse_interval must be an integer of at least 1, got 0"),
        (lambda: ReuseConfig(2.5), "got 2.5"),  # type: ignore[arg-type]
        (lambda: ReuseConfig(True), "got True"),
        (lambda: ReuseConfig(2, -1), "cutoff_block must be None or an integer of at least 0, got -1"),
        (lambda: ReuseConfig(window_start=1.5), r"window_start must be a fraction in \[0, 1\], got 1.5"),
        (lambda: ReuseConfig(window_start=float("nan")), "got nan"),
        (lambda: ReuseConfig(window_start=0.6, window_end=0.5), "0.6 > 0.5"),
    ],
)
def test_a_setting_outside_its_range_is_named(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Schedule.parse("ffxr", 1), "got 'x'"),
        (lambda: Schedule.parse("", 1), "at least one step"),
        (lambda: Schedule.parse("ffr", 1), "step 2 reuses but no step before it caches"),
        (lambda: Schedule.parse("ff", -1), "got -1"),
        (lambda: Schedule.parse("cr9r", "9"), "cutoff_block must be an integer of at least 0, got '9'"),  # type: ignore[arg-type]
        (lambda: Schedule.parse("f9r", 1), "got '9'"),
        (lambda: Schedule.parse("cr9r13", 1).check_depth(14), r"\[0, 12\] for 14 blocks, got 13"),
        (lambda: Schedule((StepKind.FULL,) * 3, 4, (1, 2)), "cutoffs must hold one block for each of 3 steps, got 2"),
        (lambda: Schedule((StepKind.FULL,) * 2, 4, (1, 5)), r"cutoffs must be integers in \[0, 4\], the cutoff_block, got 5"),
        (lambda: Schedule.parse("ff", 5).ideal_speedup(6), r"\[0, 4\] for 6 blocks, got 5"),
        (lambda: fixed_schedule(ReuseConfig(2, 5), 10, 6), r"\[0, 4\] for 6 blocks, got 5"),
        (lambda: fixed_schedule(ReuseConfig(2), 0, 6), "num_steps must be at least 1, got 0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        make()
