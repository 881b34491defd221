"""Configuration as frozen dataclasses: no torch, no hardware probing, JSON round trip.

Each field's `help` is its one-line meaning; the command line shows the same words.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from bitgen.errors import ConfigError

MODEL_SIZES = ("nano", "tiny", "small", "base", "large")
QUANTIZATIONS = ("ternary", "none")
ATTENTION_MODES = ("prefix", "causal", "bidirectional")
IMAGE_RESIZES = ("crop", "pad")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda", "mps")
CAPTION_SAMPLINGS = ("one", "all")
SCHEDULES = ("two_stage", "cosine")
PARALLEL_STRATEGIES = ("ddp", "fsdp")
OBJECTIVES = ("caption", "mlm", "self_critical")

CAPTION_IDF = "caption_idf"
"""Tensor of a model, float16 `[V]`: inverse document frequencies of its training captions' tokens
(`bitgen.dataset.samples.TrainingSet.caption_idf`)."""
BEST_BY = ("auto", "loss", "cider")
MAX_PREDICT_TOKENS = 8
WORD_PRETRAINING_PERCENT = 60
"""Share of all updates that word pretraining takes where no number is given."""

_Config = TypeVar("_Config", bound="_JsonConfig")


def _field(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


class _JsonConfig:
    """JSON round trip for a dataclass; unknown and mistyped fields are refused by name."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls: type[_Config], values: Mapping[str, Any]) -> _Config:
        """Build from a mapping. Raises ConfigError for unknown names and values of another type."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"A {cls.__name__} is read from a mapping, not {type(values)!r}.")
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ConfigError(
                f"{cls.__name__} has no field named {', '.join(unknown)}.",
                remedy="It may come from a newer BitGen: upgrade, or remove the field.",
            )
        return cls(**{name: _restore(value) for name, value in values.items()})

    @classmethod
    def from_json(cls: type[_Config], text: str) -> _Config:
        """Build from JSON text. Raises ConfigError if it is not JSON or does not fit."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{cls.__name__}: not JSON ({error}).") from error
        return cls.from_dict(values)

    def _check_types_and_choices(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            expected = str(field.type)
            kinds: dict[str, tuple[type, ...]] = {
                "bool": (bool,),
                "int": (int,),
                "float": (int, float),
                "str": (str,),
                "tuple": (tuple,),
                "None": (type(None),),
            }
            allowed = tuple(
                kind for part in expected.split(" | ") for kind in kinds[part.split("[")[0]]
            )
            if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                raise ConfigError(f"{field.name} must be {expected}, got {value!r}.")
            choices = field.metadata.get("choices")
            if choices is not None and value not in choices:
                raise ConfigError(
                    f"{field.name} must be one of {', '.join(choices)}; got {value!r}."
                )


def _restore(value: Any) -> Any:
    return tuple(_restore(item) for item in value) if isinstance(value, list) else value


@dataclass(frozen=True)
class BitGenConfig(_JsonConfig):
    """Architecture of one model. `BitGenConfig.preset("tiny")` gives the named sizes."""

    model_size: str = _field("custom", "Name of the preset that this was made from.")
    vocab_size: int = _field(8192, "Rows of the embedding; the tokenizer may use fewer.")
    hidden_size: int = _field(256, "Width C of the decoder.")
    num_layers: int = _field(6, "Decoder layers.")
    num_heads: int = _field(4, "Query heads H of the decoder.")
    num_kv_heads: int = _field(4, "Key and value heads; fewer than num_heads is grouped-query.")
    head_dim: int = _field(64, "Width D of one head.")
    intermediate_size: int = _field(768, "Width of the decoder's feed-forward layer.")
    num_experts: int = _field(1, "Feed-forward layers of a decoder layer; 1 is no mixture.")
    experts_per_token: int = _field(1, "Experts that each token is sent to.")
    max_positions: int = _field(512, "Longest sequence S (image tokens and text) accepted.")
    rope_theta: float = _field(10000.0, "Base of the rotary position embedding.")
    rms_norm_eps: float = _field(1e-5, "Added to the mean square in RMSNorm.")
    dropout: float = _field(0.0, "Dropout on each residual branch, in training.")
    attention_mode: str = _field(
        "prefix",
        "prefix: image and prompt see each other, the caption is causal; causal; bidirectional:"
        " all see all, for a model that ranks robots and writes no captions.",
        ATTENTION_MODES,
    )
    quantization: str = _field("ternary", "Linear weights: ternary or none.", QUANTIZATIONS)
    predict_tokens: int = _field(
        1, "Next tokens that each position predicts, 1 to 8; above 1, captions are written faster."
    )
    image_size: int = _field(160, "Side of the square picture, in pixels.")
    image_resize: str = _field("crop", "Aspect-preserving: crop, or pad.", IMAGE_RESIZES)
    image_mean: tuple[float, float, float] = _field(
        (0.485, 0.456, 0.406), "Mean per channel (R, G, B) of pixels in [0, 1]."
    )
    image_std: tuple[float, float, float] = _field(
        (0.229, 0.224, 0.225), "Standard deviation per channel of pixels in [0, 1]."
    )
    image_encoder: str = _field(
        "vit",
        "vit (ternary); the name of a torchvision classifier, such as resnet50; or hf:FOLDER, a"
        " vision tower that transformers opens (DINOv2, SigLIP, CLIP, ViT).",
    )
    encoder_config: str = _field("", "transformers' config of an hf: image encoder, as JSON.")
    patch_size: int = _field(16, "Side of one patch of the vit encoder, in pixels.")
    stem_residual_convolutions: int = _field(
        0, "Residual convolutions behind each halving but the first of the vit encoder's stem."
    )
    encoder_hidden_size: int = _field(256, "Width of the vit encoder.")
    encoder_layers: int = _field(4, "Layers of the vit encoder.")
    encoder_heads: int = _field(4, "Heads of the vit encoder.")
    encoder_intermediate_size: int = _field(768, "Width of the vit encoder's feed-forward layer.")
    freeze_encoder: bool = _field(False, "Keep the image encoder's weights as they are.")
    robot_names: tuple[str, ...] = _field((), "Robots seen in training: each has a learned bias.")
    robot_sets: tuple[int, ...] = _field(
        (), "Sets of them that tasks named; bit r of a set stands for the robot r."
    )
    task_word_bins: int = _field(
        4096, "Bins of the linear model of tasks' words; 4096 in models that do not say."
    )
    caption_idf: bool = _field(
        False, "Whether the weights hold in how few captions each token was, for --consensus."
    )

    def __post_init__(self) -> None:
        self._check_types_and_choices()
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "num_experts",
            "experts_per_token",
            "max_positions",
            "task_word_bins",
            "image_size",
            "patch_size",
            "encoder_hidden_size",
            "encoder_layers",
            "encoder_heads",
            "encoder_intermediate_size",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.patch_size < 2 or self.patch_size & (self.patch_size - 1):
            raise ConfigError(f"patch_size must be a power of two, got {self.patch_size}.")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads"
                f" ({self.num_kv_heads})."
            )
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"experts_per_token ({self.experts_per_token}) must be at most num_experts"
                f" ({self.num_experts})."
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for RoPE, got {self.head_dim}.")
        if self.encoder_hidden_size % self.encoder_heads:
            raise ConfigError(
                f"encoder_hidden_size ({self.encoder_hidden_size}) must be a multiple of"
                f" encoder_heads ({self.encoder_heads})."
            )
        if any(not 0 < robots < 1 << len(self.robot_names) for robots in self.robot_sets):
            raise ConfigError(
                f"robot_sets {list(self.robot_sets)} are not all of the {len(self.robot_names)}"
                " robots of robot_names."
            )
        patches = max(1, round(self.image_size / self.patch_size))
        if self.image_encoder == "vit" and self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size {self.image_size} is not a multiple of the patch size"
                f" {self.patch_size}.",
                remedy=f"Take {patches * self.patch_size}.",
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}.")
        if not 1 <= self.predict_tokens <= MAX_PREDICT_TOKENS:
            raise ConfigError(
                f"predict_tokens must be 1 to {MAX_PREDICT_TOKENS}, got {self.predict_tokens}."
            )
        if self.predict_tokens > 1 and self.attention_mode == "bidirectional":
            raise ConfigError(
                "A bidirectional model sees all tokens and predicts none:"
                f" predict_tokens must be 1, got {self.predict_tokens}."
            )

    @classmethod
    def preset(cls, model_size: str, **changes: Any) -> BitGenConfig:
        """The named size, with fields changed by keyword. Raises ConfigError for other names."""
        if model_size not in _PRESETS:
            raise ConfigError(
                f"There is no model size {model_size!r}.",
                remedy=f"Sizes: {', '.join(MODEL_SIZES)}.",
            )
        given = {name: value for name, value in changes.items() if value is not None}
        return cls(**{"model_size": model_size, **_PRESETS[model_size], **given})


