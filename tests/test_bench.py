"""The bench's pure parts: the order of runs, medians and quartiles, the results file, the tables. No timing is asserted."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from analysis import __main__ as command
from analysis import bench_app, bench_visitors
from analysis.bench import MAX_REPEATS, REQUEST, control_steps, cutoffs, mean_difference, speedup_figures
from analysis.records import BenchError, Record, kept, read_records, write_records
from analysis.stopwatch import interleaved, paired_ratios, spread
from analysis.tables import BEGIN, END, OF_THE_PAGE, between_markers, render, table, update_readme
from blockdance import ReuseConfig, fixed_schedule

ORIGIN = {
    "commit": "abc1234", "date": "2025-01-02", "machine": {"cpu": "A processor", "cores": 4, "torch_threads": 2},
    "versions": {"python": "3.11.0", "torch": "2.13.0", "diffusers": "0.42.0"}, "dtype": "float32", "model": "a model",
    "steps": 30, "sampler": "DDIM", "guidance": 4.0, "prompt": "red apple", "seed": 0,
}  # fmt: skip
CONTROL = {
    "steps": 24, "speedup_ideal": 1.25, "speedup_measured": 1.21, "speedup_measured_quartiles": [1.2, 1.22],
    "lpips": 0.0321, "ssim": 0.912,
}  # fmt: skip
SPEEDUP = ORIGIN | {
    "bench": "speedup", "repeats": 20, "reuse_interval": 2, "cutoff_block": 9, "num_blocks": 14, "window_start": 0.4,
    "window_end": 0.95, "baseline_seconds": 0.5, "speedup_ideal": 1.235, "speedup_measured": 1.194,
    "speedup_measured_quartiles": [1.18, 1.21], "fraction_of_ideal": 0.967, "lpips": 0.0123, "ssim": 0.987,
    "lpips_name": "LPIPS (SqueezeNet)", "difference_prompts": ["red apple", "tulip"], "fewer_steps": CONTROL,
}  # fmt: skip
COMPARED = {
    "repeats": 20, "baseline_seconds": 0.5, "seconds": 0.25, "seconds_quartiles": [0.24, 0.26], "ratio_paired": 1.005,
    "ratio_paired_quartiles": [0.998, 1.012],
}  # fmt: skip
OTHERS = [
    ORIGIN | COMPARED | {"bench": "overhead"},
    ORIGIN | COMPARED | {"bench": "observe", "ratio_paired": 1.08},
    ORIGIN | COMPARED | {"bench": "slider", "ratio_paired": 0.5, "replayed_steps": 12},
    ORIGIN | {"bench": "cache", "cache_bytes_per_branch": 32768, "cache_bytes": 65536, "tokens": 64, "width": 128},
    ORIGIN
    | {"bench": "app", "repeats": 20, "starts": 3, "start_seconds": 6.0, "first_seconds": 2.5, "remembered_seconds": 0.05},
    ORIGIN
    | {
        "bench": "visitors",
        "visitors": 20,
        "requests": 3600,
        "swaps": 24,
        "swap_seconds": 0.021,
        "swap_seconds_slowest": 0.034,
        "alone_seconds": 0.011,
        "alone_seconds_95": 0.022,
        "busy_seconds": 0.033,
        "busy_seconds_95": 0.044,
        "runs": 300,
        "resident_bytes": [{"runs": 0, "bytes": 2**30}, {"runs": 300, "bytes": 2**30 + 2**28}],
    },
]
PAGE = f"# Title\n\n{BEGIN}\nold\n{END}\n\nAfter.\n"


def test_every_second_round_runs_backwards() -> None:
    calls: list[str] = []
    seconds = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, repeats=3)  # type: ignore[misc]
    assert "".join(calls) == "abccbaabc"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_run_may_say_itself_how_long_it_took() -> None:
    seconds = interleaved({"a": lambda: 1.0, "b": lambda: 2.0}, repeats=2, timed=lambda run: run())
    assert seconds == {"a": [1.0, 1.0], "b": [2.0, 2.0]}


@pytest.mark.parametrize(
    ("values", "median", "quartiles"), [([5.0, 1.0, 2.0, 4.0, 3.0], 3.0, [2.0, 4.0]), ([7.0], 7.0, [7.0, 7.0])]
)
def test_a_spread_is_the_median_and_the_quartiles(values: list[float], median: float, quartiles: list[float]) -> None:
    assert spread("seconds", values) == {"seconds": median, "seconds_quartiles": quartiles}


def test_ratios_are_paired_round_by_round() -> None:
    assert paired_ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


def test_the_measured_speedup_is_the_median_of_the_paired_ratios_beside_the_ideal() -> None:
    """Its quartiles are of the same ratios, 1.5, 2 and 50; the medians' own ratio, 1.5, is told nowhere."""
    found = speedup_figures(baseline=[3.0, 2.0, 100.0], ours=[2.0, 1.0, 2.0], ideal=2.5)
    assert found["speedup_measured"] == 2.0
    assert found["speedup_measured_quartiles"] == [1.75, 26.0]
    assert found["fraction_of_ideal"] == 0.8
    assert found["seconds"] == 2.0


