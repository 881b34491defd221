"""Two backends, one answer: the native engine against PyTorch, and which of them is taken."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bitgen.dataset.robots import Robot
from bitgen.errors import InputError
from bitgen.export.artifact import open_artifact
from bitgen.export.safetensors import export_safetensors
from bitgen.inference import native_backend
from bitgen.inference.consensus import most_agreed
from bitgen.inference.engine import GenerationOptions
from bitgen.inference.generate import generate
from bitgen.inference.pipeline import picture_pixels
from bitgen.inference.predictor import BitGen, Caption, CaptionOptions
from bitgen.kernels import library

MakeRun = Callable[..., Path]
TASKS = ["go", "carry the blue box up the stairs to the shelf", "dive for the ball", "look"]
SOURCE = Path(__file__).resolve().parents[2] / "src"

needs_library = pytest.mark.skipif(
    not library.is_usable(), reason=f"needs the C++ library: {library.describe().reason}"
)
# Roundings of sums decide here and there between two int8 steps.
CLOSE = 0.02


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Nine files of noise and colour, of different shapes."""
    random = np.random.default_rng(3)
    paths = []
    for index in range(9):
        height, width = random.integers(20, 60, 2)
        pixels = np.full((height, width, 3), random.integers(0, 255, 3), dtype=np.uint8)
        pixels[: height // 2] = random.integers(0, 255, (height // 2, width, 3))
        paths.append(tmp_path / f"picture{index}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def both(run_dir: Path, **options: Any) -> tuple[BitGen, BitGen]:
    """The artifact of a run on the native engine, and in PyTorch."""
    artifact = run_dir.with_suffix(".safetensors")
    export_safetensors(run_dir, artifact, **options)
    native, reference = (BitGen.load(artifact, "cpu", backend=b) for b in ("native", "torch"))
    assert (native.backend, reference.backend) == ("native", "torch")
    return native, reference


def assert_same(found: list[Caption], expected: list[Caption]) -> None:
    """Token by token; one caption of several may fall to the other side of a rounding."""
    num_equal = 0
    for one, other in zip(found, expected, strict=True):
        if one.token_ids == other.token_ids:
            num_equal += 1
            assert (one.text, one.tokens) == (other.text, other.tokens)
            assert one.log_probability == pytest.approx(other.log_probability, abs=0.2)
    assert num_equal >= len(expected) - (len(expected) > 1)


# The same answers -------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"attention_mode": "causal"},
        {"num_experts": 4, "experts_per_token": 2},
        {"image_resize": "pad", "num_kv_heads": 2},
    ],
    ids=["prefix", "causal", "experts", "pad"],
)
def test_captions_are_the_same(
    make_run: MakeRun, pictures: list[Path], config: dict[str, Any]
) -> None:
    native, reference = both(make_run(**config))
    expected = reference.caption(pictures, max_tokens=12)
    assert len({caption.text for caption in expected}) > 1
    for batch_size in (1, 4, 16):
        assert_same(native.caption(pictures, max_tokens=12, batch_size=batch_size), expected)


@needs_library
@pytest.mark.parametrize("in_file", ["float32", "int8"])
def test_beams_and_prompts_are_the_same(
    make_run: MakeRun, pictures: list[Path], in_file: str
) -> None:
    native, reference = both(make_run(), embedding=in_file, convolutions=in_file)
    prompts = [["", "a", "a blue box on", "dog dog dog dog"][index % 4] for index in range(9)]
    for options in (
        {"prompt": prompts},
        {"prompt": prompts, "beam_size": 3},
        {"beam_size": 4, "length_penalty": 0.0, "batch_size": 3},
        {"beam_size": 2, "length_penalty": 2.0, "max_tokens": 3},
        {"max_tokens": 1},
    ):
        options = {"max_tokens": 10, **options}
        assert_same(native.caption(pictures, **options), reference.caption(pictures, **options))


