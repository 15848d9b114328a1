"""BlockDance-Ada: a policy decides once, for each sample by itself, and training moves it where the reward is."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import constants
from safetensors.torch import save_file

from blockdance import (
    ConfigError,
    PolicyError,
    ReuseConfig,
    Schedule,
    ScheduleError,
    SessionError,
    UnsupportedModelError,
    accelerate,
    load_demo_pipeline,
    load_demo_profile,
    observe,
    record,
)
from blockdance.ada import AdaPolicy, load_demo_policy
from blockdance.ada.imitation import Examples, Losses, Teacher, expected_change, imitate
from blockdance.ada.policy import fingerprint_of, new_policy
from blockdance.ada.quality import image_reward, quality_named
from blockdance.ada.reinforce import BASELINES, Price, Tried, advantages, log_probability, policy_loss, try_some
from blockdance.ada.rollouts import Environment, Task
from blockdance.ada.train import main as train_main
from blockdance.ada.trainer import TrainConfig, Trainer, reuse_share
from blockdance.policy import Decision, Moment
from blockdance.storage import Extrapolated, Latest, StorageRule, rule_named
from tests.tiny import BLOCKS, dit, pixart, run_dit, run_pixart
from tests.tiny_video import opensora

STEPS = 10


def policy_for(pipe: Any, cutoffs: tuple[int, ...] = (1, 3), seed: int = 1, storage: str = "latest") -> AdaPolicy:
    """An untrained policy, whose random weights are large enough to decide differently on different latents."""
    torch.manual_seed(seed)
    text = torch.zeros(1, 5, 12) if pipe.transformer.config.get("caption_channels") else None
    seen = Moment(torch.zeros(1, 4, 8, 8), text, None, STEPS)
    policy = new_policy(pipe.transformer, seen, cutoffs, storage=storage, width=16)
    for parameter in policy.network.parameters():
        torch.nn.init.normal_(parameter, std=0.8)
    return policy


def drawn(pipe: Any, plan: Any, batch: int = 3, **options: Any) -> tuple[torch.Tensor, Any]:
    with accelerate(pipe, plan, **options) as trace:
        return run_pixart(pipe, STEPS, batch=batch), trace


# ---------------------------------------------------------------- schedules of their own


SCHEDULES = [Schedule.parse(text, 3) for text in ("ffcrrrcrrf", "fffccrcrrr", "ffcr1rccrr1r")]


@pytest.mark.parametrize("storage", [None, Extrapolated()])
@pytest.mark.parametrize("guided", [True, False])
def test_each_sample_of_a_batch_gets_what_its_schedule_gives_it_alone(storage: Any, guided: bool) -> None:
    pipe = pixart()
    with accelerate(pipe, SCHEDULES, storage=storage) as trace:
        together = run_pixart(pipe, STEPS, batch=3, guided=guided)
    for sample, schedule in enumerate(SCHEDULES):
        with accelerate(pipe, schedule, storage=storage):
            alone = run_pixart(pipe, STEPS, batch=3, guided=guided)[sample]
        torch.testing.assert_close(together[sample], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], alone)
    assert trace.block_evaluations == pytest.approx(sum(one.block_evaluations(BLOCKS) for one in SCHEDULES) / 3)


def test_each_sample_pays_for_its_own_blocks_alone() -> None:
    pipe, rows = pixart(), [0] * BLOCKS
    for index, block in enumerate(pipe.transformer.transformer_blocks):

        def count(_: Any, args: Any, index: int = index) -> None:
            rows[index] += len(args[0])

        block.register_forward_pre_hook(count)
    drawn(pipe, SCHEDULES)
    wanted = [sum(index > one.cutoff_at(step) or one[step].value != "r" for one in SCHEDULES for step in range(STEPS))
              for index in range(BLOCKS)]  # fmt: skip
    assert rows == [2 * calls for calls in wanted]


def test_samples_with_one_schedule_are_not_taken_apart() -> None:
    pipe, calls = pixart(), []
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(len(args[0])), with_kwargs=True)
    both, _ = drawn(pipe, [SCHEDULES[0]] * 3)
    assert calls == [6] * STEPS
    assert torch.equal(both, drawn(pipe, SCHEDULES[0])[0])


def test_labels_of_a_class_conditional_model_go_with_their_samples() -> None:
    pipe = dit()
    with accelerate(pipe, SCHEDULES):
        together = run_dit(pipe, STEPS, batch=3)
    for sample, schedule in enumerate(SCHEDULES):
        with accelerate(pipe, schedule):
            torch.testing.assert_close(together[sample], run_dit(pipe, STEPS, batch=3)[sample], rtol=1e-3, atol=1e-4)


def test_a_batch_that_does_not_fit_its_schedules_is_refused() -> None:
    pipe = pixart()
    with pytest.raises(ScheduleError, match="the batch has 4 rows, which do not go into 3 schedules"):
        drawn(pipe, SCHEDULES, batch=2)
    with pytest.raises(ScheduleError, match="one schedule for each sample, got none"):
        drawn(pipe, [])
    with pytest.raises(SessionError, match="observe sees whole batches"), observe(pipe):
        drawn(pipe, SCHEDULES)


def test_a_batch_with_schedules_of_their_own_replays_what_all_share() -> None:
    pipe = pixart()
    with record(pipe) as recording:
        run_pixart(pipe, STEPS, batch=3)
    full, _ = drawn(pipe, SCHEDULES)
    replayed, trace = drawn(pipe, SCHEDULES, replay=recording)
    assert torch.equal(full, replayed)
    assert [step.replayed for step in trace.steps] == [True] * 2 + [False] * 8


# ---------------------------------------------------------------- a policy in a run


def test_a_policy_decides_for_each_sample_and_the_decision_is_what_runs() -> None:
    pipe = pixart()
    policy = policy_for(pipe)
    with accelerate(pipe, policy) as trace:
        together = run_pixart(pipe, STEPS, batch=3)
    schedules = [decision.schedule for decision in trace.decisions]
    assert len(schedules) == 3 and len(set(schedules)) > 1
    assert all(str(one).startswith("fffc") and "r" in str(one) for one in schedules)
    assert torch.equal(together, drawn(pipe, schedules)[0])
    for sample, schedule in enumerate(schedules):
        torch.testing.assert_close(together[sample], drawn(pipe, schedule)[0][sample], rtol=1e-4, atol=1e-5)


class Given:
    """A policy whose decisions are known."""

    cutoffs = (1, 3)

    def __init__(self, storage: StorageRule, schedules: list[Schedule]) -> None:
        self.storage, self.schedules = storage, schedules

    def decides_at(self, num_steps: int) -> int:
        return 4

    def check(self, transformer: Any) -> None:
        pass

    def decide(self, moment: Moment) -> list[Decision]:
        return [Decision(schedule, ()) for schedule in self.schedules]


@pytest.mark.parametrize("storage", [Latest(), Extrapolated(), Extrapolated(points=3)])
def test_whatever_is_decided_finds_what_it_starts_from(storage: StorageRule) -> None:
    pipe = pixart()
    for texts in (("fffcr3r3crrc", "fffcr1rrcrc", "fffccrcrrr"), ("fffcrrccrr",) * 3):
        schedules = [Schedule.parse(text, 1) for text in texts]
        decided, trace = drawn(pipe, Given(storage, schedules))
        assert torch.equal(decided, drawn(pipe, schedules, storage=storage)[0])
        assert trace.block_evaluations == pytest.approx(sum(one.block_evaluations(BLOCKS) for one in schedules) / 3)


def test_probabilities_say_what_the_schedule_does() -> None:
    pipe = pixart()
    _, trace = drawn(pipe, policy_for(pipe))
    for decision in trace.decisions:
        assert len(decision.probabilities) == 6
        assert [kind.value for kind in list(decision.schedule)[4:]] == [
            "c" if p >= 0.5 else "r" for p in decision.probabilities
        ]


@pytest.mark.parametrize("storage", ["latest", "extrapolated"])
def test_a_policy_with_a_baseline_to_replay_draws_the_same_bits(storage: str) -> None:
    pipe = pixart()
    policy = policy_for(pipe, storage=storage)
    with record(pipe) as recording:
        run_pixart(pipe, STEPS, batch=1)
    full, _ = drawn(pipe, policy, batch=1)
    replayed, trace = drawn(pipe, policy, batch=1, replay=recording)
    assert torch.equal(full, replayed)
    assert trace.steps[0].replayed and str(trace.schedule).count("r") > 0


def test_a_policy_looks_at_the_latent_and_the_text_and_the_wish() -> None:
    policy, (latent, text) = policy_for(pixart()), (torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12))
    first = policy.decide(Moment(latent, text, None, 20))[0].probabilities
    for other in (Moment(latent + 1, text, None, 20), Moment(latent, text + 1, None, 20)):
        assert policy.decide(other)[0].probabilities != first
    assert policy.with_saving(0.9).decide(Moment(latent, text, None, 20))[0].probabilities != first
    padded = Moment(latent, torch.cat([text, torch.randn(1, 2, 12)], 1), torch.tensor([[1] * 5 + [0] * 2]), 20)
    assert policy.decide(padded)[0].probabilities == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize("steps", [5, 10, 33, 100])
def test_a_policy_serves_any_number_of_steps(steps: int) -> None:
    policy = policy_for(pixart())
    decision = policy.decide(Moment(torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12), None, steps))[0]
    assert len(decision.schedule) == steps and len(decision.probabilities) == steps - round(0.4 * steps)


def test_too_few_steps_run_dense_and_say_so() -> None:
    pipe = pixart()
    with accelerate(pipe, policy_for(pipe)) as trace:
        run_pixart(pipe, 3)
    assert trace.kinds == "fff" and trace.note is not None and "3 steps are too few" in trace.note


def test_a_policy_comes_back_from_its_file(tmp_path: Path) -> None:
    pipe = pixart()
    policy = policy_for(pipe)
    policy.save(tmp_path / "policy.safetensors")
    loaded = AdaPolicy.load(tmp_path / "policy.safetensors")
    assert loaded.config == policy.config
    assert torch.equal(drawn(pipe, policy)[0], drawn(pipe, loaded)[0])


def test_a_policy_of_another_model_is_refused() -> None:
    pipe, other = pixart(), dit()
    with pytest.raises(PolicyError, match="its class is 'PixArtTransformer2DModel', that of this DiT"):
        drawn(other, policy_for(pipe))
    deeper = pixart()
    deeper.transformer.register_to_config(num_layers=7)
    with pytest.raises(PolicyError, match="its num_layers is 6, that of this PixArtTransformer2DModel is 7"):
        drawn(deeper, policy_for(pipe))
    with pytest.raises(PolicyError, match="trained for another model"):
        drawn(pipe, load_demo_policy())
    assert torch.equal(run_pixart(pipe, STEPS), run_pixart(pixart(), STEPS))


def reinitialised(pipe: Any) -> Any:
    torch.manual_seed(9)
    for parameter in pipe.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return pipe


def test_a_policy_of_other_weights_is_refused(tmp_path: Path) -> None:
    policy_for(pixart()).save(tmp_path / "policy.safetensors")
    policy = AdaPolicy.load(tmp_path / "policy.safetensors")
    with pytest.raises(PolicyError, match="trained for a PixArtTransformer2DModel with other weights; train one for these"):
        drawn(reinitialised(pixart()), policy)
    older = AdaPolicy(replace(policy.config, fingerprint=None), policy.network)
    older.check(reinitialised(pixart()).transformer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_policy_knows_its_weights_in_narrow_formats(dtype: torch.dtype) -> None:
    for pipe in (pixart(), load_demo_pipeline()):
        known = fingerprint_of(pipe.transformer)
        assert known is not None and len(known) == 16 and any(known)
        policy = policy_for(pipe)
        for parameter in pipe.transformer.parameters():
            parameter.data = parameter.data.to(dtype)
        policy.check(pipe.transformer)


def test_weights_that_are_elsewhere_are_not_compared_and_adapters_are_overlooked() -> None:
    pipe, policy = pixart(), policy_for(pixart())
    pipe.transformer.pos_embed.lora_A = torch.nn.Linear(4, 4)
    assert fingerprint_of(pipe.transformer) == policy.config.fingerprint
    policy.check(reinitialised(pixart()).transformer.to("meta"))
    assert policy_for(pixart()).config.fingerprint is not None
    assert fingerprint_of(pixart().transformer.to("meta")) is None


class Packed(torch.Tensor):
    """A weight as quantization packs it: it has shape and format, multiplies as a whole, and tells no number alone."""

    refuses: type[BaseException] = NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("view", "flatten", "reshape", "item", "__getitem__", "select"):
            raise cls.refuses(f"{func.__name__} of {cls.__name__} is not implemented")
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        return found.as_subclass(cls) if func.__name__ in ("detach", "requires_grad_") else found


class PackedOtherwise(Packed):
    refuses = AttributeError


def with_weights(pipe: Any, kind: type[torch.Tensor]) -> Any:
    """Every matrix is packed."""
    for module in pipe.transformer.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(module.weight.detach().as_subclass(kind), requires_grad=False)
    return pipe


@pytest.mark.parametrize("kind", [Packed, PackedOtherwise])
def test_a_policy_runs_on_packed_weights_and_does_not_compare_them(kind: type[torch.Tensor]) -> None:
    policy, plain, pipe = policy_for(pixart()), pixart(), with_weights(pixart(), kind)
    assert policy.config.fingerprint is not None and fingerprint_of(pipe.transformer) is None
    expected, _ = drawn(plain, policy)
    pictures, trace = drawn(pipe, policy)
    assert torch.equal(expected, pictures) and "r" in trace.kinds
    assert policy_for(pipe).config.fingerprint is None
    with pytest.raises(PolicyError, match="trained for another model"):
        policy.check(with_weights(dit(), kind).transformer)


def test_a_policy_runs_on_weights_that_torchao_packed() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    pipe, policy = load_demo_pipeline(), load_demo_policy(saving=0.55)
    quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig())
    assert fingerprint_of(pipe.transformer) is None
    with accelerate(pipe, policy) as trace:
        pipe("red apple", num_inference_steps=10, generator=torch.Generator().manual_seed(0), output_type="latent")
    assert trace.kinds.startswith("fffc") and "r" in trace.kinds


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_no_fingerprint(number: float) -> None:
    pipe = pixart()
    next(one for one in pipe.transformer.parameters() if one.ndim > 1).data.fill_(number)
    assert fingerprint_of(pipe.transformer) is None


class Looker(Given):
    """Keeps what it was shown."""

    def decide(self, moment: Moment) -> list[Decision]:
        self.moment = moment
        return super().decide(moment)


def test_a_policy_sees_open_soras_text_and_which_tokens_count() -> None:
    pipe = opensora()
    looker = Looker(Latest(), [Schedule.parse("fffcrrrrrr", 1)] * 2)
    prompts = ["a red apple", "blue apple turns a red"]
    with accelerate(pipe, looker):
        pipe(prompts, num_inference_steps=STEPS, output_type="latent", generator=torch.Generator().manual_seed(0))
    text, mask = pipe.encode_prompt(prompts, torch.device("cpu"))
    assert looker.moment.text is not None and torch.allclose(looker.moment.text, text[:, 0], atol=1e-5)
    assert looker.moment.text_mask is not None and looker.moment.text_mask.tolist() == mask.tolist() != [[1] * 5] * 2
    policy = new_policy(pipe.transformer, looker.moment, (1, 2), width=16)
    assert policy.config.shape.text_width == 16 and len(policy.decide(looker.moment)) == 2


def test_a_file_without_a_policy_is_refused(tmp_path: Path) -> None:
    for name in ("missing", "text", "weights"):
        file = tmp_path / name
        if name == "text":
            file.write_text("no policy")
        if name == "weights":
            save_file({"weight": torch.zeros(1)}, file)
        with pytest.raises(PolicyError, match=f"{name} holds no policy"):
            AdaPolicy.load(file)


@pytest.mark.parametrize("saving", [-0.1, 1.5, "half", None, True])
def test_a_saving_outside_its_range_is_refused(saving: Any) -> None:
    with pytest.raises(ConfigError, match=r"saving must be a share in \[0, 1\], got"):
        policy_for(pixart()).with_saving(saving)


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("baseline", BASELINES)
def test_the_gradient_moves_probabilities_towards_a_known_optimum(baseline: str) -> None:
    """The reward counts the steps, and the cutoffs of reuse steps, that are as they should be."""
    wanted, which = torch.tensor([1.0, 0, 0, 1, 0, 1]), torch.tensor([0, 2, 1, 0, 0, 0])
    reuse, generator = wanted == 0, torch.Generator().manual_seed(0)
    logits, cutoffs = torch.zeros(1, 6, requires_grad=True), torch.zeros(1, 6, 3, requires_grad=True)
    optimizer = torch.optim.Adam([logits, cutoffs], lr=0.05)

    def reward(is_cache: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        right = (is_cache == wanted).float()
        return (right + right * (reuse & (places == which))).mean(dim=-1)

    for _ in range(400):
        tried = try_some(logits, cutoffs, 16, generator)
        greedy = reward((logits >= 0).float(), cutoffs.argmax(dim=-1))
        advantage = advantages(reward(tried.is_cache, tried.cutoffs), baseline, greedy)
        optimizer.zero_grad()
        policy_loss(logits, cutoffs, tried, advantage).backward()
        optimizer.step()
    assert ((logits.sigmoid()[0] > 0.5) == (wanted == 1)).all()
    assert (cutoffs[0].argmax(dim=-1) == which)[reuse].all()
    assert ((logits.sigmoid() - wanted).abs() < 0.2).all()


def test_a_cutoff_counts_on_reuse_steps_alone() -> None:
    logits, cutoffs = torch.zeros(1, 2), torch.tensor([[[0.0, 1.0], [0.0, 2.0]]])
    tried = Tried(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0, 1]]]))
    wanted = 2 * np.log(0.5) + cutoffs[0, 1].log_softmax(dim=0)[1].item()
    assert log_probability(logits, cutoffs, tried).item() == pytest.approx(wanted)


def test_an_advantage_is_what_its_baseline_leaves() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0]])
    assert advantages(rewards, "none").tolist() == [[1, 2, 6]]
    assert advantages(rewards, "self-critical", torch.tensor([2.0])).tolist() == [[-1, 0, 4]]
    found = advantages(rewards, "leave-one-out")[0]
    assert (found / found[2]).tolist() == pytest.approx([-3 / 4.5, -1.5 / 4.5, 1])
    assert torch.allclose(advantages(100 * rewards, "leave-one-out")[0], found, atol=1e-2)


def test_tries_come_as_often_as_they_are_probable() -> None:
    logits, cutoffs = torch.tensor([[2.0, -1.0]]), torch.tensor([[[0.0, 1.0], [3.0, 0.0]]])
    tried = try_some(logits, cutoffs, 20_000, torch.Generator().manual_seed(0))
    assert tried.is_cache.mean(dim=1)[0].tolist() == pytest.approx(logits.sigmoid()[0].tolist(), abs=0.02)
    assert tried.cutoffs.float().mean(dim=1)[0].tolist() == pytest.approx(cutoffs.softmax(-1)[0, :, 1].tolist(), abs=0.02)


def test_quality_gets_dearer_where_more_is_saved_than_was_wanted() -> None:
    price, wanted = Price(10.0), torch.tensor([0.3, 0.8])
    assert price(wanted, 30).tolist() == [10, 10]
    for _ in range(50):
        price.learn(wanted, torch.tensor([0.6, 0.5]), 30)
    dear, cheap = price(wanted, 30).tolist()
    assert dear > 10 > cheap
    assert price(wanted, 50).tolist() == [10, 10]


def test_the_share_counts_reuse_steps_by_the_blocks_they_skip() -> None:
    assert reuse_share(Schedule.parse("ffccrrcr", 3), 4, 3) == 0.75
    assert reuse_share(Schedule.parse("ffccr3r1cr3", 3), 4, 3) == pytest.approx((1 + 0.5 + 1) / 4)


def test_a_picture_that_loses_more_is_to_save_less() -> None:
    """Losses grow by e for every 0.1 of saving; the second picture always loses e times as much as the first."""
    losses = Losses.fitted(-torch.tensor([[-4.0, -2.0], [-3.0, -1.0]]).exp())
    assert losses.hardness.tolist() == pytest.approx([-0.05, 0.05])
    price = Price(1.0)
    price.expect(30, *losses.price)
    wanted = torch.tensor([0.3, 0.5, 0.7])
    typical = (losses.rate * (wanted - 0.5) + losses.level.mean()).exp()
    assert (price(wanted, 30) * losses.rate * typical).tolist() == pytest.approx([1, 1, 1])


def test_the_teacher_reuses_only_where_the_policy_decides_and_is_imitated() -> None:
    profile, pipe = load_demo_profile(), load_demo_pipeline()
    moment = Moment(torch.randn(4, 16, 8, 8), torch.randn(4, 16, 128), None, 20)
    policy = new_policy(pipe.transformer, moment, [6, 12], width=32)
    teacher = Teacher(profile, policy)
    schedules = [teacher.schedule(saving, 20) for saving in (0.25, 0.5, 0.75)]
    assert all((one.first_reuse or 0) >= 8 and one.cutoff_block == 12 for one in schedules)
    assert [reuse_share(one, 8, 12) for one in schedules] == [0.25, 0.5, 0.75]
    reused = [{step for step in range(20) if one[step].value == "r"} for one in schedules]
    assert reused[0] < reused[1] < reused[2]
    imitate(teacher, [Examples(moment, torch.tensor([0.0, 0.0, 0.2, -0.2]))], (0.5, 0.5), torch.Generator().manual_seed(0))
    decisions = [decision.schedule for decision in policy.with_saving(0.5).decide(moment)]
    assert str(decisions[0]) == str(decisions[1]) == str(schedules[1])
    assert [round(reuse_share(one, 8, 12), 2) for one in decisions[2:]] == pytest.approx([0.3, 0.7], abs=0.05)
    with pytest.raises(ConfigError, match=r"deepest cutoff must be among the profile's \[6, 9, 12\] to start from it, got 3"):
        Teacher(profile, new_policy(pipe.transformer, moment, [3]))


def test_the_teachers_order_takes_the_step_with_the_least_expected_change_next() -> None:
    profile, policy = load_demo_profile(), policy_for(pixart(), (6, 12))
    teacher, expected = Teacher(profile, policy), profile.expected(10)
    order = teacher.ranks(10).argsort().tolist()
    alone = [expected_change(expected, 12, {step}, policy.storage) for step in range(4, 10)]
    assert order[0] == int(np.argmin(alone))
    assert alone[0] == pytest.approx(expected.change(4, 12, [3], np.ones(1)) ** 2)
    pair = expected_change(expected, 12, {4, 5}, policy.storage)
    assert pair == pytest.approx(alone[0] + expected.change(5, 12, [3], np.ones(1)) ** 2)


CONFIG = TrainConfig(updates=3, scenes=2, rollouts=3, steps=(6,))


def trainer(
    folder: Path, config: TrainConfig = CONFIG, cutoffs: tuple[int, ...] = (6, 12), storage: str = "latest",
    rho: float = 0.4, pipe: Any = None,
) -> Trainer:  # fmt: skip
    environment = Environment(pipe or load_demo_pipeline(), rho, rule_named(storage), {})
    prompts, accelerator = ["pizza", "owl", "crab"], Accelerator(cpu=True)
    return Trainer(environment, quality_named("ssim"), prompts, cutoffs, config, folder, accelerator, storage)


def logged(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.parametrize(
    "config",
    [CONFIG, replace(CONFIG, baseline="self-critical"), replace(CONFIG, baseline="none", savings=None, quality_weight=5.0)],
)
def test_a_training_that_was_cut_off_goes_on_to_the_same_end(tmp_path: Path, config: TrainConfig) -> None:
    whole = trainer(tmp_path / "whole", config).run()
    trainer(tmp_path / "parts", replace(config, updates=2)).run()
    resumed = trainer(tmp_path / "parts", config)
    assert resumed.update == 2
    again = resumed.run()
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")
    for name, weight in whole.network.state_dict().items():
        assert torch.equal(weight, again.network.state_dict()[name])
    saved = AdaPolicy.load(tmp_path / "parts" / "policy.safetensors")
    assert saved.config.training["updates"] == 3 and saved.config.training["rollouts"] == 18


def test_training_leaves_the_diffusion_model_alone(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    before = {name: weight.clone() for name, weight in one.environment.pipe.transformer.state_dict().items()}
    one.run()
    assert all(torch.equal(before[name], weight) for name, weight in one.environment.pipe.transformer.state_dict().items())
    assert not any(parameter.grad is not None for parameter in one.environment.pipe.transformer.parameters())


def test_a_folder_with_another_training_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    with pytest.raises(ConfigError, match="holds a training of another model or other cutoffs"):
        trainer(tmp_path, cutoffs=(12,))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"storage": "extrapolated"}, "with storage 'latest', got 'extrapolated'"),
        ({"rho": 0.5}, r"with rho 0\.4, got 0\.5"),
        ({"config": replace(CONFIG, steps=(7,))}, r"with steps \[6\], got \[7\]"),
        ({"config": replace(CONFIG, baseline="self-critical")}, "with baseline 'leave-one-out', got 'self-critical'"),
        ({"config": replace(CONFIG, savings=None, quality_weight=5.0)}, r"with savings \[0\.2, 0\.8\], got None"),
    ],
)
def test_a_training_does_not_go_on_with_other_settings(
    one_update: Path, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"holds a training {words}; choose another folder"):
        trainer(one_update, **change)
    pipe = load_demo_pipeline()
    with pytest.raises(PolicyError, match="with other weights"):
        trainer(one_update, pipe=reinitialised(pipe))


@pytest.fixture(scope="module")
def one_update(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    trainer(folder, replace(CONFIG, updates=1)).run()
    return folder


def test_a_training_that_was_killed_at_any_moment_goes_on_to_the_same_end(tmp_path: Path) -> None:
    """After update 2 only the policy was written, and its line and half of the next are in the log."""
    whole = trainer(tmp_path / "whole").run()
    folder = tmp_path / "killed"
    trainer(folder, replace(CONFIG, updates=1)).run()
    state = (folder / "state.pt").read_bytes()
    trainer(folder, replace(CONFIG, updates=2)).run()
    (folder / "state.pt").write_bytes(state)
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"update": 3, "roll')
    again = trainer(folder)
    assert again.update == 1
    again.run()
    assert logged(folder) == logged(tmp_path / "whole")
    for name, weight in whole.network.state_dict().items():
        assert torch.equal(weight, again.policy.network.state_dict()[name])


def test_the_price_moves_once_an_update_however_many_pictures_the_update_saw(tmp_path: Path) -> None:
    learner, moved = trainer(tmp_path), []
    for pictures in (1, 8):
        learner.price = Price(10.0)
        learner._learn_price(torch.full((pictures,), 0.5), torch.full((pictures,), 0.7), 30)
        moved.append(learner.price.coefficients[30])
    assert torch.allclose(moved[0], moved[1]) and moved[0].any()


def test_all_processes_stop_and_keep_when_the_time_of_one_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer(tmp_path)

    def with_another_that_is_late(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values, torch.ones_like(values)]) if values.shape == (1,) else values

    monkeypatch.setattr(one, "_gathered", with_another_that_is_late)
    one.run()
    assert one.update == 1 and trainer(tmp_path).update == 1


def test_what_processes_share_is_on_their_devices_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nccl takes no tensors of the CPU. Here both are one device, so what counts is that each was moved."""
    one, to = trainer(tmp_path, replace(CONFIG, updates=1)), torch.Tensor.to
    moved: list[torch.Tensor] = []
    shared: list[torch.Tensor] = []

    def moving(tensor: torch.Tensor, *where: Any, **more: Any) -> torch.Tensor:
        found = to(tensor, *where, **more)
        if where == (one.accelerator.device,):
            moved.append(found := found.clone())
        return found

    def sharing(tensor: torch.Tensor, **_: Any) -> torch.Tensor:
        shared.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", moving)
    monkeypatch.setattr(one.accelerator, "gather", sharing)
    monkeypatch.setattr(one.accelerator, "reduce", sharing)
    one.run()
    assert len(shared) == 4 and all(any(tensor is one for one in moved) for tensor in shared)


