"""Scores of captions against what people wrote, and of robots against the right ones. No torch.

    scores = score_captions({"a": ["a cat on a mat", "a cat sits"]}, {"a": "a cat on a mat"})
    scores.cider, scores.bleu_4

The captions' figures are those of the COCO caption evaluation. They come from pycocoevalcap, the
reference implementation (extra `eval`). Its tokenizer and METEOR are Java programs: without Java,
words are split by `bitgen.dataset.penn_treebank`, and there is no METEOR.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bitgen.dataset import penn_treebank
from bitgen.errors import BitGenError, InputError
from bitgen.files import write_whole

EVAL_EXTRA = "eval"
JAVA_TOKENIZER = "PTBTokenizer of Stanford CoreNLP (Java)"
PYTHON_TOKENIZER = "the same rules in Python (no Java)"

_TOKENIZER_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
_SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")

_RESULTS_REMEDY = 'Expected is COCO\'s results format: [{"image_id": 42, "caption": "a dog"}, ...].'

Id = TypeVar("Id", bound=Hashable)


@dataclass(frozen=True)
class ImageScores:
    """Scores of one caption. BLEU is that of the sentence, smoothed as pycocoevalcap does."""

    bleu_1: float
    bleu_2: float
    bleu_3: float
    bleu_4: float
    rouge_l: float
    cider: float
    meteor: float | None = None
    spice: float | None = None


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a set of captions, each the higher the better; all but CIDEr are at most 1.

    `meteor` and `spice` are None where they were not computed. `images` holds each picture's own
    scores, in the order of the references.
    """

    num_images: int
    bleu_1: float
    bleu_2: float
    bleu_3: float
    bleu_4: float
    rouge_l: float
    cider: float
    meteor: float | None
    spice: float | None
    tokenizer: str
    """How captions were split into words: `JAVA_TOKENIZER` or `PYTHON_TOKENIZER`."""
    images: Mapping[Any, ImageScores] = field(repr=False)


def score_captions(
    references: Mapping[Id, Sequence[str]],
    candidates: Mapping[Id, str],
    use_java: bool | None = None,
) -> CaptionScores:
    """Score one caption a picture, as pycocoevalcap does: the same figures to the last digit.

    Args:
        references: what people wrote of each picture, at least one caption. Pictures without a
            candidate are left out, also from CIDEr's word weights; the order is that of the sums.
        candidates: the captions to score.
        use_java: split words and compute METEOR by Java; False does without both, which saves its
            start (some ten seconds, mostly METEOR's); None uses it where it is there.

    Raises:
        InputError: pycocoevalcap or, where it is asked for, Java is missing; no candidates; one
            without references.
        BitGenError: Java failed.
    """
    require_scorers()
    ids = [image_id for image_id in references if image_id in candidates]
    if not candidates:
        raise InputError("There are no captions to score.")
    if len(ids) < len(candidates):
        unknown = next(image_id for image_id in candidates if image_id not in references)
        raise InputError(
            f"{len(candidates) - len(ids)} of {len(candidates)} captions are of pictures without"
            f" references, such as {unknown!r}.",
            remedy="Score them against the split that they were written for.",
        )
    for image_id in ids:
        if not references[image_id]:
            raise InputError(f"There is no reference caption of {image_id!r}.")
    if use_java and not has_java():
        raise InputError("There is no Java.", remedy="Install a Java run time, or do without it.")
    with_java = has_java() if use_java is None else use_java

    counts = [len(references[image_id]) for image_id in ids]
    flat = [caption for image_id in ids for caption in references[image_id]]
    words, tokenizer = split_words(flat, with_java)
    ends = itertools.accumulate(counts)
    gts = {
        image_id: words[end - count : end]
        for image_id, count, end in zip(ids, counts, ends, strict=True)
    }
    candidate_words, _ = split_words([candidates[image_id] for image_id in ids], with_java)
    res = {image_id: [text] for image_id, text in zip(ids, candidate_words, strict=True)}
    return _compute(gts, res, tokenizer, with_java)


