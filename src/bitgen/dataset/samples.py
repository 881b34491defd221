"""Training and validation samples: captions of pictures, and robot tasks.

caption: <|bos|> [prompt words] caption words <|eos|>     task: <|task|> words
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
        self._images, self._tasks, self._cache = list(images), list(tasks), cache
        self._tokenizer, self._training = tokenizer, training
        self._augment = training_mode and training.augment
        self._prompt_probability = training.prompt_probability if training_mode else 0.0
        self._robot_names = tuple(robot_names)
        self._image_size = config.image_size
        self._captions_have_loss = config.attention_mode != "bidirectional"
        self._epoch = 0
        one_each = training.captions == "one" or not training_mode
        self._captions = [
            (image, None if one_each else caption)
            for image in range(len(self._images))
            for caption in range(1 if one_each else len(self._images[image].captions))
        ]
        self._image_words = _image_words(self._images, tokenizer) if training_mode else []
        self.collate = Collator(tokenizer.pad_id, len(self._robot_names))

    @property
    def tasks(self) -> tuple[RobotTask, ...]:
        """The robot tasks, in their order."""
        return tuple(self._tasks)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose draws `__getitem__` makes."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._captions) + len(self._tasks)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        random = np.random.default_rng((self._training.seed, self._epoch, index))
        if index < len(self._captions):
            return self._caption_sample(*self._captions[index], random)
        return self._task_sample(self._tasks[index - len(self._captions)], random)

    def _caption_sample(
        self, image: int, caption: int | None, random: np.random.Generator
    ) -> Sample:
        entry = self._images[image]
        if caption is None:
            caption = int(random.integers(len(entry.captions)))
        words = entry.captions[caption].split()
        num_prompt_tokens = 0
        if len(words) > 1 and random.random() < self._prompt_probability:
            prompt = " ".join(words[: random.integers(1, len(words))])
            num_prompt_tokens = len(self._tokenizer.encode(prompt))
        caption_ids = self._tokenizer.encode(" ".join(words))
        limit = self._training.max_caption_tokens
        end = [self._tokenizer.eos_id] if len(caption_ids) < limit else []
        input_ids = [self._tokenizer.bos_id, *caption_ids[:limit], *end]
        # Seen from both sides, each word would be read off instead of being foretold.
        num_prefix = 1 + min(num_prompt_tokens, limit - 1)
        return Sample(
            input_ids=input_ids,
            num_prefix=num_prefix if self._captions_have_loss else len(input_ids),
            image=self._picture(entry, " ".join(entry.captions), random),
            image_words=self._image_words[image] if self._image_words else {},
        )

    def _task_sample(self, task: RobotTask, random: np.random.Generator) -> Sample:
        input_ids = self._tokenizer.encode_task(task.task)
        image = None
        if task.image is not None:
            entry = CaptionedImage(path=task.image, image_id=0, captions=())
            image = self._picture(entry, task.task, random)
        labels = tuple(float(name in task.robots) for name in self._robot_names)
        return Sample(input_ids, len(input_ids), image, labels)

    def _picture(
        self, entry: CaptionedImage, words: str, random: np.random.Generator
    ) -> torch.Tensor:
        pixels = np.array(self._cache[entry.path])
        if self._augment:
            pixels = _augmented(pixels, may_mirror=_SIDES.search(words) is None, random=random)
        return torch.from_numpy(pixels)


def _image_words(images: Sequence[CaptionedImage], tokenizer: Tokenizer) -> list[dict[int, float]]:
    """What each picture's captions say, as TF-IDF weights of their tokens that add up to 1.

    Words that all captions share weigh nothing, those that tell pictures apart weigh most (the
    weights of CIDEr, arXiv 1411.5726, over single tokens).
    """
    counts = [
        Counter(token for caption in image.captions for token in set(tokenizer.encode(caption)))
        for image in images
    ]
    frequency = Counter(token for count in counts for token in count)
    weights = []
    for count in counts:
        row = {token: n * math.log(len(images) / frequency[token]) for token, n in count.items()}
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
    image = Image.fromarray(pixels_3SS.transpose(1, 2, 0))
    image = image.resize(
        (size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )
    if may_mirror and random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    contrast = 1 + random.uniform(-1, 1) * _BRIGHTNESS_AND_CONTRAST
    brightness = 255 * random.uniform(-1, 1) * _BRIGHTNESS_AND_CONTRAST
    table = (np.arange(256) - 127.5) * contrast + 127.5 + brightness
    lit = np.clip(table, 0, 255).astype(np.uint8)[np.asarray(image)]
    return np.ascontiguousarray(lit.transpose(2, 0, 1))
