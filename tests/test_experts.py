"""Pipelines with several denoisers: one schedule over the whole run, and nothing stored crosses from one to another."""

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor

from blockdance import (
    Extrapolated,
    ReuseConfig,
    Schedule,
    ScheduleError,
    accelerate,
    observe,
    own_profile,
    plan,
    record,
)
from blockdance.ada import load_demo_policy
from blockdance.errors import PolicyError
from tests.guided import MODELS, Guided
from tests.zoo import HEADS, TEXT, WIDTH, awake

STEPS = 20


def expert(num_layers: int, seed: int) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    return awake(
        WanTransformer3DModel(
            **HEADS, in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=8, ffn_dim=32, num_layers=num_layers,
            rope_max_seq_len=32,
        )
    )  # fmt: skip


def wan_2_2(first: int = 4, second: int = 4) -> Any:
    """Wan 2.2 in small: the experts change at step 12 of 20."""
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=expert(first, 0), transformer_2=expert(second, 1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), boundary_ratio=0.65,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def words(seed: int) -> Tensor:
    return torch.randn(1, TEXT, WIDTH, generator=torch.Generator().manual_seed(seed))


def draw(pipe: Any, **more: Any) -> Tensor:
    frames: Tensor = pipe(
        prompt_embeds=words(1), negative_prompt_embeds=words(99), height=64, width=64, num_frames=5,
        num_inference_steps=STEPS, guidance_scale=4.0, generator=torch.Generator().manual_seed(0), output_type="latent",
        **more,
    ).frames  # fmt: skip
    return frames


def blocks_run(pipe: Any) -> list[tuple[int, int]]:
    """A list that gets (expert, block) of every block that really runs from now on."""
    ran: list[tuple[int, int]] = []
    for number, model in enumerate((pipe.transformer, pipe.transformer_2)):
        for index, block in enumerate(model.blocks):
            block.attn1.register_forward_hook(lambda *_, place=(number, index): ran.append(place))
    return ran


def switch_of(pipe: Any) -> int:
    """The first step of the second expert."""
    ran, seen = blocks_run(pipe), list[int]()

    def look(*_: Any) -> dict[str, Any]:
        seen.append(ran[-1][0])
        return {}

    draw(pipe, callback_on_step_end=look)
    return seen.index(1)


@pytest.mark.parametrize("depths", [(4, 4), (4, 6), (6, 4)])
def test_both_experts_reuse_on_one_schedule_each_up_to_its_own_cutoff(depths: tuple[int, int]) -> None:
    pipe = wan_2_2(*depths)
    switch = switch_of(pipe)
    assert 4 < switch < STEPS - 4
    config = ReuseConfig(2, (1, 2), 0.2, 1.0)
    ran, per_step = blocks_run(pipe), list[list[tuple[int, int]]]()

    def collect(step: int, num_steps: int) -> None:
        per_step.append(list(ran))
        ran.clear()

    with accelerate(pipe, config, on_step=collect) as trace:
        draw(pipe)
    assert trace.kinds == str(trace.schedule)[:switch] + trace.kinds[switch:]
    for step, (kind, blocks) in enumerate(zip(trace.kinds, per_step, strict=True)):
        number = int(step >= switch)
        first = config.cutoff_block[number] + 1 if kind == "r" else 0  # type: ignore[index]
        assert blocks == [(number, index) for index in range(first, depths[number])] * 2
    reused = [step for step, kind in enumerate(trace.kinds) if kind == "r"]
    assert min(reused) < switch < max(reused)


def test_by_default_each_has_the_cutoff_of_its_depth() -> None:
    pipe = wan_2_2(4, 8)
    with accelerate(pipe, ReuseConfig(2, None, 0.2, 1.0)) as trace:
        draw(pipe)
    saved = {step.blocks_total - step.blocks_evaluated for step in trace.steps if step.kind.value == "r"}
    assert saved == {2 * 3, 2 * 6}


@pytest.mark.parametrize("storage", [None, Extrapolated()], ids=["latest", "extrapolated"])
def test_nothing_stored_crosses_from_one_expert_to_the_other(storage: Any) -> None:
    """The step after the change is to reuse, and its expert has stored nothing: it caches, and gets what a cache step gets."""
    pipe = wan_2_2()
    switch = switch_of(pipe)
    kinds = ["f"] * STEPS
    kinds[switch - 2 : switch + 2] = "ccrr"
    cached = kinds.copy()
    cached[switch] = "c"
    pictures = []
    for letters in (kinds, cached):
        with accelerate(pipe, Schedule.parse("".join(letters), 1), storage=storage) as trace:
            pictures.append(draw(pipe))
        assert trace.kinds == "".join(cached)
    assert torch.equal(*pictures)


