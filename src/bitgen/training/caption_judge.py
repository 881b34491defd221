"""CIDEr-D of validation captions, by which the best checkpoint can be chosen."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bitgen.config import TrainingConfig
from bitgen.dataset.coco import CaptionedImage
from bitgen.dataset.collate import Batch
from bitgen.dataset.penn_treebank import caption_words
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.model.bitgen import BitGenModel
from bitgen.training.caption_sampling import never_ids, write_captions
from bitgen.training.cider import CiderD


class CaptionJudge:
    """Compares captions with the references of some validation pictures.

    Document frequencies are those of these pictures, as in the published metric.
    """

    def __init__(
        self, tokenizer: Tokenizer, images: Sequence[CaptionedImage], training: TrainingConfig
    ) -> None:
        """
        Args:
            tokenizer: the model's.
            images: the validation set's, of which `training.cider_images` are taken from all over.
            training: how many, and how long captions may be.
        """
        self._tokenizer, self._max_tokens = tokenizer, training.max_caption_tokens
        number = min(len(images), training.cider_images)
        self._chosen = [index * len(images) // number for index in range(number)]
        self._position = {image: position for position, image in enumerate(self._chosen)}
        self._scorer = CiderD(
            [[caption_words(text) for text in images[index].captions] for index in self._chosen]
        )

    def batches(self, batch_size: int) -> list[list[int]]:
        """Which samples of the validation set are to be captioned together."""
        starts = range(0, len(self._chosen), batch_size)
        return [self._chosen[start : start + batch_size] for start in starts]

    def cider(self, model: BitGenModel, batch: Batch, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Caption pictures greedily: the sum of the captions' CIDEr-D and their count, float64 [2].

        Args:
            model: on the device of the pictures; call this under the forward pass's autocast.
            batch: one of `batches`, on the host.
            images_B3HW: its pictures, normalised, on the device.
        """
        tokenizer = self._tokenizer
        captions = write_captions(
            model,
            images_B3HW,
            tokenizer.bos_id,
            tokenizer.eos_id,
            self._max_tokens,
            never_ids=never_ids(tokenizer, model),
            greedy=True,
        )
        words = [caption_words(tokenizer.decode(ids)) for (ids,) in captions]
        positions = [self._position[picture] for picture in batch.pictures.tolist()]
        return torch.tensor([self._scorer(words, positions).sum(), len(words)], dtype=torch.float64)
