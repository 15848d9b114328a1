"""Where the blocks of a transformer without an adapter may be: its largest lists of modules."""

from collections.abc import Iterable
from itertools import permutations, product

from torch import nn

from blockdance.adapters import Stack, parameter_names
from blockdance.errors import UnsupportedModelError
from blockdance.work import num_parameters

WORTHWHILE = 0.1
"""A list with less than this fraction of the largest one's parameters is no part of the depth axis."""
TRIED = 3
"""How many lists, from the largest on, are tried by themselves and in pairs."""


def candidate_stacks(transformer: nn.Module) -> list[Stack]:
    """What an unknown transformer's stack may be: one list of blocks, or two.

    Those with the most parameters first; of each, every order in which its blocks might return their streams.

    Raises:
        UnsupportedModelError: it has no list of blocks.
    """
    lists = block_lists(transformer)
    if not lists:
        raise UnsupportedModelError(f"{type(transformer).__name__} has no list of blocks whose outputs could be reused")
    sizes = {path: num_parameters(blocks) for path, blocks in lists.items()}
    least = max(WORTHWHILE * max(sizes.values()), sorted(sizes.values(), reverse=True)[:TRIED][-1])
    worthwhile = [path for path in lists if sizes[path] >= least]
    pairs = [pair for pair in permutations(worthwhile, 2) if set(lists[pair[0]]).isdisjoint(lists[pair[1]])]
    choices: list[tuple[str, ...]] = [*((path,) for path in worthwhile), *pairs]
    choices.sort(key=lambda paths: sum(sizes[path] for path in paths), reverse=True)
    return [stack for paths in choices for stack in _stacks_over({path: lists[path] for path in paths})]


def block_lists(transformer: nn.Module) -> dict[str, list[nn.Module]]:
    """Its lists of modules that take the same arguments, by path; of lists inside of others the outermost."""
    lists: dict[str, list[nn.Module]] = {}
    for path, module in transformer.named_modules():
        is_inside = any(path.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not is_inside and _all_alike(module):
            lists[path] = list(module)
    return lists


def _all_alike(modules: Iterable[nn.Module]) -> bool:
    signatures = {tuple(parameter_names(module)) for module in modules}
    return len(signatures) == 1 and signatures != {()}


def _stacks_over(lists: dict[str, list[nn.Module]]) -> list[Stack]:
    """Stacks of these lists, one after the other or, if they are equally long, in turns."""
    orders = [_stream_orders(blocks[0]) for blocks in lists.values()]
    in_turns = (False, True) if len(lists) == 2 and len(set(map(len, lists.values()))) == 1 else (False,)
    return [Stack(dict(zip(lists, names, strict=True)), turns) for turns in in_turns for names in product(*orders)]


def _stream_orders(block: nn.Module) -> list[tuple[str, ...]]:
    """What a block may return: the image's stream by itself, or with another before or after it."""
    names = parameter_names(block)
    image = "hidden_states" if "hidden_states" in names else names[0]
    likely = dict.fromkeys(("encoder_hidden_states", *names[:2]))
    others = [name for name in likely if name in names and name != image]
    return [(image,), *((image, other) for other in others), *((other, image) for other in others)]
