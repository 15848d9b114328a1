"""What training a picture model and training a video model have in common: optimizers, averages, the loop, checkpoints."""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from analysis.machine import cpu_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `Learner` and `run`."""
    parser.add_argument("--updates", type=int, required=True, help="in all, earlier calls included")
    parser.add_argument("--minutes", type=float, help="stop after so many, to go on another time")
    parser.add_argument("--checkpoint-minutes", type=float, default=10.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--adamw-rate", type=float, default=1e-3)
    parser.add_argument("--no-compile", action="store_true")


class Learner:
    """Everything that training changes: the two networks, their optimizers, their averages, and the counters.

    Args:
        tokenizer: of the text encoder.
        text_encoder: trained along.
        transformer: the diffusion transformer.
        blocks: its blocks, whose matrices Muon trains; AdamW trains the rest.
        args: of `add_arguments`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, text_encoder: T5EncoderModel, transformer: Any, blocks: nn.Module,
        args: argparse.Namespace,
    ) -> None:  # fmt: skip
        self.tokenizer, self.text_encoder, self.transformer = tokenizer, text_encoder, transformer
        self.nets = nn.ModuleList([text_encoder, transformer])
        matrices = [p for p in blocks.parameters() if p.ndim == 2 and min(p.shape) > 6]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.nets.parameters() if id(p) not in chosen]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=args.muon_rate, weight_decay=0.01),
            torch.optim.AdamW(rest, lr=args.adamw_rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.peak_rates = [args.muon_rate, args.adamw_rate]
        self.ema = EMAModel(self.nets.parameters(), decay=args.ema, use_ema_warmup=True, power=0.75)
        self.updates, self.seconds = 0, 0.0

    def update(self, loss: Tensor, rate: float) -> None:
        for optimizer, peak in zip(self.optimizers, self.peak_rates, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.nets.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.nets.parameters())
        self.updates += 1

    def save(self, folder: Path) -> None:
        state = {
            "nets": self.nets.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "updates": self.updates,
            "seconds": self.seconds,
        }
        torch.save(state, folder / "state.tmp")
        (folder / "state.tmp").replace(folder / "state.pt")

    def resume(self, folder: Path) -> None:
        """Go on from the folder's state, with other chance than before, if it holds one."""
        if not (folder / "state.pt").exists():
            return
        state = torch.load(folder / "state.pt", weights_only=True)
        self.nets.load_state_dict(state["nets"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.updates, self.seconds = state["updates"], state["seconds"]
        torch.manual_seed(self.updates)


def prepared(folder: Path) -> torch.device:
    """Make a training's folder, seed the chance, and say where to train."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hardware() -> str:
    """What this machine trains on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores of {cpu_name()}"


def rate_at(fraction: float) -> float:
    """Warm up for 1 %, stay for half of the run, then fall linearly to zero."""
    return min(1.0, fraction / 0.01 + 0.05, 2 * (1 - fraction))


@contextmanager
def fast_on(device: torch.device, transformer: Any, compiled: bool) -> Iterator[None]:
    """Compile, and on a CPU take attention as plain matrix products: with 64 tokens the fused one's backward pass is half of an
    update's time there. (The compiler's patterns would bring it back.)"""
    on_cpu = device.type == "cpu"
    if compiled:
        transformer.compile(options={"pattern_matcher": False} if on_cpu else None)
    with sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext():
        yield


def run(learner: Learner, args: argparse.Namespace, loss_of_batch: Callable[[], Tensor], keep: Callable[[], None]) -> None:
    """Train to the last update, or for `args.minutes`, with a checkpoint every few minutes and at the end.

    Args:
        learner: goes on from where it is.
        args: of `add_arguments`, with `out`.
        loss_of_batch: the loss of a fresh batch.
        keep: writes what a checkpoint holds beside the state.
    """
    with fast_on(next(learner.nets.parameters()).device, learner.transformer, not args.no_compile):
        loop(learner, args, loss_of_batch, keep)


def loop(learner: Learner, args: argparse.Namespace, loss_of_batch: Callable[[], Tensor], keep: Callable[[], None]) -> None:
    """The updates of `run`."""
    bar = tqdm(total=args.updates, initial=learner.updates, unit="updates")
    begin = last_checkpoint = time.monotonic()
    recent = 0.0
    while learner.updates < args.updates:
        start = time.monotonic()
        loss = loss_of_batch()
        learner.update(loss, rate_at(learner.updates / args.updates))
        recent = 0.98 * recent + 0.02 * loss.item() if recent else loss.item()
        now = time.monotonic()
        learner.seconds += now - start
        bar.update()
        bar.set_postfix(loss=f"{recent:.4f}", refresh=False)
        over = args.minutes is not None and now - begin > 60 * args.minutes
        if over or now - last_checkpoint > 60 * args.checkpoint_minutes or learner.updates == args.updates:
            learner.save(args.out)
            keep()
            facts = {"updates": learner.updates, "images_seen": learner.updates * args.batch, "loss": round(recent, 4)}
            facts |= {"seconds": round(learner.seconds), "hardware": hardware()}
            with (args.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(facts) + "\n")
            last_checkpoint = time.monotonic()
        if over:
            return
