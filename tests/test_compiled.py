"""The whole forward in compiled graphs: the bits of the swapped model, two graphs a run, and a model that nobody touched."""

import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import accelerate as hugging_face
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from blockdance import Extrapolated, Schedule, accelerate, observe
from blockdance.adapters import Block, Streams, blocks_of, located, stack_of
from blockdance.compiled import CompiledForward, compiled_forward
from blockdance.errors import ConfigError, SessionError, UnsupportedModelError
from blockdance.selftest import Handler
from blockdance.storage import Residual
from tests.tiny import CASES
from tests.zoo import ZOO

DIT, PIXART = CASES
CPU = torch.device("cpu")
CUTOFF = 1
STEPS = 20
BUILT: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Any]]]] = {
    "DiT": (lambda: DIT.build().transformer, DIT.inputs),
    "PixArt": (lambda: PIXART.build().transformer, PIXART.inputs),
} | {tiny.name: (tiny.build, tiny.inputs) for tiny in ZOO}
REAL = ["DiT", "PixArt"] + [
    f"{name}Transformer{n}DModel" for name, n in [("Wan", 3), ("SD3", 2), ("Flux", 2), ("QwenImage", 2), ("Latte", 3)]
]


@pytest.fixture(autouse=True)
def graphs() -> Iterator[CompileCounterWithBackend]:
    """Counts the graphs, and runs them as they are."""
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        yield CompileCounterWithBackend("eager")
    torch.compiler.reset()


def built(name: str) -> tuple[nn.Module, list[Block], Callable[[int, float], dict[str, Any]]]:
    """A model, its blocks, and arguments for a call of it: their batch size and timestep."""
    build, inputs = BUILT[name]
    model = build()
    stack = stack_of(model)
    assert stack is not None

    def at(batch: int, timestep: float) -> dict[str, Any]:
        torch.manual_seed(batch)
        kwargs = inputs(batch)
        return kwargs | {"timestep": torch.full_like(kwargs["timestep"], timestep)}

    return model, blocks_of(model, stack), at


DEPTH = 4
WIDTH = 8


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, moment: Tensor) -> Tensor:
        return hidden_states + moment * torch.sin(self.mix(hidden_states))


