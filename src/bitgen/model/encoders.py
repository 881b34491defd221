"""Image encoders by name, and the weights that they start from.

vit          ours, ternary               bitgen.model.image_encoder
resnet50 ... torchvision's classifiers   bitgen.model.torchvision_backbone
hf:FOLDER    towers of transformers      bitgen.model.transformers_tower
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bitgen.config import BitGenConfig
from bitgen.errors import ConfigError, ModelFileError
from bitgen.model.image_encoder import ImageEncoder, VisionTransformer
from bitgen.model.torchvision_backbone import (
    TorchvisionBackbone,
    download_weights,
    pretrained_input,
)
from bitgen.model.transformers_tower import PREFIX, TransformersTower, read_tower

# Under these names programs keep a state dict beside other things in one file.
_WRAPPERS = ("state_dict", "model")


class OpenedEncoder(NamedTuple):
    """An image encoder that was asked for, with what its weights ask for."""

    config: BitGenConfig
    """With the normalisation of the weights, and of a tower its architecture."""
    weights: str | None
    """Where they come from, for `load_encoder_weights`; None: at random."""
    image_size: int | None
    """Side of the pictures that they were trained on, in pixels; None if that is not known."""


def open_encoder(config: BitGenConfig, weights: str | None = None) -> OpenedEncoder:
    """Look at an image encoder before it is made: what its weights were trained on.

    Args:
        config: `image_encoder` may be `hf:FOLDER`.
        weights: as in `load_encoder_weights`; of `hf:FOLDER` they lie in the folder.

    Raises:
        ModelFileError: the folder holds no vision tower.
        ConfigError: weights beside those of a folder.
    """
    if config.image_encoder.startswith(PREFIX):
        if weights is not None:
            raise ConfigError(
                f"The weights of {config.image_encoder} lie in its folder, and {weights} was"
                " given too.",
                remedy="Leave --encoder_weights out.",
            )
        folder = Path(config.image_encoder.removeprefix(PREFIX)).expanduser().absolute()
        tower = read_tower(folder)
        opened = replace(
            config, image_encoder=encoder_name(config.image_encoder), encoder_config=tower[0]
        )
        if tower.mean is not None and tower.std is not None:
            opened = replace(opened, image_mean=tower.mean, image_std=tower.std)
        return OpenedEncoder(opened, str(folder), tower.image_size)
    if config.image_encoder == "vit" or weights is None:
        return OpenedEncoder(config, weights, None)
    trained = pretrained_input(config.image_encoder, weights)
    if trained is None:
        return OpenedEncoder(config, weights, None)
    is_file = Path(weights).exists()
    return OpenedEncoder(
        replace(config, image_mean=trained.mean, image_std=trained.std),
        weights,
        None if is_file else trained.image_size,
    )


def encoder_name(name: str) -> str:
    """An image encoder's name as models keep it: of `hf:FOLDER` the folder's last part."""
    if not name.startswith(PREFIX):
        return name
    return PREFIX + Path(name.removeprefix(PREFIX)).expanduser().absolute().name


def make_image_encoder(config: BitGenConfig) -> ImageEncoder:
    """The encoder that `config.image_encoder` names, with random weights.

    Raises:
        ConfigError: there is none of this name, or it gives no grid of features of such pictures.
    """
    encoder: ImageEncoder
    if config.image_encoder == "vit":
        encoder = VisionTransformer(config)
    elif config.image_encoder.startswith(PREFIX):
        encoder = TransformersTower(config)
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
            own weight names such as `DEFAULT` or `IMAGENET1K_V1`, which torchvision downloads; of a
            tower of transformers its folder.

    Raises:
        ModelFileError: the file is missing, damaged, or holds other names or shapes.
        ConfigError: torchvision knows no such weights.
        DownloadError: they cannot be downloaded.
    """
    path = Path(weights)
    if isinstance(encoder, TransformersTower):
        encoder.load_folder(path)
        return
    state: Mapping[str, torch.Tensor]
    if path.exists():
        state = _read_state_dict(path)
    elif isinstance(encoder, TorchvisionBackbone):
        state = download_weights(name, weights)
    else:
        raise ModelFileError(f"There is no encoder weights file {weights}.")
    target: nn.Module = encoder
    metadata = getattr(state, "_metadata", None)
    if isinstance(encoder, TorchvisionBackbone):
        state, target = encoder.fitted(state), encoder.backbone
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
    chosen: Any = OrderedDict((key, state[key]) for key in expected)
    if metadata:
        chosen._metadata = metadata
    target.load_state_dict(with_versions(target, chosen))


def with_versions(module: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict with the versions of the module's own layouts, where it says none.

    Modules that changed their layout once (MNASNet) refuse a state dict without them, and files do
    not keep them.
    """
    if hasattr(state, "_metadata"):
        return state
    result: Any = OrderedDict(state)
    result._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    return result


def _read_state_dict(path: Path) -> Mapping[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has its own exception for a damaged file
        raise ModelFileError(
            f"{path} is not a weights file that can be read ({type(error).__name__}).",
            remedy="Give a safetensors file, or a plain state dict saved by torch.save.",
        ) from error
    for name in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict):
        raise ModelFileError(f"{path} holds a {type(state).__name__}, not a state dict.")
    if state and all(str(key).startswith("module.") for key in state):  # of DataParallel
        return {key.removeprefix("module."): value for key, value in state.items()}
    return state


def weights_digest(encoder: ImageEncoder) -> str:
    """A name for an encoder's weights, which others do not share: 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(encoder.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {list(array.shape)}".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
