"""What may be asked of generation, checked before a model runs. Imports no torch.

Both backends, PyTorch and the native engine, refuse the same requests with the same words.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from bitgen.config import BitGenConfig
from bitgen.errors import InputError

TEXT_SINKS = 4
"""Text tokens that are never forgotten: with fewer, fluency is lost (arXiv 2309.17453, table 2)."""

CONSENSUS_TEMPERATURE = 0.5
"""Of the captions that a consensus is found among, where none is given (docs/training.md)."""
MOST_CONSENSUS = 1024

MOST_THREADS = 1024
"""More than any processor runs; a larger number is a slip of the pen."""


@dataclass(frozen=True)
class CaptionOptions:
    """How captions are written; the words of `BitGen.caption` explain each option.

    Raises:
        InputError: a value out of range, or values that exclude each other.
    """

    beam_size: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 40
    batch_size: int = 16
    length_penalty: float = 1.0
    attention_window: int = 0
    speculative: bool | None = None
    cuda_graphs: bool = False
    consensus: int = 0

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)
        check_options(
            max_tokens=self.max_tokens,
            beam_size=self.beam_size,
            length_penalty=self.length_penalty,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            attention_window=self.attention_window,
            speculative=self.speculative,
            cuda_graphs=self.cuda_graphs,
            consensus=self.consensus,
        )
        if self.seed is not None:
            check_seed(self.seed)

    @property
    def num_samples(self) -> int:
        """Captions drawn of each picture."""
        return max(1, self.consensus)

    @property
    def drawing_temperature(self) -> float:
        """The temperature that captions are drawn at; 0: they are not drawn."""
        if self.consensus and not self.temperature:
            return CONSENSUS_TEMPERATURE
        return self.temperature

    @property
    def drawing_seed(self) -> int | None:
        """Of the draws; where no chance was asked for, the same every time."""
        if self.consensus and not self.temperature and self.seed is None:
            return 0
        return self.seed

    @property
    def pictures_at_a_time(self) -> int:
        """`batch_size`, or fewer where many captions are drawn of each."""
        return max(1, self.batch_size // self.num_samples)


@dataclass(frozen=True)
class Vocabulary:
    """What generation must know of the tokenizer."""

    eos_id: int
    """The token that ends a caption."""
    never_ids: tuple[int, ...]
    """Tokens that are never chosen: the special ones but the end of text."""
    size: int
    """Ids from here on are never chosen: rows of the embedding without a token."""


def check_options(
    *,
    max_tokens: int,
    beam_size: int,
    length_penalty: float,
    temperature: float,
    top_k: int,
    top_p: float,
    attention_window: int = 0,
    speculative: bool | None = None,
    cuda_graphs: bool = False,
    consensus: int = 0,
) -> None:
    """Raise InputError for generation options out of range or excluding each other."""
    if max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, got {max_tokens}.")
    if beam_size < 1:
        raise InputError(f"beam_size must be at least 1, got {beam_size}.")
    if not abs(length_penalty) < float("inf"):
        raise InputError(f"length_penalty must be a finite number, got {length_penalty}.")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature must be 0 (greedy) or a positive number, got {temperature}.")
    if top_k < 0:
        raise InputError(f"top_k must be 0 (all tokens) or positive, got {top_k}.")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be in (0, 1], got {top_p}.")
    if beam_size > 1 and temperature > 0:
        raise InputError(
            f"Beam search (beam_size {beam_size}) does not sample (temperature {temperature}).",
            remedy="Take beam_size 1 to sample, or temperature 0 to search.",
        )
    if consensus and not 2 <= consensus <= MOST_CONSENSUS:
        raise InputError(
            f"consensus must be 2 to {MOST_CONSENSUS} captions, or 0 for none; got {consensus}."
        )
    if consensus and (beam_size > 1 or speculative):
        raise InputError(
            "A consensus is found among captions that are drawn: it takes no beams or speculative"
            " decoding.",
            remedy="Leave either out.",
        )
    if temperature == 0 and not consensus and (top_k or top_p < 1):
        raise InputError(
            "top_k and top_p choose among sampled tokens, but temperature 0 does not sample.",
            remedy="Set temperature too, for instance to 1.",
        )
    if speculative and (beam_size > 1 or temperature > 0 or attention_window):
        raise InputError(
            "Speculative decoding is greedy, over the whole text: it takes no beams, temperature or"
            " attention window.",
            remedy="Leave either out.",
        )
    if cuda_graphs and (speculative or attention_window):
        raise InputError(
            "A CUDA graph reads one token a row over the whole text: it takes no speculative"
            " decoding or attention window.",
            remedy="Leave either out.",
        )


def check_batch_size(batch_size: int) -> None:
    """Raise InputError for less than one row at a time."""
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}.")


def check_threads(threads: int | None) -> None:
    """Raise InputError for a number of threads that cannot be; None leaves it to the backend."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise InputError(
            f"threads must be 1 to {MOST_THREADS}, got {threads}.",
            remedy="Leave it out to use one a core.",
        )