class Toy(nn.Module):
    """The least that is a diffusion transformer; compiles in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(DEPTH))
        self.proj_out = nn.Linear(WIDTH, WIDTH)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, skip_layers: Any = (), in_pieces: bool = False, return_dict: bool = True
    ) -> Any:
        moment = torch.cos(timestep)[:, None, None]
        if in_pieces:
            torch._dynamo.graph_break()
        for index, block in enumerate(self.blocks):
            if index not in skip_layers:
                hidden_states = block(hidden_states, moment) + index  # as a ControlNet adds between blocks
        sample = self.proj_out(hidden_states) * moment
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


@pytest.fixture
def toy() -> tuple[nn.Module, list[Block], Callable[..., dict[str, Any]]]:
    torch.manual_seed(0)
    model = Toy()

    def at(batch: int, timestep: float, tokens: int = 5, **more: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(batch)
        latent = torch.randn(batch, tokens, WIDTH, generator=generator)
        return {"hidden_states": latent, "timestep": torch.full((batch,), timestep)} | more

    return model, [located(block, ("hidden_states",)) for block in model.blocks], at


class Swapped(Handler):
    """First stores the output of block `cutoff`, then starts from it, by swapped classes."""

    def __init__(self, blocks: list[Block], cutoff: int) -> None:
        super().__init__(block.module for block in blocks)
        self.blocks, self.cutoff = blocks, cutoff
        self.stored: Streams | None = None

    def run_block(self, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        index = self.index_of[id(module)]
        block = self.blocks[index]
        if self.stored is not None and index <= self.cutoff:
            return block.returning(self.stored if index == self.cutoff else block.inputs(args, kwargs))
        returned = run(module, *args, **kwargs)
        if index == self.cutoff:
            self.stored = tuple(stream.clone() for stream in block.outputs(returned))
        return returned


def swapped_pair(
    model: nn.Module, blocks: list[Block], cutoff: int, cache: dict[str, Any], reuse: dict[str, Any]
) -> tuple[Tensor, Streams, Tensor]:
    """A cache step's and a reuse step's outputs of the model with swapped blocks, and what was stored between them."""
    probe = Swapped(blocks, cutoff)
    with probe.watching():
        full = model(**cache)[0]
        assert probe.stored is not None
        return full, probe.stored, model(**reuse)[0]


def compiled_pair(
    forward: CompiledForward, cutoff: int, cache: dict[str, Any], reuse: dict[str, Any]
) -> tuple[Tensor, Streams, Tensor]:
    """The same from graphs."""
    output, kept = forward.all_blocks([cutoff], (), cache)
    return output[0], kept[cutoff], forward.tail(cutoff, kept[cutoff], (), reuse)[0]


def flat(pair: tuple[Tensor, Streams, Tensor]) -> list[Tensor]:
    return [pair[0], *pair[1], pair[2]]


def same_bits(ours: tuple[Tensor, Streams, Tensor], theirs: tuple[Tensor, Streams, Tensor]) -> bool:
    return all(map(torch.equal, flat(ours), flat(theirs)))


# Exact, in two graphs


@pytest.mark.parametrize("name", REAL)
def test_a_run_has_the_bits_of_the_swapped_model_from_two_graphs(name: str, graphs: CompileCounterWithBackend) -> None:
    model, blocks, at = built(name)
    forward = CompiledForward(model, blocks, backend=graphs, fullgraph=True)
    for step in range(0, STEPS, 2):
        cache, reuse = at(2, 990 - 40.0 * step), at(2, 950 - 40.0 * step)
        assert same_bits(compiled_pair(forward, CUTOFF, cache, reuse), swapped_pair(model, blocks, CUTOFF, cache, reuse))
    assert graphs.frame_count == 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", ["PixArt", "FluxTransformer2DModel"])
def test_a_backend_that_rewrites_the_graph_is_exact_to_rounding(name: str) -> None:
    model, blocks, at = built(name)
    forward = CompiledForward(model, blocks, backend="aot_eager", fullgraph=True)
    cache, reuse = at(2, 800), at(2, 700)
    ours, theirs = compiled_pair(forward, CUTOFF, cache, reuse), swapped_pair(model, blocks, CUTOFF, cache, reuse)
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(a, b)


def test_keeping_nothing_gives_the_bits_of_the_plain_model(toy: Any, graphs: CompileCounterWithBackend) -> None:
    model, blocks, at = toy
    output, kept = CompiledForward(model, blocks, backend=graphs, fullgraph=True).all_blocks((), (), at(2, 500))
    assert torch.equal(output.sample, model(**at(2, 500)).sample)
    assert kept == {}


def test_positional_arguments_and_plain_tuples_pass_through(toy: Any, graphs: CompileCounterWithBackend) -> None:
    model, blocks, at = toy
    kwargs = at(2, 500) | {"return_dict": False}
    latent = kwargs.pop("hidden_states")
    forward = CompiledForward(model, blocks, backend=graphs, fullgraph=True)
    assert torch.equal(forward.all_blocks((), (latent,), kwargs)[0][0], model(latent, **kwargs)[0])


def test_cutoffs_do_not_push_each_other_out(toy: Any, graphs: CompileCounterWithBackend) -> None:
    """Each has its graphs to itself, so dynamo's limit for one function, here a single graph, is never reached."""
    model, blocks, at = toy
    forward = CompiledForward(model, blocks, backend=graphs, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=1):
        for step in (900.0, 600.0, 300.0):
            for cutoff in range(DEPTH - 1):
                cache, reuse = at(2, step), at(2, step - 10)
                expected = swapped_pair(model, blocks, cutoff, cache, reuse)
                assert same_bits(compiled_pair(forward, cutoff, cache, reuse), expected)
    assert graphs.frame_count == 2 * (DEPTH - 1)