@needs_library
@pytest.mark.parametrize("cut", [{}, {"top_k": 5}, {"top_p": 0.7}])
@pytest.mark.parametrize("consensus", [0, 12])
def test_a_seed_draws_the_same_words(
    make_run: MakeRun, pictures: list[Path], cut: dict[str, float], consensus: int
) -> None:
    native, reference = both(make_run())
    for seed in (0, -5, 2**64 - 1):
        options = {"temperature": 1.5, "seed": seed, "max_tokens": 9, **cut}
        if not consensus:
            assert_same(native.caption(pictures, **options), reference.caption(pictures, **options))
            continue
        drawn, expected = (
            drawn_captions(model, pictures[0], consensus, **options)
            for model in (native, reference)
        )
        assert len(set(map(tuple, expected))) > 3
        assert sum(one == other for one, other in zip(drawn, expected, strict=True)) > 9


@needs_library
def test_a_tiny_temperature_draws_the_likeliest_and_seeds_repeat(
    make_run: MakeRun, pictures: list[Path]
) -> None:
    native, reference = both(make_run())
    cold = native.caption(pictures, temperature=1e-6, max_tokens=8, seed=1)
    assert_same(cold, reference.caption(pictures, max_tokens=8))
    hot = {"temperature": 2.0, "max_tokens": 8, "top_k": 50, "top_p": 0.99}
    first = native.caption(pictures, seed=-5, **hot)
    assert native.caption(pictures, seed=-5, batch_size=2, **hot) == first
    assert native.caption(pictures, seed=6, **hot) != first
    assert native.caption(pictures, **hot) != native.caption(pictures, **hot)


@needs_library
@pytest.mark.parametrize("has_idf", [True, False])
def test_a_consensus_is_the_caption_that_is_most_like_those_drawn(
    make_run: MakeRun, pictures: list[Path], has_idf: bool
) -> None:
    native, reference = both(make_run(caption_idf=has_idf))
    idf_V = native._native._caption_idf_V
    assert (idf_V is not None) == has_idf
    np.testing.assert_array_equal(idf_V, reference._torch._caption_idf_V)
    options = {"max_tokens": 8, "temperature": 1.5}
    for model in (native, reference):
        found = model.caption(pictures[:4], consensus=6, seed=3, **options)
        num_equal = 0
        for picture, caption in zip(pictures, found, strict=False):
            (alone,) = model.caption(picture, consensus=6, seed=3, **options)
            drawn = drawn_captions(model, picture, 6, 3, **options)
            assert alone.token_ids == drawn[most_agreed(drawn, idf_V)]
            num_equal += alone.token_ids == caption.token_ids
        assert num_equal >= 3  # one may fall to the other side of a rounding
        # At no temperature they are drawn at half of one, and alike every time.
        without = model.caption(pictures[:4], consensus=6, max_tokens=8)
        again = model.caption(pictures[:4], consensus=6, max_tokens=8, temperature=0.5, seed=0)
        assert without == again == model.caption(pictures[:4], consensus=6, max_tokens=8)
        cold = model.caption(pictures, consensus=3, temperature=1e-6, max_tokens=8)
        assert_same(cold, model.caption(pictures, max_tokens=8))


def drawn_captions(
    model: BitGen, picture: Path, count: int, seed: int, max_tokens: int, **options: Any
) -> list[list[int]]:
    """Token ids of captions, by the functions below `BitGen`."""
    tokenizer = model.tokenizer
    pixels = picture_pixels(picture, model.config)
    never_ids = sorted(tokenizer.special_ids - {tokenizer.eos_id})
    if model.backend == "native":
        engine = model._native._engine
        options = GenerationOptions(
            eos_id=tokenizer.eos_id, max_tokens=max_tokens, **options,
            never_ids=never_ids, vocab_size=tokenizer.vocab_size, num_samples=count,
        )  # fmt: skip
        images = engine.encode_images(pixels[None])
        return [g.tokens for g in engine.generate([[tokenizer.bos_id]], images, options, [seed])]
    drawn = generate(
        model.model, model._torch._images([pixels]), [[tokenizer.bos_id]], tokenizer.eos_id,
        max_tokens, never_ids=never_ids, vocab_size=tokenizer.vocab_size, seeds=[seed],
        num_samples=count, **options,
    )  # fmt: skip
    return [got.tokens for got in drawn]


