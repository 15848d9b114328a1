"""How much of what a transformer runs is in its blocks: what reuse could save at most."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def num_parameters(modules: Iterable[nn.Module]) -> int:
    """Of all together; one that several share counts once."""
    return sum({id(one): one.numel() for module in modules for one in module.parameters()}.values())


class Work(TorchDispatchMode):
    """Counts the floating point operations of matrix products, convolutions and attention in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        count = flop_registry.get(func._overloadpacket)
        if count is None:
            with self:  # in inference mode, what is made of several operations comes here whole
                parts = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if parts is NotImplemented else parts
        output = func(*args, **kwargs)
        self.flops += count(*args, **kwargs, out_val=output)
        return output