def check_seed(seed: int) -> None:
    """Raise InputError for what is no 64-bit whole number, signed or not."""
    try:
        is_64_bits = -(2**63) <= operator.index(seed) < 2**64
    except TypeError:
        is_64_bits = False
    if not is_64_bits:
        raise InputError(f"The seed must be a 64-bit whole number, got {seed!r}.")


def check_writes(config: BitGenConfig) -> None:
    """Raise InputError for a model that cannot write."""
    if config.attention_mode == "bidirectional":
        raise InputError(
            "This model's attention is bidirectional: it reads, but cannot write word after word.",
            remedy="Ask it for robots, or train with attention_mode prefix or causal.",
        )


def check_future_heads(config: BitGenConfig, speculative: bool | None) -> None:
    """Raise InputError where drafts are asked for and the model has no heads to make them."""
    if speculative and config.predict_tokens == 1:
        raise InputError(
            "This model has no future token heads to draft with.",
            remedy="Leave speculative decoding out, or train with --predict_tokens 2 or more.",
        )


def check_lengths(
    prompt_lengths: Sequence[int],
    image_tokens: int,
    max_tokens: int,
    max_positions: int,
    attention_window: int = 0,
) -> None:
    """Raise InputError where picture, prompts and `max_tokens` do not fit the model's positions.

    Args:
        prompt_lengths: tokens of each prompt, `<bos>` included.
        image_tokens: tokens of the picture before them; 0 = none.
        max_tokens: most tokens generated, the end of text included.
        max_positions: positions of the model.
        attention_window: with a window (above 0) only the prompt and one token must fit.

    Raises:
        InputError: see above.
        ValueError: a prompt without a token.
    """
    if attention_window:
        room = max_positions - image_tokens - TEXT_SINKS
        if not 1 <= attention_window <= room:
            raise InputError(
                f"attention_window is {attention_window}; beside {image_tokens} image tokens and"
                f" {TEXT_SINKS} sinks the model has room for 1 to {room} of its {max_positions}"
                " positions.",
                remedy="Take a number in that range, or 0 to look back on everything.",
            )
        max_tokens = 1
    longest = max(prompt_lengths)
    if min(prompt_lengths) == 0:
        raise ValueError("Each prompt needs at least one token.")
    # The last generated token is never read, so it takes no position.
    room = max_positions - image_tokens - longest + 1
    if room < 1:
        raise InputError(
            f"The prompt is too long: {longest} tokens and {image_tokens} image tokens, but the"
            f" model reads {max_positions} positions.",
            remedy="Shorten the prompt.",
        )
    if max_tokens > room:
        raise InputError(
            f"max_tokens is {max_tokens}, but beside {image_tokens} image tokens and {longest}"
            f" prompt tokens the model has room for {room} of its {max_positions} positions.",
            remedy=f"Set max_tokens to {room} at most.",
        )


def check_text_lengths(
    lengths: Sequence[int], what: str, image_tokens: int, max_positions: int
) -> None:
    """Raise InputError where a text that is read (a task, a robot) is longer than the model."""
    longest = max(lengths)
    room = max_positions - image_tokens
    if longest > room:
        raise InputError(
            f"The {what} is too long: {longest} tokens; the model has room for {room}.",
            remedy="Shorten it.",
        )
