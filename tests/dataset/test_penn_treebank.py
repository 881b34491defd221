"""The words of captions, against the Java program that the COCO evaluation splits them by."""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from pathlib import Path

import pytest

from bitgen.dataset.penn_treebank import tokenize
from bitgen.inference.evaluate import has_java, split_words

# What the Java program says of these, written down: it is not everywhere.
KNOWN = {
    "A man is riding a horse.": "a man is riding a horse",
    "It's the dog's ball; they can't see it!": "it 's the dog 's ball they ca n't see it",
    "a black-and-white T.V. on a table": "a black-and-white t.v. on a table",
    'A sign that says "STOP", and (maybe) more': "a sign that says stop and -lrb- maybe -rrb- more",
    "Two people cannot sit -- there are 1,000 chairs...": (
        "two people can not sit there are 1,000 chairs"
    ),
    "Mr. Smith at 10:30 a.m. in the U.S.": "mr. smith at 10:30 a.m. in the u.s.",
    "gonna eat 1/2 pizza & $5 chips": "gon na eat 1/2 pizza & $ 5 chips",
    "  ": "",
    "a caf\u00e9 at 5pm": "a caf\u00e9 at 5pm",
}

PIECES = """
a man cat's don't I'm you'll rock'n'roll o'clock 'em 1990's '90s U.S. U.S.A. T.V. st. St. Mr. Dr.
etc. no. No.5 vs. A. b. cannot gonna wanna x-ray pre-1990 5-year-old 10:30 3.5 1,000 $5 50% #1 @home
& AT&T R&B "quoted" (in) [out] {x} - -- --- ... .. . , ; : ! ?! a/b and/or 1/2 1-1/2 12/25/2010
www.site.com site.com http://a.b/c.html me@x.org :) ;-) <b> < > * ** = + café ’s “so”
– … ` `` '' it's. end. Mt. Ave. mph m.p.h. ca. photo.jpg it,and so.So ½ 555-1234
(555) dogs' 's y'all ol' Sept. Tues. inc. co. P.S. c++ F# @a_b #red AT&amp;T &quot;
"""

needs_java = pytest.mark.skipif(
    not has_java() or find_spec("pycocoevalcap") is None, reason="needs Java and pycocoevalcap"
)


@pytest.mark.parametrize("caption", KNOWN)
def test_splits_as_written_down(caption: str) -> None:
    assert tokenize([caption]) == [KNOWN[caption]]


@needs_java
def test_what_is_written_down_is_what_java_says() -> None:
    assert split_words(list(KNOWN), use_java=True)[0] == list(KNOWN.values())


def test_the_next_caption_may_matter() -> None:
    """The Java program looks for the end of a sentence on the next line."""
    assert tokenize(["the letter A.", "The letter b."])[0] == "the letter a"
    assert tokenize(["the letter A.", "letters"])[0] == "the letter a."


@needs_java
def test_equals_java_on_mixed_up_captions() -> None:
    """Captions of odd pieces, which people's captions hold rarely."""
    draw = random.Random(0)
    captions = [" ".join(draw.choices(PIECES.split(), k=draw.randint(1, 9))) for _ in range(4000)]
    java, _ = split_words(captions, use_java=True)
    python = tokenize(captions)
    differing = [(c, p, j) for c, p, j in zip(captions, python, java, strict=True) if p != j]
    assert not differing, differing[:9]


@needs_java
@pytest.mark.parametrize("file", ["captions_train2017.json", "captions_val2017.json"])
def test_equals_java_on_every_real_caption(coco_dir: Path, file: str) -> None:
    listed = json.loads((coco_dir / "annotations" / file).read_text(encoding="utf-8"))
    captions = [annotation["caption"] for annotation in listed["annotations"]]
    java, _ = split_words(captions, use_java=True)
    python = tokenize(captions)
    assert [pair for pair in zip(python, java, strict=True) if pair[0] != pair[1]] == []
