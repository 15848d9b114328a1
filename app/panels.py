"""The page's HTML panels, made from figures alone. Text that a visitor typed is escaped."""

import html
from collections.abc import Sequence

from app.engine import Drawn, View
from blockdance import Schedule, StepKind

LEGEND = {StepKind.FULL: "full", StepKind.CACHE: "cache", StepKind.REUSE: "reuse"}


def safe(text: str) -> str:
    """Escaped for HTML, and for Gradio, which would evaluate `${...}` in a value."""
    return html.escape(text).replace("$", "&#36;")


def status_panel(view: View) -> str:
    """What is running and how far it is; at the end, what both pictures share."""
    request = view.request
    if view.phase == "done":
        shared = f"seed {request.seed}, {request.steps} steps, guidance {request.guidance:g}, {request.sampler}"
        return message_panel(f"“{request.prompt}” from the same noise: {shared}")
    return f'<div class="bd-status"><span>{safe(view.phase)} …</span><i style="width:{round(100 * view.progress)}%"></i></div>'


def message_panel(text: str) -> str:
    """A sentence in the status line's place."""
    return f'<div class="bd-status"><span>{safe(text)}</span></div>'


def schedule_panel(schedule: Schedule, num_blocks: int) -> str:
    """What a schedule means, before anything runs: one cell a step, and the cost model's speedup."""
    cells = "".join(f'<i class="{LEGEND[kind]}" title="step {step}: {LEGEND[kind]}"></i>' for step, kind in enumerate(schedule))
    legend = " ".join(f'<span><i class="{name}"></i>{name}</span>' for name in LEGEND.values())
    return (
        f'<div class="bd-schedule"><div class="cells">{cells}</div><div class="legend">{legend}</div>'
        f"<p>{safe(coverage(schedule, num_blocks))} Ideal speedup <b>{schedule.ideal_speedup(num_blocks):.2f}×</b>.</p></div>"
    )


def coverage(schedule: Schedule, num_blocks: int) -> str:
    """How much is reused, as a sentence."""
    reused = sum(kind is StepKind.REUSE for kind in schedule)
    if not reused:
        return f"Nothing is reused: all {num_blocks} blocks run on all {len(schedule)} steps."
    return f"{schedule.cutoff_block + 1} of {num_blocks} blocks reused on {reused} of {len(schedule)} steps."


def numbers_panel(view: View, variant: Drawn, unknown_words: Sequence[str], machine: str) -> str:
    """Every figure of a comparison, and the control with fewer steps once it is there."""
    figures, control = variant.figures, view.control
    fewer = f"plain sampler, {control.figures['steps']} steps" if control else "plain sampler, fewer steps"
    return f"""<div class="bd-numbers">
{_notices(view, unknown_words)}
<div class="headline"><b>{figures["speedup_measured"]:.2f}×</b> measured
<span>{figures["speedup_ideal"]:.2f}× ideal</span></div>
<p>{safe(coverage(view.schedule, figures["num_blocks"]))} {figures["block_evaluations"]} of
{figures["baseline_block_evaluations"]} block evaluations; cache {figures["cache_bytes"] / 1024:.0f} KiB.</p>
<table><thead><tr><th></th><th colspan="2">speedup</th><th colspan="3">difference from the baseline</th></tr>
<tr><th></th><th>measured</th><th>ideal</th><th>{safe(figures["lpips_name"])}</th><th>SSIM</th><th>PSNR</th></tr></thead>
<tbody>{_row("BlockDance", variant)}{_row(fewer, control)}</tbody></table>
<p class="small">A difference is not a quality: 0 LPIPS and 1 SSIM mean the same picture. Both rows cost about the same.
Whole calls of {view.request.steps} steps, {figures["baseline_seconds"]:.2f} s for the baseline and
{figures["seconds"]:.2f} s for BlockDance, timed once each on {safe(machine)}. Steps that equal the baseline's are replayed
and count with their recorded seconds ({figures["replayed_steps"]} here).</p></div>"""


def _row(name: str, drawn: Drawn | None) -> str:
    if drawn is None:
        return f"<tr><th>{safe(name)}</th>" + "<td>…</td>" * 5 + "</tr>"
    figures = drawn.figures
    ratio = "∞" if figures["psnr"] is None else f"{figures['psnr']:.1f} dB"
    values = (
        f"{figures['speedup_measured']:.2f}×",
        f"{figures['speedup_ideal']:.2f}×",
        f"{figures['lpips']:.5f}",
        f"{figures['ssim']:.4f}",
        ratio,
    )
    return f"<tr><th>{safe(name)}</th>" + "".join(f"<td>{value}</td>" for value in values) + "</tr>"


def _notices(view: View, unknown_words: Sequence[str]) -> str:
    notices = [view.note] if view.note else []
    if unknown_words:
        words = ", ".join(f"“{word}”" for word in dict.fromkeys(unknown_words))
        notices.append(f"Words the model does not know, and draws as if they were not there: {words}.")
    return "".join(f'<p class="notice">{safe(notice)}</p>' for notice in notices)