@needs_library
@pytest.mark.parametrize("mode", ["prefix", "causal", "bidirectional"])
def test_robots_are_ranked_the_same_with_and_without_pictures(
    make_run: MakeRun, pictures: list[Path], mode: str
) -> None:
    native, reference = both(make_run(attention_mode=mode))
    images = [pictures[0], None, pictures[1], None]
    stranger = [*native.catalog[:2], Robot("Mole", ("digs",), ("cannot see",), ("soil",))]
    for catalog, batch_size in itertools.product((None, stranger), (1, 4)):
        found, expected = (
            model.select_robots_batch(TASKS, images, catalog=catalog, batch_size=batch_size)
            for model in (native, reference)
        )
        for one, other in zip(found, expected, strict=True):
            assert {c.name: c.probability for c in one} == pytest.approx(
                {c.name: c.probability for c in other}, abs=CLOSE
            )
    answers = list(native.answers(pictures, task=TASKS[1], captions=mode != "bidirectional"))
    alone = [native.select_robots(TASKS[1], picture) for picture in pictures]
    for answer, choices in zip(answers, alone, strict=True):
        assert answer.robots is not None
        assert {c.name: c.probability for c in answer.robots} == pytest.approx(
            {c.name: c.probability for c in choices}, abs=CLOSE
        )


@needs_library
def test_a_picture_of_which_more_is_asked_is_encoded_once(
    make_run: MakeRun, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    native, _ = both(make_run())
    first, second = (np.asarray(Image.open(path)) for path in pictures[:2])
    engine = native._native._engine
    encoded = []
    encode = engine.encode_images
    monkeypatch.setattr(engine, "encode_images", lambda p: encoded.append(len(p)) or encode(p))
    open_picture = Image.fromarray(first)
    alone = native.caption(open_picture, max_tokens=4)
    ranked = native.select_robots(TASKS[1], open_picture)
    begun = native.caption(open_picture, "a red", max_tokens=4)
    assert encoded == [1]
    other = native.caption(Image.fromarray(second), max_tokens=4)
    assert native.caption([open_picture, open_picture], max_tokens=4) == alone * 2
    assert native.caption(open_picture, max_tokens=4) == alone
    assert encoded == [1, 1, 2, 1]
    assert native.select_robots(TASKS[1], open_picture) == ranked
    assert begun[0].text.startswith("a red")
    assert other != alone


@needs_library
def test_a_run_and_its_older_checkpoint_run_natively(
    make_run: MakeRun, pictures: list[Path]
) -> None:
    run_dir = make_run(steps=(3, 9))
    for path in (run_dir, run_dir / "checkpoints" / "step_000009"):
        native, reference = (BitGen.load(path, "cpu", backend=b) for b in ("native", "torch"))
        assert native.info == reference.info
        assert_same(
            native.caption(pictures[:4], max_tokens=8),
            reference.caption(pictures[:4], max_tokens=8),
        )


# Answers to endless pictures --------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_library)])
def test_answers_come_in_order_with_errors_in_their_places(
    make_run: MakeRun, pictures: list[Path], tmp_path: Path, backend: str
) -> None:
    bitgen = BitGen.load(make_run(), "cpu", backend=backend)
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    given = [bad, *pictures[:5], bad, bad, *pictures[5:], bad]
    options = CaptionOptions(max_tokens=6, batch_size=2)
    answers = list(bitgen.answers(given, options, prompt="a", task="go"))
    assert [answer.picture for answer in answers] == given
    good = [answer for answer in answers if answer.error is None]
    assert [answer.picture for answer in good] == pictures
    for answer in answers:
        if answer.error is not None:
            assert answer.picture == bad and "bad.png" in answer.error.message
            assert answer.caption is answer.robots is answer.pixels_3SS is None
    expected = bitgen.caption(pictures, prompt="a", max_tokens=6, batch_size=2)
    assert_same([answer.caption for answer in good if answer.caption], expected)


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_library)])
def test_endless_pictures_are_answered_a_few_batches_behind(
    make_run: MakeRun, pictures: list[Path], backend: str
) -> None:
    bitgen = BitGen.load(make_run(), "cpu", backend=backend)
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        for path in itertools.cycle(pictures):
            taken += 1
            yield path

    options = CaptionOptions(max_tokens=4, batch_size=2)
    answers = bitgen.answers(endless(), options)
    texts = []
    for number in range(30):
        caption = next(answers).caption
        assert caption is not None
        texts.append(caption.text)
        assert taken <= number + 8 * options.batch_size + 8
    answers.close()
    assert texts[: len(pictures)] == texts[len(pictures) : 2 * len(pictures)]