def _preset(
    width: int, layers: int, heads: int, feed_forward: int, vocabulary: int, image: int,
    encoder: tuple[int, int, int, int], **stem: int,
) -> dict[str, Any]:  # fmt: skip
    encoder_width, encoder_layers, encoder_heads, encoder_feed_forward = encoder
    return {
        "hidden_size": width, "num_layers": layers, "num_heads": heads, "num_kv_heads": heads,
        "intermediate_size": feed_forward, "vocab_size": vocabulary, "image_size": image,
        "encoder_hidden_size": encoder_width, "encoder_layers": encoder_layers,
        "encoder_heads": encoder_heads, "encoder_intermediate_size": encoder_feed_forward, **stem,
    }  # fmt: skip


# Learns to see photographs from scratch (docs/training.md). A stored configuration that names no
# stem has the dataclass's, so these are not its defaults.
_PHOTOGRAPHS = {"patch_size": 32, "stem_residual_convolutions": 1}
_PRESETS: dict[str, dict[str, Any]] = {
    "nano": _preset(256, 3, 4, 512, 4096, 96, encoder=(256, 2, 4, 512)),
    "tiny": _preset(256, 6, 4, 768, 8192, 160, encoder=(256, 4, 4, 768), **_PHOTOGRAPHS),
    "small": _preset(512, 8, 8, 1536, 16384, 224, encoder=(512, 6, 8, 1536), **_PHOTOGRAPHS),
    "base": _preset(768, 12, 12, 2048, 16384, 224, encoder=(768, 8, 12, 2048)),
    "large": _preset(1536, 24, 24, 4096, 32768, 224, encoder=(1024, 12, 16, 2816)),
}


