"""`BitGen`: a loaded model that captions pictures and chooses robots.

    model = BitGen.load("runs/tiny")            # or "tiny.safetensors"
    model.caption("photo.jpg")[0].text
    model.select_robots("bring back the red ball", image="photo.jpg")[0].name

Pictures and prompts are given in batches, and each is answered as if it were alone.

A model runs on one of two backends, which say the same: the native engine, which needs no torch, or
PyTorch, which can do everything. Neither is imported before a model asks for it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitgen.config import DEVICES, BitGenConfig
from bitgen.dataset.plan_grammar import PlanFormat, PlanGrammar, PlanLimits
from bitgen.dataset.plans import Subtask
from bitgen.dataset.robots import Robot, chosen_robots, load_catalog
from bitgen.dataset.task_words import (
    TASK_WORD_BINS,
    TaskParts,
    new_robot_log_odds,
    pooled_log_odds,
)
from bitgen.dataset.tokenizer import Tokenizer, tidy_sentence
from bitgen.errors import ImageError, InputError
from bitgen.inference.answers import Answer, Caption, Generation, Picture, RobotChoice
from bitgen.inference.backend import (
    BACKENDS,
    Backend,
    NativeUnavailable,
    Request,
    RobotTexts,
    TaskRequest,
)
from bitgen.inference.options import (
    CaptionOptions,
    Vocabulary,
    check_batch_size,
    check_future_heads,
    check_lengths,
    check_text_lengths,
    check_threads,
    check_writes,
)
from bitgen.inference.pipeline import decoded_ahead, picture_pixels
from bitgen.inference.planning import PlanOptions, write_plan
from bitgen.shipped import SHIPPED_MODEL, model_path

if TYPE_CHECKING:
    import torch

    from bitgen.export.loaded import LoadedModel
    from bitgen.inference.torch_backend import TorchBackend
    from bitgen.model.bitgen import BitGenModel

__all__ = ["Answer", "BitGen", "Caption", "CaptionOptions", "Picture", "RobotChoice"]


DEFAULT_ROBOT_THRESHOLD = 0.5
"""Of models that were not validated on robot tasks."""
DEFAULT_ROBOT_TEMPERATURE = 1.0
"""Of the same models."""


@dataclass(frozen=True)
class _Described:
    """Robots in words."""

    names: tuple[str, ...]
    texts: tuple[str, ...]
    trained_log_odds: float | None = None
    """Highest of the catalog's robots that were trained on, where `texts` are variants of some."""

    @classmethod
    def of(cls, robots: Sequence[Robot]) -> _Described:
        texts = tuple(robot.text() for robot in robots)
        return cls(tuple(robot.name for robot in robots), texts)