def test_the_cutoffs_are_half_of_the_depth_the_default_and_the_deepest() -> None:
    assert cutoffs(28) == [13, 20, 26]
    assert cutoffs(14)[0] == 6
    assert cutoffs(14)[-1] == 12


def test_the_control_costs_what_the_schedule_costs() -> None:
    schedule = fixed_schedule(ReuseConfig(2, 6), 30, 14)
    assert control_steps(schedule, 14) == round(30 * schedule.block_evaluations(14) / (30 * 14))


def test_a_mean_over_an_equal_picture_has_no_psnr() -> None:
    each = [{"lpips": 0.0, "psnr": float("inf")}, {"lpips": 0.5, "psnr": 20.0}]
    assert mean_difference(each) == {"lpips": 0.25, "psnr": None}


def test_a_results_file_is_rewritten_as_a_whole_and_read_back(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "bench.jsonl"
    write_records(file, [{"bench": "speedup", "old": True}, {"bench": "app"}])
    write_records(file, [{"bench": "cache", "repeats": 1}])
    assert read_records(file) == [{"bench": "cache", "repeats": 1}]
    assert [json.loads(line)["bench"] for line in file.read_text().splitlines()] == ["cache"]


def test_a_write_that_is_cut_off_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "bench.jsonl"
    write_records(file, [{"bench": "app"}])

    def cut_off(path: Path, text: str) -> None:
        with path.open("w") as half:
            half.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(KeyboardInterrupt):
        write_records(file, [{"bench": "cache"}])
    assert read_records(file) == [{"bench": "app"}]


def test_a_bench_of_some_keeps_the_records_of_the_others(tmp_path: Path) -> None:
    file = tmp_path / "bench.jsonl"
    assert kept(file, ["app"]) == []
    write_records(file, [{"bench": "speedup"}, {"bench": "app"}])
    assert kept(file, ["app", "cache"]) == [{"bench": "speedup"}]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"seconds": 1}'])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "bench.jsonl"
    file.write_text(f'{{"bench": "app"}}\n{line}\n')
    with pytest.raises(BenchError, match=r"line 2 of .* is not a record"):
        read_records(file)


def test_the_tables_name_the_hardware_the_command_and_every_figure() -> None:
    text = render([*OTHERS, SPEEDUP], "assets/results/bench.jsonl")
    sentence = text.split("\n\n")[0]
    for phrase in (
        "A processor (4 cores, 2 torch threads)",
        "`python -m analysis bench`",
        "`python -m analysis tables`",
        "`abc1234`",
    ):
        assert phrase in sentence
    row = "| 2 | 9 | 1.24x | 1.19x (1.18 to 1.21) | 0.967 | 0.01230 / 0.9870 |"
    assert f"{row} 24 steps, ideal 1.25x | 1.21x (1.20 to 1.22) | 0.03210 / 0.9120 |" in text
    assert "difference from the baseline" in text
    for figure in (
        "+0.50 %",
        "+8.00 %",
        "0.250 s",
        "0.50 of the baseline's 0.500 s",
        "32,768 bytes",
        "0.050 s",
        "6.000 s",
        "0.034 s",
        "0.044 s",
        "300: 1280 MiB",
    ):
        assert figure in text


def test_every_row_has_as_many_cells_as_the_head() -> None:
    lines = [line for line in render([SPEEDUP, *OTHERS], "bench.jsonl").splitlines() if line.startswith("|")]
    assert {line.count(" | ") for line in lines} == {8, 1}
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_a_table_of_only_some_benches_leaves_the_others_out() -> None:
    assert "cutoff block" not in render(OTHERS, "bench.jsonl")
    assert "app.py" not in render([SPEEDUP], "bench.jsonl")


@pytest.mark.parametrize("name", ["machine", "model", "versions", "prompt"])
def test_records_of_different_origin_do_not_share_a_table(name: str) -> None:
    with pytest.raises(BenchError, match=f"the records differ in {name}"):
        render([SPEEDUP, OTHERS[0] | {name: "another"}], "bench.jsonl")


