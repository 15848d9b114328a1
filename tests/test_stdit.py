"""Open-Sora 1.0's STDiT: the original's numbers where they are at hand, and what must hold for any size."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from blockdance import UnsupportedModelError
from blockdance.models.stdit import STDiT
from tests.tiny_video import tiny_stdit

PARITY = Path(__file__).parents[2] / "shared" / "parity" / "stdit_v1_tiny.safetensors"
FRAMES, SIZE = 3, 8


def inputs(batch: int = 2, frames: int = FRAMES, height: int = SIZE, width: int = SIZE) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(batch, 4, frames, height, width, generator=generator),
        "timestep": torch.arange(batch) * 100.0,
        "y": torch.randn(batch, 1, 5, 16, generator=generator),
    }


def predicted(model: STDiT, **arguments: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**arguments)
    return out


@pytest.fixture(scope="module")
def original() -> dict[str, Tensor]:
    """A forward pass of the original: its weights, inputs, outputs and every block's output."""
    if not PARITY.exists():
        pytest.skip("the original's forward pass is not on this machine")
    with safe_open(PARITY, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)


@pytest.fixture(scope="module")
def ported(original: dict[str, Tensor]) -> STDiT:
    with safe_open(PARITY, "pt") as file:
        model = STDiT(**json.loads(file.metadata()["config"]))
    model.load_state_dict({name[2:]: weight for name, weight in original.items() if name.startswith("w.")})
    return model.eval()


@pytest.mark.parametrize("name", ["masked", "unmasked"])
def test_the_outputs_are_the_originals(original: dict[str, Tensor], ported: STDiT, name: str) -> None:
    mask = original["in.mask"] if name == "masked" else None
    out = predicted(ported, x=original["in.x"], timestep=original["in.timestep"], y=original["in.y"], mask=mask)
    assert torch.allclose(out, original[f"out.{name}"], atol=1e-4, rtol=0)


def test_every_block_puts_out_what_the_originals_does(original: dict[str, Tensor], ported: STDiT) -> None:
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: seen.append(out)) for block in ported.blocks]
    predicted(ported, x=original["in.x"], timestep=original["in.timestep"], y=original["in.y"], mask=original["in.mask"])
    for hook in hooks:
        hook.remove()
    assert len(seen) == 3
    for index, out in enumerate(seen):
        assert torch.allclose(out, original[f"block.{index}"], atol=1e-4, rtol=0)


def test_the_positions_are_the_originals(original: dict[str, Tensor], ported: STDiT) -> None:
    """As the constructor makes them, not as the checkpoint stores them."""
    fresh = STDiT(**ported.config)
    assert torch.allclose(fresh.pos_embed, original["w.pos_embed"], atol=1e-6)
    assert torch.allclose(fresh.pos_embed_temporal, original["w.pos_embed_temporal"], atol=1e-6)


@pytest.mark.parametrize(("frames", "height", "width", "depth"), [(1, 2, 2, 1), (2, 8, 4, 2), (5, 4, 8, 3), (16, 6, 6, 2)])
def test_any_frame_count_size_and_depth(frames: int, height: int, width: int, depth: int) -> None:
    """A model made for one size and a model called with it give the same."""
    given = inputs(2, frames, height, width)
    made_for = tiny_stdit(input_size=(frames, height, width), depth=depth)
    called_with = tiny_stdit(input_size=(7, 10, 10), depth=depth)
    out = predicted(made_for, **given)
    assert out.shape == (2, 8, frames, height, width)
    assert torch.equal(out, predicted(called_with, **given))


