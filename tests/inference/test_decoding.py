"""Recorded decoding steps against plain calls of the model.

A CUDA graph needs a GPU. What makes a step fit to be one does not: `tape` records the tensor
operations of a step on the CPU and repeats them on the same memory, with the same numbers, as a
CUDA graph does. What depends on the host would be seen to stand still.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from bitgen.config import BitGenConfig
from bitgen.errors import BitGenError, ConfigError, InputError
from bitgen.inference import decoding
from bitgen.inference.decoding import DecodingGraphs, Step
from bitgen.inference.generate import Generation, generate
from bitgen.inference.predictor import BitGen
from bitgen.model.bitgen import BitGenModel
from bitgen.model.cache import AttentionCache
from bitgen.model.masks import AttentionMask
from bitgen.model.ternary import pack_ternary_layers

BOS, EOS, NEVER, USED_VOCABULARY = 1, 2, (0, 1, 3, 4), 11
PROMPTS = [[BOS], [BOS, 5, 6, 7], [BOS, 6]]


def toy_model(seed: int = 0, packed: bool = False, **changes: Any) -> BitGenModel:
    torch.manual_seed(seed)
    values = {
        "vocab_size": 13, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
        "head_dim": 8, "intermediate_size": 32, "max_positions": 40, "image_size": 16,
        "patch_size": 8, "encoder_hidden_size": 16, "encoder_layers": 1, "encoder_heads": 2,
        "encoder_intermediate_size": 16,
    }  # fmt: skip
    model = BitGenModel(BitGenConfig(**{**values, **changes}))
    with torch.no_grad():  # far from uniform, so that no two tokens are nearly tied
        model.text_decoder.embed_tokens.weight.normal_(std=0.35)
        for name, parameter in model.named_parameters():
            if name.endswith("sub_norm.weight"):
                parameter.fill_(1.0)
    if packed:
        pack_ternary_layers(model)
    return model.eval()


def run(
    model: BitGenModel,
    prompts: list[list[int]] = PROMPTS,
    with_images: bool = True,
    seed: int = 1,
    **options: Any,
) -> list[Generation]:
    generator = torch.Generator().manual_seed(seed)
    options.setdefault("max_tokens", 9)
    if options.get("temperature"):
        options["seeds"] = [7 + row for row in range(len(prompts))]
    return generate(
        model,
        torch.randn(len(prompts), 3, 16, 16, generator=generator) if with_images else None,
        prompts,
        eos_id=EOS,
        never_ids=NEVER,
        vocab_size=USED_VOCABULARY,
        **options,
    )


class _Tape(TorchDispatchMode):
    """Writes down each tensor operation, with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


@functools.cache
def can_write_down() -> bool:
    """Whether this torch shows operations in inference mode (2.2 does not)."""
    try:
        with torch.inference_mode(), _Tape():
            torch.arange(3) / 2
    except RuntimeError:
        return False
    return True


def tape(step: Step) -> Step:
    """A recorder for the CPU: repeats the operations of one call, Python has no part in it.

    Where torch cannot show them, the step is called again, and only its memory stays the same.
    """
    output = step()  # what is allocated and asked only once
    if not can_write_down():
        return lambda: output.copy_(step())
    with _Tape() as recorded:
        output = step()

    def repeat() -> torch.Tensor:
        for func, args, kwargs, old in recorded.calls:
            new = func(*args, **kwargs)
            for old_leaf, new_leaf in zip(tree_leaves(old), tree_leaves(new), strict=True):
                # A view, or what was changed in place, is where it was.
                if (
                    isinstance(old_leaf, torch.Tensor)
                    and old_leaf.data_ptr() != new_leaf.data_ptr()
                ):
                    old_leaf.copy_(new_leaf)
        return output

    return repeat


def assert_same(got: list[Generation], expected: list[Generation], tolerance: float) -> None:
    assert [row.tokens for row in got] == [row.tokens for row in expected]
    assert [row.finished for row in got] == [row.finished for row in expected]
    for mine, other in zip(got, expected, strict=True):
        assert mine.log_probability == pytest.approx(other.log_probability, abs=tolerance)


