"""Training and validation samples: captions of pictures, and robot tasks.

caption: <|bos|> [prompt words] caption words <|eos|>     task: <|task|> words

In masked language modelling some of a caption's words are hidden (`bitgen.dataset.masked`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from bitgen.config import BitGenConfig, TrainingConfig
from bitgen.dataset.coco import CaptionedImage
from bitgen.dataset.collate import Collator, Sample
from bitgen.dataset.images import ImageCache
from bitgen.dataset.masked import TokenMasker, check_objective
from bitgen.dataset.robots import RobotTask
from bitgen.dataset.tokenizer import Tokenizer

_SMALLEST_CROP = 0.85
_BRIGHTNESS_AND_CONTRAST = 0.15
_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


class TrainingSet(Dataset[Sample]):
    """Captions and robot tasks of one split.

    Every draw (which caption, prompt, augmentation) depends on the seed, the epoch and the index
    alone, so that a resumed run and any number of workers see the same samples.
    """

    def __init__(
        self,
        images: Sequence[CaptionedImage],
        tasks: Sequence[RobotTask],
        cache: ImageCache,
        tokenizer: Tokenizer,
        config: BitGenConfig,
        training: TrainingConfig,
        robot_names: Sequence[str],
        training_mode: bool,
    ) -> None:
        """Every caption and task is encoded here, once.

        Raises:
            ConfigError: the objective is none for this attention mode or tokenizer.
        """
        check_objective(config, training, tokenizer)
        self._images, self._tasks, self._cache = list(images), list(tasks), cache
        self._tokenizer, self._training = tokenizer, training
        self._augment = training_mode and training.augment
        self._prompt_probability = training.prompt_probability if training_mode else 0.0
        self._robot_names = tuple(robot_names)
        self._image_size = config.image_size
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

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose draws `__getitem__` makes."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._captions) + len(self._tasks)

    def lengths(self, epoch: int) -> np.ndarray:
        """Tokens of each sample that `__getitem__` gives in an epoch, int64 `[len(self)]`.

        What depends on chance is drawn as it is there: 2 seconds for 118,000 images.
        """
        limit = self._training.max_caption_tokens
        num_tokens = np.diff(self._token_ends)
        # <|bos|>, the words, and <|eos|> where there is room.
        of_captions = 1 + np.minimum(num_tokens, limit) + (num_tokens < limit)
        lengths = np.empty(len(self), dtype=np.int64)
        lengths[len(self._captions) :] = [len(ids) for ids in self._task_ids]
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
        return self._task_sample(index - len(self._captions), random)

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
        picture = self._picture(entry, " ".join(entry.captions), random)
        labels = None
        if self._masker is not None:
            input_ids, labels = self._masker(input_ids, random)
        return Sample(
            input_ids=input_ids,
            num_prefix=len(input_ids) if self._is_bidirectional else num_prefix,
            image=picture,
            image_words=self._image_words[image] if self._image_words else {},
            labels=labels,
        )

    def _task_sample(self, number: int, random: np.random.Generator) -> Sample:
        task, input_ids = self._tasks[number], list(self._task_ids[number])
        image = None
        if task.image is not None:
            entry = CaptionedImage(path=task.image, image_id=0, captions=())
            image = self._picture(entry, task.task, random)
        labels = tuple(float(name in task.robots) for name in self._robot_names)
        return Sample(input_ids, len(input_ids), image, labels)

    def _picture(
        self, entry: CaptionedImage, words: str, random: np.random.Generator
    ) -> torch.Tensor:
        pixels = self._cache[entry.path]
        if self._augment:
            pixels = _augmented(pixels, may_mirror=_SIDES.search(words) is None, random=random)
        return torch.from_numpy(pixels)

    def _weigh_image_words(self) -> list[dict[int, float]]:
        """What each picture's captions say, as TF-IDF weights of their tokens that add up to 1.

        Words that all captions share weigh nothing, those that tell pictures apart weigh most (the
        weights of CIDEr, arXiv 1411.5726, over single tokens).
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
        num_images = len(self._images)
        weights = []
        for count in counts:
            row = {token: n * math.log(num_images / frequency[token]) for token, n in count.items()}
            total = sum(row.values())
            weights.append({token: value / total for token, value in row.items() if value > 0})
        return weights


def _augmented(pixels_3SS: np.ndarray, may_mirror: bool, random: np.random.Generator) -> np.ndarray:
    """A slightly cropped, lit and, where the words allow it, mirrored picture, uint8 `[3, S, S]`.

    Hue stays as it is, because captions name colours.
    """
    size = pixels_3SS.shape[-1]
    side = size * random.uniform(_SMALLEST_CROP, 1.0)
    left, top = random.uniform(0, size - side, 2)
    # Planes joined by Pillow, and one table for all bytes: by numpy, either takes several times
    # as long.
    image = Image.merge("RGB", [Image.fromarray(plane_SS) for plane_SS in pixels_3SS])
    image = image.resize(
        (size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )
    if may_mirror and random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    contrast = 1 + random.uniform(-1, 1) * _BRIGHTNESS_AND_CONTRAST
    brightness = 255 * random.uniform(-1, 1) * _BRIGHTNESS_AND_CONTRAST
    table = (np.arange(256) - 127.5) * contrast + 127.5 + brightness
    table_bytes = np.clip(table, 0, 255).astype(np.uint8).tobytes()
    lit = np.frombuffer(image.tobytes().translate(table_bytes), dtype=np.uint8)
    return np.ascontiguousarray(lit.reshape(size, size, 3).transpose(2, 0, 1))