@pytest.mark.parametrize("patch", [(1, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_any_patch(patch: tuple[int, int, int]) -> None:
    out = predicted(tiny_stdit(patch_size=patch), **inputs(frames=4))
    assert out.shape == (2, 8, 4, SIZE, SIZE) and out.std() > 0


def test_every_patch_comes_out_where_it_went_in() -> None:
    """Without attention each patch depends on itself alone."""
    model: Any = tiny_stdit()
    for block in model.blocks:
        for part in (block.attn, block.attn_temp, block.cross_attn):
            part.proj.weight.data.zero_()
    given = inputs()
    other = given["x"].clone()
    other[:, :, 1, 2:4, 6:8] += 1
    changed = (predicted(model, **given) != predicted(model, **given | {"x": other})).any(dim=1).any(dim=0)
    expected = torch.zeros_like(changed)
    expected[1, 2:4, 6:8] = True
    assert torch.equal(changed, expected)


def test_masked_tokens_are_not_read_and_a_full_mask_is_no_mask() -> None:
    model, given = tiny_stdit(), inputs()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    other = given["y"].clone()
    other[:, 0][mask == 0] = 9.0
    out = predicted(model, **given, mask=mask)
    assert torch.equal(out, predicted(model, **given | {"y": other}, mask=mask))
    whole = predicted(model, **given)
    assert not torch.allclose(out, whole)
    assert torch.allclose(whole, predicted(model, **given, mask=torch.ones(2, 5)), atol=1e-6)


def test_the_mask_of_half_a_batch_serves_both_halves() -> None:
    model, given = tiny_stdit(), inputs(4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    assert torch.equal(predicted(model, **given, mask=mask), predicted(model, **given, mask=mask.repeat(2, 1)))


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    model, given = tiny_stdit(), inputs(2)
    alone = [predicted(model, **{name: value[k : k + 1] for name, value in given.items()}) for k in range(2)]
    assert torch.allclose(predicted(model, **given), torch.cat(alone), atol=1e-5)


def test_the_order_of_frames_matters_and_only_through_their_positions() -> None:
    model: Any = tiny_stdit()
    given = inputs()
    turned = given | {"x": given["x"].flip(2)}
    assert not torch.allclose(predicted(model, **given).flip(2), predicted(model, **turned), atol=1e-3)
    model.frame_positions = lambda frames: torch.zeros(1, frames, 16)
    assert torch.allclose(predicted(model, **given).flip(2), predicted(model, **turned), atol=1e-5)


def test_a_fresh_model_predicts_nothing_and_can_learn() -> None:
    model: Any = STDiT(input_size=(2, 8, 8), hidden_size=16, depth=2, num_heads=2, caption_channels=16, model_max_length=5)
    out = model(**inputs())
    assert not out.any()
    (out - 1).square().mean().backward()
    assert model.final_layer.linear.weight.grad.any()


def test_the_published_size() -> None:
    with torch.device("meta"):
        model = STDiT()
    width = 1152
    in_blocks = 28 * (3 * 4 + 8) * width**2  # three attentions of four matrices, an MLP of two that are four times as wide
    around = (6 + 1 + 1) * width**2 + 4096 * width  # modulations, timestep and text
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(in_blocks + around, rel=0.002)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_checkpoint_of_another_size_is_loaded_without_its_positions(tmp_path: Path, suffix: str) -> None:
    made, file = tiny_stdit(), tmp_path / f"checkpoint{suffix}"
    weights = {f"module.{name}": weight.clone() for name, weight in made.state_dict().items()}
    save_file(weights, file) if suffix == ".safetensors" else torch.save(weights, file)
    loaded = STDiT(**made.config | {"input_size": (4, 4, 4)}).eval()
    loaded.load_original(file)
    assert torch.equal(predicted(made, **inputs()), predicted(loaded, **inputs()))


def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path: Path) -> None:
    weights = tiny_stdit().state_dict()
    weights["surplus"] = torch.ones(1)
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"other.safetensors is not a checkpoint of this STDiT: .*surplus"):
        tiny_stdit().load_original(tmp_path / "other.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"must be multiples of the patch \(1, 2, 2\), got \(2, 7, 8\)"):
        predicted(tiny_stdit(), **inputs(1, 2, 7, 8))
    with pytest.raises(UnsupportedModelError, match="hidden_size must be divisible by 4 and by num_heads 3, got 16"):
        tiny_stdit(num_heads=3)


def test_a_saved_model_is_the_same(tmp_path: Path) -> None:
    model = tiny_stdit()
    model.save_pretrained(tmp_path)
    assert torch.equal(predicted(model, **inputs()), predicted(STDiT.from_pretrained(tmp_path).eval(), **inputs()))