def test_several_blocks_are_kept_by_one_graph(toy: Any, graphs: CompileCounterWithBackend) -> None:
    model, blocks, at = toy
    kept = CompiledForward(model, blocks, backend=graphs, fullgraph=True).all_blocks({0, 2}, (), at(2, 500))[1]
    assert sorted(kept) == [0, 2]
    for cutoff in kept:
        assert torch.equal(kept[cutoff][0], swapped_pair(model, blocks, cutoff, at(2, 500), at(2, 500))[1][0])
    assert graphs.frame_count == 1


def test_other_shapes_are_compiled_once_and_stay_right(toy: Any, graphs: CompileCounterWithBackend) -> None:
    model, blocks, at = toy
    forward, once = CompiledForward(model, blocks, backend=graphs, fullgraph=True), 0
    shapes = [(2, 5), (1, 5), (3, 5), (2, 9)]
    for again in (False, True):
        for batch, tokens in shapes:
            cache, reuse = at(batch, 500, tokens), at(batch, 400, tokens)
            expected = swapped_pair(model, blocks, CUTOFF, cache, reuse)
            assert same_bits(compiled_pair(forward, CUTOFF, cache, reuse), expected)
        assert not again or graphs.frame_count == once
        once = graphs.frame_count
    assert once <= 2 * len(shapes)


def test_a_model_that_is_no_single_graph_is_right_in_pieces(toy: Any, graphs: CompileCounterWithBackend) -> None:
    model, blocks, at = toy
    forward = CompiledForward(model, blocks, backend=graphs)
    once = 0
    for step in (900, 600, 300):
        once = graphs.frame_count
        cache, reuse = at(2, step, in_pieces=True), at(2, step - 100, in_pieces=True)
        assert same_bits(compiled_pair(forward, CUTOFF, cache, reuse), swapped_pair(model, blocks, CUTOFF, cache, reuse))
    assert counters["graph_break"]
    assert graphs.frame_count == once


# Memory that is written over


def overwriting(graph: Any, _: Any, **options: Any) -> Callable[..., Any]:
    """As a CUDA graph: returns the same memory on each call."""
    outputs: list[Tensor] = []

    def run(*args: Tensor) -> list[Tensor]:
        fresh = graph(*args)
        outputs.extend(map(torch.empty_like, fresh[len(outputs) :]))
        return [old.copy_(new) for old, new in zip(outputs, fresh, strict=True)]

    return run


def test_what_was_returned_outlives_the_next_call(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, blocks, at = toy
    marks: list[None] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(None))
    forward = CompiledForward(model, blocks, backend=overwriting, mode="reduce-overhead", fullgraph=True)
    pairs = [(at(2, 900), at(2, 800)), (at(2, 300), at(2, 200))]
    ours = [compiled_pair(forward, CUTOFF, *pair) for pair in pairs]
    for mine, pair in zip(ours, pairs, strict=True):
        assert same_bits(mine, swapped_pair(model, blocks, CUTOFF, *pair))
    assert len(marks) == 4