def test_a_rollout_is_what_the_pipeline_draws_with_that_schedule() -> None:
    pipe = load_demo_pipeline()
    environment, task = Environment(pipe, 0.4, policy_for(pixart()).storage, {}), Task("pizza", 7, 8)
    schedules = [Schedule.parse("ffcrrrrr", 12), Schedule.parse("ffccrccr", 12)]
    pictures = environment.play(environment.scene(task), schedules)
    for picture, schedule in zip(pictures, schedules, strict=True):
        with accelerate(pipe, schedule):
            output = pipe("pizza", num_inference_steps=8, generator=torch.Generator().manual_seed(7), output_type="np")
        assert np.abs(picture.astype(int) - (output.images[0] * 255).round()).max() <= 1
    assert not np.array_equal(pictures[0], pictures[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"updates": 0}, "updates must be at least 1, got 0"),
        ({"baseline": "mean"}, "baseline must be one of none, self-critical, leave-one-out, got 'mean'"),
        ({"rollouts": 1}, "leave-one-out needs at least 2 rollouts, got 1"),
        ({"savings": None}, "quality_weight must be given"),
        ({"savings": (0.9, 0.2)}, "two ascending shares"),
        ({"steps": (30, 2)}, r"steps must each be at least 4, got \(30, 2\)"),
        ({"steps": ()}, r"steps must each be at least 4, got \(\)"),
        ({"learning_rate": -1.0}, r"learning_rate must be a number above 0, got -1\.0"),
        ({"quality_weight": 0.0}, r"quality_weight must be a number above 0, got 0\.0"),
        ({"entropy_weight": float("nan")}, "entropy_weight must be a number of at least 0, got nan"),
        ({"seed": -1}, r"seed must be in \[0, 2147483647\], got -1"),
    ],
)
def test_a_training_setting_outside_its_range_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(CONFIG, **change)