def test_a_cutoff_for_each_is_checked() -> None:
    pipe = wan_2_2(4, 6)
    with pytest.raises(ScheduleError, match=r"cutoff_block must be in \[0, 2\] for 4 blocks, got 3"):
        accelerate(pipe, ReuseConfig(2, (3, 4))).__enter__()
    with pytest.raises(ScheduleError, match=r"one for each of 2 transformers, got \(1, 2, 3\)"):
        accelerate(pipe, ReuseConfig(2, (1, 2, 3))).__enter__()
    with (
        accelerate(pipe, Schedule.parse("cr" * 10, 4)),
        pytest.raises(ScheduleError, match=r"\[0, 2\] for 4 blocks, got 4"),
    ):
        draw(pipe)


def test_without_reuse_every_bit_is_the_plain_pipelines_and_leaving_restores_both() -> None:
    pipe = wan_2_2()
    plain, before = draw(pipe), [type(one) for model in (pipe.transformer, pipe.transformer_2) for one in model.modules()]
    with accelerate(pipe, ReuseConfig(1)) as trace:
        assert torch.equal(plain, draw(pipe))
    assert trace.kinds == "f" * STEPS
    with accelerate(pipe, ReuseConfig(2, 1)):
        assert not torch.equal(plain, draw(pipe))
    assert [type(one) for model in (pipe.transformer, pipe.transformer_2) for one in model.modules()] == before
    assert torch.equal(plain, draw(pipe))


def test_a_recording_replays_both_experts() -> None:
    pipe = wan_2_2()
    schedule = Schedule.parse("f" * 16 + "crcr", 1)
    with accelerate(pipe, schedule):
        expected = draw(pipe)
    with record(pipe) as recording:
        draw(pipe)
    with accelerate(pipe, schedule, replay=recording) as trace:
        assert torch.equal(expected, draw(pipe))
    assert sum(step.replayed for step in trace.steps) == 16


def test_observe_sees_both_experts() -> None:
    pipe = wan_2_2(4, 6)
    switch = switch_of(pipe)
    with observe(pipe) as observation:
        draw(pipe)
    for branch in ("conditional", "unconditional"):
        known = observation.cosine(branch)[..., 0].isfinite()
        assert known.shape == (6, STEPS)
        assert known[:4, 1:switch].all() and not known[4:, :switch].any()
        assert not known[:, switch].any() and known[:, switch + 1 :].all()


def test_plan_sees_both_experts() -> None:
    pipe = wan_2_2()

    class Decoded:
        transformer, transformer_2, scheduler = pipe.transformer, pipe.transformer_2, pipe.scheduler

        def __call__(self, num_inference_steps: int, generator: Any, seed: int, **_: Any) -> Any:
            latents = draw(pipe, latents=torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(seed)))
            frames = latents[0, :3].permute(1, 2, 3, 0).sigmoid()
            return type("Output", (), {"frames": [frames.numpy()]})

    def distance(ours: Any, theirs: Any) -> float:
        return float(abs(ours.astype(float) - theirs).mean())

    prompts = [{"seed": 1}, {"seed": 2}]
    profile = own_profile(Decoded(), prompts, steps=STEPS, distance=distance)
    assert profile.num_blocks == 4 and profile.steps == STEPS
    planned = plan(profile=profile, target_speedup=1.2, steps=STEPS)
    with accelerate(pipe, planned.schedule, storage=planned.storage) as trace:
        draw(pipe)
    assert "r" in trace.kinds and trace.speedup_ideal > 1.1


def test_a_policy_for_one_transformer_is_refused() -> None:
    with pytest.raises(PolicyError, match="a policy decides for one transformer, this pipeline has 2"):
        accelerate(wan_2_2(), load_demo_policy()).__enter__()


def test_a_transformer_for_each_branch_of_guidance() -> None:
    """Some pipelines call another model for the unconditional branch on every step."""
    tiny = next(tiny for tiny in MODELS if tiny.name == "SD3Transformer2DModel")
    pipe = Guided(tiny)
    pipe.unconditional_transformer = tiny.build()  # type: ignore[attr-defined]
    models, calls = [pipe.transformer, pipe.unconditional_transformer], [0]  # type: ignore[attr-defined]

    def predict(latent: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        calls[0] += 1
        inputs = {tiny.latent: latent, "timestep": timestep.expand(1)}
        output: Tensor = models[(calls[0] - 1) % 2](**condition | inputs, return_dict=False)[0]
        return output

    pipe.predict = predict  # type: ignore[method-assign]
    with accelerate(pipe, ReuseConfig(2, 1, 0.3, 1.0)) as trace:
        pipe()
    assert trace.kinds == "fffcrcrcrc"
    assert [step.blocks_evaluated for step in trace.steps] == [8, 8, 8, 8, 4, 8, 4, 8, 4, 8]