def test_what_cannot_be_is_refused_before_a_picture_is_opened(make_run: MakeRun) -> None:
    bitgen = BitGen.load(make_run(), "cpu")

    def untouched() -> Iterator[Path]:
        raise AssertionError("a picture was asked for")
        yield

    for options, words in (
        ({"prompt": "ball " * 400}, "prompt is too long"),
        ({"options": CaptionOptions(max_tokens=1000)}, "room for"),
        ({"task": " "}, "task is empty"),
        ({"task": "lift " * 1000}, "task is too long"),
        ({"task": "go", "catalog": []}, "catalog is empty"),
        ({"options": CaptionOptions(speculative=True)}, "no future token heads"),
    ):
        with pytest.raises(InputError, match=words):
            bitgen.answers(untouched(), **options)
    for wrong in ({"batch_size": 0}, {"top_p": 2.0}, {"seed": "x"}, {"seed": 2**64}):
        with pytest.raises(InputError):
            CaptionOptions(**wrong)


# Which backend ----------------------------------------------------------------------------------


@needs_library
def test_auto_takes_the_native_engine_and_pytorch_for_what_it_cannot(
    make_run: MakeRun, pictures: list[Path]
) -> None:
    artifact = make_run(predict_tokens=3).with_suffix(".safetensors")
    export_safetensors(artifact.with_suffix(""), artifact)
    bitgen = BitGen.load(artifact, "cpu")
    assert (bitgen.backend, bitgen.why_torch, str(bitgen.device)) == ("native", None, "cpu")
    (plain,) = bitgen.caption(pictures[0], max_tokens=6)
    assert plain.speculation is None
    (drafted,) = bitgen.caption(pictures[0], max_tokens=6, speculative=True)
    assert drafted.speculation is not None
    assert drafted.token_ids == plain.token_ids
    assert len(bitgen.caption(pictures[0], max_tokens=600, attention_window=8)) == 1
    assert bitgen.model.config == bitgen.config
    alone = BitGen.load(artifact, "cpu", backend="native")
    for options in ({"speculative": True}, {"attention_window": 8}):
        with pytest.raises(InputError, match="native engine"):
            alone.caption(pictures[0], max_tokens=6, **options)
    with pytest.raises(InputError, match="native engine alone"):
        _ = alone.model


@needs_library
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization": "none"}, "not ternary"),
        ({"image_encoder": "mobilenet_v3_small", "image_size": 64}, "mobilenet_v3_small"),
    ],
)
def test_models_that_the_engine_cannot_run(
    make_run: MakeRun, config: dict[str, Any], words: str
) -> None:
    run_dir = make_run(**config)
    artifact = run_dir.with_suffix(".safetensors")
    export_safetensors(run_dir, artifact)
    for path in (run_dir, artifact):
        bitgen = BitGen.load(path, "cpu")
        assert bitgen.backend == "torch"
        assert bitgen.why_torch is not None and words in bitgen.why_torch
        with pytest.raises(InputError, match=words) as refused:
            BitGen.load(path, "cpu", backend="native")
        assert refused.value.remedy is not None


def test_requests_to_load_that_cannot_be(make_run: MakeRun) -> None:
    run_dir = make_run()
    for options, words in (
        ({"backend": "abacus"}, "no backend 'abacus'"),
        ({"threads": 0}, "threads must be 1"),
        ({"threads": 10**6}, "threads must be 1"),
        ({"backend": "native", "device": "cuda"}, "native engine runs on the CPU"),
        ({"backend": "native", "packed": False}, "packed weights only"),
    ):
        with pytest.raises(InputError, match=words):
            BitGen.load(run_dir, **options)
    assert BitGen.load(run_dir, "cpu", packed=False).backend == "torch"


