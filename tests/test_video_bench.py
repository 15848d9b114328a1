"""The video row: measured on clips, with the control beside it, and its table says what its lines do."""

from pathlib import Path

import pytest

from analysis.intervals import INTERVALS
from analysis.metrics import shift_tolerant_lpips
from analysis.records import BenchError, read_records
from analysis.video import BEGIN, END, measure_video, render_video, update_video
from blockdance import Schedule
from tests.tiny_video import opensora


def test_clips_are_compared_frame_by_frame_with_fewer_steps_beside_them(tmp_path: Path) -> None:
    out, readme = tmp_path / "video.jsonl", tmp_path / "README.md"
    lines = measure_video(opensora(32), shift_tolerant_lpips(), ["red apple", "blue"], 1, out)
    assert read_records(out) == lines and [line["reuse_interval"] for line in lines] == list(INTERVALS)
    for line in lines:
        schedule = Schedule.parse(line["schedule"], line["cutoff_block"])
        assert line["speedup_ideal"] == pytest.approx(schedule.ideal_speedup(4))
        assert (
            line["frames"] == 2 and line["lpips_worst_frame"] >= line["lpips"] > 0 and line["worst_prompt"] in line["prompts"]
        )
        assert line["fewer_steps"]["steps"] == round(30 / line["speedup_ideal"])
    readme.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    update_video(readme, lines, out)
    text = readme.read_text()
    assert "1 interleaved runs of" in text and f"| {lines[0]['fewer_steps']['steps']} steps, ideal" in text
    with pytest.raises(BenchError, match="`python -m analysis video` writes them"):
        render_video([], "")