@dataclass(frozen=True)
class TrainingConfig(_JsonConfig):
    """How one run is trained: what is given is what is used.

    `TrainingConfig.for_model(config)` gives what `bitgen train` takes for a model's size.
    """

    num_epochs: int = _field(10, "Passes over the training set.")
    batch_size: int = _field(32, "Samples a step and process, before accumulation.")
    grad_accumulation: int = _field(1, "Batches whose gradients are added before one update.")
    learning_rate: float = _field(2e-3, "Peak learning rate.")
    encoder_learning_rate: float | None = _field(
        None,
        "Peak learning rate of the image encoder, which rises and falls as the other does. Default:"
        " --learning_rate, right for a vit from scratch; pretrained ones take a tenth or less.",
    )
    min_learning_rate: float = _field(1e-5, "Learning rate at the end of the schedule.")
    schedule: str = _field(
        "two_stage",
        "cosine; two_stage: one for each half, the second lower and without weight decay.",
        SCHEDULES,
    )
    warmup_steps: int = _field(200, "Updates over which the learning rate rises.")
    weight_decay: float = _field(0.05, "AdamW's weight decay, on matrices only.")
    grad_clip: float = _field(1.0, "Largest gradient norm; 0 switches clipping off.")
    label_smoothing: float = _field(0.0, "Share of the target given to all other tokens.")
    robot_loss_weight: float = _field(1.0, "Weight of the robot loss beside the caption loss.")
    task_word_dropout: float = _field(
        0.3, "Share of a robot task's tokens that are left out, others in every epoch."
    )
    robot_phrase_dropout: float = _field(
        0.5, "Share of the phrases of robots' texts that are left out, others in every update."
    )
    image_word_weight: float = _field(
        1.0, "Weight of the loss that has image tokens foretell the captions' words; 0: without."
    )
    future_token_weight: float = _field(
        0.3, "Weight of the loss of each token foretold beyond the next, with --predict_tokens."
    )
    load_balance_weight: float = _field(
        0.01, "Weight of the loss that has experts take equal shares of the tokens."
    )
    router_z_weight: float = _field(
        0.001, "Weight of the loss that keeps the scores of the experts' router small."
    )
    word_pretraining_steps: int | None = _field(
        0, "First updates, which train the image encoder alone, on the words of the captions."
    )
    """None: `WORD_PRETRAINING_PERCENT` of all updates, once their number is known."""
    word_pretraining_image_size: int = _field(
        0, "Side of the pictures in those updates, for vit: smaller ones are faster; 0: full size."
    )
    word_mixup: float = _field(
        0.0, "In those updates, blend pictures and their words two by two (mixup's alpha); 0: none."
    )
    objective: str = _field(
        "caption",
        "caption: each word foretold from those before it; mlm: hidden words from all others, for"
        " an encoder (--attention_mode bidirectional); self_critical: captions that the model draws"
        " itself, rewarded by CIDEr-D, as a second stage (--initial_model).",
        OBJECTIVES,
    )
    mlm_probability: float = _field(0.15, "Share of a caption's tokens that mlm asks for.")
    num_sampled_captions: int = _field(
        5, "Captions that self_critical draws of each picture; each is judged by the others."
    )
    cross_entropy_weight: float = _field(
        0.0, "Weight of the caption loss beside the reward, in self_critical."
    )
    prompt_probability: float = _field(
        0.1, "Share of captions whose first words are given as a prompt, without loss."
    )
    augment: bool = _field(True, "Vary pictures in training (crop, colour, mirror where true).")
    norm_batch: int = _field(
        4,
        "Pictures by whose common means and variances the convolutions of vit are normalised, a"
        " batch's at most. More learn sooner; accumulated batches equal a large one where their"
        " size is a multiple.",
    )
    cached_views: int = _field(
        1,
        "With --freeze_encoder: versions of each picture whose features are computed once and kept"
        " on disk. 1: the picture as it is; more: so many that --augment varies; 0: none, the"
        " encoder runs in every update.",
    )
    smallest_crop: float = _field(
        0.5, "Smallest side of the crops that --augment makes, as a share of the picture's."
    )
    captions: str = _field(
        "one", "one: one caption of an image drawn per epoch; all: every one.", CAPTION_SAMPLINGS
    )
    max_caption_tokens: int = _field(40, "Longer captions are cut, in tokens.")
    max_plan_tokens: int = _field(
        200, "Longer plans lose their last subtasks; in tokens, frame and robots included."
    )
    robot_repeats: int = _field(1, "Times that each robot task comes in an epoch.")
    plan_repeats: int = _field(1, "Times that each plan comes in an epoch.")
    length_buckets: bool = _field(
        False, "Batch captions of similar length: less padding, but less mixed updates."
    )
    precision: str = _field("auto", "Arithmetic of the forward pass.", PRECISIONS)
    device: str = _field("auto", "Where to train.", DEVICES)
    parallel: str = _field(
        "ddp",
        "What processes started by torchrun share. ddp: gradients; fsdp: weights and optimizer too,"
        " for models that do not fit one device.",
        PARALLEL_STRATEGIES,
    )
    compile: bool = _field(
        False, "Compile layers by torch.compile: faster steps, after minutes of compiling."
    )
    activation_checkpointing: bool = _field(
        False, "Recompute layers in the backward pass: less memory, a third more time."
    )
    num_workers: int = _field(0, "Processes that load batches; 0 loads in the main one.")
    seed: int = _field(0, "Seed of weights, data order, captions and augmentation.")
    max_steps: int | None = _field(None, "Stop after so many updates, whatever the epochs.")
    eval_every: int = _field(500, "Updates between validations; one more at the end.")
    save_every: int = _field(500, "Updates between checkpoints; one more at the end.")
    patience: int = _field(
        0, "Stop after so many validations in a row without a better one; 0: never."
    )
    best_by: str = _field(
        "auto",
        "What the best validation has: the least loss, or the highest cider of greedy captions;"
        " auto: cider in self_critical, else loss.",
        BEST_BY,
    )
    cider_images: int = _field(
        500, "Validation pictures that are captioned for best_by cider, from all over the set."
    )
    keep_checkpoints: int = _field(2, "Checkpoints kept besides best and last.")
    weights_every: int = _field(
        100, "Updates between counts of the ternary weights (shares, flips); 0: never."
    )

    def __post_init__(self) -> None:
        self._check_types_and_choices()
        for name in (
            "num_epochs",
            "batch_size",
            "grad_accumulation",
            "eval_every",
            "save_every",
            "max_caption_tokens",
            "max_plan_tokens",
            "norm_batch",
            "robot_repeats",
            "plan_repeats",
            "cider_images",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in (
            "min_learning_rate",
            "warmup_steps",
            "weight_decay",
            "grad_clip",
            "num_workers",
            "robot_loss_weight",
            "image_word_weight",
            "future_token_weight",
            "load_balance_weight",
            "router_z_weight",
            "cross_entropy_weight",
            "word_pretraining_image_size",
            "word_mixup",
            "cached_views",
            "patience",
            "keep_checkpoints",
            "weights_every",
            "seed",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}.")
        if self.word_pretraining_steps is not None and self.word_pretraining_steps < 0:
            raise ConfigError(
                f"word_pretraining_steps must not be negative, got {self.word_pretraining_steps}."
            )
        if self.num_sampled_captions < 2:
            raise ConfigError(
                "num_sampled_captions must be at least 2, because each is judged by the others; got"
                f" {self.num_sampled_captions}."
            )
        if self.word_pretraining_steps and not self.image_word_weight:
            raise ConfigError(
                "word_pretraining_steps trains by the image word loss alone, and image_word_weight"
                " is 0."
            )
        if not 0 < self.smallest_crop <= 1:
            raise ConfigError(f"smallest_crop must be in (0, 1], got {self.smallest_crop}.")
        if self.cached_views > 1 and not self.augment:
            raise ConfigError(
                f"cached_views {self.cached_views} keeps varied versions of each picture, and"
                " augment is off: all would be the same.",
                remedy="Take --cached_views 1, or leave --no_augment out.",
            )
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be positive, got {self.learning_rate}.")
        if self.encoder_learning_rate is not None and not self.encoder_learning_rate > 0:
            raise ConfigError(
                f"encoder_learning_rate must be positive, got {self.encoder_learning_rate}.",
                remedy="--freeze_encoder keeps the image encoder as it is.",
            )
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"max_steps must be at least 1, got {self.max_steps}.")
        for name in (
            "label_smoothing", "prompt_probability", "task_word_dropout", "robot_phrase_dropout",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        if not 0 < self.mlm_probability < 1:
            raise ConfigError(f"mlm_probability must be in (0, 1), got {self.mlm_probability}.")

    @classmethod
    def for_model(
        cls, config: BitGenConfig, from_scratch: bool = True, **changes: Any
    ) -> TrainingConfig:
        """How `bitgen train` trains a model of that size, with fields changed by keyword.

        Args:
            config: the architecture. Sizes without a recipe of their own have the defaults.
            from_scratch: whether all weights start at random. Only then do the recipe's learning
                rates hold, and its word pretraining where the image encoder is a vit that learns.
            changes: fields of TrainingConfig that win over the recipe; None for its value.

        Raises:
            ConfigError: a value that is not possible.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        recipe: dict[str, Any] = {}
        if config.model_size in _RECIPE_SIZES:
            recipe |= _RECIPE
            if from_scratch:
                recipe |= _RECIPE_FROM_SCRATCH
                if _learns_words(config, given):
                    recipe |= _word_pretraining(config)
        return cls(**{**recipe, **given})

    def count_word_pretraining(self, total_updates: int) -> int:
        """How many of so many updates train the image encoder alone."""
        if self.word_pretraining_steps is None:
            return total_updates * WORD_PRETRAINING_PERCENT // 100
        return self.word_pretraining_steps

    @property
    def judges_by_cider(self) -> bool:
        """Whether validation captions pictures, and the best checkpoint is that of most CIDEr."""
        if self.best_by == "auto":
            return self.objective == "self_critical"
        return self.best_by == "cider"


_RECIPE_SIZES = ("tiny", "small")
_RECIPE = {"batch_size": 64, "norm_batch": 64, "schedule": "cosine"}
_RECIPE_FROM_SCRATCH = {"min_learning_rate": 2e-4}
_WORD_IMAGE_SIZE = 96


def _learns_words(config: BitGenConfig, given: Mapping[str, Any]) -> bool:
    """Whether pretraining on words has an image encoder to teach, and a loss to do it by."""
    return (
        config.image_encoder == "vit"
        and not config.freeze_encoder
        and given.get("image_word_weight", TrainingConfig.image_word_weight) != 0
        and given.get("objective") != "self_critical"  # a second stage, after all others
    )


def _word_pretraining(config: BitGenConfig) -> dict[str, Any]:
    fits = config.image_size > _WORD_IMAGE_SIZE and _WORD_IMAGE_SIZE % config.patch_size == 0
    return {
        "word_pretraining_steps": None,
        "word_pretraining_image_size": _WORD_IMAGE_SIZE if fits else 0,
        "word_mixup": 0.2,
    }