class AddsInPlace(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.add_(1)


class InPlace(nn.Module):
    """Its blocks write into what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AddsInPlace() for _ in range(4))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        hidden_states = hidden_states.clone()
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return (hidden_states,)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_blocks_that_write_in_place_spoil_nothing(backend: str) -> None:
    model = InPlace()
    blocks = [located(block, ("hidden_states",)) for block in model.blocks]
    forward = CompiledForward(model, blocks, backend=backend, fullgraph=True)
    (output,), kept = forward.all_blocks([1], (torch.zeros(3),), {})
    for _ in range(2):
        assert torch.equal(forward.tail(1, kept[1], (torch.ones(3),), {})[0], output)
    assert torch.equal(kept[1][0], torch.full((3,), 2.0))


# The model is left alone


def traits(model: nn.Module) -> Any:
    """Everything there is to change on it."""
    attributes = [(name, type(module), dict(vars(module))) for name, module in model.named_modules()]
    weights = {name: (id(value), value.data_ptr(), value._version) for name, value in model.state_dict(keep_vars=True).items()}
    return [(name, cls, {key: id(value) for key, value in values.items()}) for name, cls, values in attributes], weights


def test_nothing_is_left_on_the_model(toy: Any, graphs: CompileCounterWithBackend) -> None:
    model, blocks, at = toy
    before = traits(model)
    forward = CompiledForward(model, blocks, backend=graphs)
    compiled_pair(forward, CUTOFF, at(2, 500), at(2, 400))
    assert traits(model) == before


def test_an_exception_leaves_nothing_either(toy: Any, graphs: CompileCounterWithBackend) -> None:
    model, blocks, at = toy
    before, forward = traits(model), CompiledForward(model, blocks, backend=graphs)
    expected = compiled_pair(forward, CUTOFF, at(2, 500), at(2, 400))
    broken = at(2, 500) | {"hidden_states": torch.zeros(2, 5, 7)}
    with pytest.raises(Exception, match="same reduction dim"):
        forward.all_blocks([CUTOFF], (), broken)
    with pytest.raises(Exception, match="same reduction dim"):
        forward.tail(CUTOFF, (torch.zeros(2, 5, 7),), (), broken)
    assert traits(model) == before
    assert same_bits(compiled_pair(forward, CUTOFF, at(2, 500), at(2, 400)), expected)


def test_a_plain_call_in_another_thread_meanwhile_runs_every_block(toy: Any) -> None:
    model, blocks, at = toy
    expected, meanwhile = model(**at(2, 500)).sample, []

    def plainly() -> Tensor:
        with torch.no_grad():
            return model(**at(2, 500)).sample

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        def run(*args: Tensor) -> Any:
            with ThreadPoolExecutor(1) as pool:
                meanwhile.append(pool.submit(plainly).result())
            return graph(*args)

        return run

    compiled_pair(CompiledForward(model, blocks, backend=backend), CUTOFF, at(2, 500), at(2, 400))
    assert len(meanwhile) == 2
    assert all(torch.equal(expected, one) for one in meanwhile)


@pytest.mark.parametrize("in_pieces", [False, True])
def test_threads_that_share_the_graphs_get_their_own_results(
    toy: Any, graphs: CompileCounterWithBackend, in_pieces: bool
) -> None:
    model, blocks, at = toy
    forward = CompiledForward(model, blocks, backend=graphs)
    calls = [(at(2, 100.0 * n, in_pieces=in_pieces), at(2, 100.0 * n - 50, in_pieces=in_pieces)) for n in range(1, 9)]
    expected = [swapped_pair(model, blocks, CUTOFF, *call) for call in calls]

    def pair(call: Any) -> tuple[Tensor, Streams, Tensor]:
        with torch.no_grad():
            return compiled_pair(forward, CUTOFF, *call)

    with ThreadPoolExecutor(4) as pool:
        assert all(map(same_bits, pool.map(pair, calls), expected))
    assert in_pieces or graphs.frame_count == 2


def test_blocks_swapped_by_a_session_in_use_change_nothing(toy: Any, graphs: CompileCounterWithBackend) -> None:
    model, blocks, at = toy
    forward = CompiledForward(model, blocks, backend=graphs, fullgraph=True)
    expected = compiled_pair(forward, CUTOFF, at(2, 500), at(2, 400))
    with Swapped(blocks, 2).watching():
        assert same_bits(compiled_pair(forward, CUTOFF, at(2, 500), at(2, 400)), expected)
        anew = CompiledForward(model, blocks, backend=graphs, fullgraph=True)
        assert same_bits(compiled_pair(anew, CUTOFF, at(2, 500), at(2, 400)), expected)
    assert graphs.frame_count == 4


# A model that changes


def test_parts_that_are_replaced_are_followed(toy: Any, graphs: CompileCounterWithBackend) -> None:
    model, blocks, at = toy
    forward = CompiledForward(model, blocks, backend=graphs, fullgraph=True)
    forward.all_blocks((), (), at(2, 500))
    for parent, name in [(model, "proj_out"), (model.blocks[2], "mix")]:
        before = model(**at(2, 500)).sample
        setattr(parent, name, nn.Sequential(getattr(parent, name), Doubled()))
        assert not torch.equal(before, model(**at(2, 500)).sample)
        assert torch.equal(forward.all_blocks((), (), at(2, 500))[0].sample, model(**at(2, 500)).sample)


class Doubled(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return 2 * hidden_states


def test_weights_that_move_are_followed(toy: Any, graphs: CompileCounterWithBackend) -> None:
    model, blocks, at = toy
    forward = CompiledForward(model, blocks, backend=graphs, fullgraph=True)
    forward.all_blocks((), (), at(2, 500))
    model.double()
    kwargs = {name: value.double() for name, value in at(2, 500).items()}
    assert torch.equal(forward.all_blocks((), (), kwargs)[0].sample, model(**kwargs).sample)


def test_a_later_session_finds_the_graphs_and_they_go_with_the_model(graphs: CompileCounterWithBackend) -> None:
    model = Toy()

    def blocks(model: Toy) -> list[Block]:
        return [located(block, ("hidden_states",)) for block in model.blocks]

    forward = compiled_forward(model, blocks(model), backend=graphs)
    forward.all_blocks((), (torch.zeros(1, 5, WIDTH), torch.zeros(1)), {})
    assert compiled_forward(model, blocks(model), backend=graphs) is forward
    assert compiled_forward(model, blocks(model), backend="eager") is not forward
    gone = weakref.ref(model)
    del model, forward
    gc.collect()
    assert gone() is None


# Hooks


def test_whole_model_offloading_stays_outside_the_graph(toy: Any, graphs: CompileCounterWithBackend) -> None:
    """Pipelines take its hooks off and put them on again after every picture, which compiles nothing anew."""
    model, blocks, at = toy
    expected = swapped_pair(model, blocks, CUTOFF, at(2, 500), at(2, 400))
    forward = CompiledForward(model, blocks, backend=graphs, fullgraph=True)
    for _ in range(2):
        assert same_bits(compiled_pair(forward, CUTOFF, at(2, 500), at(2, 400)), expected)
        hook = Noting()
        add_hook_to_module(model, hook)
        assert same_bits(compiled_pair(forward, CUTOFF, at(2, 500), at(2, 400)), expected)
        anew = CompiledForward(model, blocks, backend="eager", fullgraph=True)
        assert same_bits(compiled_pair(anew, CUTOFF, at(2, 500), at(2, 400)), expected)
        assert hook.seen == ["before", "after"] * 4
        remove_hook_from_module(model)
    assert graphs.frame_count == 2


class Noting(ModelHook):
    """In the place of accelerate's hook that moves a whole model."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.seen.append("before")
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.seen.append("after")
        return output


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "sequential": lambda model: hugging_face.cpu_offload(model, execution_device=CPU),
    "groups": lambda model: apply_group_offloading(
        model, onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=2
    ),
    "leaves": lambda model: apply_group_offloading(model, onload_device=CPU, offload_device=CPU, offload_type="leaf_level"),
    "own": lambda model: setattr(model, "forward", lambda **kwargs: kwargs),
}


