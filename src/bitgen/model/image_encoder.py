"""Image encoders: pictures `[B, 3, H, W]` to a grid of features `[B, P, C]`.

convolution stem (float) -> a patch each -> ternary linear -> + position -> n x layer

Here is what all encoders have, and ours; those of others are named in `bitgen.model.encoders`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from bitgen.config import BitGenConfig
from bitgen.model.layers import TransformerLayer, run_layers
from bitgen.model.masks import AttentionMask
from bitgen.model.norm import RMSNorm
from bitgen.model.ternary import make_linear

_FIRST_STEM_WIDTH, _LAST_STEM_WIDTH = 32, 256
_SMALLEST_MOMENTUM = 0.01
_VARIANCE_FLOOR = 1e-3  # a channel that hardly varies would amplify rounding


class GhostBatchNorm(nn.Module):
    """Batch normalisation over fixed groups of rows (arXiv 1705.08741).

    Training from scratch, it learns shapes sooner than normalising each picture alone does, and the
    sooner, the larger its groups (docs/training.md has the figures). Because groups are fixed,
    gradients accumulated over small batches equal those of a large one as long as the batch size is
    a multiple of the group's.

    Attributes:
        group_size: rows whose means and variances are taken together in training.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_groups: torch.Tensor

    def __init__(self, width: int, group_size: int = 4) -> None:
        super().__init__()
        self.group_size = group_size
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.register_buffer("num_groups", torch.zeros(()))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        statistics = (self.running_mean, self.running_var, self.weight, self.bias)
        if not self.training:
            return F.batch_norm(x_BCHW, *statistics, eps=_VARIANCE_FLOOR)
        normalised = []
        seen = int(self.num_groups)
        for group in x_BCHW.split(self.group_size):
            seen += 1
            momentum = max(1 / seen, _SMALLEST_MOMENTUM)  # a plain mean at first
            normalised.append(F.batch_norm(group, *statistics, True, momentum, eps=_VARIANCE_FLOOR))
        self.num_groups.fill_(seen)
        return torch.cat(normalised)


class ConvolutionStem(nn.Module):
    """Strided 3x3 convolutions in float, `[B, 3, H, W] -> [B, width, H / patch, W / patch]`.

    Early convolutions make a vision transformer easier to train from scratch (arXiv 2106.14881).
    """

    def __init__(self, patch_size: int, num_residual: int) -> None:
        super().__init__()
        num_halvings = patch_size.bit_length() - 1
        widths = [min(_FIRST_STEM_WIDTH << i, _LAST_STEM_WIDTH) for i in range(num_halvings)]
        convolutions, before = [], 3
        for halving, width in enumerate(widths):
            convolutions.append(_convolution(before, width, stride=2))
            # Not behind the first: at half the picture's side they would cost most and say least.
            for _ in range(num_residual if halving else 0):
                convolutions.append(_convolution(width, width, stride=1))
            before = width
        self.convolutions = nn.ModuleList(convolutions)
        self.norms = nn.ModuleList(GhostBatchNorm(c.out_channels) for c in convolutions)
        self.output_width = widths[-1]

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        # Channels last is the layout that convolutions and patches are read in.
        x = images_B3HW.contiguous(memory_format=torch.channels_last)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            y = torch.relu(norm(convolution(x)))
            x = x + y if convolution.stride == (1, 1) else y
        return x


def _convolution(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


class ImageEncoder(nn.Module):
    """What every image encoder has.

    `forward(images_B3HW, mask=None, return_weights=False)` gives features `[B, P, C]` and the
    attention weights `[B, H, P, P]` of each layer of ours, if asked for.

    Attributes:
        num_tokens: P, features a picture.
        output_width: width of one feature.
        frozen: weights and batch statistics stay as they are.
    """

    num_tokens: int
    output_width: int

    def __init__(self, config: BitGenConfig) -> None:
        super().__init__()
        self.frozen = config.freeze_encoder

    def train(self, mode: bool = True) -> ImageEncoder:
        """As `nn.Module.train`; a frozen encoder stays in evaluation mode."""
        super().train(mode and not self.frozen)
        return self


class VisionTransformer(ImageEncoder):
    """A ternary vision transformer, trained from scratch; its layers are the decoder's."""

    def __init__(self, config: BitGenConfig) -> None:
        super().__init__(config)
        width, eps = config.encoder_hidden_size, config.rms_norm_eps
        self.stem = ConvolutionStem(config.patch_size, config.stem_residual_convolutions)
        self.patch_norm = RMSNorm(self.stem.output_width, eps)
        self.patch_embedding = make_linear(self.stem.output_width, width, config.quantization)
        self.num_tokens = (config.image_size // config.patch_size) ** 2
        self.position_embedding = nn.Parameter(torch.empty(1, self.num_tokens, width))
        nn.init.normal_(self.position_embedding, std=0.2)
        self.layers = nn.ModuleList(
            TransformerLayer(
                hidden_size=width,
                num_heads=config.encoder_heads,
                num_kv_heads=config.encoder_heads,
                head_dim=width // config.encoder_heads,
                intermediate_size=config.encoder_intermediate_size,
                quantization=config.quantization,
                eps=eps,
                dropout=config.dropout,
            )
            for _ in range(config.encoder_layers)
        )
        self.output_width = width

    def forward(
        self,
        images_B3HW: torch.Tensor,
        mask: AttentionMask | None = None,
        return_weights: bool = False,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Features; `mask` says which patch may see which (None = all see all)."""
        grid_BEHW = self.stem(images_B3HW)
        patches_BPE = grid_BEHW.flatten(2).transpose(1, 2)
        positions_1PC = self._positions(*grid_BEHW.shape[2:])
        x_BPC = self.patch_embedding(self.patch_norm(patches_BPE)) + positions_1PC
        mask = mask or AttentionMask.bidirectional()
        features_BPE, weights, _ = run_layers(
            self.layers, x_BPC, mask, return_weights=return_weights
        )
        return features_BPE, weights

    def _positions(self, height: int, width: int) -> torch.Tensor:
        """Position embedding `[1, P, C]` of a grid; resampled if it is not the config's."""
        side = math.isqrt(self.num_tokens)
        if (height, width) == (side, side):
            return self.position_embedding
        grid_1CHW = self.position_embedding.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        resampled_1CHW = F.interpolate(
            grid_1CHW, (height, width), mode="bilinear", align_corners=False, antialias=True
        )
        return resampled_1CHW.flatten(2).transpose(1, 2)
