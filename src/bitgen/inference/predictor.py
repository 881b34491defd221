"""`BitGen`: a loaded model that captions pictures and chooses robots.

    model = BitGen.load("runs/tiny")            # or "tiny.safetensors"
    model.caption("photo.jpg")[0].text
    model.select_robots("bring back the red ball", image="photo.jpg")[0].name

Pictures and prompts are given in batches, and each is answered as if it were alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from bitgen.config import DEVICES, BitGenConfig
from bitgen.dataset.collate import pad_rows
from bitgen.dataset.images import load_image, normalize_images, prepare_image
from bitgen.dataset.robots import Robot, load_catalog
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.errors import InputError
from bitgen.export.loaded import LoadedModel, load_run
from bitgen.export.safetensors import load_artifact
from bitgen.inference.generate import Speculation, check_options, generate
from bitgen.model.bitgen import BitGenModel
from bitgen.model.device import resolve_device

Picture: TypeAlias = str | Path | Image.Image
"""A picture: the path of a file, or an open PIL image."""


@dataclass(frozen=True)
class Caption:
    """What the model says about one picture."""

    text: str
    """The whole caption, the prompt's words included."""
    tokens: list[str]
    """The text of each generated token (prompt and end of text are not among them)."""
    token_ids: list[int]
    """The ids of `tokens`."""
    log_probability: float
    """Natural logarithm of the probability of the tokens and of the text's end behind them."""
    speculation: Speculation | None = None
    """What speculative decoding saved; None where it was not used."""


@dataclass(frozen=True)
class RobotChoice:
    """How well one robot suits a task: several may, or none."""

    name: str
    probability: float