def test_without_the_library_pytorch_answers_and_says_why(
    make_run: MakeRun, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise library.KernelsError("The C++ kernels were not built.", remedy="Build them.")

    run_dir = make_run()
    monkeypatch.setattr(library, "load", missing)
    bitgen = BitGen.load(run_dir, "cpu")
    assert (bitgen.backend, bitgen.why_torch) == ("torch", "The C++ kernels were not built.")
    assert len(bitgen.caption(pictures[:2], max_tokens=4)) == 2
    with pytest.raises(InputError, match="were not built") as refused:
        BitGen.load(run_dir, "cpu", backend="native")
    assert refused.value.remedy == "Build them."


@needs_library
def test_a_gpu_is_preferred_where_torch_sees_one(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run()
    driver = tmp_path / "driver"
    driver.touch()
    for file, seen, expected in (
        (tmp_path / "nothing", True, "native"),
        (driver, False, "native"),
        (driver, True, "torch"),
    ):
        monkeypatch.setattr(native_backend, "_GPU_FILES", (str(file),))
        monkeypatch.setattr(torch.cuda, "is_available", lambda seen=seen: seen)
        if expected == "torch":
            monkeypatch.setattr(
                "bitgen.model.device.resolve_device", lambda name: torch.device("cpu")
            )
        assert BitGen.load(run_dir).backend == expected
    assert BitGen.load(run_dir, backend="native").backend == "native"


@needs_library
def test_threads_are_those_asked_for(make_run: MakeRun, pictures: list[Path]) -> None:
    run_dir, before = make_run(), (library.threads(), torch.get_num_threads())
    try:
        single = BitGen.load(run_dir, "cpu", backend="native", threads=1)
        assert library.threads() == 1
        expected = single.caption(pictures[:3])
        robots = single.select_robots("go", pictures[0])
        other = BitGen.load(run_dir, "cpu", backend="native", threads=3)
        assert library.threads() == 3
        assert [c.token_ids for c in other.caption(pictures[:3])] == [c.token_ids for c in expected]
        for one, same in zip(other.select_robots("go", pictures[0]), robots, strict=True):
            assert one.probability == pytest.approx(same.probability, abs=CLOSE)
        BitGen.load(run_dir, "cpu", backend="torch", threads=2)
        assert torch.get_num_threads() == 2
    finally:
        library.set_threads(before[0])
        torch.set_num_threads(before[1])


# Without torch ----------------------------------------------------------------------------------

WITHOUT_TORCH = """
import sys

class Refuser:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchvision", "matplotlib", "transformers", "scipy"}:
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Refuser())
from bitgen import BitGen

model = BitGen.load(sys.argv[1], backend=sys.argv[3])
captions = model.caption([sys.argv[2]] * 3, max_tokens=5, beam_size=2, prompt="a")
robots = model.select_robots("go", sys.argv[2])
assert len(captions) == 3 and robots and model.select_robots("go")
print(captions[0].text)
"""


@needs_library
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_an_artifact_is_answered_without_torch(
    make_run: MakeRun, pictures: list[Path], backend: str
) -> None:
    run_dir = make_run()
    artifact = run_dir.with_suffix(".safetensors")
    export_safetensors(run_dir, artifact)
    finished = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(artifact), str(pictures[0]), backend],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    (expected,) = BitGen.load(artifact, "cpu", backend="torch").caption(
        pictures[0], max_tokens=5, beam_size=2, prompt="a"
    )
    assert finished.stdout.strip() == expected.text


@needs_library
def test_a_file_that_does_not_fit_its_config_is_refused(make_run: MakeRun) -> None:
    run_dir = make_run()
    artifact = run_dir.with_suffix(".safetensors")
    export_safetensors(run_dir, artifact)
    opened = open_artifact(artifact)
    small = replace(opened.header.config, num_layers=3)
    with pytest.raises(InputError, match="layers.2"):
        native_backend.NativeBackend(small, opened.tensors)
