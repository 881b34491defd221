"""Image encoders: pictures `[B, 3, H, W]` to a grid of features `[B, P, C]`.

vit:        conv stem (/4, float) -> 4x4 patches -> ternary linear -> + position -> n x layer
torchvision: the backbone up to its last grid of features, under torchvision's weight names
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from bitgen.config import BitGenConfig
from bitgen.errors import ConfigError, ModelFileError
from bitgen.model.layers import TransformerLayer
from bitgen.model.masks import AttentionMask
from bitgen.model.norm import RMSNorm
from bitgen.model.ternary import make_linear

_STEM_STRIDE = 4


class ConvolutionStem(nn.Module):
    """Two strided convolutions in float, `[B, 3, H, W] -> [B, width, H/4, W/4]`.

    Early convolutions make a vision transformer easier to train from scratch (arXiv 2106.14881).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, kernel_size=3, stride=2, padding=1)
        self.norm1 = nn.GroupNorm(1, width // 2)
        self.conv2 = nn.Conv2d(width // 2, width, kernel_size=3, stride=2, padding=1)
        self.norm2 = nn.GroupNorm(1, width)

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.conv1(images_B3HW)))
        return F.relu(self.norm2(self.conv2(x)))


class VisionTransformer(nn.Module):
    """A ternary vision transformer, trained from scratch; its layers are the decoder's."""

    def __init__(self, config: BitGenConfig) -> None:
        super().__init__()
        width, eps = config.encoder_hidden_size, config.rms_norm_eps
        stem_width = max(32, width // 4)
        if config.patch_size % _STEM_STRIDE:
            raise ConfigError(
                f"patch_size must be a multiple of {_STEM_STRIDE}, got {config.patch_size}."
            )
        self.stem = ConvolutionStem(stem_width)
        self.cells_per_patch = config.patch_size // _STEM_STRIDE
        patch_width = stem_width * self.cells_per_patch**2
        self.patch_norm = RMSNorm(patch_width, eps)
        self.patch_embedding = make_linear(patch_width, width, config.quantization)
        self.num_tokens = (config.image_size // config.patch_size) ** 2
        self.position_embedding = nn.Parameter(torch.empty(1, self.num_tokens, width))
        nn.init.normal_(self.position_embedding, std=0.02)
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

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        cells = self.stem(images_B3HW)
        batch, width, height, _ = cells.shape
        side, grid = self.cells_per_patch, height // self.cells_per_patch
        patches = cells.view(batch, width, grid, side, grid, side).permute(0, 2, 4, 1, 3, 5)
        patches_BPC = patches.reshape(batch, grid * grid, width * side * side)
        x_BPC = self.patch_embedding(self.patch_norm(patches_BPC)) + self.position_embedding
        mask = AttentionMask.bidirectional()
        for layer in self.layers:
            x_BPC, _ = layer(x_BPC, mask)
        return x_BPC


class TorchvisionBackbone(nn.Module):
    """A torchvision classifier cut where it last gives a grid of features.

    `backbone` keeps torchvision's own parameter names, so that its published weights load by name.
    """

    def __init__(self, config: BitGenConfig) -> None:
        super().__init__()
        from torchvision import models

        name = config.image_encoder
        if name not in models.list_models(module=models):
            raise ConfigError(
                f"There is no image encoder {name!r}.",
                remedy="Take vit, or a torchvision classifier such as mobilenet_v3_small,"
                " efficientnet_b0, resnet50, convnext_tiny or vit_b_16.",
            )
        options = {"image_size": config.image_size} if name.startswith("vit_") else {}
        self.backbone = models.get_model(name, weights=None, **options)
        for head in ("fc", "classifier", "head", "heads"):
            if hasattr(self.backbone, head):
                setattr(self.backbone, head, nn.Identity())
        self.frozen = config.freeze_encoder
        self.eval()
        with torch.no_grad():
            probe_BPC = self(torch.zeros(1, 3, config.image_size, config.image_size))
        self.train()
        self.num_tokens, self.output_width = probe_BPC.shape[1], probe_BPC.shape[2]

    def train(self, mode: bool = True) -> TorchvisionBackbone:
        """A frozen backbone stays in evaluation mode, so that its batch statistics are kept."""
        super().train(mode and not self.frozen)
        return self

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        net: Any = self.backbone
        if hasattr(net, "encoder") and hasattr(net, "class_token"):
            tokens = net._process_input(images_B3HW)
            class_token = net.class_token.expand(tokens.shape[0], -1, -1)
            encoded: torch.Tensor = net.encoder(torch.cat([class_token, tokens], dim=1))
            return encoded[:, 1:]
        if hasattr(net, "layer4"):
            x = net.maxpool(net.relu(net.bn1(net.conv1(images_B3HW))))
            grid = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        elif hasattr(net, "trunk_output"):
            grid = net.trunk_output(net.stem(images_B3HW))
        elif hasattr(net, "features"):
            grid = net.features(images_B3HW)
            if hasattr(net, "permute"):  # Swin keeps its channels last
                grid = grid.permute(0, 3, 1, 2)
        else:
            raise ConfigError(
                f"{type(net).__name__} gives no grid of features.",
                remedy="Take a backbone such as mobilenet_v3_small, resnet50 or vit_b_16.",
            )
        return grid.flatten(2).transpose(1, 2)


def make_image_encoder(config: BitGenConfig) -> VisionTransformer | TorchvisionBackbone:
    """The encoder that `config.image_encoder` names, with random weights.

    Raises:
        ConfigError: neither `vit` nor a torchvision backbone that gives a grid of features.
    """
    encoder: VisionTransformer | TorchvisionBackbone
    if config.image_encoder == "vit":
        encoder = VisionTransformer(config)
    else:
        encoder = TorchvisionBackbone(config)
    if config.freeze_encoder:
        encoder.requires_grad_(False)
    return encoder


def load_encoder_weights(
    encoder: VisionTransformer | TorchvisionBackbone, name: str, weights: str
) -> None:
    """Load published weights into an encoder.

    Args:
        encoder: what `make_image_encoder` gave.
        name: the encoder's name in the config.
        weights: a local file (safetensors, or a state dict saved by torch), or one of torchvision's
            own weight names such as `DEFAULT` or `IMAGENET1K_V1`, which torchvision downloads.

    Raises:
        ModelFileError: the file is missing, damaged, or holds other names or shapes.
        ConfigError: torchvision knows no such weights.
    """
    path = Path(weights)
    if path.exists():
        state = _read_state_dict(path)
    elif isinstance(encoder, TorchvisionBackbone):
        from torchvision import models

        try:
            member = models.get_model_weights(name)[weights]
        except (KeyError, ValueError) as error:
            known = ", ".join(entry.name for entry in models.get_model_weights(name))
            raise ConfigError(
                f"{weights!r} is neither a file nor weights that torchvision has for {name}.",
                remedy=f"Give a file, or one of: DEFAULT, {known}.",
            ) from error
        state = member.get_state_dict(progress=False)
    else:
        raise ModelFileError(f"There is no encoder weights file {weights}.")
    target: nn.Module = encoder.backbone if isinstance(encoder, TorchvisionBackbone) else encoder
    expected = target.state_dict()
    missing = sorted(set(expected) - set(state))
    mismatched = sorted(k for k in expected if k in state and state[k].shape != expected[k].shape)
    if missing or mismatched:
        first = (missing or mismatched)[0]
        raise ModelFileError(
            f"{weights} does not fit the image encoder {name}: {len(missing)} of {len(expected)}"
            f" tensors are missing and {len(mismatched)} have another shape (first: {first}).",
            remedy="Give weights of the same architecture and image size.",
        )
    target.load_state_dict({key: state[key] for key in expected})


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has its own exception for a damaged file
        raise ModelFileError(
            f"{path} is not a weights file that can be read ({type(error).__name__}).",
            remedy="Give a safetensors file, or a plain state dict saved by torch.save.",
        ) from error
    if not isinstance(state, dict):
        raise ModelFileError(f"{path} holds a {type(state).__name__}, not a state dict.")
    return state