class BitGen:
    """A model in evaluation mode, in float32, on one device.

    Attributes:
        model: the `BitGenModel`.
        tokenizer: its tokenizer.
        device: where it runs.
        info: where it comes from (run, step, losses, data).
    """

    def __init__(
        self,
        model: BitGenModel,
        tokenizer: Tokenizer,
        catalog: Sequence[Robot] = (),
        device: str | torch.device = "cpu",
        info: dict[str, Any] | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.tokenizer = tokenizer
        self.info = info or {}
        self._catalog = list(catalog)
        self._catalog_in_model: list[Robot] | None = None

    @classmethod
    def load(cls, path: str | Path, device: str = "auto", packed: bool = True) -> BitGen:
        """Load a run's folder (its best checkpoint, else its last), a checkpoint's, or an artifact.

        Args:
            path: the folder, or the file that `bitgen export` wrote.
            device: `auto`, `cpu`, `cuda` or `mps`.
            packed: run on 2-bit weights; False keeps a run's layers as in training. Both give the
                same numbers.

        Raises:
            ModelFileError: missing, damaged, foreign, or of a newer format.
            InputError: a device that is not there, or `packed=False` for an artifact.
        """
        if device.partition(":")[0] not in DEVICES:
            raise InputError(
                f"There is no device {device!r}.", remedy=f"Devices: {', '.join(DEVICES)}."
            )
        resolved = resolve_device(device)
        loaded: LoadedModel
        if Path(path).is_dir():
            loaded = load_run(path, packed=packed)
        else:
            loaded = load_artifact(path)
            if not packed:
                raise InputError(
                    f"{path} holds packed weights only.",
                    remedy="Load the run that it was exported from, or leave packed at True.",
                )
        return cls(loaded.model, loaded.tokenizer, loaded.catalog, resolved, loaded.info)

    @property
    def config(self) -> BitGenConfig:
        """The model's architecture."""
        return self.model.config

    @property
    def catalog(self) -> list[Robot]:
        """The robots that `select_robots` chooses from."""
        return list(self._catalog)

    def set_catalog(self, catalog: Sequence[Robot] | str | Path) -> None:
        """Choose from other robots from now on, given as a list or as a catalog's JSON file."""
        self._catalog = _read_catalog(catalog)

    def caption(
        self,
        images: Picture | Sequence[Picture],
        prompt: str | Sequence[str] = "",
        beam_size: int = 1,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        max_tokens: int = 40,
        batch_size: int = 16,
        length_penalty: float = 1.0,
        attention_window: int = 0,
        speculative: bool | None = None,
    ) -> list[Caption]:
        """Say what pictures show.

        Args:
            images: one picture or several.
            prompt: first words of the caption, for all pictures or one prompt a picture.
            beam_size: hypotheses kept; 1 is greedy, or sampling if `temperature` is above 0.
            temperature: 0 takes the likeliest token; above, tokens are drawn.
            top_k: draw among the so many likeliest tokens; 0 among all.
            top_p: draw among the fewest likeliest tokens that hold this probability.
            seed: of the draws. Each picture starts from it, so that its caption does not depend on
                the pictures beside it; None draws differently each time.
            max_tokens: most tokens generated a picture.
            batch_size: pictures at a time.
            length_penalty: see `bitgen.inference.generate.generate`.
            attention_window: tokens that each token looks back on beside the picture, so that
                `max_tokens` may be any number; 0 looks back on all.
            speculative: draft by the future token heads: the same greedy captions, sooner. None
                does so where it helps: up to four pictures at a time.

        Returns:
            One `Caption` a picture, in order.

        Raises:
            InputError: no picture, options out of range, a prompt that is too long, or
                `speculative` with a model that has no future token heads.
            ImageError: a file that is not a picture.
        """
        pictures = _listed(images)
        prompts = [prompt] * len(pictures) if isinstance(prompt, str) else list(prompt)
        if len(prompts) != len(pictures):
            raise InputError(f"{len(pictures)} pictures, but {len(prompts)} prompts.")
        _check_batch_size(batch_size)
        check_options(
            max_tokens=max_tokens,
            beam_size=beam_size,
            length_penalty=length_penalty,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            attention_window=attention_window,
            speculative=speculative,
        )
        tokenizer = self.tokenizer
        captions: list[Caption] = []
        for start in range(0, len(pictures), batch_size):
            stop = min(start + batch_size, len(pictures))
            words = [tokenizer.encode(text) for text in prompts[start:stop]]
            generators = None
            if seed is not None and temperature > 0:
                generators = [_seeded(seed) for _ in words]
            generations = generate(
                self.model,
                self._tensor_of(pictures[start:stop]),
                [[tokenizer.bos_id, *ids] for ids in words],
                eos_id=tokenizer.eos_id,
                max_tokens=max_tokens,
                beam_size=beam_size,
                length_penalty=length_penalty,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                generators=generators,
                never_ids=sorted(tokenizer.special_ids - {tokenizer.eos_id}),
                vocab_size=tokenizer.vocab_size,
                attention_window=attention_window,
                speculative=speculative,
            )
            captions += [
                Caption(
                    text=tokenizer.decode([*ids, *generation.tokens]),
                    tokens=tokenizer.tokens(generation.tokens),
                    token_ids=generation.tokens,
                    log_probability=generation.log_probability,
                    speculation=generation.speculation,
                )
                for ids, generation in zip(words, generations, strict=True)
            ]
        return captions

    def select_robots(
        self,
        task: str,
        image: Picture | None = None,
        catalog: Sequence[Robot] | str | Path | None = None,
    ) -> list[RobotChoice]:
        """Rank the robots for a task, the likeliest first.

        Args:
            task: what is to be done, in words.
            image: what the camera sees, where there is one.
            catalog: robots to choose from in this call; None takes the model's catalog.

        Raises:
            InputError: an empty or too long task, or no robots to choose from.
            ImageError: a file that is not a picture.
        """
        return self.select_robots_batch([task], [image], catalog=catalog)[0]

    @torch.inference_mode()
    def select_robots_batch(
        self,
        tasks: Sequence[str],
        images: Sequence[Picture | None] | None = None,
        catalog: Sequence[Robot] | str | Path | None = None,
        batch_size: int = 16,
    ) -> list[list[RobotChoice]]:
        """`select_robots` for several tasks, each with its own picture or None."""
        pictures = [None] * len(tasks) if images is None else list(images)
        if len(pictures) != len(tasks):
            raise InputError(f"{len(tasks)} tasks, but {len(pictures)} pictures.")
        _check_batch_size(batch_size)
        robots = self._catalog if catalog is None else _read_catalog(catalog)
        self._give_to_model(robots)
        ranked: list[list[RobotChoice]] = []
        for start in range(0, len(tasks), batch_size):
            probability_BR = self._robot_probabilities(
                tasks[start : start + batch_size], pictures[start : start + batch_size]
            )
            for probability_R in probability_BR.tolist():
                choices = [
                    RobotChoice(robot.name, probability)
                    for robot, probability in zip(robots, probability_R, strict=True)
                ]
                ranked.append(sorted(choices, key=lambda choice: -choice.probability))
        return ranked

    def _robot_probabilities(
        self, tasks: Sequence[str], pictures: Sequence[Picture | None]
    ) -> torch.Tensor:
        """Float32 `[B, R]`, each robot judged by itself."""
        for task in tasks:
            if not task.strip():
                raise InputError("The task is empty.", remedy="Say what is to be done.")
        image_mask = [picture is not None for picture in pictures]
        has_images = any(image_mask)
        input_ids_BL, valid_BL = self._padded(
            [self.tokenizer.encode_task(task) for task in tasks],
            what="task",
            image_tokens=self.model.num_image_tokens if has_images else 0,
        )
        mask = self.model.build_attention_mask(
            valid_BL,
            prefix_lengths_B=valid_BL.sum(dim=1),
            image_mask_B=torch.tensor(image_mask) if has_images else None,
            has_images=has_images,
        )
        output = self.model(
            input_ids_BL.to(self.device),
            images=self._tensor_of(pictures) if has_images else None,
            attention_mask=mask,
            return_robot_selection=True,
        )
        assert output.robot_logits is not None
        return output.robot_logits.sigmoid()

    def _give_to_model(self, robots: list[Robot]) -> None:
        if robots == self._catalog_in_model:
            return
        if not robots:
            raise InputError(
                "There are no robots to choose from: this model was trained without a catalog.",
                remedy="Give a robot catalog.",
            )
        input_ids_RL, valid_RL = self._padded(
            [self.tokenizer.encode_robot(robot.text()) for robot in robots],
            what="text of a robot",
            image_tokens=0,
        )
        self.model.set_robots([robot.name for robot in robots], input_ids_RL, valid_RL)
        self._catalog_in_model = list(robots)

    def _padded(
        self, rows: list[list[int]], what: str, image_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids padded on the right, int64 `[B, L]`, and which are tokens, bool `[B, L]`.

        Both on the CPU, where it costs nothing to see that there is no padding.
        """
        longest = max(len(ids) for ids in rows)
        room = self.config.max_positions - image_tokens
        if longest > room:
            raise InputError(
                f"The {what} is too long: {longest} tokens; the model has room for {room}.",
                remedy="Shorten it.",
            )
        return pad_rows(rows, self.tokenizer.pad_id)

    def _tensor_of(self, pictures: Sequence[Picture | None]) -> torch.Tensor:
        """Normalised pictures, float32 `[B, 3, S, S]`; one that is None is empty."""
        config = self.config
        size = config.image_size
        pixels_B3SS = np.zeros((len(pictures), 3, size, size), dtype=np.uint8)
        for row, picture in enumerate(pictures):
            if picture is not None:
                pixels_B3SS[row] = picture_pixels(picture, config)
        pixels = torch.from_numpy(pixels_B3SS).to(self.device)
        return normalize_images(pixels, config.image_mean, config.image_std)


def picture_pixels(picture: Picture, config: BitGenConfig) -> np.ndarray:
    """The square that the model sees of a picture, not yet normalised: uint8 `[3, S, S]`.

    Raises:
        ImageError: not a picture, or one that is too small or too large.
    """
    if isinstance(picture, Image.Image):
        return prepare_image(picture, config.image_size, config.image_resize)
    return load_image(picture, config.image_size, config.image_resize)


def _listed(images: Picture | Sequence[Picture]) -> list[Picture]:
    pictures = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
    if not pictures:
        raise InputError("There is no picture to caption.", remedy="Give at least one.")
    return pictures


def _read_catalog(catalog: Sequence[Robot] | str | Path) -> list[Robot]:
    robots = load_catalog(Path(catalog)) if isinstance(catalog, (str, Path)) else list(catalog)
    if not robots:
        raise InputError("The robot catalog is empty.", remedy="Name at least one robot in it.")
    return robots


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}.")


def _seeded(seed: int) -> torch.Generator:
    try:
        return torch.Generator().manual_seed(seed)
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:
        raise InputError(f"The seed must be a 64-bit whole number, got {seed!r}.") from error
