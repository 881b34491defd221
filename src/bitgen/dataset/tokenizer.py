"""Byte-level BPE over captions, tasks and robot texts; any text round-trips.

caption:    <|bos|> words <|eos|>        task: <|task|> words        robot: <|robot|> words
plan:       <|plan|> words of the task, then JSON (`bitgen.dataset.plan_grammar`)

`<|mask|>` stands for a hidden word in masked language modelling, and nowhere else; `<|plan|>` asks
for the ordered subtasks of a task.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from bitgen.errors import InputError

MASK_TOKEN, PLAN_TOKEN = "<|mask|>", "<|plan|>"
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|task|>", "<|robot|>", MASK_TOKEN, PLAN_TOKEN)
_LATER_TOKENS = frozenset((MASK_TOKEN, PLAN_TOKEN))  # which older tokenizers lack

_SPACE_BEFORE_MARK = re.compile(r" ([.,;:!?])(?= |$)")
_ENCODED_AT_ONCE = 10_000  # texts: what `tokenizers` makes of one takes about a kilobyte


def tidy_sentence(text: str) -> str:
    """With single spaces, and none before a mark as in tokenized captions ("a dog .")."""
    return _SPACE_BEFORE_MARK.sub(r"\1", " ".join(text.split()))


class Tokenizer:
    """A Hugging Face `tokenizers` tokenizer with BitGen's special tokens.

    Attributes:
        pad_id, bos_id, eos_id, task_id, robot_id: ids of the special tokens.
        mask_id, plan_id: ids of `<|mask|>` and `<|plan|>`; None for tokenizers made before.
        special_ids: all of these.
        vocab_size: number of entries; a model's embedding may have more rows.
    """

    def __init__(self, backend: HuggingFaceTokenizer) -> None:
        ids = {token: backend.token_to_id(token) for token in SPECIAL_TOKENS}
        missing = [token for token, i in ids.items() if i is None and token not in _LATER_TOKENS]
        if missing:
            raise InputError(
                f"The tokenizer lacks the special tokens {', '.join(missing)}.",
                remedy="Add them to it, or let `bitgen train` make a tokenizer.",
            )
        found = {token: i for token, i in ids.items() if i is not None}
        self.pad_id, self.bos_id, self.eos_id, self.task_id, self.robot_id, *_ = found.values()
        self.mask_id, self.plan_id = found.get(MASK_TOKEN), found.get(PLAN_TOKEN)
        self.special_ids = frozenset(found.values())
        self._special_tokens = tuple(found)
        self.vocab_size = backend.get_vocab_size()
        self._backend = backend

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from texts until `vocab_size` entries, or until nothing repeats.

        Raises:
            InputError: a vocabulary that cannot hold all bytes and the special tokens.
        """
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(alphabet) + len(SPECIAL_TOKENS):
            raise InputError(
                f"A byte-level vocabulary needs at least {len(alphabet) + len(SPECIAL_TOKENS)}"
                f" entries, got {vocab_size}."
            )
        backend = HuggingFaceTokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(alphabet),
            show_progress=False,
        )
        backend.train_from_iterator((_normalise(text) for text in texts), trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Read a `tokenizer.json`. Raises InputError if it is missing or none."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The tokenizer {path} cannot be read: {error}.") from error
        return cls.from_json(text, source=str(path))

    @classmethod
    def from_json(cls, text: str, source: str = "tokenizer.json") -> Tokenizer:
        """Build from the text of a `tokenizer.json`. Raises InputError if it is none."""
        try:
            backend = HuggingFaceTokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise InputError(f"{source} is not a Hugging Face tokenizer: {error}.") from error
        return cls(backend)

    def to_json(self) -> str:
        """The text of `tokenizer.json`, which transformers' PreTrainedTokenizerFast opens."""
        return self._backend.to_str(pretty=False)

    def encode(self, text: str) -> list[int]:
        """Ids of the words alone. Text that spells a special token is not turned into one."""
        ids: list[int] = []
        for piece in self._pieces(text):
            ids += self._backend.encode(piece, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        if self._backend.padding is not None:  # which would fill texts up to the longest
            return [self.encode(text) for text in texts]
        encoded: list[list[int]] = []
        for start in range(0, len(texts), _ENCODED_AT_ONCE):
            split = [self._pieces(text) for text in texts[start : start + _ENCODED_AT_ONCE]]
            pieces = [piece for pieces in split for piece in pieces]
            found = iter(self._backend.encode_batch(pieces, add_special_tokens=False))
            encoded += [[i for _ in pieces for i in next(found).ids] for pieces in split]
        return encoded

    def _pieces(self, text: str) -> list[str]:
        """Cut inside every spelled-out special token, so that user text can never produce one."""
        text = _normalise(text)
        for token in self._special_tokens:
            text = text.replace(token, f"{token[0]}\0{token[1:]}")
        return [piece for piece in text.split("\0") if piece]

    def encode_task(self, text: str) -> list[int]:
        """`<|task|>` and the words of a robot task."""
        return [self.task_id, *self.encode(text)]

    def encode_plan_task(self, text: str) -> list[int]:
        """`<|plan|>` and the words of a task that is to be split into subtasks.

        Raises:
            InputError: the tokenizer was made before there was such a token.
        """
        if self.plan_id is None:
            raise InputError(
                f"The tokenizer lacks the special token {PLAN_TOKEN}: it can ask for no plans.",
                remedy="Let `bitgen train` make a tokenizer, or add the token to it.",
            )
        return [self.plan_id, *self.encode(text)]

    def encode_robot(self, text: str) -> list[int]:
        """`<|robot|>` and the words of a robot's text."""
        return [self.robot_id, *self.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True).strip()

    def ordinary_ids(self) -> list[int]:
        """Ids that stand for text: all but the special ones, this tokenizer's own included."""
        added = self._backend.get_added_tokens_decoder()
        special = self.special_ids.union(i for i, token in added.items() if token.special)
        return sorted(set(self._backend.get_vocab(with_added_tokens=True).values()) - special)

    def token_bytes(self) -> list[bytes | None]:
        """The bytes that each id stands for, by id; None for special tokens and for no token.

        The text of ids is these bytes, one after the other.

        Raises:
            InputError: the tokenizer is not byte-level.
        """
        if (json.loads(self.to_json())["decoder"] or {}).get("type") != "ByteLevel":
            raise InputError(
                "The tokenizer is not byte-level: what its tokens spell is not known.",
                remedy="Take a byte-level one, such as `bitgen train` makes.",
            )
        byte_of = _bytes_of_characters()
        found: list[bytes | None] = [None] * self.vocab_size
        spelled = {i: token for token, i in self._backend.get_vocab(False).items()}
        for i in self.ordinary_ids():
            if i in spelled and i < len(found) and all(c in byte_of for c in spelled[i]):
                found[i] = bytes(byte_of[c] for c in spelled[i])
        return found

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Each id's own text, spaces kept."""
        return [self._backend.decode([i], skip_special_tokens=False) for i in ids]


def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable bytes of Latin-1 stand for themselves, the others follow from U+0100 on (GPT-2).
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + number): byte for number, byte in enumerate(others)},
    }


def _normalise(text: str) -> str:
    return " ".join(text.split())