def test_the_page_may_be_measured_on_a_machine_of_its_own() -> None:
    page = [record for record in OTHERS if record["bench"] in OF_THE_PAGE]
    model = [SPEEDUP, *(record for record in OTHERS if record["bench"] not in OF_THE_PAGE)]
    another: Record = {"machine": ORIGIN["machine"] | {"cpu": "Another"}}  # type: ignore[operator]
    text = render([*model, *(record | another for record in page)], "bench.jsonl")
    first, second = text.split("Measured on Another")
    assert "+0.50 %" in first and "1280 MiB" not in first and "1280 MiB" in second and "+0.50 %" not in second


def test_no_records_make_no_table() -> None:
    with pytest.raises(BenchError, match="holds no records"):
        render([], "bench.jsonl")


def test_only_what_stands_between_the_markers_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    update_readme(page, [SPEEDUP], tmp_path / "results" / "bench.jsonl")
    once = page.read_text()
    assert once.startswith(f"# Title\n\n{BEGIN}\n")
    assert once.endswith(f"\n{END}\n\nAfter.\n")
    assert "old" not in once.split()
    assert "(results/bench.jsonl)" in once
    update_readme(page, [SPEEDUP], tmp_path / "results" / "bench.jsonl")
    assert page.read_text() == once


@pytest.mark.parametrize("page", ["", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_a_page_without_one_pair_of_markers_is_refused(page: str) -> None:
    with pytest.raises(BenchError, match=f"README.md needs one line {BEGIN} and after it one line {END}"):
        between_markers(page, "text", "README.md")


def run_command(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["analysis", *words])
    with pytest.raises(SystemExit) as ended:
        command.main()
    return ended.value.code


@pytest.mark.parametrize("repeats", ["0", "-3", str(MAX_REPEATS + 1)])
def test_repeats_out_of_range_end_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], repeats: str
) -> None:
    assert run_command(monkeypatch, "bench", "--repeats", repeats) == 2
    assert capsys.readouterr().err == f"error: repeats must be an integer in [1, {MAX_REPEATS}], got {repeats}\n"


def test_tables_without_markers_end_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "bench.jsonl"
    readme.write_text("no markers")
    write_records(results, [SPEEDUP])
    assert run_command(monkeypatch, "tables", "--readme", str(readme), "--results", str(results)) == 2
    assert capsys.readouterr().err.startswith("error: README.md needs one line")
    assert readme.read_text() == "no markers"


def test_a_missing_results_file_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_command(monkeypatch, "tables", "--results", str(tmp_path / "none.jsonl")) == 2
    assert "none.jsonl is missing" in capsys.readouterr().err


def test_a_missing_app_is_told_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_app, "APP", tmp_path / "app.py")
    assert run_command(monkeypatch, "bench", "--only", "app", "--out", str(tmp_path / "bench.jsonl")) == 2
    assert "app.py is missing" in capsys.readouterr().err


def test_an_app_that_ends_at_once_is_told_with_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    app = tmp_path / "app.py"
    app.write_text("raise SystemExit('no model here')")
    monkeypatch.setattr(bench_app, "APP", app)
    monkeypatch.setattr(bench_app, "ROOT", tmp_path)
    with pytest.raises(BenchError, match="exit code 1 before it answered: no model here"), bench_app.running_app():
        pass


def test_the_app_is_asked_for_the_default_window() -> None:
    asked = bench_app.arguments(REQUEST, cutoff_block=9)
    assert (asked["prompt"], asked["steps"], asked["window_start"], asked["window_end"]) == ("red apple", 30, 0.4, 0.95)


def test_visitors_are_measured_on_the_running_app(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"VISITORS": 2, "ROUNDS": 1, "RUNS": 6, "RUN_STEPS": 4}.items():
        monkeypatch.setattr(bench_visitors, name, value)
    try:
        record = bench_visitors.measure_visitors(REQUEST, cutoff_block=9)
    except BenchError as error:
        assert "no Chromium" in str(error)
        pytest.skip(str(error))
    assert record["requests"] == 2 * (1 + 1 + 16) and record["swaps"] == 3 * 4 * 2
    assert 0 < record["alone_seconds"] <= record["alone_seconds_95"]
    assert [read["runs"] for read in record["resident_bytes"]] == list(range(7))
    assert all(read["bytes"] > 2**28 for read in record["resident_bytes"])
