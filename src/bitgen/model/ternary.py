"""Linear layers with ternary weights: one for training, one for running packed.

    x [..., K] -> int8 a token -> integer product with T [N, K] -> * s / scale -> [..., N]

Both layers compute the same integers and multiply them by the same float32 number, so a packed
model answers what the trained one answers, bit for bit in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bitgen.kernels.gpu import gpu_kernels
from bitgen.kernels.matmul import ternary_matmul, without_autocast
from bitgen.kernels.packing import pack_ternary, unpack_ternary
from bitgen.kernels.quantize import quantize_activation, quantize_weight
from bitgen.kernels.tiles import tile_shape


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of the autocast region that we are in; None outside of one."""
    if hasattr(torch, "get_autocast_dtype"):
        try:
            enabled = torch.is_autocast_enabled(device_type)
        except RuntimeError:  # this torch has no autocast for the device (MPS in torch 2.4)
            return None
        return torch.get_autocast_dtype(device_type) if enabled else None
    if device_type == "cpu":
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def _joined(parts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """`torch.cat`, which copies even where there is but one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


class _TernaryLinearFunction(torch.autograd.Function):
    """Forward in integers; backward takes both roundings as identity (straight-through).

    Several weights that multiply the same input are taken together: the input is quantized once,
    and one product serves all.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dtype: torch.dtype, *weights_NK: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        quantized = [quantize_weight(weight_NK) for weight_NK in weights_NK]
        ternary_NK = _joined([ternary for ternary, _ in quantized])
        scales = [scale for _, scale in quantized]
        x_quantized, token_scale = quantize_activation(x)
        x_MK, token_scale_M1 = x_quantized.reshape(-1, x.shape[-1]), token_scale.reshape(-1, 1)
        ctx.save_for_backward(x_MK, token_scale_M1, ternary_NK, *scales)
        ctx.x_dtype = x.dtype
        return tuple(
            sums_MN.mul_(scale / token_scale_M1)
            .to(dtype)
            .contiguous()
            .view(*x.shape[:-1], sums_MN.shape[1])
            for sums_MN, scale in zip(
                ternary_matmul(x_MK, ternary_NK).split([len(w) for w in weights_NK], dim=1),
                scales,
                strict=True,
            )
        )

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_MK, token_scale_M1, ternary_NK, *scales = ctx.saved_tensors
        widths = [gradient.shape[-1] for gradient in gradients]
        gradient_MN = _joined([g.reshape(-1, g.shape[-1]) for g in gradients], dim=1)
        dtype = gradient_MN.dtype
        x_gradient = None
        with without_autocast(gradient_MN.device.type):
            if ctx.needs_input_grad[0]:
                parts_NK = ternary_NK.to(dtype).split(widths)
                weight_NK = _joined([t * s for t, s in zip(parts_NK, scales, strict=True)])
                x_gradient = (gradient_MN @ weight_NK.to(dtype)).to(ctx.x_dtype)
                x_gradient = x_gradient.view(*gradients[0].shape[:-1], x_MK.shape[1])
            if not any(ctx.needs_input_grad[2:]):
                return x_gradient, None, *[None] * len(scales)
            weight_gradient = gradient_MN.T @ (x_MK / token_scale_M1).to(dtype)
        return x_gradient, None, *weight_gradient.float().split(widths)


class TernaryLinear(nn.Module):
    """Linear layer without bias that trains float weights and multiplies by their ternary values.

    `[..., K] -> [..., N]`. The output has the autocast dtype inside an autocast region, and the
    input's dtype outside of one.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.normal_(self.weight, std=1 / math.sqrt(in_features))

    @property
    def packed_bytes(self) -> int:
        """Bytes that `PackedTernaryLinear` takes for this layer: tiles and scale."""
        return math.prod(tile_shape(self.out_features, self.in_features)) + 4

    def ternary(self) -> torch.Tensor:
        """The weights `T` as they are now, int8 `[N, K]`."""
        return quantize_weight(self.weight.detach())[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear_group([self], x)[0]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class PackedTernaryLinear(nn.Module):
    """The run-time form of `TernaryLinear`: weights packed at 2 bits, no gradient.

    Buffers: `packed`, tiles uint8 `[ceil(N / 32), ceil(K / 16), 128]` (see `bitgen.kernels.tiles`),
    and `scale` float32 `[]`; both are what an artifact stores. Where there are Triton kernels for
    the device, they read the tiles; elsewhere the weights are unpacked to int8 once, at the first
    call.
    """

    packed: torch.Tensor
    scale: torch.Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        shape = tile_shape(out_features, in_features)
        self.register_buffer("packed", torch.zeros(shape, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(()))
        self._ternary_NK: torch.Tensor | None = None

    @classmethod
    def from_trained(cls, layer: TernaryLinear) -> PackedTernaryLinear:
        """Quantize and pack a trained layer's weights."""
        ternary_NK, scale = quantize_weight(layer.weight.detach())
        packed_layer = cls(layer.in_features, layer.out_features).to(layer.weight.device)
        packed_layer.packed.copy_(pack_ternary(ternary_NK))
        packed_layer.scale.copy_(scale)
        return packed_layer

    def ternary(self) -> torch.Tensor:
        """The weights `T`, int8 `[N, K]`."""
        return unpack_ternary(self.packed, self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(*_quantize(x)).to(x.dtype)

    def multiply(self, quantized: torch.Tensor, token_scale: torch.Tensor) -> torch.Tensor:
        """The product with an input quantized before, int8 `[..., K]` and float32 `[..., 1]`."""
        kernels = gpu_kernels(self.packed.device)
        if kernels is not None:
            output_MN: torch.Tensor = kernels.ternary_product(
                quantized.reshape(-1, self.in_features),
                token_scale,
                self.packed,
                self.out_features,
                self.scale,
            )
            return output_MN.view(*quantized.shape[:-1], self.out_features)
        if self._ternary_NK is None or self._ternary_NK.device != self.packed.device:
            self._ternary_NK = self.ternary()
        sums_MN = ternary_matmul(quantized.reshape(-1, self.in_features), self._ternary_NK)
        output_MN = sums_MN.mul_(self.scale / token_scale.reshape(-1, 1))
        return output_MN.view(*quantized.shape[:-1], self.out_features)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._ternary_NK = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_activation` for packed layers, by the device's own kernel where it has one."""
    kernels = gpu_kernels(x.device)
    if kernels is None:
        return quantize_activation(x)
    quantized: tuple[torch.Tensor, torch.Tensor] = kernels.quantize(x)
    return quantized


def linear_group(layers: Sequence[nn.Module], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each layer's output for the same input `[..., K]`, which is quantized only once."""
    if all(isinstance(layer, TernaryLinear) for layer in layers):
        dtype = autocast_dtype(x.device.type) or x.dtype
        outputs: tuple[torch.Tensor, ...] = _TernaryLinearFunction.apply(
            x, dtype, *[layer.weight for layer in layers]
        )
        return outputs
    packed = [layer for layer in layers if isinstance(layer, PackedTernaryLinear)]
    if len(packed) == len(layers):
        quantized, token_scale = _quantize(x)
        return tuple(layer.multiply(quantized, token_scale).to(x.dtype) for layer in packed)
    return tuple(layer(x) for layer in layers)


def make_linear(in_features: int, out_features: int, quantization: str) -> nn.Module:
    """A linear layer without bias: `TernaryLinear`, or `nn.Linear` for quantization "none"."""
    if quantization == "ternary":
        return TernaryLinear(in_features, out_features)
    layer = nn.Linear(in_features, out_features, bias=False)
    nn.init.normal_(layer.weight, std=1 / math.sqrt(in_features))
    return layer


def pack_ternary_layers(model: nn.Module) -> None:
    """Replace every `TernaryLinear` of `model`, in place, by its `PackedTernaryLinear`."""
    for name, child in model.named_children():
        if isinstance(child, TernaryLinear):
            setattr(model, name, PackedTernaryLinear.from_trained(child))
        else:
            pack_ternary_layers(child)