@pytest.mark.parametrize("put_on", HOOKS.values(), ids=HOOKS)
def test_hooks_inside_the_graph_are_refused_when_a_session_begins(
    toy: Any, graphs: CompileCounterWithBackend, put_on: Any
) -> None:
    model, blocks, _ = toy
    compiled_forward(model, blocks, backend=graphs)
    put_on(model)
    for begin in (compiled_forward, CompiledForward):
        with pytest.raises(UnsupportedModelError, match="which one graph of the whole transformer cannot hold"):
            begin(model, blocks, backend=graphs)


@pytest.mark.parametrize("kind", ["sequential", "groups"])
def test_hooks_on_blocks_are_noticed_within_a_session(toy: Any, graphs: CompileCounterWithBackend, kind: str) -> None:
    model, blocks, at = toy
    forward = CompiledForward(model, blocks, backend=graphs)
    forward.all_blocks((), (), at(2, 500))
    HOOKS[kind](model)
    with pytest.raises(UnsupportedModelError, match="compile the blocks alone"):
        forward.all_blocks((), (), at(2, 500))


def test_sequential_hooks_that_were_removed_are_forgotten(toy: Any, graphs: CompileCounterWithBackend) -> None:
    model, blocks, at = toy
    expected = model(**at(2, 500)).sample
    HOOKS["sequential"](model)
    remove_hook_from_module(model, recurse=True)
    forward = CompiledForward(model, blocks, backend=graphs, fullgraph=True)
    assert torch.equal(forward.all_blocks((), (), at(2, 500))[0].sample, expected)