def require_scorers() -> None:
    """Raise InputError, saying what to do, where pycocoevalcap is not installed."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise InputError(
            "Captions are scored by pycocoevalcap, which is not installed.",
            remedy=f'Run: pip install "bitgen[{EVAL_EXTRA}]"',
        )


def has_java() -> bool:
    """Whether there is a Java run time that starts."""
    return _java() is not None


def split_words(captions: Sequence[str], use_java: bool = False) -> tuple[list[str], str]:
    """Captions as words with a space between, and by what they were split.

    Raises BitGenError if Java fails.
    """
    if use_java and captions:
        return _split_by_java(captions), JAVA_TOKENIZER
    return penn_treebank.tokenize(captions), PYTHON_TOKENIZER


@functools.cache
def _java() -> str | None:
    found = shutil.which("java")
    if found is None:
        return None
    try:  # some systems have a `java` that only says that there is none
        subprocess.run([found, "-version"], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return found


def _package_folder() -> Path:
    found = importlib.util.find_spec("pycocoevalcap")
    assert found is not None and found.submodule_search_locations
    return Path(next(iter(found.submodule_search_locations)))


def _split_by_java(captions: Sequence[str]) -> list[str]:
    # Not by pycocoevalcap's class: it writes into the folder that it is installed in.
    java = _java()
    assert java is not None
    lines = [penn_treebank.one_line(caption) for caption in captions]
    command = [java, "-cp", str(_package_folder() / _TOKENIZER_JAR)]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    done = subprocess.run(command, input="\n".join(lines).encode(), capture_output=True)
    found = done.stdout.decode().split("\n")
    if done.returncode != 0 or len(found) < len(lines):
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise BitGenError(
            f"The Java tokenizer failed: {said[-1] if said else f'exit code {done.returncode}'}",
            remedy="Leave Java out: --no_java.",
        )
    return [penn_treebank.without_punctuation(line.rstrip().split(" ")) for line in found][
        : len(lines)
    ]


def _compute(
    gts: Mapping[Any, list[str]], res: Mapping[Any, list[str]], tokenizer: str, with_java: bool
) -> CaptionScores:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    bleu, image_bleu = Bleu(4).compute_score(gts, res, verbose=0)
    rouge, image_rouge = Rouge().compute_score(gts, res)
    cider, image_cider = Cider().compute_score(gts, res)
    meteor, image_meteor = _meteor(gts, res) if with_java else (None, [None] * len(gts))
    spice, image_spice = _spice(gts, res) if with_java else (None, [None] * len(gts))
    of_each = zip(*image_bleu, image_rouge, image_cider, image_meteor, image_spice, strict=True)
    images = {
        image_id: ImageScores(**_named(scores))
        for image_id, scores in zip(gts, of_each, strict=True)
    }
    whole = _named((*bleu, rouge, cider, meteor, spice))
    return CaptionScores(len(images), **whole, tokenizer=tokenizer, images=images)


def _named(scores: Sequence[Any]) -> dict[str, Any]:
    """Scores in the order of `ImageScores`, as plain floats."""
    names = (entry.name for entry in fields(ImageScores))
    return {
        name: None if score is None else float(score)
        for name, score in zip(names, scores, strict=True)
    }


def _meteor(
    gts: Mapping[Any, list[str]], res: Mapping[Any, list[str]]
) -> tuple[float, list[float | None]]:
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    process = scorer.meteor_p
    try:
        score, scores = scorer.compute_score(gts, res)
    except (OSError, ValueError) as error:
        raise BitGenError(
            f"METEOR's Java program failed: {error}", remedy="Leave Java out: --no_java."
        ) from error
    finally:
        # `Meteor` leaves its pipes open.
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
    return score, list(scores)


def _spice(
    gts: Mapping[Any, list[str]], res: Mapping[Any, list[str]]
) -> tuple[float | None, list[float | None]]:
    """SPICE where its models lie; pycocoevalcap would download them."""
    folder = _package_folder() / "spice" / "lib"
    if not all((folder / name).is_file() for name in _SPICE_JARS):
        return None, [None] * len(gts)
    from pycocoevalcap.spice.spice import Spice

    score, scores = Spice().compute_score(gts, res)
    of_image = dict(zip(sorted(gts), scores, strict=True))
    return float(score), [float(of_image[image_id]["All"]["f"]) for image_id in gts]


# What else tells captions apart ------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionStatistics:
    """What captions are like, whatever they say of their pictures."""

    mean_length: float
    """Words a caption, as they are scored: punctuation is none."""
    vocabulary_size: int
    """Different words in all captions."""
    distinct_share: float
    """Different captions, of all, 0 to 1."""
    copied_share: float | None
    """Captions that stand word for word among those trained on, of all, 0 to 1; None where those
    are not there. Case, punctuation and white space do not count."""
    lengths: Mapping[int, int] = field(repr=False)
    """How many captions have so many words, by ascending length."""


def caption_statistics(
    captions: Sequence[str], trained_on: Iterable[str] | None = None
) -> CaptionStatistics:
    """Count words, different captions and copies. Raises InputError without captions."""
    if not captions:
        raise InputError("There are no captions to count.")
    words = [text.split() for text in penn_treebank.tokenize(captions)]
    keys = [_copy_key(caption) for caption in captions]
    copied = None
    if trained_on is not None:
        known = {_copy_key(caption) for caption in trained_on}
        copied = sum(key in known for key in keys) / len(keys)
    lengths = Counter(map(len, words))
    return CaptionStatistics(
        mean_length=sum(map(len, words)) / len(words),
        vocabulary_size=len({word for of_caption in words for word in of_caption}),
        distinct_share=len(set(keys)) / len(keys),
        copied_share=copied,
        lengths=dict(sorted(lengths.items())),
    )


def _copy_key(caption: str) -> str:
    return " ".join(re.findall(r"[\w']+", caption.lower()))


# Results files -----------------------------------------------------------------------------------


def read_results(path: Path) -> dict[int | str, str]:
    """Read captions in COCO's results format, `[{"image_id": 42, "caption": "..."}]`.

    Raises InputError for a file that is missing or of another kind, or has a picture twice.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}.", remedy=_RESULTS_REMEDY) from error
    if not isinstance(content, list):
        raise InputError(
            f"{path} holds a JSON {type(content).__name__}, not a list.", remedy=_RESULTS_REMEDY
        )
    captions: dict[int | str, str] = {}
    for position, entry in enumerate(content, start=1):
        image_id = entry.get("image_id") if isinstance(entry, dict) else None
        caption = entry.get("caption") if isinstance(entry, dict) else None
        is_id = isinstance(image_id, (int, str)) and not isinstance(image_id, bool)
        if not is_id or not isinstance(caption, str):
            raise InputError(
                f"{path}, entry {position} lacks an image_id or a caption.", remedy=_RESULTS_REMEDY
            )
        assert isinstance(image_id, (int, str))
        if image_id in captions:
            raise InputError(
                f"{path} has more than one caption of picture {image_id!r}.",
                remedy="One caption a picture is scored.",
            )
        captions[image_id] = caption
    if not captions:
        raise InputError(f"{path} holds no captions.", remedy=_RESULTS_REMEDY)
    return captions