@pytest.mark.parametrize(
    "options",
    [{}, {"beam_size": 3}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 3, "top_p": 0.9}],
    ids=["greedy", "beams", "sampling", "top k and p"],
)
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    # A last bit of float that differs can round an int8 activation the other way.
    [
        ({"quantization": "none"}, 1e-4),
        ({"quantization": "none", "attention_mode": "causal"}, 1e-4),
        ({"packed": True}, 0.05),
    ],
    ids=["float", "causal", "packed"],
)
@pytest.mark.parametrize("with_images", [True, False], ids=["pictures", "text"])
def test_recorded_steps_generate_what_the_model_does(
    options: dict[str, Any], changes: dict[str, Any], tolerance: float, with_images: bool
) -> None:
    said = set()
    for seed in range(3):
        model = toy_model(seed, **changes)
        graphs = DecodingGraphs(model, record=tape)
        # One recording serves one call after another, whatever the prompts.
        for prompts in (PROMPTS, [[BOS, 7, 8, 9, 10, 5]] * 3, PROMPTS[::-1]):
            expected = run(model, prompts, with_images, seed, **options)
            got = run(model, prompts, with_images, seed, graphs=graphs, **options)
            assert_same(got, expected, tolerance)
            said |= {tuple(row.tokens) for row in got}
    assert len(said) > 3, "the toy models should say different things"


def test_one_recording_a_number_of_rows_and_length() -> None:
    model = toy_model(max_positions=200)
    recordings = []

    def record(step: Step) -> Step:
        recordings.append(step)
        return tape(step)

    graphs = DecodingGraphs(model, most=2, record=record)
    for max_tokens in (9, 30):
        run(model, graphs=graphs, max_tokens=max_tokens)
    assert len(recordings) == 1
    run(model, graphs=graphs, max_tokens=80)  # a longer cache
    run(model, PROMPTS[:1], graphs=graphs)  # fewer rows: the first recording makes room
    assert len(recordings) == 3
    run(model, graphs=graphs, max_tokens=80)
    assert len(recordings) == 3
    run(model, graphs=graphs)
    assert len(recordings) == 4


def test_a_single_token_needs_no_step() -> None:
    def record(step: Step) -> Step:
        raise AssertionError("nothing is to be recorded")

    model = toy_model()
    graphs = DecodingGraphs(model, record=record)
    assert run(model, max_tokens=1, graphs=graphs) == run(model, max_tokens=1)


def test_new_weights_are_recorded_anew() -> None:
    model = toy_model(0)
    graphs = DecodingGraphs(model, record=tape)
    run(model, graphs=graphs)
    for assign in (False, True):
        other = toy_model(1 + assign)
        model.load_state_dict(other.state_dict(), assign=assign)
        assert_same(run(model, graphs=graphs), run(other), 0.05)


def test_what_an_earlier_text_left_behind_is_not_seen() -> None:
    model = toy_model(quantization="none")
    graphs = DecodingGraphs(model, record=tape)
    expected = run(model)
    run(model, graphs=graphs)
    (decoder,) = graphs._decoders.values()
    with torch.inference_mode():
        for layer in decoder.cache.layers:
            layer.keys.fill_(float("nan"))
            layer.values.fill_(float("nan"))
    assert_same(run(model, graphs=graphs), expected, 1e-4)


def test_a_recording_that_stands_still_is_refused() -> None:
    def broken(step: Step) -> Step:
        output = step().clone()
        return lambda: output

    with pytest.raises(BitGenError, match="answers otherwise") as caught:
        model = toy_model()
        run(model, graphs=DecodingGraphs(model, record=broken))
    assert "Leave cuda_graphs out" in str(caught.value)


