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
from bitgen.model.layers import TransformerLayer, run_layers
from bitgen.model.masks import AttentionMask
from bitgen.model.norm import RMSNorm
from bitgen.model.ternary import make_linear

_FIRST_STEM_WIDTH, _LAST_STEM_WIDTH = 32, 256
_GHOST_BATCH = 4
_SMALLEST_MOMENTUM = 0.01
_VARIANCE_FLOOR = 1e-3  # a channel that hardly varies would amplify rounding


class GhostBatchNorm(nn.Module):
    """Batch normalisation over fixed groups of four rows (arXiv 1705.08741).

    Training from scratch, it learns shapes sooner than normalising each picture alone does
    (docs/training.md has the figures). Because groups are fixed, gradients accumulated over small
    batches equal those of a large one as long as the batch size is a multiple of four.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_groups: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
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
        for group in x_BCHW.split(_GHOST_BATCH):
            seen += 1
            momentum = max(1 / seen, _SMALLEST_MOMENTUM)  # a plain mean at first
            normalised.append(F.batch_norm(group, *statistics, True, momentum, eps=_VARIANCE_FLOOR))
        self.num_groups.fill_(seen)
        return torch.cat(normalised)


class ConvolutionStem(nn.Module):
    """Strided 3x3 convolutions in float, `[B, 3, H, W] -> [B, width, H / patch, W / patch]`.

    Early convolutions make a vision transformer easier to train from scratch (arXiv 2106.14881).
    """

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        num_halvings = patch_size.bit_length() - 1
        widths = [min(_FIRST_STEM_WIDTH << i, _LAST_STEM_WIDTH) for i in range(num_halvings)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, width, kernel_size=3, stride=2, padding=1, bias=False)
            for before, width in zip([3, *widths], widths, strict=False)
        )
        self.norms = nn.ModuleList(GhostBatchNorm(width) for width in widths)
        self.output_width = widths[-1]

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        # Channels last is the layout that convolutions and patches are read in.
        x = images_B3HW.contiguous(memory_format=torch.channels_last)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = torch.relu(norm(convolution(x)))
        return x


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
        self.stem = ConvolutionStem(config.patch_size)
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
        patches_BPE = self.stem(images_B3HW).flatten(2).transpose(1, 2)
        x_BPC = self.patch_embedding(self.patch_norm(patches_BPE)) + self.position_embedding
        mask = mask or AttentionMask.bidirectional()
        features_BPE, weights, _ = run_layers(
            self.layers, x_BPC, mask, return_weights=return_weights
        )
        return features_BPE, weights


class TorchvisionBackbone(ImageEncoder):
    """A torchvision classifier cut where it last gives a grid of features.

    `backbone` keeps torchvision's own parameter names, so that its published weights load by name.
    """

    def __init__(self, config: BitGenConfig) -> None:
        super().__init__(config)
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
        self.eval()
        with torch.no_grad():
            probe_BPC, _ = self(torch.zeros(1, 3, config.image_size, config.image_size))
        self.train()
        self.num_tokens, self.output_width = probe_BPC.shape[1], probe_BPC.shape[2]

    def forward(
        self,
        images_B3HW: torch.Tensor,
        mask: AttentionMask | None = None,
        return_weights: bool = False,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Features, and no weights: torchvision's layers do not show theirs.

        Raises:
            ValueError: a mask, which torchvision's layers do not take.
        """
        if mask is not None:
            raise ValueError(f"{type(self.backbone).__name__} takes no attention mask.")
        return self._grid(images_B3HW), ()

    def _grid(self, images_B3HW: torch.Tensor) -> torch.Tensor:
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


def make_image_encoder(config: BitGenConfig) -> ImageEncoder:
    """The encoder that `config.image_encoder` names, with random weights.

    Raises:
        ConfigError: neither `vit` nor a torchvision backbone that gives a grid of features.
    """
    encoder: ImageEncoder
    if config.image_encoder == "vit":
        encoder = VisionTransformer(config)
    else:
        encoder = TorchvisionBackbone(config)
    if config.freeze_encoder:
        encoder.requires_grad_(False)
    return encoder


def load_encoder_weights(encoder: ImageEncoder, name: str, weights: str) -> None:
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