def test_a_tail_whose_cutoff_is_left_out_says_so(toy: Any, graphs: CompileCounterWithBackend) -> None:
    """As skip-layer guidance does."""
    model, blocks, at = toy
    forward, left_out = CompiledForward(model, blocks, backend=graphs), at(2, 500, skip_layers=[CUTOFF])
    assert forward.all_blocks([CUTOFF, 2], (), left_out)[1].keys() == {2}
    starts = forward.all_blocks([CUTOFF], (), at(2, 500))[1][CUTOFF]
    with pytest.raises(SessionError, match="left out block 1"):
        forward.tail(CUTOFF, starts, (), left_out)


# In a pipeline


@pytest.mark.parametrize("storage", [None, Extrapolated()], ids=["latest", "extrapolated"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_pipeline_gets_the_same_picture_from_two_graphs(case: Any, storage: Any, graphs: CompileCounterWithBackend) -> None:
    pipe, schedule = case.build(), Schedule.parse("fffccrcrcr", 3)
    with accelerate(pipe, schedule, storage=storage) as swapped:
        expected = case.run(pipe)
    before = [type(module) for module in pipe.transformer.modules()]
    with accelerate(pipe, schedule, storage=storage, compiled={"backend": graphs, "fullgraph": True}) as trace:
        assert torch.equal(expected, case.run(pipe))
        assert torch.equal(expected, case.run(pipe))
    assert graphs.frame_count == 2
    assert trace.kinds == str(schedule) and trace.cache_bytes == swapped.cache_bytes
    assert [step.blocks_evaluated for step in trace.steps] == [step.blocks_evaluated for step in swapped.steps]
    assert [type(module) for module in pipe.transformer.modules()] == before
    with accelerate(pipe, Schedule.parse("ccrrcrcrff", 3), compiled={"backend": graphs, "fullgraph": True}):
        case.run(pipe)
    assert graphs.frame_count == 2


def test_every_cutoff_of_a_schedule_has_one_graph(graphs: CompileCounterWithBackend) -> None:
    pipe, schedule = PIXART.build(), Schedule.parse("fffcr1r2cr1r2", 2)
    with accelerate(pipe, schedule):
        expected = PIXART.run(pipe, steps=9)
    with accelerate(pipe, schedule, compiled={"backend": graphs, "fullgraph": True}):
        assert torch.equal(expected, PIXART.run(pipe, steps=9))
    assert graphs.frame_count == 3


def test_what_needs_single_blocks_or_samples_is_refused_with_a_compiled_forward() -> None:
    pipe, options = PIXART.build(), {"backend": "eager"}
    with (
        pytest.raises(ConfigError, match="storage must be a rule of block outputs alone"),
        accelerate(pipe, Schedule.parse("cr", 1), storage=Residual(), compiled=options),
    ):
        pass
    for outer, inner in ((0, 1), (1, 0)):
        parts = [accelerate(pipe, Schedule.parse("cr", 1), compiled=options), observe(pipe)]
        with parts[outer], pytest.raises(SessionError, match="observe sees every block"), parts[inner]:
            pass
    several = [Schedule.parse("cr", 1), Schedule.parse("cc", 1)]
    with accelerate(pipe, several, compiled=options), pytest.raises(SessionError, match="runs whole batches"):
        PIXART.run(pipe, steps=2, batch=2)


def test_with_gradients_the_forward_runs_as_it_is(graphs: CompileCounterWithBackend) -> None:
    pipe, inputs = PIXART.build(), PIXART.inputs()
    with accelerate(pipe, Schedule.parse("cr", 1), compiled={"backend": graphs}) as trace, torch.enable_grad():
        pipe.scheduler.set_timesteps(2)
        for timestep in pipe.scheduler.timesteps:
            pipe.transformer(**inputs)[0].sum().backward()
            pipe.scheduler.step(torch.zeros(2, 4, 8, 8), timestep, torch.zeros(2, 4, 8, 8))
    assert trace.kinds == "ff" and not graphs.frame_count
