"""Stored outputs in CPU memory, for models whose outputs are large: a storage rule around another."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from blockdance.adapters import Streams
from blockdance.storage import PAPER, Kept, StorageRule, check_rule


class InCPUMemory(tuple[Tensor, ...]):
    """Streams in CPU memory, each with the device it belongs to. Copies may be under way: read by `back` or `mapped` alone."""

    homes: tuple[torch.device, ...]
    copied: tuple[torch.cuda.Event, ...]
    """Of the copies that may be under way."""

    def __new__(
        cls, streams: Iterable[Tensor], homes: Iterable[torch.device], copied: Iterable[torch.cuda.Event] = ()
    ) -> "InCPUMemory":
        made = super().__new__(cls, streams)
        made.homes, made.copied = tuple(homes), tuple(copied)
        return made

    def back(self) -> Streams:
        """The streams on their devices again; these wait for the copies, and the host for nothing."""
        for home in dict.fromkeys(self.homes):
            for event in self.copied:
                torch.cuda.current_stream(home).wait_event(event)
        return tuple(stream.to(home, non_blocking=True) for stream, home in zip(self, self.homes, strict=True))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "InCPUMemory":
        """Each stream changed, in CPU memory. The host waits for the copies, since it reads them."""
        for event in self.copied:
            event.synchronize()
        pairs = zip(self, self.homes, strict=True)
        return InCPUMemory([pinned(change(stream)) if on_cuda(home) else change(stream) for stream, home in pairs], self.homes)


@dataclass(frozen=True)
class Offloaded:
    """Another rule, which finds what it keeps in CPU memory; the picture has the same bits.

    With CUDA a stored output leaves for pinned memory beside the computation, and is back on the device for the moment of
    each reuse step alone, for which it must come over the bus: worth it for models whose one output takes much memory, as
    those of videos. The model's copy is free at once, the one that is sent as soon as it has arrived.

    Raises:
        ConfigError: `rule` is no storage rule.
    """

    rule: StorageRule = PAPER
    """What reuse steps start from."""

    def __post_init__(self) -> None:
        check_rule(self.rule)

    @property
    def points(self) -> int:
        return self.rule.points

    @property
    def wants_inputs(self) -> bool:
        return self.rule.wants_inputs

    def stored(self, streams: Streams) -> Streams:
        """A copy in CPU memory; the model may write into its own as soon as this returns."""
        sent = [sent_to_cpu(stream.detach()) for stream in streams]
        return InCPUMemory(
            [copy for copy, _ in sent], [stream.device for stream in streams], [event for _, event in sent if event is not None]
        )

    def outputs_at(self, position: float, kept: Sequence[Kept], inputs: Streams) -> Streams:
        return self.rule.outputs_at(position, [brought_back(one) for one in kept], inputs)


def sent_to_cpu(stream: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy in CPU memory, and what tells when it is whole; None if it is already."""
    if not on_cuda(stream.device):
        return stream.to("cpu", copy=True), None
    ours = stream.clone()  # the model may write into its own while this one is on its way
    copy, side = pinned_like(ours), copying_stream(stream.device)
    side.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(side):
        copy.copy_(ours, non_blocking=True)
    ours.record_stream(side)  # or else its memory could be given to others before it has been read
    return copy, side.record_event()


def brought_back(kept: Kept) -> Kept:
    outputs, inputs = [
        streams.back() if isinstance(streams, InCPUMemory) else streams for streams in (kept.outputs, kept.inputs)
    ]
    assert outputs is not None
    return replace(kept, outputs=outputs, inputs=inputs)


def calculation_of(rule: StorageRule) -> StorageRule:
    """The rule without what says where outputs are kept: rules with the same one draw the same picture."""
    return calculation_of(rule.rule) if isinstance(rule, Offloaded) else rule


@cache
def copying_stream(device: torch.device) -> torch.cuda.Stream:
    """The one that copies run on, beside the computation."""
    return torch.cuda.Stream(device)


def on_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def pinned_like(stream: Tensor) -> Tensor:
    """Memory that a CUDA device can copy to while the host goes on."""
    return torch.empty_like(stream, device="cpu", pin_memory=True)


def pinned(stream: Tensor) -> Tensor:
    return stream.pin_memory()