class BitGen:
    """A model in evaluation mode, in float32, on one device.

    Attributes:
        config: the model's architecture.
        tokenizer: its tokenizer.
        info: where it comes from (run, step, losses, data).
        why_torch: why the model does not run on the native engine; None where it does, or where
            PyTorch was asked for.
    """

    def __init__(
        self,
        model: BitGenModel,
        tokenizer: Tokenizer,
        catalog: Sequence[Robot] = (),
        device: str | torch.device = "cpu",
        info: dict[str, Any] | None = None,
    ) -> None:
        from bitgen.inference.torch_backend import TorchBackend

        self._start(
            model.config, tokenizer, catalog, info or {}, torch_backend=TorchBackend(model, device)
        )

    def _start(
        self,
        config: BitGenConfig,
        tokenizer: Tokenizer,
        catalog: Sequence[Robot],
        info: dict[str, Any],
        native: Backend | None = None,
        torch_backend: TorchBackend | None = None,
        open_torch: Callable[[], TorchBackend] | None = None,
        why_torch: str | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.info = info
        self.why_torch = why_torch
        self._catalog = list(catalog)
        self._trained_robots = {robot.name for robot in catalog}
        self._plan_format: PlanFormat | None = None
        tuned = info.get("robot_threshold")
        self._robot_threshold = DEFAULT_ROBOT_THRESHOLD if tuned is None else float(tuned)
        temperature = info.get("robot_temperature")
        self._robot_temperature = (
            DEFAULT_ROBOT_TEMPERATURE if temperature is None else float(temperature)
        )
        self._robot_word_weight = float(info.get("robot_word_weight") or 0.0)
        self._native = native
        self._torch = torch_backend
        self._open_torch = open_torch

    @classmethod
    def load(
        cls,
        path: str | Path = SHIPPED_MODEL,
        device: str = "auto",
        packed: bool = True,
        backend: str = "auto",
        threads: int | None = None,
    ) -> BitGen:
        """Load a run's folder (its best checkpoint, else its last), a checkpoint's, or an artifact.

        Args:
            path: the folder, or the file that `bitgen export` wrote; `shipped`, the default, is the
                model that ships with BitGen.
            device: `auto`, `cpu`, `cuda` or `mps`.
            packed: run on 2-bit weights; False keeps a run's layers as in training. Both give the
                same numbers.
            backend: `native` runs on the CPU without PyTorch; `torch` is PyTorch; `auto` takes the
                native engine where it can run the model, and PyTorch for the rest: a GPU, full
                precision, other image encoders than vit, and single requests such as an attention
                window or `BitGen.model`.
            threads: processor threads; None takes one a core. They are the process's: a model that
                is loaded later with another number changes it for all.

        Raises:
            ModelFileError: missing, damaged, foreign, or of a newer format.
            InputError: a device that is not there, `packed=False` for an artifact, a backend or a
                number of threads that cannot be, or a model that `native` cannot run.
        """
        if device.partition(":")[0] not in DEVICES:
            raise InputError(
                f"There is no device {device!r}.", remedy=f"Devices: {', '.join(DEVICES)}."
            )
        if backend not in BACKENDS:
            raise InputError(
                f"There is no backend {backend!r}.", remedy=f"Backends: {', '.join(BACKENDS)}."
            )
        check_threads(threads)
        source = model_path(path)
        why_torch = None
        if backend != "torch":
            from bitgen.inference.native_backend import open_native

            try:
                found = open_native(source, device, packed, threads, asked_for=backend == "native")
            except NativeUnavailable as error:
                if backend == "native":
                    raise
                why_torch = error.message
            else:
                self = cls.__new__(cls)
                self._start(
                    found.config,
                    found.tokenizer,
                    found.catalog,
                    found.info,
                    native=found.backend,
                    open_torch=None
                    if backend == "native"
                    else lambda: _open_torch(source, "cpu", packed, threads)[0],
                )
                return self
        torch_backend, loaded = _open_torch(source, device, packed, threads)
        self = cls.__new__(cls)
        self._start(
            loaded.model.config,
            loaded.tokenizer,
            loaded.catalog,
            loaded.info,
            torch_backend=torch_backend,
            why_torch=why_torch,
        )
        return self

    @property
    def backend(self) -> str:
        """What answers ordinary requests: `native` or `torch`."""
        return "torch" if self._native is None else "native"

    @property
    def device(self) -> str | torch.device:
        """Where the model runs."""
        return "cpu" if self._torch is None else self._torch.device

    @property
    def model(self) -> BitGenModel:
        """The `BitGenModel`; where the native engine answers, PyTorch's is loaded beside it.

        Raises:
            InputError: the model was loaded for the native engine alone.
        """
        return self._torch_backend("The PyTorch model is not there").model

    @property
    def catalog(self) -> list[Robot]:
        """The robots that `select_robots` chooses from."""
        return list(self._catalog)

    @property
    def robot_threshold(self) -> float:
        """Probability from which a robot is chosen; the validation of its training found it.

        It may be set, from 0 (all robots are chosen) to 1. Raises InputError for other values.
        """
        return self._robot_threshold

    @robot_threshold.setter
    def robot_threshold(self, threshold: float) -> None:
        if not 0 <= threshold <= 1:
            raise InputError(
                f"The robot threshold is a probability, from 0 to 1; got {threshold:g}."
            )
        self._robot_threshold = float(threshold)

    @property
    def robot_temperature(self) -> float:
        """What logits of robots are divided by, so that probabilities are calibrated.

        The validation of the training found it (temperature scaling, arXiv 1706.04599).
        """
        return self._robot_temperature

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
        cuda_graphs: bool = False,
        consensus: int = 0,
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
                the pictures beside it; None draws differently each time. Both backends draw the
                same words from a seed.
            max_tokens: most tokens generated a picture.
            batch_size: pictures at a time.
            length_penalty: see `bitgen.inference.generate.generate`.
            attention_window: tokens that each token looks back on beside the picture, so that
                `max_tokens` may be any number; 0 looks back on all.
            speculative: draft by the future token heads: the same greedy captions, sooner than by
                PyTorch without drafts. None leaves it to the backend: PyTorch drafts for up to four
                pictures at a time, the native engine is faster without.
            cuda_graphs: on a CUDA device, read token after token by a recorded step: the same
                captions up to rounding. Experimental: see docs/gpu.md.
            consensus: draw so many captions of each picture and take the one that is most like all
                of them (`bitgen.inference.consensus`); 0: none. They are drawn at `temperature`;
                where it is 0, at 0.5 and, without a `seed`, alike every time.

        Returns:
            One `Caption` a picture, in order.

        Raises:
            InputError: no picture, options out of range, a prompt that is too long,
                `speculative` with a model that has no future token heads, or `cuda_graphs` without
                a CUDA device or with a model that has experts.
            ImageError: a file that is not a picture.
        """
        options = CaptionOptions(
            beam_size=beam_size,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            max_tokens=max_tokens,
            batch_size=batch_size,
            length_penalty=length_penalty,
            attention_window=attention_window,
            speculative=speculative,
            cuda_graphs=cuda_graphs,
            consensus=consensus,
        )
        pictures = [images] if isinstance(images, Picture) else list(images)
        if not pictures:
            raise InputError("There is no picture to caption.", remedy="Give at least one.")
        prompts = [prompt] * len(pictures) if isinstance(prompt, str) else list(prompt)
        if len(prompts) != len(pictures):
            raise InputError(f"{len(pictures)} pictures, but {len(prompts)} prompts.")
        captions = []
        for answer in self._answers(pictures, prompts, options, True):
            if answer.error is not None:
                raise answer.error
            assert answer.caption is not None
            captions.append(answer.caption)
        return captions

    def answers(
        self,
        images: Iterable[Picture],
        options: CaptionOptions | None = None,
        prompt: str = "",
        task: str | None = None,
        captions: bool = True,
        catalog: Sequence[Robot] | str | Path | None = None,
    ) -> Generator[Answer, None, None]:
        """Caption any number of pictures, and rank robots for a task, one answer after the other.

        Files are decoded ahead in threads while the model works, and answers come in order as soon
        as they are ready; memory does not grow with the number of pictures. A picture that cannot
        be read does not end it: its `Answer` says why.

        Args:
            images: read lazily, a few batches ahead of the answers.
            options: how captions are written.
            prompt: first words of every caption.
            task: what is to be done, in words: robots are ranked for it and each picture.
            captions: whether captions are written.
            catalog: robots to choose from in this call; None takes the model's catalog.

        Raises:
            InputError: a prompt or task that is empty or too long, no robots to choose from, or a
                model that cannot do what is asked.
        """
        request, ranked = None, None
        if task is not None:
            robots = self._robots(catalog)
            (ids,) = self._task_ids([task], has_pictures=True)
            request = TaskRequest(ids, self._texts(robots))
            ranked = partial(self._choices, task=task, robots=_Described.of(robots))
        return self._answers(
            images, [prompt], options or CaptionOptions(), captions, request, ranked
        )

    def _answers(
        self,
        pictures: Iterable[Picture],
        prompts: Sequence[str],
        options: CaptionOptions,
        writes: bool,
        task: TaskRequest | None = None,
        ranked: Callable[[np.ndarray], list[RobotChoice]] | None = None,
    ) -> Generator[Answer, None, None]:
        """Check and start; `prompts` has one for each picture, or one for all.

        `ranked` makes choices of the logits `[R]` of the task's robots.
        """
        tokenizer = self.tokenizer
        words = [tokenizer.encode(prompt) for prompt in prompts]
        backend = self._backend_for(options)
        if writes:
            check_writes(self.config)
            check_future_heads(self.config, options.speculative)
            check_lengths(
                [1 + len(ids) for ids in words],
                backend.num_image_tokens,
                options.max_tokens,
                self.config.max_positions,
                options.attention_window,
            )
        vocabulary = Vocabulary(
            tokenizer.eos_id,
            tuple(sorted(tokenizer.special_ids - {tokenizer.eos_id})),
            tokenizer.vocab_size,
        )
        # Twice a batch ahead: one that is worked on, one that is being decoded meanwhile.
        decoded = decoded_ahead(pictures, self.config, ahead=2 * options.batch_size)
        waiting: deque[tuple[Picture, list[int], np.ndarray | ImageError]] = deque()

        def requests() -> Iterator[Request]:
            prompt_words = itertools.cycle(words) if len(words) == 1 else iter(words)
            for (picture, pixels), ids in zip(decoded, prompt_words, strict=False):
                waiting.append((picture, ids, pixels))
                if not isinstance(pixels, ImageError):
                    yield Request(pixels, [tokenizer.bos_id, *ids])

        def run() -> Generator[Answer, None, None]:
            with contextlib.closing(decoded):
                for reply in backend.replies(requests(), vocabulary, options, writes, task):
                    yield from _unreadable(waiting)
                    picture, ids, pixels = waiting.popleft()
                    assert not isinstance(pixels, ImageError)
                    robots = None
                    if ranked is not None and reply.robot_logits_R is not None:
                        robots = ranked(reply.robot_logits_R)
                    caption = self._caption(ids, reply.generation)
                    yield Answer(picture, caption, robots, pixels_3SS=pixels)
                yield from _unreadable(waiting)

        return run()

    def _caption(self, prompt_ids: list[int], generation: Generation | None) -> Caption | None:
        if generation is None:
            return None
        return Caption(
            text=tidy_sentence(self.tokenizer.decode([*prompt_ids, *generation.tokens])),
            tokens=self.tokenizer.tokens(generation.tokens),
            token_ids=generation.tokens,
            log_probability=generation.log_probability,
            speculation=generation.speculation,
        )

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
        check_batch_size(batch_size)
        robots = self._robots(catalog)
        texts, described = self._texts(robots), _Described.of(robots)
        backend = self._backend_for(CaptionOptions())
        ranked: list[list[RobotChoice]] = []
        present = [picture for picture in pictures if picture is not None]
        with contextlib.closing(decoded_ahead(present, self.config, 2 * batch_size)) as decoded:
            for start in range(0, len(tasks), batch_size):
                batch = pictures[start : start + batch_size]
                pixels = [None if picture is None else _next_pixels(decoded) for picture in batch]
                words = tasks[start : start + batch_size]
                has_pictures = any(picture is not None for picture in batch)
                task_ids = self._task_ids(words, has_pictures)
                logits_BR = backend.robot_logits(task_ids, pixels, texts)
                ranked += [
                    self._choices(logits_R, task, described)
                    for task, logits_R in zip(words, logits_BR, strict=True)
                ]
        return ranked

    @property
    def writes_plans(self) -> bool:
        """Whether the model was trained on plans."""
        return bool(self._plans_trained_on("train_plans"))

    def _plans_trained_on(self, count: str) -> int:
        data = self.info.get("data")
        return int(data.get(count) or 0) if isinstance(data, dict) else 0

    def plan(
        self,
        task: str,
        image: Picture | None = None,
        catalog: Sequence[Robot] | str | Path | None = None,
        options: PlanOptions | None = None,
    ) -> list[Subtask]:
        """Split a task into subtasks, by order, each with a robot of the catalog.

        Args:
            task: what is to be done, in words.
            image: what the camera sees, where there is one. The decoder sees it if plans with
                pictures were trained on; the robot selector sees it in any case.
            catalog: robots to choose from in this call; None takes the model's catalog.
            options: how the plan is written.

        Raises:
            InputError: a model that was not trained on plans, or whose attention is bidirectional;
                an empty or too long task; or no robots to choose from.
            ImageError: a file that is not a picture.
        """
        check_writes(self.config)
        if not self.writes_plans:
            raise InputError(
                "This model was not trained on plans.",
                remedy="Train one with `bitgen train --plan_data FILE`; --task alone ranks robots.",
            )
        if not task.strip():
            raise InputError("The task is empty.", remedy="Say what is to be done.")
        options = options or PlanOptions()
        robots = self._robots(catalog)
        pixels = None if image is None else picture_pixels(image, self.config)
        by_selector = options.robots_by == "selector" or (
            options.robots_by == "auto"
            and bool(self.config.robot_names)
            and not self._trained_robots.issuperset(robot.name for robot in robots)
        )
        if by_selector and not self.config.robot_names:
            raise InputError(
                "This model's robot selector was not trained: it cannot choose robots for a plan.",
                remedy="Let the decoder choose them, or train with --robot_data too.",
            )
        backend = self._backend_for(CaptionOptions())
        seen = pixels if self._plans_trained_on("train_plans_with_image") else None
        prompt_ids = self.tokenizer.encode_plan_task(task)
        image_tokens = 0 if seen is None else backend.num_image_tokens
        used = image_tokens + len(prompt_ids)
        check_text_lengths([len(prompt_ids)], "task", image_tokens, self.config.max_positions)
        max_tokens = min(options.max_tokens, self.config.max_positions - used)
        self._plan_format = self._plan_format or PlanFormat(self.tokenizer)
        limits = PlanLimits(options.max_subtasks, options.max_subtask_tokens, max(1, max_tokens))
        grammar = PlanGrammar(self._plan_format, [robot.name for robot in robots], limits)
        texts = self._texts(robots) if by_selector else None
        described = _Described.of(robots)

        def robot_scores(words: str) -> np.ndarray:
            assert texts is not None
            task_ids = self._task_ids([words], has_pictures=pixels is not None)
            logits_R = backend.robot_logits(task_ids, [pixels], texts)[0]
            log_odds_R = self._log_odds(logits_R, words, described)
            scores_R: np.ndarray = -np.logaddexp(0.0, -log_odds_R)  # log of the probability
            return scores_R

        reader = backend.read_text(prompt_ids, seen, limits.max_tokens)
        return write_plan(reader, grammar, options, robot_scores if by_selector else None).subtasks

    def explain_robots(
        self,
        choices: Sequence[RobotChoice],
        task: str,
        image: Picture | np.ndarray | None = None,
        catalog: Sequence[Robot] | str | Path | None = None,
        batch_size: int = 16,
    ) -> list[RobotChoice]:
        """The same choices with their `why`: words and pieces of the picture that weighed most.

        Each part is left out in turn and the model asked again; see `bitgen.inference.explain`.

        Args:
            choices: of `select_robots` or of an `Answer`.
            task: the task that they were chosen for.
            image: the picture that they were chosen for, or `Answer.pixels_3SS`.
            catalog: the robots that they were chosen from; None takes the model's catalog.
            batch_size: questions at a time.

        Raises:
            InputError: as `select_robots`.
            ImageError: a file that is not a picture.
        """
        from bitgen.inference.explain import explain

        check_batch_size(batch_size)
        robots = self._robots(catalog)
        texts = self._texts(robots)
        described = _Described.of(robots)
        backend = self._backend_for(CaptionOptions())
        pixels_3SS = image
        if image is not None and not isinstance(image, np.ndarray):
            with contextlib.closing(decoded_ahead([image], self.config, 1)) as decoded:
                pixels_3SS = _next_pixels(decoded)
        assert pixels_3SS is None or isinstance(pixels_3SS, np.ndarray)
        (whole_ids,) = self._task_ids([task], has_pictures=pixels_3SS is not None)
        logits_R = backend.robot_logits([whole_ids], [pixels_3SS], texts)[0]
        trained = self._highest_trained(self._log_odds(logits_R, task, described), described.names)

        def score_tasks(tasks: Sequence[str], pixels: Sequence[np.ndarray | None]) -> np.ndarray:
            ids = [self.tokenizer.encode_task(words) for words in tasks]
            logits_BR = np.concatenate(
                [
                    backend.robot_logits(
                        ids[start : start + batch_size], pixels[start : start + batch_size], texts
                    )
                    for start in range(0, len(ids), batch_size)
                ]
            )
            return np.stack(
                [
                    self._log_odds(logits_R, words, described)
                    for words, logits_R in zip(tasks, logits_BR, strict=True)
                ]
            )

        def score_texts(names: Sequence[str], words: Sequence[str]) -> np.ndarray:
            ids = tuple(tuple(self.tokenizer.encode_robot(text)) for text in words)
            logits_N = np.concatenate(
                [
                    backend.robot_logits(
                        [whole_ids],
                        [pixels_3SS],
                        RobotTexts(
                            tuple(names[start : start + batch_size]),
                            ids[start : start + batch_size],
                        ),
                    )[0]
                    for start in range(0, len(ids), batch_size)
                ]
            )
            variants = _Described(tuple(names), tuple(words), trained)
            return self._log_odds(logits_N, task, variants)

        return explain(
            choices,
            described.names,
            described.texts,
            task,
            pixels_3SS,
            score_tasks,
            score_texts,
        )

    def _task_ids(self, tasks: Sequence[str], has_pictures: bool) -> list[list[int]]:
        for task in tasks:
            if not task.strip():
                raise InputError("The task is empty.", remedy="Say what is to be done.")
        task_ids = [self.tokenizer.encode_task(task) for task in tasks]
        image_tokens = self._backend_for(CaptionOptions()).num_image_tokens if has_pictures else 0
        lengths = [len(ids) for ids in task_ids]
        check_text_lengths(lengths, "task", image_tokens, self.config.max_positions)
        return task_ids

    def _robots(self, catalog: Sequence[Robot] | str | Path | None) -> list[Robot]:
        robots = self._catalog if catalog is None else _read_catalog(catalog)
        if not robots:
            raise InputError(
                "There are no robots to choose from: this model was trained without a catalog.",
                remedy="Give a robot catalog.",
            )
        return robots

    def _texts(self, robots: Sequence[Robot]) -> RobotTexts:
        ids = tuple(tuple(self.tokenizer.encode_robot(robot.text())) for robot in robots)
        lengths = [len(row) for row in ids]
        check_text_lengths(lengths, "text of a robot", 0, self.config.max_positions)
        return RobotTexts(tuple(robot.name for robot in robots), ids)

    def _choices(self, logits_R: np.ndarray, task: str, robots: _Described) -> list[RobotChoice]:
        """The robots with their probabilities, the likeliest first."""
        log_odds_R = self._log_odds(logits_R, task, robots)
        probabilities = np.exp(-np.logaddexp(0.0, -log_odds_R)).tolist()
        chosen = chosen_robots(probabilities, self._robot_threshold)
        choices = map(RobotChoice, robots.names, probabilities, chosen)
        return sorted(choices, key=lambda choice: -choice.probability)

    def _log_odds(self, logits_N: np.ndarray, task: str, robots: _Described) -> np.ndarray:
        """float64 `[N]`: how likely each of N robots suits, from the model's logits.

        Of robots that were trained on the task's words have a say, learnt with them. One that was
        not has no bias of its own; what its text and the task have in common stands in for it.
        """
        by_words: dict[str, float] = {}
        words = self._backend_for(CaptionOptions()).task_words
        if words is not None and self._robot_word_weight:
            by_words = dict(
                zip(self.config.robot_names, words.log_odds([task])[0].tolist(), strict=True)
            )

        def log_odds(name: str, logit: float) -> float:
            if name in by_words:
                return pooled_log_odds(
                    logit, by_words[name], self._robot_temperature, self._robot_word_weight
                )
            return logit / self._robot_temperature

        log_odds_N = np.array(list(map(log_odds, robots.names, logits_N.tolist())))
        is_new = [name not in self._trained_robots for name in robots.names]
        if not any(is_new):
            return log_odds_N
        trained = robots.trained_log_odds
        if trained is None:
            trained = self._highest_trained(log_odds_N, robots.names)
        parts = TaskParts(task, np.ones(TASK_WORD_BINS) if words is None else words.idf_D)
        for index in np.flatnonzero(is_new):
            log_odds_N[index] = new_robot_log_odds(
                parts, robots.texts[index], float(log_odds_N[index]), trained
            )
        return log_odds_N

    def _highest_trained(self, log_odds_N: np.ndarray, names: Sequence[str]) -> float:
        """Of robots that were trained on; 0 where there is none."""
        pairs = zip(names, log_odds_N.tolist(), strict=True)
        return max((value for name, value in pairs if name in self._trained_robots), default=0.0)

    def _backend_for(self, options: CaptionOptions) -> Backend:
        """The native engine, unless there is none or it cannot do this."""
        if self._native is None:
            return self._torch_backend("")
        if options.attention_window:
            return self._torch_backend("The native engine has no attention window")
        if options.speculative:
            return self._torch_backend("The native engine does not draft by future token heads")
        if options.cuda_graphs:
            return self._torch_backend("The native engine uses no GPU")
        return self._native

    def _torch_backend(self, why: str) -> TorchBackend:
        if self._torch is None:
            if self._open_torch is None:
                raise InputError(
                    f"{why}: this model was loaded for the native engine alone.",
                    remedy="Load it with backend auto or torch.",
                )
            import torch

            # Whatever mode the caller is in, the weights are ordinary tensors.
            with torch.inference_mode(False):
                self._torch = self._open_torch()
        return self._torch


def _open_torch(
    path: Path, device: str, packed: bool, threads: int | None
) -> tuple[TorchBackend, LoadedModel]:
    """Load a model's files into PyTorch."""
    import torch

    from bitgen.export.loaded import load_run
    from bitgen.export.safetensors import load_artifact
    from bitgen.inference.torch_backend import TorchBackend
    from bitgen.model.device import resolve_device

    resolved = resolve_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    if path.is_dir():
        loaded = load_run(path, packed=packed)
    else:
        loaded = load_artifact(path)
        if not packed:
            raise InputError(
                f"{path} holds packed weights only.",
                remedy="Load the run that it was exported from, or leave packed at True.",
            )
    return TorchBackend(loaded.model, resolved), loaded


def _unreadable(
    waiting: deque[tuple[Picture, list[int], np.ndarray | ImageError]],
) -> Iterator[Answer]:
    """Take the pictures from the head of the queue that cannot be read."""
    while waiting and isinstance(error := waiting[0][2], ImageError):
        yield Answer(waiting.popleft()[0], error=error)


def _next_pixels(decoded: Iterator[tuple[Picture, np.ndarray | ImageError]]) -> np.ndarray:
    _, pixels = next(decoded)
    if isinstance(pixels, ImageError):
        raise pixels
    return pixels


def _read_catalog(catalog: Sequence[Robot] | str | Path) -> list[Robot]:
    robots = load_catalog(Path(catalog)) if isinstance(catalog, (str, Path)) else list(catalog)
    if not robots:
        raise InputError("The robot catalog is empty.", remedy="Name at least one robot in it.")
    return robots