def write_results(captions: Mapping[int | str, str], path: Path) -> None:
    """Write captions in COCO's results format. The file appears whole or not at all."""
    entries = [{"image_id": image_id, "caption": text} for image_id, text in captions.items()]
    with write_whole(Path(path), "results file") as file:
        file.write((json.dumps(entries, ensure_ascii=False) + "\n").encode())


# Robots ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RobotCounts:
    """One robot over all tasks: chosen and right (`hits`), chosen wrongly, or missed."""

    name: str
    hits: int
    wrongly_chosen: int
    missed: int

    @property
    def num_tasks(self) -> int:
        """Tasks that it suits."""
        return self.hits + self.missed

    @property
    def f1(self) -> float:
        """0 where it is neither right nor chosen anywhere, as scikit-learn has it."""
        return _f1(self.hits, self.wrongly_chosen, self.missed)


@dataclass(frozen=True)
class ReliabilityBin:
    """Probabilities of one tenth of the range: how many, their mean, and how often they held."""

    low: float
    high: float
    count: int
    mean_probability: float | None
    share_right: float | None


@dataclass(frozen=True)
class RobotScores:
    """How well robots are chosen; shares are from 0 to 1."""

    num_tasks: int
    threshold: float
    exact_match: float
    """Tasks with exactly the right robots."""
    hamming_loss: float
    """Decisions (a task, a robot) that are wrong; the lower the better."""
    macro_f1: float
    micro_f1: float
    top_1: float
    """Tasks whose likeliest robot is a right one."""
    top_3: float
    """Tasks with a right robot among the three likeliest."""
    calibration_error: float
    """Expected calibration error over `reliability`: distance of probability and truth."""
    reliability: tuple[ReliabilityBin, ...]
    robots: tuple[RobotCounts, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Tasks that suit robot i (row) for which robot j (column) was chosen, `[R, R]`."""


def score_robots(
    names: Sequence[str],
    probabilities_TR: np.ndarray,
    chosen_TR: np.ndarray,
    right_TR: np.ndarray,
    threshold: float,
    num_bins: int = 10,
) -> RobotScores:
    """Compare the robots that were chosen for tasks with the right ones.

    Args:
        names: of the R robots.
        probabilities_TR: `[T, R]`, 0 to 1.
        chosen_TR: bool `[T, R]`.
        right_TR: bool `[T, R]`.
        threshold: probability from which robots were chosen, for the record.
        num_bins: equally wide parts of 0 to 1 for the calibration.

    Raises InputError without tasks.
    """
    if not len(right_TR):
        raise InputError("There are no robot tasks to score.")
    hits_R = (chosen_TR & right_TR).sum(axis=0)
    wrong_R = (chosen_TR & ~right_TR).sum(axis=0)
    missed_R = (~chosen_TR & right_TR).sum(axis=0)
    robots = tuple(
        RobotCounts(name, int(hits), int(wrong), int(missed))
        for name, hits, wrong, missed in zip(names, hits_R, wrong_R, missed_R, strict=True)
    )
    ranking_TR = np.argsort(-probabilities_TR, axis=1, kind="stable")
    ranked_right_TR = np.take_along_axis(right_TR, ranking_TR, axis=1)
    bins = _reliability(probabilities_TR.ravel(), right_TR.ravel(), num_bins)
    error = sum(
        entry.count * abs(entry.mean_probability - entry.share_right)
        for entry in bins
        if entry.mean_probability is not None and entry.share_right is not None
    )
    confusion_RR = right_TR.astype(int).T @ chosen_TR.astype(int)
    return RobotScores(
        num_tasks=len(right_TR),
        threshold=threshold,
        exact_match=float((chosen_TR == right_TR).all(axis=1).mean()),
        hamming_loss=float((chosen_TR != right_TR).mean()),
        macro_f1=sum(robot.f1 for robot in robots) / len(robots),
        micro_f1=_f1(int(hits_R.sum()), int(wrong_R.sum()), int(missed_R.sum())),
        top_1=float(ranked_right_TR[:, 0].mean()),
        top_3=float(ranked_right_TR[:, :3].any(axis=1).mean()),
        calibration_error=error / right_TR.size,
        reliability=bins,
        robots=robots,
        confusion=tuple(tuple(int(count) for count in row) for row in confusion_RR),
    )


def _f1(hits: int, wrong: int, missed: int) -> float:
    return 2 * hits / (2 * hits + wrong + missed) if hits else 0.0


def _reliability(
    probabilities: np.ndarray, right: np.ndarray, num_bins: int
) -> tuple[ReliabilityBin, ...]:
    places = np.minimum((probabilities * num_bins).astype(int), num_bins - 1)
    bins = []
    for number in range(num_bins):
        inside = places == number
        count = int(inside.sum())
        bins.append(
            ReliabilityBin(
                low=number / num_bins,
                high=(number + 1) / num_bins,
                count=count,
                mean_probability=float(probabilities[inside].mean()) if count else None,
                share_right=float(right[inside].mean()) if count else None,
            )
        )
    return tuple(bins)
