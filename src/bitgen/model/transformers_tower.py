"""Vision towers of Hugging Face transformers as image encoders: DINOv2, SigLIP, CLIP, ViT ...

A tower is opened from a local folder once. Afterwards its architecture stands in the model's
own config (`encoder_config`) and its weights in the checkpoints: the folder is not needed again.
Nothing is fetched, no code of the folder runs, and weights are read from safetensors alone.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bitgen.config import BitGenConfig
from bitgen.errors import ConfigError, ModelFileError
from bitgen.model.image_encoder import ImageEncoder
from bitgen.model.masks import AttentionMask

PREFIX = "hf:"
"""What the name of such an image encoder begins with; the folder, or its last part, follows."""

_MOST_SPECIAL_TOKENS = 16
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


class TowerFolder(NamedTuple):
    """What a folder says of its vision tower."""

    config_json: str
    """transformers' config of the tower alone."""
    mean: tuple[float, float, float] | None
    """Per channel, of pixels in [0, 1]; None if the folder does not say."""
    std: tuple[float, float, float] | None
    image_size: int | None
    """Side of the pictures that it was trained on, in pixels; None if the folder does not say."""


class TransformersTower(ImageEncoder):
    """A vision tower of transformers, `[B, 3, S, S] -> [B, P, E]`: its last hidden state.

    Class and register tokens are left out, so that what remains is a grid. What would stand behind
    the last hidden state (pooling heads) is left out too.
    """

    def __init__(self, config: BitGenConfig) -> None:
        """
        Raises:
            ConfigError: transformers is not there, or too old for it, or the tower is none that
                takes pictures of this size and gives a grid of features.
        """
        super().__init__(config)
        transformers = _transformers()
        name, size = config.image_encoder, config.image_size
        if not config.encoder_config:
            raise ConfigError(
                f"The architecture of the image encoder {name} is not known: encoder_config is"
                " empty.",
                remedy="Take the config that bitgen.model.encoders.open_encoder gives.",
            )
        values = json.loads(config.encoder_config)
        try:
            kind = transformers.CONFIG_MAPPING[values["model_type"]]
            self._tower_config = kind.from_dict(values)
            with _quiet():
                self.tower = transformers.AutoModel.from_config(self._tower_config).float()
        except Exception as error:  # each architecture has its own for a config that is not its own
            raise ConfigError(
                f"transformers {transformers.__version__} cannot build the image encoder {name}"
                f" ({values.get('model_type')}; {_first_line(error)}).",
                remedy=f"It was opened with transformers {values.get('transformers_version')}:"
                " install that version, or a newer one.",
            ) from error
        pooler = getattr(self.tower, "pooler", None)
        if pooler is not None and any(True for _ in pooler.parameters()):
            self.tower.pooler = None
        accepted = inspect.signature(self.tower.forward).parameters
        self._options = (
            {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}
        )
        self.num_tokens = 0
        self.eval()
        try:
            with torch.no_grad():
                probe = self._last_hidden_state(torch.zeros(1, 3, size, size))
        except Exception as error:  # each architecture has its own for pictures that it cannot take
            trained = getattr(self._tower_config, "image_size", None)
            raise ConfigError(
                f"The image encoder {name} cannot take pictures of {size} px"
                f" ({_first_line(error)}).",
                remedy=f"Take --image_size {trained}."
                if isinstance(trained, int) and trained != size
                else "Take another vision tower, such as DINOv2, SigLIP, CLIP or ViT.",
            ) from error
        self.num_tokens = self._count_grid(probe, name, size)
        self.output_width = probe.shape[1] if probe.dim() == 4 else probe.shape[2]
        self.train()

    def _count_grid(self, probe: torch.Tensor, name: str, size: int) -> int:
        """P, the features of a picture of `size` px that stand on a grid."""
        if probe.dim() == 4:
            return probe.shape[2] * probe.shape[3]
        tokens = probe.shape[1]
        patch = getattr(self._tower_config, "patch_size", None)
        if isinstance(patch, int):
            grid = (size // patch) ** 2
            if 0 <= tokens - grid <= _MOST_SPECIAL_TOKENS:
                if size % patch:
                    raise ConfigError(
                        f"image_size {size} is not a multiple of the {patch} px of a patch of"
                        f" {name}.",
                        remedy=f"Take --image_size {max(1, round(size / patch)) * patch}.",
                    )
                return grid
        if math.isqrt(tokens) ** 2 != tokens:
            raise ConfigError(
                f"The {tokens} features that {name} gives of a picture of {size} px are no grid.",
                remedy="Take another vision tower, such as DINOv2, SigLIP, CLIP or ViT.",
            )
        return tokens

    def _last_hidden_state(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        output = self.tower(pixel_values=images_B3HW, **self._options)
        state: torch.Tensor = output.last_hidden_state
        return state

    def forward(
        self,
        images_B3HW: torch.Tensor,
        mask: AttentionMask | None = None,
        return_weights: bool = False,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Features, and no weights.

        Raises:
            ValueError: a mask, which these towers are not given.
        """
        if mask is not None:
            raise ValueError(f"{type(self.tower).__name__} takes no attention mask.")
        state = self._last_hidden_state(images_B3HW)
        if state.dim() == 4:
            return state.flatten(2).transpose(1, 2), ()
        return state[:, state.shape[1] - self.num_tokens :], ()  # special tokens come first

    def load_folder(self, folder: Path) -> None:
        """Load the weights of the folder that the tower was opened from.

        Raises:
            ModelFileError: there are none in safetensors, or they do not fit.
        """
        transformers = _transformers()
        try:
            with _quiet():
                loaded, report = transformers.AutoModel.from_pretrained(
                    folder,
                    config=type(self._tower_config).from_dict(self._tower_config.to_dict()),
                    use_safetensors=True,
                    output_loading_info=True,
                    **_LOCAL,
                )
        except Exception as error:  # transformers raises many types for files that do not fit
            raise ModelFileError(
                f"The weights in {folder} cannot be loaded ({_first_line(error)}).",
                remedy="The folder needs weights that fit its config.json, as safetensors.",
            ) from error
        own, state = self.tower.state_dict(), loaded.state_dict()
        # What the report calls missing was made at random.
        prefix, random = f"{loaded.base_model_prefix}.", set(report["missing_keys"])
        missing = sorted(
            name for name in own if name not in state or {name, prefix + name} & random
        )
        if missing:
            raise ModelFileError(
                f"{folder} lacks {len(missing)} of {len(own)} tensors of the image encoder"
                f" (first: {missing[0]}).",
                remedy="The folder needs weights that fit its config.json, as safetensors.",
            )
        self.tower.load_state_dict({name: state[name].float() for name in own})


def read_tower(folder: Path) -> TowerFolder:
    """What a folder that transformers saved says of its vision tower; of a model of pictures and
    texts (CLIP, SigLIP) the part that sees.

    Raises:
        ModelFileError: no folder, or none that this transformers opens without code of its own.
        ConfigError: transformers is not there, or the model is none of pictures.
    """
    if not folder.is_dir():
        raise ModelFileError(
            f"There is no folder {folder} with a vision tower.",
            remedy="Nothing is fetched: download the model first, and give its folder.",
        )
    transformers = _transformers()
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
            config = getattr(config, "vision_config", config)
            model_class = transformers.MODEL_MAPPING[type(config)]
    except Exception as error:  # a missing file, an unknown architecture, code of its own, no JSON
        raise ModelFileError(
            f"{folder} is no vision tower that transformers {transformers.__version__} opens"
            f" ({_first_line(error)}).",
            remedy="Give a folder with config.json and safetensors, whose architecture transformers"
            " itself has.",
        ) from error
    if isinstance(model_class, (tuple, list)):
        model_class = model_class[0]
    if getattr(model_class, "main_input_name", "") != "pixel_values":
        raise ConfigError(
            f"{folder} holds a {config.model_type}, which takes no pictures.",
            remedy="Give a vision tower, such as DINOv2, SigLIP, CLIP or ViT.",
        )
    values = json.loads(config.to_json_string(use_diff=False))
    for name in ("dtype", "torch_dtype", "_name_or_path", "architectures"):
        values.pop(name, None)
    if "vision_use_head" in values:
        values["vision_use_head"] = False  # SigLIP's pooling head stands behind the features
    size = values.get("image_size")
    return TowerFolder(
        json.dumps(values, separators=(",", ":")),
        *_normalisation(folder),
        size if isinstance(size, int) else None,
    )


def _normalisation(folder: Path) -> tuple[Any, Any]:
    """Mean and standard deviation that the folder's image processor normalises by."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            values = json.loads((folder / name).read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ModelFileError(f"{folder / name} cannot be read ({error}).") from error
        values = values.get("image_processor", values)
        if values.get("do_normalize") is False:
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        mean, std = values.get("image_mean"), values.get("image_std")
        if _is_triple(mean) and _is_triple(std):
            return tuple(map(float, mean)), tuple(map(float, std))
    return None, None


def _is_triple(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) == 3
        and all(isinstance(value, (int, float)) for value in values)
    )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "Image encoders of the form hf:FOLDER need transformers, which is not installed.",
            remedy="Install it: pip install 'bitgen[hf]'",
        ) from error
    return transformers


@contextmanager
def _quiet() -> Iterator[None]:
    """Without bars and reports of transformers: what is wrong is said by errors."""
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".:") if text else type(error).__name__