def test_what_cannot_be_recorded_is_refused() -> None:
    model = toy_model()
    with pytest.raises(ConfigError, match="need a CUDA device; the model is on cpu"):
        DecodingGraphs(model)
    with pytest.raises(ConfigError, match="with experts"):
        DecodingGraphs(toy_model(num_experts=2, experts_per_token=1), record=tape)
    graphs = DecodingGraphs(model, record=tape)
    with pytest.raises(InputError, match="no speculative decoding or attention window"):
        run(model, graphs=graphs, attention_window=4)
    with pytest.raises(InputError, match="no speculative decoding or attention window"):
        run(model, graphs=graphs, speculative=True)
    with pytest.raises(ValueError, match="another model"):
        run(toy_model(), graphs=graphs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device it is no error")
def test_captions_by_cuda_graphs_need_a_gpu(make_run: Callable[..., Path]) -> None:
    model = BitGen.load(make_run(), device="cpu")
    with pytest.raises(ConfigError, match="the model is on cpu"):
        model.caption(Image.new("RGB", (32, 32)), cuda_graphs=True)


# The cache --------------------------------------------------------------------------------------


def read_prompt(model: BitGenModel, length: int) -> tuple[Any, torch.Tensor]:
    """A static cache that holds 2 rows, the first padded on the left by 2."""
    ids_BL = torch.randint(5, 11, (2, length), generator=torch.Generator().manual_seed(3))
    valid_BL = torch.ones(2, length, dtype=torch.bool)
    valid_BL[0, :2] = False
    cache = model.new_cache(2, 32)
    model(
        ids_BL,
        attention_mask=model.build_attention_mask(valid_BL, has_images=False),
        attention_cache=cache,
    )
    return cache, ids_BL


@torch.inference_mode()
def test_a_fixed_cache_answers_as_a_static_one() -> None:
    model = toy_model(quantization="none")
    static, _ = read_prompt(model, 5)
    fixed = model.new_fixed_cache(4, 16)
    rows = torch.tensor([1, 0, 0, 1])
    fixed.load(static, rows)
    static.reorder(rows)
    for step in range(11):
        tokens_B1 = (torch.arange(4)[:, None] + step) % 6 + 5
        expected = model(tokens_B1, attention_cache=static).logits
        got = model(tokens_B1, attention_cache=fixed).logits
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        if step == 4:
            for cache in (static, fixed):
                cache.reorder(torch.tensor([3, 3, 1, 2]))
    assert fixed.length == static.length == 16
    with pytest.raises(ValueError, match="room for 16 positions"):
        model(tokens_B1, attention_cache=fixed)


@torch.inference_mode()
def test_a_fixed_cache_refuses_what_would_not_be_alike() -> None:
    model = toy_model()
    static, ids_BL = read_prompt(model, 5)
    fixed = model.new_fixed_cache(2, 8)
    with pytest.raises(ValueError, match="one token a row"):
        model(ids_BL, attention_cache=fixed)
    with pytest.raises(ValueError, match="window"):
        mask = AttentionMask.sliding_window(2)
        model(ids_BL[:, :1], attention_mask=mask, attention_cache=fixed)
    with pytest.raises(ValueError, match="keeps its 2 rows"):
        fixed.reorder(torch.tensor([0]))
    with pytest.raises(ValueError, match="2 rows of 8 columns; 3 rows of 5"):
        fixed.load(static, torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match="static cache"):
        fixed.rewind([0, 0])
    static.rewind([3, 5])
    with pytest.raises(ValueError, match="different lengths"):
        fixed.load(static, torch.tensor([0, 1]))


# On a GPU ---------------------------------------------------------------------------------------


class _HostTraffic(TorchDispatchMode):
    """Notes what a CUDA graph cannot hold: copies between host and device, and waiting for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.calls: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in [*given, *made] if tensor.dim()}
        if len(devices) > 1:
            self.found.append(str(func))
        if "cuda" in devices:
            shapes = tree_map_only(torch.Tensor, lambda t: tuple(t.shape), (args, kwargs))
            self.calls.append((str(func), str(shapes)))
        return result


@pytest.mark.parametrize("changes", [{"quantization": "none"}, {}, {"attention_mode": "causal"}])
def test_a_step_on_a_gpu_neither_waits_nor_depends_on_the_host(changes: dict[str, Any]) -> None:
    """By tensors without data that say they are on a GPU: whatever asks for their values fails."""
    if not can_write_down():
        pytest.skip("this torch does not show operations in inference mode")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.inference_mode():
        with torch.device("cuda"):
            model = toy_model(**changes)
        tokens_B1 = torch.zeros(3, 1, dtype=torch.int64, device="cuda")

        def step(cache: AttentionCache) -> list[tuple[str, str]]:
            with _HostTraffic() as traffic:
                logits_BV = decoding._next_logits(model, tokens_B1, cache)
            assert logits_BV.device.type == "cuda" and logits_BV.shape == (3, 13)
            assert not traffic.found
            return traffic.calls

        fixed, static = model.new_fixed_cache(3, 64), model.new_cache(3, 64)
        steps = [step(fixed) for _ in range(3)]
        assert step(static) != step(static), "the steps of a static cache differ"
    assert len(steps[0]) > 50
    assert steps[0] == steps[1] == steps[2], "a number or shape differs from step to step"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"beam_size": 3}], ids=["greedy", "beams"])
def test_cuda_graphs_generate_what_the_model_does(options: dict[str, Any]) -> None:
    model = toy_model(quantization="none").cuda()
    graphs = DecodingGraphs(model)
    for prompts in (PROMPTS, PROMPTS[::-1]):
        expected = run(model, prompts, with_images=False, **options)
        got = run(model, prompts, with_images=False, graphs=graphs, **options)
        assert_same(got, expected, 1e-3)
