"""Ada's evidence: each rival does what its name says, and the tables say what the lines do."""

import random
from pathlib import Path

import numpy as np
import pytest

from analysis.ada import HELD_OUT, SAVINGS, Rivals, held_out, measure, shuffled
from analysis.compare import read_prompts
from analysis.experiment import with_sampler
from analysis.metrics import shift_tolerant_lpips
from analysis.records import BenchError, Record, append_records, read_records
from analysis.tables_ada import BEGIN, END, ada_figure, correlations, curves, gain, render_ada, update_ada
from blockdance import Schedule, load_demo_pipeline, load_demo_profile
from blockdance.ada import POLICY_FILE, load_demo_policy


def test_no_held_out_prompt_was_trained_or_profiled_with() -> None:
    from analysis.__main__ import PROFILE_PROMPTS

    held, trained = held_out(), read_prompts(POLICY_FILE.with_name("train.txt"))
    assert len(set(held)) == len(held) == 128
    assert not set(held) & {*trained, *PROFILE_PROMPTS}
    assert HELD_OUT.exists()


def test_a_shuffled_schedule_reuses_as_often_after_the_same_prefix() -> None:
    schedule = Schedule.parse("fffcrrcrcc", 3)
    several = {str(shuffled(schedule, 4, random.Random(seed))) for seed in range(20)}
    assert len(several) > 5
    assert all(one.startswith("fffc") and one.count("r") == 3 for one in several)


def test_rivals_are_planned_for_the_policys_own_rule_and_block() -> None:
    rivals = Rivals(load_demo_policy(), load_demo_profile())
    given = {(method, knob): schedule for method, knob, schedule in rivals.schedules(30)}
    assert str(given["fixed", "N=2"]) == "f" * 12 + "cr" * 8 + "ff"
    assert all(one.cutoff_block == 12 for (method, _), one in given.items() if method != "planned")
    late = [given["planned-late", f"{saving:g}"] for saving in SAVINGS]
    assert all((one.first_reuse or 30) >= 12 for one in late)
    assert [str(one).count("r") for one in late] == [round(18 * saving) for saving in SAVINGS]
    assert given["planned", "1.5x"].ideal_speedup(14) >= 1.5


def test_a_measurement_has_a_line_for_each_and_goes_on_where_it_was(tmp_path: Path) -> None:
    pipe, out = with_sampler(load_demo_pipeline(), "DDIM"), tmp_path / "ada.jsonl"
    arguments = (pipe, load_demo_policy(), load_demo_profile())
    first = measure(*arguments, ["pizza"], [10], shift_tolerant_lpips(), out)
    text = out.read_text()
    lines = measure(*arguments, ["pizza", "owl"], [10], shift_tolerant_lpips(), out)
    assert out.read_text().startswith(text) and lines[: len(first)] == first and len(lines) == 2 * len(first)
    by_method = {(line["method"], line["knob"]): line for line in first}
    assert len(by_method) == len(first)
    for saving in SAVINGS:
        ours, chance = by_method["ada", f"{saving:g}"], by_method["random", f"{saving:g}"]
        assert ours["schedule"].startswith("fffc") and ours["reused"] == chance["reused"]
    assert by_method["fewer-steps", "18 of 30"]["speedup_ideal"] == pytest.approx(10 / 6)


