"""torchvision's classifiers as image encoders, cut where they last give a grid of features.

The grid is what torchvision's own forward passes on to its pooling (of SqueezeNet: to its head),
without class tokens. Parameters keep torchvision's names, so that its published weights load.
"""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.error import URLError

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from bitgen.config import BitGenConfig
from bitgen.errors import ConfigError, DownloadError
from bitgen.model.image_encoder import ImageEncoder
from bitgen.model.masks import AttentionMask

# Children of a classifier behind which there is no grid any more.
_HEADS = ("avgpool", "classifier", "fc", "head", "heads")
_VISION_TRANSFORMERS = ("vit_",)
_FIXED_INPUT = ("maxvit_",)
_WITH_TRANSFORMED_INPUT = ("googlenet", "inception_v3")
_OLD_DENSENET_KEY = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")


class PretrainedInput(NamedTuple):
    """What weights were trained on."""

    mean: tuple[float, float, float]
    """Per channel, of pixels in [0, 1]."""
    std: tuple[float, float, float]
    image_size: int
    """Side of the pictures, in pixels."""


class TorchvisionBackbone(ImageEncoder):
    """A torchvision classifier without its head, `[B, 3, S, S] -> [B, P, E]`."""

    def __init__(self, config: BitGenConfig) -> None:
        """
        Raises:
            ConfigError: torchvision has no such classifier, or it takes no such pictures.
        """
        super().__init__(config)
        self.backbone = _make_classifier(config.image_encoder, config.image_size)
        names = [name for name, _ in self.backbone.named_children()]
        heads = [name for name in names if name in _HEADS]
        for name in heads:
            setattr(self.backbone, name, nn.Identity())
        self._trunk = names[: names.index(heads[0])] if heads else names
        self.eval()
        size = config.image_size
        try:
            with torch.no_grad():
                probe_BPC, _ = self(torch.zeros(1, 3, size, size))
        except RuntimeError as error:
            raise ConfigError(
                f"The image encoder {config.image_encoder} cannot take pictures of {size} px"
                f" ({str(error).splitlines()[0].rstrip('.')}).",
                remedy="Take a larger --image_size, such as 224.",
            ) from error
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
        net: Any = self.backbone
        if hasattr(net, "class_token"):
            return self._transformer_tokens(images_B3HW), ()
        x = net._transform_input(images_B3HW) if hasattr(net, "transform_input") else images_B3HW
        for name in self._trunk:
            child = getattr(net, name)
            for layer in child if isinstance(child, nn.ModuleList) else (child,):
                x = layer(x)
        if type(net).__name__ == "DenseNet":
            x = F.relu(x)  # in torchvision's forward, but no module of it
        if x.dim() != 4:
            raise ConfigError(
                f"{type(net).__name__} gives no grid of features.",
                remedy="Take a backbone such as mobilenet_v3_small, resnet50 or vit_b_16.",
            )
        return x.flatten(2).transpose(1, 2), ()

    def _transformer_tokens(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        net: Any = self.backbone
        tokens = net._process_input(images_B3HW)
        class_token = net.class_token.expand(tokens.shape[0], -1, -1)
        encoded: torch.Tensor = net.encoder(torch.cat([class_token, tokens], dim=1))
        return encoded[:, 1:]

    def fitted(self, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """A state dict of torchvision's layout as this backbone names and shapes its tensors.

        What torchvision's own loading mends is mended: DenseNet's old names, counters that older
        files lack, and position embeddings of another picture size, which are interpolated.
        """
        state = OrderedDict(state)
        if type(self.backbone).__name__ == "DenseNet":
            state = OrderedDict(
                (_OLD_DENSENET_KEY.sub(r"\1\2", name), tensor) for name, tensor in state.items()
            )
        own = self.backbone.state_dict()
        for name, tensor in own.items():
            if name.endswith("num_batches_tracked"):
                state.setdefault(name, torch.zeros_like(tensor))
        position = "encoder.pos_embedding"
        if position in own and position in state and state[position].shape != own[position].shape:
            state = _interpolated(state, self.backbone)
        return state


def _make_classifier(name: str, image_size: int) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ConfigError(
            f"There is no image encoder {name!r}.",
            remedy="Take vit, hf:FOLDER, or a torchvision classifier such as mobilenet_v3_small,"
            " efficientnet_b0, resnet50, convnext_tiny or vit_b_16.",
        )
    options: dict[str, Any] = {}
    if name.startswith(_VISION_TRANSFORMERS):
        options["image_size"] = image_size
    elif name.startswith(_FIXED_INPUT):
        options["input_size"] = (image_size, image_size)
    elif name in _WITH_TRANSFORMED_INPUT:
        # Their weights were trained on pictures normalised in another way than ImageNet's, to which
        # torchvision brings them inside the model, with these weights.
        options = {"transform_input": True, "aux_logits": False, "init_weights": True}
    try:
        classifier: nn.Module = models.get_model(name, weights=None, **options)
    except (ValueError, AssertionError, RuntimeError) as error:  # of the image size
        remedy = "Take --image_size 224, or a multiple of it."
        if name.startswith(_VISION_TRANSFORMERS):
            patch = int(name.rpartition("_")[2])
            remedy = f"Take --image_size {max(1, round(image_size / patch)) * patch}."
        raise ConfigError(
            f"The image encoder {name} cannot take pictures of {image_size} px.", remedy=remedy
        ) from error
    return classifier


def _interpolated(
    state: OrderedDict[str, torch.Tensor], net: Any
) -> OrderedDict[str, torch.Tensor]:
    from torchvision.models.vision_transformer import interpolate_embeddings

    try:
        result: OrderedDict[str, torch.Tensor] = interpolate_embeddings(
            net.image_size, net.patch_size, state
        )
    except ValueError:  # no square grid: left as it is, and refused by its shape
        return state
    return result


def pretrained_input(name: str, weights: str | None = None) -> PretrainedInput | None:
    """What weights of the classifier `name` were trained on; None if torchvision does not say.

    Args:
        name: of the classifier.
        weights: torchvision's name of them; of a file, which does not say, or None, the default
            weights are taken to stand for it.
    """
    from torchvision import models

    try:
        known = models.get_model_weights(name)
    except ValueError:
        return None
    entry = known[weights] if weights in known.__members__ else known.DEFAULT
    transforms = entry.transforms()
    try:
        return PretrainedInput(
            tuple(transforms.mean), tuple(transforms.std), int(transforms.crop_size[0])
        )
    except AttributeError:
        return None


def download_weights(name: str, weights: str) -> Mapping[str, torch.Tensor]:
    """The state dict of published weights, downloaded by torchvision (once: torch hub keeps it).

    Raises:
        ConfigError: torchvision knows no such weights.
        DownloadError: they cannot be had.
    """
    from torchvision import models

    known = models.get_model_weights(name)
    if weights not in known.__members__:
        raise ConfigError(
            f"{weights!r} is neither a file nor weights that torchvision has for {name}.",
            remedy=f"Give a file, or one of: DEFAULT, {', '.join(entry.name for entry in known)}.",
        )
    entry = known[weights]
    try:
        state: Mapping[str, torch.Tensor] = entry.get_state_dict(
            progress=sys.stderr.isatty(), check_hash=True, map_location="cpu", weights_only=True
        )
    except (URLError, OSError, RuntimeError) as error:
        raise DownloadError(
            f"The weights {weights} of {name} could not be downloaded ({error}).",
            remedy=f"Download {entry.url} where that is possible, and give the file:"
            " --encoder_weights FILE.",
        ) from error
    return state
