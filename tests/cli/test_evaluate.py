"""`bitgen evaluate`: what it says, against pycocoevalcap and against the training."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bitgen.dataset.coco import load_coco
from bitgen.inference.evaluate import has_java, split_words
from bitgen.inference.predictor import BitGen

from .conftest import Run

pytest.importorskip("pycocoevalcap")

NAMES = {
    "bleu_1": "Bleu_1", "bleu_2": "Bleu_2", "bleu_3": "Bleu_3", "bleu_4": "Bleu_4",
    "rouge_l": "ROUGE_L", "cider": "CIDEr",
}  # fmt: skip


def write_coco(
    folder: Path, captions: Mapping[int, Sequence[str]], split: str = "val", side: int = 32
) -> Path:
    """A folder in COCO's layout with a plain picture for each id."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / f"{split}2017").mkdir(exist_ok=True)
    for image_id in captions:
        Image.new("RGB", (side, side), (image_id * 37 % 256, 90, 30)).save(
            folder / f"{split}2017" / f"{image_id}.png"
        )
    listed = [(i, caption) for i, texts in captions.items() for caption in texts]
    (folder / "annotations" / f"captions_{split}2017.json").write_text(
        json.dumps(
            {
                "images": [{"id": i, "file_name": f"{i}.png"} for i in captions],
                "annotations": [
                    {"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(listed)
                ],
            }
        )
    )
    return folder


def made_up(seed: int = 0, count: int = 24) -> dict[int, list[str]]:
    draw = random.Random(seed)
    words = [["a man", "two dogs", "the cat's toy"], ["near", "on", "isn't at"],
             ["a bus.", "the T.V.", "a black-and-white wall", "5th Ave."]]  # fmt: skip
    return {
        i: [" ".join(draw.choice(choice) for choice in words) for _ in range(5)]
        for i in range(1, count + 1)
    }


def scored_alone(
    references: Mapping[int, Sequence[str]], candidates: Mapping[int, str]
) -> dict[str, float]:
    """By pycocoevalcap's scorers, over its tokenizer where Java is."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    if has_java():
        gts = PTBTokenizer().tokenize(
            {i: [{"caption": text} for text in texts] for i, texts in references.items()}
        )
        res = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in candidates.items()})
        res = {i: res[i] for i in gts}
    else:
        gts = {i: split_words(list(texts))[0] for i, texts in references.items()}
        res = {i: split_words([candidates[i]])[0] for i in references}
    bleu = Bleu(4).compute_score(gts, res, verbose=0)[0]
    figures = {f"Bleu_{n}": score for n, score in enumerate(bleu, start=1)}
    return figures | {
        "ROUGE_L": float(Rouge().compute_score(gts, res)[0]),
        "CIDEr": float(Cider().compute_score(gts, res)[0]),
    }


def write_results(path: Path, candidates: Mapping[int, str]) -> Path:
    path.write_text(json.dumps([{"image_id": i, "caption": c} for i, c in candidates.items()]))
    return path


@pytest.fixture
def no_meteor(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR takes ten seconds; it is compared in tests/inference/test_evaluate.py."""
    from bitgen.inference import evaluate

    monkeypatch.setattr(evaluate, "_meteor", lambda gts, res: (None, [None] * len(gts)))


@pytest.mark.usefixtures("no_meteor")
def test_a_results_file_gets_the_figures_of_pycocoevalcap_alone(run: Run, tmp_path: Path) -> None:
    people = made_up()
    references = {i: texts[1:] for i, texts in people.items()}
    candidates = {i: texts[0] for i, texts in people.items()}
    data = write_coco(tmp_path / "coco", references)
    results = write_results(tmp_path / "results.json", candidates)
    done = run("evaluate", "--predictions", results, "--coco_data", data, "--json")
    assert done.code == 0, done.stderr
    figures = done.json()
    alone = scored_alone(references, candidates)
    assert {NAMES[name]: figures[name] for name in NAMES} == alone
    assert figures["num_images"] == 24


@pytest.mark.usefixtures("no_meteor")
def test_people_against_people_on_real_captions(run: Run, tmp_path: Path, coco_dir: Path) -> None:
    file = "annotations/captions_val2017.json"
    content = json.loads((coco_dir / file).read_text(encoding="utf-8"))
    people: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        people[annotation["image_id"]].append(annotation["caption"])
    references = {i: texts[1:] for i, texts in people.items()}
    candidates = {i: texts[0] for i, texts in people.items()}
    data = tmp_path / "coco"
    (data / "annotations").mkdir(parents=True)
    content["annotations"] = [
        {"id": n, "image_id": i, "caption": text}
        for n, (i, text) in enumerate((i, t) for i, texts in references.items() for t in texts)
    ]
    (data / file).write_text(json.dumps(content), encoding="utf-8")
    results = write_results(tmp_path / "results.json", candidates)
    # The pictures themselves are not there, and need not be.
    (data / "annotations" / "captions_train2017.json").write_text(
        json.dumps(
            {"images": [{"id": 1, "file_name": "1.jpg"}],
             "annotations": [{"id": 1, "image_id": 1, "caption": candidates[next(iter(people))]}]}
        )
    )  # fmt: skip
    done = run("evaluate", "--predictions", results, "--coco_data", data, "--json")
    assert done.code == 0, done.stderr
    figures = done.json()
    assert {NAMES[name]: figures[name] for name in NAMES} == scored_alone(references, candidates)
    assert 0.9 < figures["cider"] < 1.0
    assert figures["copied_share"] == pytest.approx(1 / 499, abs=2 / 499)


def test_a_model_is_scored_reported_and_scored_again_from_its_file(
    run: Run, tmp_path: Path, make_run: Any
) -> None:
    model = make_run("runs/<b>")
    data = write_coco(tmp_path / "coco", made_up(count=9))
    write_coco(data, made_up(seed=1, count=2), split="train")
    tasks = tmp_path / "tasks.json"
    from bitgen.dataset.robots import load_catalog

    names = [robot.name for robot in load_catalog()]
    tasks.write_text(
        json.dumps([{"task": f"job number {n}", "robots": [names[n % 3]]} for n in range(6)])
    )
    results, page = tmp_path / "out" / "results.json", tmp_path / "out" / "page.html"
    common = ("--coco_data", data, "--no_java", "--json")
    done = run(
        "evaluate", "--model", model, *common, "--robot_data", tasks, "--threshold", "0.3",
        "--write_predictions", results, "--report", page, "--threads", 1,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    figures = done.json()
    assert figures["num_images"] == 9
    assert figures["perplexity"] == pytest.approx(2.718281828459045 ** figures["loss"])
    robots = figures["robots"]
    assert robots["num_tasks"] == 6
    assert robots["threshold"] == 0.3
    assert sum(entry["count"] for entry in robots["reliability"]) == 6 * len(names)
    again = run("evaluate", "--predictions", results, *common).json()
    for name in (*NAMES, "mean_length", "vocabulary_size", "distinct_share"):
        assert again[name] == figures[name]
    html = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    assert_opens_offline(html)


def assert_opens_offline(html: str) -> None:
    """Nothing is fetched and run; every picture says what it shows; tags are balanced."""

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open_tags: list[str] = []

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            attributes = dict(attrs)
            assert tag not in ("script", "iframe", "object", "embed", "base")
            for name in ("src", "href"):
                if name in attributes:
                    assert attributes[name].startswith("data:")
            if tag == "img":
                assert attributes["alt"]
            if tag not in ("img", "meta", "link"):
                self.open_tags.append(tag)

        def handle_startendtag(self, tag: str, attrs: Any) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert self.open_tags.pop() == tag

    reader = Reader()
    reader.feed(html)
    assert reader.open_tags == []
    assert not re.search(r"url\(|@import|https?:", html)


def test_the_loss_is_the_one_that_validation_saw(run: Run, trained: Path, scenes: Path) -> None:
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    best = [m for m in metrics if m["kind"] == "validation" and m["is_best"]][-1]
    done = run("evaluate", "--model", trained, "--coco_data", scenes, "--no_java", "--json")
    assert done.code == 0, done.stderr
    assert done.json()["loss"] == pytest.approx(best["loss"], rel=0.02)
    blank = run(
        "evaluate", "--model", trained, "--coco_data", scenes, "--no_java", "--json",
        "--pictures", "blank",
    )  # fmt: skip
    assert blank.json()["loss"] != done.json()["loss"]
    assert blank.json()["distinct_share"] == pytest.approx(1 / blank.json()["num_images"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate on"),
        (["--predictions", "{results}"], "nothing to score the captions against"),
        (["--predictions", "{results}", "--coco_data", "{data}", "--split", "dev"], "--split is"),
        (["--predictions", "{data}/none.json", "--coco_data", "{data}"], "cannot be read"),
        (["--predictions", "{foreign}", "--coco_data", "{data}"], "1 of 1 captions are of"),
        (["--predictions", "{broken}", "--coco_data", "{data}"], "lacks an image_id"),
        (["--predictions", "{twice}", "--coco_data", "{data}"], "more than one caption"),
        (["--predictions", "{results}", "--model", "x", "--coco_data", "{data}"], "one of them"),
        (["--coco_data", "{data}", "--limit", "-1"], "--limit"),
        (["--predictions", "{results}", "--coco_data", "{data}", "--split", "test"], "no test"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"data": write_coco(tmp_path / "coco", made_up(count=4))}
    for name, content in {
        "results": [{"image_id": 1, "caption": "a dog"}],
        "foreign": [{"image_id": 77, "caption": "a dog"}],
        "broken": [{"image": 1, "caption": "a dog"}],
        "twice": [{"image_id": 1, "caption": "a dog"}] * 2,
    }.items():
        places[name] = tmp_path / f"{name}.json"
        places[name].write_text(json.dumps(content))
    done = run("evaluate", *(argument.format(**places) for argument in arguments))
    assert done.code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_exported_file_gets_its_runs_figures(
    run: Run, trained: Path, exported: Path, scenes: Path
) -> None:
    common = ("--coco_data", scenes, "--robot_data", scenes / "robots_val.json", "--no_java")
    of_run = run("evaluate", "--model", trained, *common, "--json").json()
    of_file = run("evaluate", "--model", exported, *common, "--json").json()
    for name in (*NAMES, "mean_length", "num_images"):
        assert of_file[name] == of_run[name]
    assert of_file["loss"] == pytest.approx(of_run["loss"], rel=1e-4)
    assert of_file["robots"]["exact_match"] == of_run["robots"]["exact_match"]
    table = run("evaluate", "--model", exported, *common, "--limit", 3)
    assert "CIDEr" in table.stdout
    assert "exact match" in table.stdout
    assert "same rules in Python" in table.stderr


def test_a_consensus_is_scored(run: Run, exported: Path, scenes: Path, tmp_path: Path) -> None:
    results, captions = tmp_path / "results.json", []
    options = {"consensus": 4, "temperature": 0.8, "max_tokens": 9}
    for seed in (0, 7):
        done = run(
            *("evaluate", "--model", exported, "--coco_data", scenes, "--no_java", "--no_loss"),
            *("--seed", seed, "--write_predictions", results),
            *(word for name, value in options.items() for word in (f"--{name}", value)),
        )
        assert done.code == 0, done.stderr
        found = {entry["image_id"]: entry["caption"] for entry in json.loads(results.read_text())}
        images = load_coco([scenes], "val")
        expected = BitGen.load(exported).caption(
            [image.path for image in images], seed=seed, **options
        )
        assert found == {
            image.image_id: caption.text for image, caption in zip(images, expected, strict=True)
        }
        captions.append(found)
    assert captions[0] != captions[1]


def test_says_what_to_install(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitgen.inference import evaluate

    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    done = run("evaluate", "--model", "none", "--coco_data", write_coco(tmp_path, made_up(count=2)))
    assert done.code == 2
    assert 'pip install "bitgen[eval]"' in done.stderr