def test_a_measurement_that_was_killed_inside_a_write_has_each_line_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, out = load_demo_pipeline(), tmp_path / "ada.jsonl"
    settings = [("fixed", "N=2"), ("fewer-steps", "25 of 30"), *(("ada", f"{saving:g}") for saving in SAVINGS)]
    drawn = [{"bench": "ada", "method": method, "knob": knob, "prompt": "owl", "steps": 10} for method, knob in settings]
    monkeypatch.setattr("analysis.ada.lines_of", lambda *_: iter(drawn))
    monkeypatch.setattr("analysis.ada.warm_up", lambda _: None)
    arguments = (pipe, load_demo_policy(), load_demo_profile(), ["owl"], [10], shift_tolerant_lpips(), out)
    assert measure(*arguments) == drawn
    text = out.read_text()
    for cut in (text.index("\n") + 1, len(text) // 2, len(text) - 1):
        out.write_text(text[:cut])
        assert measure(*arguments) == drawn and out.read_text() == text


def test_a_last_line_that_was_cut_off_is_passed_over_and_makes_way(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "compare.jsonl"
    with pytest.raises(BenchError, match=r"compare.jsonl is missing; `python -m analysis compare` writes it"):
        read_records(file)
    with pytest.raises(BenchError, match=r"results.jsonl is missing$"):
        read_records(tmp_path / "results.jsonl")
    records: list[Record] = [{"bench": "compare", "knob": str(knob)} for knob in range(3)]
    append_records(file, records[:2])
    whole = file.read_text()
    for cut_off in ("", '{"bench": "comp', '{"bench": "compare", "knob": "9"}'):
        file.write_text(whole + cut_off)
        assert read_records(file) == records[:2]
        append_records(file, records[2:])
        assert read_records(file) == records
    file.write_text('{"bench"')
    append_records(file, records)
    assert read_records(file) == records
    file.write_text(whole + "{\n")
    with pytest.raises(BenchError, match=r"line 3 of .*compare.jsonl is not a record; remove that line to use the others$"):
        read_records(file)


def line(method: str, knob: str, prompt: str, lpips: float, seconds: float, schedule: str = "ffcr") -> Record:
    return {
        "method": method, "knob": knob, "prompt": prompt, "steps": 4, "lpips": lpips, "ssim": 1.0, "psnr": 40.0,
        "seconds": seconds, "baseline_seconds": 2.0, "speedup_ideal": 2.0 / seconds, "sampler": "DDIM", "guidance": 4.0,
        "lpips_name": "LPIPS", "machine": {"cpu": "a CPU", "cores": 2, "torch_threads": 1}, "schedule": schedule,
        "reused": schedule.count("r"), "decided": 2, "jpeg_bytes": 1000 + 100 * len(prompt),
    }  # fmt: skip


LINES = [
    line(method, knob, prompt, lpips * scale, seconds, "ffcr" if prompt != "bbb" or method != "ada" else "ffcc")
    for method, knob, lpips, seconds in (
        ("fixed", "N=2", 0.010, 2 / 1.25),
        ("ada", "0.4", 0.001, 2 / 1.2),
        ("ada", "0.55", 0.100, 2 / 1.6),
        ("planned", "1.2x", 0.001, 2 / 1.2),
    )
    for prompt, scale in (("a", 0.5), ("aa", 1.0), ("bbb", 1.5))
]


def test_the_gain_is_the_speed_where_the_curve_has_the_references_loss() -> None:
    found = gain(LINES, "ada")
    assert found is not None
    assert found[0] == pytest.approx(1.4 / 1.25) and found[1] == pytest.approx(found[2]) == pytest.approx(found[0])
    assert gain(LINES, "planned") is None


def test_decisions_are_set_beside_complexity() -> None:
    assert [one.knob for one in curves(LINES)["ada"]] == ["0.4", "0.55"]
    assert correlations(LINES).startswith("0 to 1 of 2 steps reuse, in 2 different schedules; rank correlation")
    same = [one | {"reused": 1} for one in LINES]
    assert correlations(same) == "all pictures get the same number of reuse steps, 1"
    figure = ada_figure(LINES)
    heat = next(trace for trace in figure.data if trace.type == "heatmap")
    assert np.array(heat.z)[:, 3].tolist() == [1, 1, 0]


def test_the_table_stands_between_its_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    update_ada(readme, LINES, tmp_path / "ada.jsonl")
    text = readme.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "Ada 1.120 times (1.120 to 1.120)" in text and "3 prompts that no training has seen" in text
    with pytest.raises(BenchError, match="`python -m analysis ada` writes them"):
        render_ada([], "")
