"""Small models without an adapter, each with one thing about it that the self-test must see."""

from typing import Any

import torch
from torch import Tensor, nn


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, moment: Tensor) -> Tensor:
        return hidden_states + torch.tanh(self.linear(hidden_states) + moment)


class Plain(nn.Module):
    """Blocks in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        for layer in self.layers:
            hidden_states = layer(hidden_states, moment=timestep[:, None, None] / 1000)
        return (hidden_states,)


class LongSkip(Plain):
    """The last block also reads what the first put out."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        moment = timestep[:, None, None] / 1000
        first = hidden_states = self.layers[0](hidden_states, moment)
        for layer in self.layers[1:-1]:
            hidden_states = layer(hidden_states, moment)
        return (self.layers[-1](hidden_states + first, moment),)


class Random(Plain):
    """Never the same twice."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return super().forward(hidden_states + torch.randn_like(hidden_states), timestep)


class Remembering(Plain):
    """Blocks that may write into a cache."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        kv_caches: Any = None,
        kv_cache_mode: Any = None,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        if kv_caches is not None:
            kv_caches.append(hidden_states)
        return super().forward(hidden_states, timestep)


class Heavy(Plain):
    """Most of it stands in no list."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 4))

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return super().forward(hidden_states + self.encoder(hidden_states), timestep)


class Table(Plain):
    """Most of its parameters are in a table, of which a call takes one row."""

    def __init__(self) -> None:
        super().__init__()
        self.moments = nn.Embedding(1000, 4)

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return super().forward(hidden_states + self.moments(timestep.long())[:, None], timestep)


class Idle(Plain):
    """Nothing comes of its blocks."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        super().forward(hidden_states, timestep)
        return (hidden_states + timestep[:, None, None],)


class Around(Plain):
    """Runs its blocks without calling them."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        for layer in self.layers:
            hidden_states = layer.forward(hidden_states, timestep[:, None, None] / 1000)
        return (hidden_states,)


class Again(Plain):
    """Runs its blocks twice."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return super().forward(*super().forward(hidden_states, timestep), timestep)


class Beside(Plain):
    """The second of the tensors in its output is what the first block put out."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Any]:
        moment = timestep[:, None, None] / 1000
        first = hidden_states = self.layers[0](hidden_states, moment)
        for layer in self.layers[1:]:
            hidden_states = layer(hidden_states, moment)
        return ([hidden_states, first],)


class Junk(Plain):
    """Its longest list is not its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.captions = nn.ModuleList(nn.Linear(1, 1) for _ in range(9))

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        words = torch.stack([caption(hidden_states[..., :1] * 0) for caption in self.captions])
        return super().forward(hidden_states + words.mean(dim=0), timestep)


class Pair(nn.Module):
    """Takes two streams of one shape, and returns them the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return context + self.linear(x), x - self.linear(context)


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Pair() for _ in range(4))

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        context = hidden_states.flip(-1) + timestep[:, None, None]
        for layer in self.layers:
            context, hidden_states = layer(hidden_states, context)
        return (hidden_states,)


class Backwards(Plain):
    """Its second list runs first, and a third names all blocks in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(Layer() for _ in range(2))
        self.every = nn.ModuleList([*self.layers, *self.first])

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        for layer in self.first:
            hidden_states = layer(hidden_states, timestep[:, None, None] / 1000)
        return super().forward(hidden_states * 2, timestep)
