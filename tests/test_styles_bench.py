"""The three styles: the same subjects in each, with the control beside reuse, and a table that says what its lines do."""

from pathlib import Path

import pytest
import torch

from analysis.intervals import INTERVALS
from analysis.metrics import shift_tolerant_lpips
from analysis.records import BenchError, read_records
from analysis.styles import BEGIN, END, correlation, measure_styles, render_styles, update_styles
from assets.recipe.model import build_scheduler, build_text_encoder, build_tokenizer, build_transformer
from blockdance import Schedule, load_demo_pipeline
from blockdance.demo import STYLES, DemoPipeline
from tests.tiny import quiet


@pytest.fixture(scope="module")
def pipe() -> DemoPipeline:
    """Four random blocks that know three styles."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer([["red apple", "blue"]], STYLES)
    transformer = build_transformer(4, 32)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    parts = {"transformer": transformer.eval(), "text_encoder": build_text_encoder(len(tokenizer), 32).eval()}
    vae = load_demo_pipeline().vae
    return quiet(DemoPipeline(**parts, tokenizer=tokenizer, vae=vae, scheduler=build_scheduler("v_prediction")))


def test_every_subject_is_drawn_in_every_style_with_fewer_steps_beside_it(pipe: DemoPipeline, tmp_path: Path) -> None:
    out, readme = tmp_path / "styles.jsonl", tmp_path / "README.md"
    lines = measure_styles(pipe, shift_tolerant_lpips(), ["red apple", "blue"], 1, out)
    assert read_records(out) == lines
    assert [(line["style"], line["reuse_interval"]) for line in lines] == [(s, n) for s in STYLES for n in INTERVALS]
    for line in lines:
        schedule = Schedule.parse(line["schedule"], line["cutoff_block"])
        assert line["speedup_ideal"] == pytest.approx(schedule.ideal_speedup(4))
        assert line["fewer_steps"]["steps"] == round(30 / line["speedup_ideal"])
        assert line["lpips_worst"] >= line["lpips"] > 0 and line["worst_prompt"].split()[0] == line["style"]
        assert len(line["lpips_of_each"]) == len(line["jpeg_bytes"]) == 2
    readme.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    update_styles(readme, lines, out)
    text = readme.read_text()
    assert text.count("steps, ideal") == 9 and "2 subjects in each style" in text and text.endswith("after\n")
    with pytest.raises(BenchError, match="`python -m analysis styles` writes them"):
        render_styles([], "")


def test_the_correlation_is_of_ranks_over_all_pictures() -> None:
    simple, complex_ = (
        {"jpeg_bytes": [10, 20], "lpips_of_each": [0.1, 0.2]}, {"jpeg_bytes": [30, 40], "lpips_of_each": [0.9, 5.0]},
    )  # fmt: skip
    assert correlation([simple, complex_]) == pytest.approx(1)
    assert correlation([simple, {"jpeg_bytes": [1, 2], "lpips_of_each": [9.0, 8.0]}]) < 0
