"""How much memory a run takes."""

import gc
import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes about its start and stop, and of GPUs that are not there


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that tensors took while `call` ran, beyond what they took before.

    On the CPU it is counted from the allocator's own events; it repeats to a few per cent, as threads free when they will.
    """
    gc.collect()  # or what earlier runs left would be freed while this one is watched, and count against it
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