def test_a_quality_that_needs_other_weights_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="quality must be one of lpips, ssim, clip, image-reward, got 'taste'"):
        quality_named("taste")
    with pytest.raises(ConfigError, match="quality image-reward needs the package image-reward"):
        quality_named("image-reward")


def test_image_reward_is_loaded_from_this_machine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name which loads what the real one would, and asks the hub for it."""
    (tmp_path / "ImageReward").mkdir()
    text = "from huggingface_hub import constants\ndef load(name): raise OSError(f'offline: {constants.HF_HUB_OFFLINE}')\n"
    (tmp_path / "ImageReward" / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = tmp_path / ".cache" / "ImageReward"
    folder.mkdir(parents=True)
    for file in ("ImageReward.pt", "med_config.json"):
        with pytest.raises(ConfigError, match=f"needs {file} of THUDM/ImageReward in {folder}, which has none"):
            image_reward()
        (folder / file).touch()
    with pytest.raises(ConfigError, match="cannot be loaded from this machine alone: offline: True"):
        image_reward()
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(("build", "reason"), [(dit, "takes no prompt"), (opensora, "takes no num_images_per_prompt")])
def test_a_pipeline_that_draws_no_pictures_of_texts_is_refused(build: Any, reason: str) -> None:
    pipe = build()
    with pytest.raises(UnsupportedModelError, match=f"a text-to-image pipeline; {type(pipe).__name__} {reason}"):
        Environment(pipe, 0.4, Latest(), {})


def test_a_pipeline_of_videos_is_refused_whatever_it_calls_them() -> None:
    class Videos:
        def __call__(self, prompt: str, num_images_per_prompt: int, video_length: int) -> None: ...

    with pytest.raises(UnsupportedModelError, match="Videos draws videos"):
        Environment(Videos(), 0.4, Latest(), {})
    with pytest.raises(UnsupportedModelError, match="DemoPipeline takes no warmth"):
        Environment(load_demo_pipeline(), 0.4, Latest(), {"warmth": 1})


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("ada")
    (folder / "prompts.txt").write_text("pizza\nowl\n")
    yield folder


def train(folder: Path, *more: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    arguments = [
        "--prompts",
        str(folder / "prompts.txt"),
        "--steps",
        "6",
        "--scenes",
        "1",
        "--rollouts",
        "2",
        "--quality",
        "ssim",
    ]
    command = ["-m", "blockdance.ada.train", "--out", str(folder / "out"), *arguments, *more]
    launched = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    alone = os.environ | {"OMP_NUM_THREADS": "1"} | ({"ACCELERATE_USE_CPU": "true"} if processes > 1 else {})
    return subprocess.run([sys.executable, *launched, *command], env=alone, capture_output=True, text=True, timeout=300)


def test_the_command_trains_goes_on_and_draws_its_curves(command: Path) -> None:
    for updates in ("1", "2"):
        done = train(command, "--updates", updates)
        assert done.returncode == 0, done.stderr
    lines = logged(command / "out")
    assert [line["update"] for line in lines] == [1, 2]
    assert lines[0].keys() >= {"reward", "saving", "quality", "entropy", "quality_weight", "steps"}
    assert "entropy" in (command / "out" / "curves.html").read_text()
    assert AdaPolicy.load(command / "out" / "policy.safetensors").cutoffs == (9,)


def test_two_processes_share_an_update_and_agree_on_what_came_of_it(command: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("pizza\nowl\n")
    done = train(tmp_path, "--updates", "2", processes=2)
    assert done.returncode == 0, done.stderr
    assert [(line["update"], line["rollouts"]) for line in logged(tmp_path / "out")] == [(1, 4), (2, 8)]
    policy = AdaPolicy.load(tmp_path / "out" / "policy.safetensors")
    assert policy.config.training["processes"] == 2


def test_the_command_refuses_with_a_sentence(command: Path) -> None:
    refused = train(command, "--cutoffs", "13")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "cutoff_block must be in [0, 12]" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--rollouts", "1"], "at least 2 rollouts"),
        (["--cutoffs", "-1", "12"], "cutoff_block must be in [0, 12]"),
        (["--rho", "1.0"], "rho must be in (0, 1), got 1.0"),
        (["--rho", "0.01"], "rho must make the first decided step one of [1, 29] in a run of 30, got 0.01, which makes it 0"),
        (["--steps", "0"], "steps must each be at least 4, got (0,)"),
        (["--learning-rate", "-1"], "learning_rate must be a number above 0, got -1.0"),
        (["--entropy-weight", "nan"], "entropy_weight must be a number of at least 0, got nan"),
        (["--minutes", "-1"], "minutes must be a number of at least 0, got -1.0"),
        (["--guidance", "-5"], "guidance must be a number of at least 0, got -5.0"),
        (["--model", "demo-video"], "DemoVideoPipeline takes no num_images_per_prompt"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        train_main(["--out", str(tmp_path / "out"), "--quality", "ssim", *more])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and words in error
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- what ships


def test_the_shipped_policy_is_small_and_saves_about_what_it_is_asked_for() -> None:
    pipe, file = load_demo_pipeline(), load_demo_policy()
    shares = []
    for saving in (0.3, 0.5, 0.8):
        with accelerate(pipe, file.with_saving(saving)) as trace:
            pipe(["octopus", "red apple", "volcano"], output_type="latent", generator=torch.Generator().manual_seed(0))
        shares.append(np.mean([reuse_share(one.schedule, 12, file.cutoffs[-1]) for one in trace.decisions]))
    assert shares == sorted(shares) and shares == pytest.approx([0.3, 0.5, 0.8], abs=0.2)


def test_the_five_lines_of_the_readme() -> None:
    pipe, policy = load_demo_pipeline(), load_demo_policy(saving=0.6)
    with accelerate(pipe, policy) as trace:
        pipe("red apple")
    assert trace.kinds.startswith("f" * 11 + "c") and trace.speedup_ideal > 1.2
    with accelerate(pipe, ReuseConfig(1)) as dense:
        pipe("red apple")
    assert dense.speedup_ideal == 1.0
