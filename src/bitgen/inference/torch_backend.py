"""The PyTorch backend: any model, any device. The native engine is held to what it answers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from bitgen.dataset.collate import pad_rows
from bitgen.dataset.images import normalize_images
from bitgen.dataset.task_words import TaskWords
from bitgen.inference.answers import Generation
from bitgen.inference.backend import Reply, Request, RobotTexts, TaskRequest
from bitgen.inference.consensus import caption_idf_of, most_agreed
from bitgen.inference.decoding import DecodingGraphs
from bitgen.inference.generate import generate, read_prompts
from bitgen.inference.options import CaptionOptions, Vocabulary
from bitgen.model.bitgen import BitGenModel
from bitgen.model.cache import StaticCache


class TorchBackend:
    """A `BitGenModel` in evaluation mode on one device, batch after batch.

    Attributes:
        model: the model.
        device: where it runs.
    """

    name = "torch"

    def __init__(self, model: BitGenModel, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.num_image_tokens = model.num_image_tokens
        buffers = {name: buffer.cpu().numpy() for name, buffer in model.named_buffers()}
        self.task_words = TaskWords.of_model(model.config, buffers)
        self._caption_idf_V = caption_idf_of(buffers)
        self._robots_in_model: RobotTexts | None = None
        self._graphs: DecodingGraphs | None = None

    def replies(
        self,
        requests: Iterable[Request],
        vocabulary: Vocabulary,
        options: CaptionOptions,
        writes: bool,
        task: TaskRequest | None,
    ) -> Iterator[Reply]:
        """See `Backend.replies`: `options.pictures_at_a_time`."""
        remaining = iter(requests)
        while batch := list(itertools.islice(remaining, options.pictures_at_a_time)):
            generations: list[Generation] | list[None] = [None] * len(batch)
            if writes:
                generations = self._generations(batch, vocabulary, options)
            robots: np.ndarray | list[None] = [None] * len(batch)
            if task is not None:
                robots = self.robot_logits(
                    [task.ids] * len(batch), [request.pixels_3SS for request in batch], task.robots
                )
            yield from itertools.starmap(Reply, zip(generations, robots, strict=True))

    def _generations(
        self, batch: Sequence[Request], vocabulary: Vocabulary, options: CaptionOptions
    ) -> list[Generation]:
        seed = options.drawing_seed
        drawn = generate(
            self.model,
            self._images([request.pixels_3SS for request in batch]),
            [request.prompt_ids for request in batch],
            eos_id=vocabulary.eos_id,
            max_tokens=options.max_tokens,
            beam_size=options.beam_size,
            length_penalty=options.length_penalty,
            temperature=options.drawing_temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seeds=None if seed is None else [seed] * len(batch),
            never_ids=vocabulary.never_ids,
            vocab_size=vocabulary.size,
            attention_window=options.attention_window,
            speculative=options.speculative,
            graphs=self._decoding_graphs() if options.cuda_graphs else None,
            num_samples=options.num_samples,
        )
        of_each = [
            drawn[start : start + options.num_samples]
            for start in range(0, len(drawn), options.num_samples)
        ]
        return [
            found[most_agreed([one.tokens for one in found], self._caption_idf_V)]
            for found in of_each
        ]

    def _decoding_graphs(self) -> DecodingGraphs:
        if self._graphs is None:
            self._graphs = DecodingGraphs(self.model)
        return self._graphs

    @torch.inference_mode()
    def robot_logits(
        self,
        task_ids: Sequence[list[int]],
        pixels: Sequence[np.ndarray | None],
        robots: RobotTexts,
    ) -> np.ndarray:
        """See `Backend.robot_logits`: all tasks in one batch."""
        if robots != self._robots_in_model:
            self.model.set_robots(robots.names, *pad_rows([list(ids) for ids in robots.ids], 0))
            self._robots_in_model = robots
        image_mask = [picture is not None for picture in pixels]
        has_images = any(image_mask)
        # On the CPU, where it costs nothing to see that there is no padding.
        input_ids_BL, valid_BL = pad_rows(list(task_ids), 0)
        mask = self.model.build_attention_mask(
            valid_BL,
            prefix_lengths_B=valid_BL.sum(dim=1),
            image_mask_B=torch.tensor(image_mask) if has_images else None,
            has_images=has_images,
        )
        output = self.model(
            input_ids_BL.to(self.device),
            images=self._images(pixels) if has_images else None,
            attention_mask=mask,
            return_robot_selection=True,
        )
        assert output.robot_logits is not None
        logits_BR: np.ndarray = output.robot_logits.float().cpu().numpy()
        return logits_BR

    @torch.inference_mode()
    def read_text(
        self, prompt_ids: Sequence[int], pixels: np.ndarray | None, room: int
    ) -> TorchReader:
        """See `Backend.read_text`."""
        images = None if pixels is None else self._images([pixels])
        _, cache = read_prompts(self.model, images, [prompt_ids], room, attention_window=0)
        assert isinstance(cache, StaticCache)
        return TorchReader(self.model, cache)

    def _images(self, pixels: Sequence[np.ndarray | None]) -> torch.Tensor:
        """Normalised pictures, float32 `[B, 3, S, S]`; one that is None is empty."""
        config = self.model.config
        size = config.image_size
        pixels_B3SS = np.zeros((len(pixels), 3, size, size), dtype=np.uint8)
        for row, picture in enumerate(pixels):
            if picture is not None:
                pixels_B3SS[row] = picture
        images = torch.from_numpy(pixels_B3SS).to(self.device)
        return normalize_images(images, config.image_mean, config.image_std)


class TorchReader:
    """See `bitgen.inference.planning.TextReader`: one row, with its cache."""

    def __init__(self, model: BitGenModel, cache: StaticCache) -> None:
        self._model, self._cache = model, cache

    @property
    def length(self) -> int:
        return self._cache.length

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> np.ndarray:
        input_ids_1L = torch.tensor([list(ids)], device=next(self._model.parameters()).device)
        output = self._model(input_ids_1L, attention_cache=self._cache)
        logits_V: np.ndarray = output.logits[0, -1].float().cpu().numpy()
        return logits_V

    def rewind(self, length: int) -> None:
        self._cache.rewind([length])
