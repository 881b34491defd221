"""The training layer, the packed layer, and their gradients."""

from __future__ import annotations

import pytest
import torch

from bitgen.kernels.quantize import quantize_activation, quantize_weight
from bitgen.model.layers import _SquaredReluGate, squared_relu_gate_reference
from bitgen.model.norm import RMSNorm, rms_norm_reference
from bitgen.model.ternary import (
    PackedTernaryLinear,
    TernaryLinear,
    autocast_dtype,
    linear_group,
    make_linear,
    pack_ternary_layers,
)


def straight_through_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """BitNet b1.58 as its papers write it: dequantized values, rounding hidden by detach."""
    ternary, scale = quantize_weight(weight)
    quantized, token_scale = quantize_activation(x)
    x_rounded = x + (quantized / token_scale - x).detach()
    weight_rounded = weight + (ternary * scale - weight).detach()
    return x_rounded @ weight_rounded.T


def test_output_and_gradients_equal_the_straight_through_reference() -> None:
    torch.manual_seed(0)
    layer = TernaryLinear(48, 32)
    x = torch.randn(3, 5, 48, requires_grad=True)
    gradient = torch.randn(3, 5, 32)
    expected = straight_through_reference(x, layer.weight)
    expected_gradients = torch.autograd.grad(expected, [x, layer.weight], gradient)
    output = layer(x)
    gradients = torch.autograd.grad(output, [x, layer.weight], gradient)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_a_group_gives_what_its_layers_give_alone() -> None:
    torch.manual_seed(0)
    layers = [TernaryLinear(48, width) for width in (16, 8, 24)]
    x = torch.randn(2, 7, 48, requires_grad=True)
    parameters = [x, *[layer.weight for layer in layers]]
    together = linear_group(layers, x)
    alone = tuple(layer(x) for layer in layers)
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours, theirs)
    ours = torch.autograd.grad(sum(o.square().sum() for o in together), parameters)
    theirs = torch.autograd.grad(sum(o.square().sum() for o in alone), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


def test_bf16_autocast_stays_close_and_keeps_float32_weight_gradients() -> None:
    torch.manual_seed(0)
    layer = TernaryLinear(64, 64)
    x = torch.randn(16, 64)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_dtype("cpu") == torch.bfloat16
        output = layer(x)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(output.float(), exact, atol=0.02, rtol=0.01)
    assert autocast_dtype("cpu") is None


def test_a_device_without_autocast_multiplies_and_has_gradients() -> None:
    """No torch has autocast for the meta device, as older ones have none for Apple's GPUs."""
    with torch.device("meta"):
        layer, x = TernaryLinear(8, 6), torch.randn(2, 3, 8, requires_grad=True)
    output = layer(x)
    output.sum().backward()
    assert output.shape == (2, 3, 6) and output.dtype == torch.float32
    assert x.grad is not None and x.grad.shape == x.shape
    assert layer.weight.grad is not None and layer.weight.grad.shape == layer.weight.shape


@pytest.mark.parametrize("width", [64, 50])
def test_packed_layer_equals_the_trained_one_bit_for_bit(width: int) -> None:
    torch.manual_seed(0)
    layer = TernaryLinear(width, 33)
    x = torch.randn(4, 6, width)
    packed = PackedTernaryLinear.from_trained(layer)
    assert torch.equal(packed(x), layer(x))
    assert torch.equal(linear_group([packed, packed], x)[1], layer(x))
    copy = PackedTernaryLinear(width, 33)
    copy(x)
    copy.load_state_dict(packed.state_dict())
    assert torch.equal(copy(x), layer(x))


def test_pack_ternary_layers_reaches_nested_layers_and_leaves_others() -> None:
    model = torch.nn.Sequential(
        TernaryLinear(8, 8), torch.nn.Sequential(TernaryLinear(8, 4)), torch.nn.Linear(4, 2)
    )
    x = torch.randn(3, 8)
    before = model(x)
    pack_ternary_layers(model)
    assert not any(isinstance(module, TernaryLinear) for module in model.modules())
    assert sum(isinstance(module, PackedTernaryLinear) for module in model.modules()) == 2
    assert torch.equal(model(x), before)


def test_full_precision_layer_is_a_plain_linear() -> None:
    assert type(make_linear(4, 3, "none")) is torch.nn.Linear
    assert type(make_linear(4, 3, "ternary")) is TernaryLinear


def test_rms_norm_equals_its_reference_and_so_does_its_gradient() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(48, 1e-5)
    torch.nn.init.normal_(norm.weight)
    x, gradient = torch.randn(2, 5, 48, requires_grad=True), torch.randn(2, 5, 48)
    reference = rms_norm_reference(x, norm.weight, 1e-5)
    assert torch.equal(norm(x), reference)
    ours = torch.autograd.grad(norm(x), [x, norm.weight], gradient)
    theirs = torch.autograd.grad(reference, [x, norm.weight], gradient)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_squared_relu_gate_equals_its_reference_and_so_does_its_gradient() -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(4, 9, requires_grad=True) for _ in range(2))
    gradient = torch.randn(4, 9)
    output = _SquaredReluGate.apply(gate, up)
    reference = squared_relu_gate_reference(gate, up)
    assert torch.equal(output, reference)
    ours = torch.autograd.grad(output, [gate, up], gradient)
    theirs = torch.autograd.grad(reference, [gate, up], gradient)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
