"""Training and validation samples: captions of pictures, robot tasks, and plans.

caption: <|bos|> [prompt words] caption words <|eos|>     task: <|task|> words
plan:    <|plan|> words of the task, JSON

In masked language modelling some of a caption's words are hidden (`bitgen.dataset.masked`).
"""

from __future__ import annotations

import hashlib
import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from bitgen.config import BitGenConfig, TrainingConfig
from bitgen.dataset.coco import CaptionedImage
from bitgen.dataset.collate import IGNORED_LABEL, Collator, Sample
from bitgen.dataset.features import PLAIN, FeatureCache
from bitgen.dataset.masked import TokenMasker, check_objective
from bitgen.dataset.plan_grammar import PlanFormat
from bitgen.dataset.plans import TaskPlan
from bitgen.dataset.robots import RobotTask
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.errors import ConfigError

_WIDEST_CROP = 4 / 3  # of its height; the narrowest is as much higher than wide
_BRIGHTNESS_AND_CONTRAST = 0.15
_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


class Pictures(Protocol):
    """Gives the pixels of a picture, uint8 `[3, S, S]`; an `ImageCache` does."""

    def __getitem__(self, path: Path, /) -> np.ndarray: ...


class TrainingSet(Dataset[Sample]):
    """Captions, robot tasks and plans of one split.

    Every draw (which caption, prompt, augmentation) depends on the seed, the epoch and the index
    alone, so that a resumed run and any number of workers see the same samples.
    """

    def __init__(
        self,
        images: Sequence[CaptionedImage],
        tasks: Sequence[RobotTask],
        cache: Pictures | FeatureCache,
        tokenizer: Tokenizer,
        config: BitGenConfig,
        training: TrainingConfig,
        robot_names: Sequence[str],
        training_mode: bool,
        plans: Sequence[TaskPlan] = (),
    ) -> None:
        """Every caption, task and plan is encoded here, once.

        Samples hold pictures where `cache` does; or features, of one of the variants that
        `PictureVariants` names for each picture.

        Raises:
            ConfigError: the objective is none for this attention mode or tokenizer; or plans and a
                model that writes no text.
            InputError: plans and a tokenizer that cannot write them.
        """
        check_objective(config, training, tokenizer)
        self._images, self._tasks, self._cache = list(images), list(tasks), cache
        self._tokenizer, self._training = tokenizer, training
        self._augment = training_mode and training.augment
        self._variants = PictureVariants(training, training_mode)
        self._prompt_probability = training.prompt_probability if training_mode else 0.0
        self._task_word_dropout = training.task_word_dropout if training_mode else 0.0
        self._robot_names = tuple(robot_names)
        self._image_size, self._vocab_size = config.image_size, config.vocab_size
        self._is_bidirectional = config.attention_mode == "bidirectional"
        # Seen from both sides, a word that is not hidden would be read off.
        self.captions_have_loss = not self._is_bidirectional or training.objective == "mlm"
        self._epoch = 0
        one_each = training.captions == "one" or not training_mode
        self._captions = [
            (image, None if one_each else caption)
            for image in range(len(self._images))
            for caption in range(1 if one_each else len(self._images[image].captions))
        ]
        captions = [caption for image in self._images for caption in image.captions]
        encoded = tokenizer.encode_batch(captions)
        # One array for all: workers share it, where lists would be copied by their first use.
        self._tokens = np.fromiter((i for ids in encoded for i in ids), dtype=np.int32)
        self._token_ends = np.cumsum([0, *map(len, encoded)])
        self._first_captions = np.cumsum([0, *(len(image.captions) for image in self._images)])
        self._task_ids = [
            [tokenizer.task_id, *ids] for ids in tokenizer.encode_batch([t.task for t in tasks])
        ]
        # Of each copy other words are left out.
        self._num_tasks = len(self._tasks) * (training.robot_repeats if training_mode else 1)
        self._plans = list(plans)
        self._plan_repeats = training.plan_repeats if training_mode else 1
        self._plan_texts = self._encode_plans() if plans else []
        self._masker = None
        if training.objective == "mlm":
            self._masker = TokenMasker(tokenizer, training.mlm_probability)
        self._image_words = self._weigh_image_words() if training_mode else []
        self.collate = Collator(tokenizer.pad_id, len(self._robot_names))

    @property
    def images(self) -> tuple[CaptionedImage, ...]:
        """The pictures that have captions, in their order."""
        return tuple(self._images)

    @property
    def tasks(self) -> tuple[RobotTask, ...]:
        """The robot tasks, in their order."""
        return tuple(self._tasks)

    @property
    def plans(self) -> tuple[TaskPlan, ...]:
        """The plans, in their order, each once."""
        return tuple(self._plans)

    @property
    def texts_have_loss(self) -> bool:
        """Whether there is a text that the model learns to write."""
        return self.captions_have_loss and bool(self._captions or self._plans)

    @property
    def longest_plan(self) -> int:
        """Tokens of the longest plan with its task; 0 without plans."""
        return max((len(ids) for _, ids, _ in self._plan_texts), default=0)

    def caption_idf(self) -> np.ndarray:
        """Inverse document frequency of each token, float32 `[V]`: the captions of a picture are a
        document, ln(N / n) for a token that n of N of them have, at least one (arXiv 1411.5726,
        equation 1)."""
        num_pictures = len(self._images)
        ends = self._token_ends[self._first_captions]
        picture_of = np.repeat(np.arange(num_pictures), np.diff(ends))
        found = np.unique(picture_of * self._vocab_size + self._tokens)
        counts_V = np.bincount(found % self._vocab_size, minlength=self._vocab_size)
        idf_V: np.ndarray = np.log(num_pictures / np.maximum(counts_V, 1)).astype(np.float32)
        return idf_V

    def task_number(self, index: int) -> int | None:
        """Which of `tasks` a sample is; None for captions and plans."""
        copy = index - len(self._captions)
        return copy % len(self._tasks) if 0 <= copy < self._num_tasks else None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose draws `__getitem__` makes."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._captions) + self._num_tasks + len(self._plans) * self._plan_repeats

    def lengths(self, epoch: int) -> np.ndarray:
        """Tokens of each sample that `__getitem__` gives in an epoch, int64 `[len(self)]`.

        What depends on chance is drawn as it is there: 2 seconds for 118,000 images.
        """
        limit = self._training.max_caption_tokens
        num_tokens = np.diff(self._token_ends)
        # <|bos|>, the words, and <|eos|> where there is room.
        of_captions = 1 + np.minimum(num_tokens, limit) + (num_tokens < limit)
        lengths = np.empty(len(self), dtype=np.int64)
        for copy in range(self._num_tasks):
            index, number = len(self._captions) + copy, copy % len(self._tasks)
            lengths[index] = len(self._draw_task_ids(number, self._random(epoch, index)))
        of_plans = [len(ids) for _, ids, _ in self._plan_texts] * self._plan_repeats
        lengths[len(self._captions) + self._num_tasks :] = of_plans
        for index, (image, caption) in enumerate(self._captions):
            if caption is None:
                caption = self._draw_caption(image, self._random(epoch, index))
            lengths[index] = of_captions[self._first_captions[image] + caption]
        return lengths

    def _random(self, epoch: int, index: int) -> np.random.Generator:
        return np.random.default_rng((self._training.seed, epoch, index))

    def _draw_caption(self, image: int, random: np.random.Generator) -> int:
        return int(random.integers(len(self._images[image].captions)))

    def _caption_ids(self, image: int, caption: int) -> list[int]:
        number = self._first_captions[image] + caption
        start, end = self._token_ends[number : number + 2]
        ids: list[int] = self._tokens[start:end].tolist()
        return ids

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        random = self._random(self._epoch, index)
        if index < len(self._captions):
            return self._caption_sample(*self._captions[index], random)
        index -= len(self._captions)
        if index < self._num_tasks:
            return self._task_sample(index % len(self._tasks), random)
        return self._plan_sample((index - self._num_tasks) % len(self._plans), random)

    def _caption_sample(
        self, image: int, caption: int | None, random: np.random.Generator
    ) -> Sample:
        entry = self._images[image]
        if caption is None:
            caption = self._draw_caption(image, random)
        words = entry.captions[caption].split()
        num_prompt_tokens = 0
        if len(words) > 1 and random.random() < self._prompt_probability:
            prompt = " ".join(words[: random.integers(1, len(words))])
            num_prompt_tokens = len(self._tokenizer.encode(prompt))
        caption_ids = self._caption_ids(image, caption)
        limit = self._training.max_caption_tokens
        end = [self._tokenizer.eos_id] if len(caption_ids) < limit else []
        input_ids = [self._tokenizer.bos_id, *caption_ids[:limit], *end]
        num_prefix = 1 + min(num_prompt_tokens, limit - 1)
        pixels, features = self._picture(entry.path, " ".join(entry.captions), random)
        labels = None
        if self._masker is not None:
            input_ids, labels = self._masker(input_ids, random)
        return Sample(
            input_ids=input_ids,
            num_prefix=len(input_ids) if self._is_bidirectional else num_prefix,
            image=pixels,
            image_features=features,
            image_words=self._image_words[image] if self._image_words else {},
            labels=labels,
            picture=image,
        )

    def _task_sample(self, number: int, random: np.random.Generator) -> Sample:
        task, input_ids = self._tasks[number], self._draw_task_ids(number, random)
        image, features = self._task_picture(task, random)
        labels = tuple(float(name in task.robots) for name in self._robot_names)
        return Sample(input_ids, len(input_ids), image, labels, image_features=features)

    def _draw_task_ids(self, number: int, random: np.random.Generator) -> list[int]:
        """`<|task|>` and the words that are not left out; at least one is there."""
        task_id, *words = self._task_ids[number]
        if self._task_word_dropout:
            left = random.random(len(words)) >= self._task_word_dropout
            words = [word for word, stays in zip(words, left, strict=True) if stays] or words
        return [task_id, *words]

    def _plan_sample(self, number: int, random: np.random.Generator) -> Sample:
        num_prefix, input_ids, labels = self._plan_texts[number]
        image, features = self._task_picture(self._plans[number], random)
        return Sample(
            list(input_ids),
            num_prefix,
            image,
            labels=list(labels),
            image_features=features,
            is_plan=True,
        )

    def _encode_plans(self) -> list[tuple[int, list[int], list[int]]]:
        """Of each plan the length of its task, its tokens, and their labels."""
        if self._is_bidirectional:
            raise ConfigError(
                "Plans are written word after word, which a bidirectional model cannot.",
                remedy="Take --attention_mode prefix, or leave --plan_data out.",
            )
        plan_format, encoded = PlanFormat(self._tokenizer), []
        for plan in self._plans:
            task = self._tokenizer.encode_plan_task(plan.task)
            ids, has_choice = plan_format.encode(plan.subtasks, self._training.max_plan_tokens)
            # What the grammar alone decides is nothing to learn.
            labels = [
                token if chosen else IGNORED_LABEL
                for token, chosen in zip(ids, has_choice, strict=True)
            ]
            encoded.append((len(task), [*task, *ids], [*[IGNORED_LABEL] * len(task), *labels]))
        return encoded

    def _task_picture(
        self, task: RobotTask | TaskPlan, random: np.random.Generator
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if task.image is None:
            return None, None
        return self._picture(task.image, task.task, random)

    def _picture(
        self, path: Path, words: str, random: np.random.Generator
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Pixels or features, whichever are cached, of a picture of which `words` are said."""
        if isinstance(self._cache, FeatureCache):
            names = self._variants.names(words)
            name = names[int(random.integers(len(names)))] if len(names) > 1 else names[0]
            return None, torch.from_numpy(self._cache.features(path, name))
        pixels = self._cache[path]
        if self._augment:
            may_mirror = _SIDES.search(words) is None
            pixels = _augmented(pixels, self._training.smallest_crop, may_mirror, random)
        return torch.from_numpy(pixels), None

    def _weigh_image_words(self) -> list[dict[int, float]]:
        """What each picture's captions agree on, as weights of their tokens that add up to 1.

        A token weighs as many captions as repeat it, times its inverse document frequency (as in
        CIDEr, arXiv 1411.5726): words that all pictures share weigh nothing, and what a single
        caption says, which a picture hardly foretells, neither. A picture whose captions agree on
        nothing, a single caption too, stands for all their words.
        """
        counts = [
            Counter(
                token
                for caption in range(len(entry.captions))
                for token in set(self._caption_ids(image, caption))
            )
            for image, entry in enumerate(self._images)
        ]
        frequency = Counter(token for count in counts for token in count)
        rarity = {token: math.log(len(counts) / n) for token, n in frequency.items()}
        weights = []
        for count in counts:
            repeated = {token: n - 1 for token, n in count.items() if n > 1}
            rows = ({t: n * rarity[t] for t, n in said.items()} for said in (repeated, count))
            row = next((row for row in rows if sum(row.values())), {})
            total = sum(row.values())
            weights.append({token: value / total for token, value in row.items() if value > 0})
        return weights


class PictureVariants:
    """Which versions of a picture have their features cached, by name.

    Plain, or varied as pictures are in training, `TrainingConfig.cached_views` of each. What a name
    stands for depends on the picture and the name alone; names tell apart how pictures are varied.
    """

    def __init__(self, training: TrainingConfig, training_mode: bool) -> None:
        self._number, self._smallest_crop = 0, training.smallest_crop
        if training_mode and training.augment and training.cached_views > 1:
            self._number = training.cached_views
            # Of what is done to a picture that shows every kind of change.
            sample_388 = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(3, 8, 8)
            done = [
                _augmented(sample_388, self._smallest_crop, True, np.random.default_rng(i))
                for i in range(8)
            ]
            self._manner = hashlib.blake2b(np.stack(done).tobytes(), digest_size=4).hexdigest()

    def names(self, words: str) -> tuple[str, ...]:
        """The variants of a picture of which `words` are said."""
        if not self._number:
            return (PLAIN,)
        mirror = "-mirror" if _SIDES.search(words) is None else ""
        return tuple(f"{self._manner}-{number}{mirror}" for number in range(self._number))

    def make(self, pixels_3SS: np.ndarray, name: str) -> np.ndarray:
        """A variant that is not plain, uint8 `[3, S, S]`."""
        seed = (zlib.crc32(name.encode()), zlib.crc32(pixels_3SS.tobytes()))
        may_mirror = name.endswith("-mirror")
        return _augmented(pixels_3SS, self._smallest_crop, may_mirror, np.random.default_rng(seed))


def _augmented(
    pixels_3SS: np.ndarray, smallest_crop: float, may_mirror: bool, random: np.random.Generator
) -> np.ndarray:
    """A cropped, stretched, lit and, where the words allow it, mirrored picture, uint8 `[3, S, S]`.

    Hue stays as it is, because captions name colours.
    """
    size = pixels_3SS.shape[-1]
    side = size * random.uniform(smallest_crop, 1.0)
    stretch = _WIDEST_CROP ** (random.uniform(-0.5, 0.5) * (smallest_crop < 1))
    width, height = min(size, side * stretch), min(size, side / stretch)
    left, top = random.uniform(0, (size - width, size - height))
    # Planes joined by Pillow, and one table for all bytes: by numpy, either takes several times
    # as long.
    image = Image.merge("RGB", [Image.fromarray(plane_SS) for plane_SS in pixels_3SS])
    image = image.resize(
        (size, size), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
    )
    if may_mirror and random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    contrast = 1 + random.uniform(-1, 1) * _BRIGHTNESS_AND_CONTRAST
    brightness = 255 * random.uniform(-1, 1) * _BRIGHTNESS_AND_CONTRAST
    table = (np.arange(256) - 127.5) * contrast + 127.5 + brightness
    table_bytes = np.clip(table, 0, 255).astype(np.uint8).tobytes()
    lit = np.frombuffer(image.tobytes().translate(table_bytes), dtype=np.uint8)
    return np.ascontiguousarray(lit.reshape(size, size, 3).transpose(2, 0, 1))
