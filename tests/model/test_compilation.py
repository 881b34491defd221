"""Compiled layers: the eager model's answers, few graphs, and only in training."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from bitgen.errors import ConfigError
from bitgen.kernels.matmul import ternary_matmul, ternary_matmul_reference
from bitgen.kernels.quantize import quantize_activation
from bitgen.model import compilation
from bitgen.model.bitgen import BitGenModel
from bitgen.model.compilation import require_compiler
from bitgen.model.layers import TransformerLayer

from .small_model import small_model

CPU = torch.device("cpu")

# What torch's own compiler touches; it hides the warning where warnings are not errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@pytest.fixture
def fresh_compiler() -> Iterator[Any]:
    """Torch's counters of graphs, from zero; skips where nothing can be compiled."""
    try:
        require_compiler(CPU)
    except ConfigError as error:
        pytest.skip(error.message)
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    yield counters
    torch.compiler.reset()


def make_pair(**changes: Any) -> tuple[BitGenModel, BitGenModel]:
    """The same model in training, eager and compiled."""
    eager, compiled = (small_model(encoder_layers=2, **changes).train() for _ in range(2))
    compiled.compile_layers()
    return eager, compiled


def loss_and_gradient(
    model: BitGenModel, length: int, num_images: int | None, robots: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of eight random rows, padded; the first `num_images` have a picture (None: no row has)."""
    generator = torch.Generator().manual_seed(length)
    ids_BL = torch.randint(4, 50, (8, length), generator=generator)
    lengths_B1 = torch.randint(3, length + 1, (8, 1), generator=generator)
    valid_BL = torch.arange(length) < lengths_B1
    images = None
    if num_images is not None:
        images = torch.randn(8, 3, 32, 32, generator=generator)
    image_mask_B = torch.arange(8) < (num_images or 0)
    mask = model.build_attention_mask(
        valid_BL, torch.ones(8, dtype=torch.long), image_mask_B, has_images=images is not None
    )
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = model(ids_BL, images, attention_mask=mask, return_robot_selection=robots)
    loss = F.cross_entropy(output.logits[valid_BL].float(), ids_BL[valid_BL])
    if robots:
        assert output.robot_logits is not None
        loss = loss + output.robot_logits.square().mean()
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(gradients)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [  # bfloat16 without ternary layers would take a minute to show nothing that these do not
        pytest.param(torch.float32, "none", id="fp32-none"),
        pytest.param(torch.float32, "ternary", id="fp32-ternary"),
        pytest.param(torch.bfloat16, "ternary", id="bf16-ternary"),
    ],
)
def test_compiled_training_gives_the_eager_loss_and_gradient(
    dtype: torch.dtype, quantization: str, fresh_compiler: Any
) -> None:
    """Two graphs serve all layers and sizes: the encoder's, and the decoder's for all its texts.

    In float32 they agree up to rounding, which in a ternary layer may turn the last bit of an
    activation. In bfloat16 each is some way off float32, and compiled must not be farther off.
    """
    eager, compiled = make_pair(quantization=quantization)
    for case in (
        (8, 8, False), (16, 8, False), (24, 8, False), (8, 5, False), (16, 3, True),
        (16, None, True),
    ):  # fmt: skip
        exact_loss, exact = loss_and_gradient(eager, *case, torch.float32)
        loss, gradient = loss_and_gradient(compiled, *case, dtype)
        off = (gradient - exact).norm()
        if dtype == torch.float32:
            torch.testing.assert_close(loss, exact_loss, rtol=1e-3, atol=0)
            assert off < {"none": 1e-5, "ternary": 2e-2}[quantization] * exact.norm()
        else:
            torch.testing.assert_close(loss, exact_loss, rtol=1e-2, atol=0)
            eager_gradient = loss_and_gradient(eager, *case, dtype)[1]
            assert off < 1.5 * (eager_gradient - exact).norm()
    assert fresh_compiler["stats"]["unique_graphs"] == 2
    assert not fresh_compiler["graph_break"]


@pytest.mark.slow
def test_compiled_integers_are_those_of_eager(fresh_compiler: Any) -> None:
    torch.manual_seed(0)
    x_MK = torch.randn(40, 96)
    ternary_NK = torch.randint(-1, 2, (32, 96), dtype=torch.int8)

    def product(
        x_MK: torch.Tensor, ternary_NK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        quantized_MK, scale = quantize_activation(x_MK)
        return quantized_MK, scale, ternary_matmul(quantized_MK, ternary_NK)

    quantized_MK, scale, sums_MN = torch.compile(product, fullgraph=True)(x_MK, ternary_NK)
    expected_MK, expected_scale = quantize_activation(x_MK)
    assert torch.equal(quantized_MK, expected_MK)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(sums_MN.long(), ternary_matmul_reference(expected_MK, ternary_NK))


def test_only_training_is_compiled_and_weights_keep_their_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[TransformerLayer] = []

    def record(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls.append(function.__self__)
            return function(*arguments)

        return call

    monkeypatch.setattr("bitgen.model.layers.compile_function", record)
    monkeypatch.setattr("bitgen.model.bitgen.require_compiler", lambda device: None)
    monkeypatch.setattr("bitgen.model.layers.mark_sizes_dynamic", lambda *_, **__: None)
    model = small_model(quantization="ternary")
    names = list(model.state_dict())
    model.compile_layers()
    assert list(model.state_dict()) == names
    ids_BL, images = torch.randint(4, 50, (2, 6)), torch.randn(2, 3, 32, 32)
    expected = model(ids_BL, images).logits
    with torch.no_grad():
        model.train()(ids_BL)
        model.eval()(ids_BL, attention_cache=model.new_cache(2, 6))
    model.train()(ids_BL, return_analysis_data=True)
    assert calls == []
    with torch.no_grad():
        for module in model.modules():  # batch statistics would differ
            module.training = isinstance(module, TransformerLayer)
    output = model(ids_BL, images).logits
    assert calls == [m for m in model.modules() if isinstance(m, TransformerLayer)]
    assert torch.equal(output, expected)


def test_without_what_compiling_needs_the_message_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compilation, "torch_version", lambda: (2, 4))
    with pytest.raises(ConfigError, match=r"needs torch 2\.5 or later") as old:
        require_compiler(CPU)
    assert "--compile" in str(old.value.remedy)
    monkeypatch.setattr(compilation, "torch_version", lambda: (2, 5))
    monkeypatch.setattr(compilation, "torch_can_compile", lambda: False)
    with pytest.raises(ConfigError, match=platform.python_version()):
        require_compiler(CPU)
    monkeypatch.setattr(compilation, "torch_can_compile", lambda: True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="there is no no-such-compiler") as missing:
        small_model().compile_layers()
    assert "CXX" in str(missing.value.remedy)
