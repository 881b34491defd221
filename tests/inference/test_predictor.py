"""`BitGen`: loading, captions, robots, and what is refused."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bitgen.dataset.robots import Robot, catalog_to_json, load_catalog
from bitgen.dataset.task_words import (
    NEW_ROBOT_WEIGHTS,
    TASK_WORD_BINS,
    TaskParts,
    TaskWords,
    new_robot_log_odds,
)
from bitgen.errors import BitGenError, ImageError, InputError, ModelFileError
from bitgen.export.safetensors import export_safetensors
from bitgen.inference.predictor import BitGen
from bitgen.kernels import library
from bitgen.model.ternary import PackedTernaryLinear, TernaryLinear

MakeRun = Callable[..., Path]


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Six PNG files of different colours, shapes and sizes."""
    random = np.random.default_rng(0)
    paths = []
    for index in range(6):
        height, width = random.integers(20, 60, 2)
        pixels = np.full((height, width, 3), random.integers(0, 255, 3), dtype=np.uint8)
        pixels[: height // 2, : width // 2] = random.integers(0, 255, 3)
        paths.append(tmp_path / f"picture{index}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def layers_of(bitgen: BitGen, kind: type) -> int:
    return sum(isinstance(module, kind) for module in bitgen.model.modules())


# Loading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "experts", [{}, {"num_experts": 4, "experts_per_token": 2}], ids=["dense", "experts"]
)
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_run_checkpoint_and_artifact_answer_the_same(
    make_run: MakeRun,
    tmp_path: Path,
    pictures: list[Path],
    experts: dict[str, int],
    backend: str,
) -> None:
    if backend == "native" and not library.is_usable():
        pytest.skip(f"needs the C++ library: {library.describe().reason}")
    load = functools.partial(BitGen.load, backend=backend)
    run_dir = make_run(**experts)
    artifact = tmp_path / "model.safetensors"
    export_safetensors(run_dir, artifact)
    checkpoint = run_dir / "checkpoints" / "step_000005"
    packed = load(run_dir)
    answers = packed.caption(pictures)
    assert len({caption.text for caption in answers}) > 1
    others = [
        load(checkpoint),
        load(str(run_dir / "checkpoints" / "best")),
        load(artifact),
    ]
    if backend == "torch":
        trained = load(run_dir, packed=False)
        assert layers_of(packed, TernaryLinear) == 0 < layers_of(packed, PackedTernaryLinear)
        assert layers_of(trained, PackedTernaryLinear) == 0 < layers_of(trained, TernaryLinear)
        parameters = packed.model.parameters()
        assert not any(parameter.dtype != torch.float32 for parameter in parameters)
        others.append(trained)
    task = "carry the box up the stairs"
    for other in others:
        assert other.caption(pictures) == answers
        assert other.caption(pictures, beam_size=3) == packed.caption(pictures, beam_size=3)
        assert other.select_robots(task, pictures[0]) == packed.select_robots(task, pictures[0])


def test_the_best_checkpoint_is_loaded_and_else_the_last(
    make_run: MakeRun, pictures: list[Path]
) -> None:
    run_dir = make_run(steps=(3, 9))
    checkpoints = run_dir / "checkpoints"
    best, last = (
        BitGen.load(checkpoints / name).caption(pictures) for name in ("step_000003", "step_000009")
    )
    assert best != last
    loaded = BitGen.load(run_dir)
    assert loaded.info["step"] == 3
    assert loaded.caption(pictures) == best
    (checkpoints / "best").unlink()
    assert BitGen.load(run_dir).caption(pictures) == last


def test_what_it_was_trained_on_is_known_without_private_folders(make_run: MakeRun) -> None:
    info = BitGen.load(make_run("garden")).info
    assert (info["run"], info["step"], info["epoch"]) == ("garden", 5, 1)
    assert info["best_validation_loss"] == 2.25
    assert info["data"] == {"coco_data": ["coco"], "train_images": 7}
    assert info["training"]["num_epochs"] == 3


def test_a_full_precision_model_works_as_well(
    make_run: MakeRun, tmp_path: Path, pictures: list[Path]
) -> None:
    run_dir = make_run(quantization="none")
    artifact = tmp_path / "float.safetensors"
    export_safetensors(run_dir, artifact)
    bitgen = BitGen.load(run_dir)
    assert layers_of(bitgen, PackedTernaryLinear) == layers_of(bitgen, TernaryLinear) == 0
    assert BitGen.load(artifact).caption(pictures) == bitgen.caption(pictures)


@pytest.mark.parametrize("encoder", ["mobilenet_v3_small", "regnet_y_400mf"])
def test_torchvision_backbones_load(make_run: MakeRun, tmp_path: Path, encoder: str) -> None:
    run_dir = make_run(image_encoder=encoder, image_size=64)
    artifact = tmp_path / "model.safetensors"
    export_safetensors(run_dir, artifact)
    picture = Image.new("RGB", (70, 50), (200, 10, 10))
    bitgen = BitGen.load(run_dir)
    assert not any(tensor.is_meta for tensor in bitgen.model.state_dict().values())
    assert BitGen.load(artifact).caption(picture) == bitgen.caption(picture)


def test_models_that_cannot_be_loaded(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no model at"):
        BitGen.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFileError, match="not a BitGen run"):
        BitGen.load(tmp_path / "empty")
    with pytest.raises(ModelFileError, match="no checkpoint yet"):
        BitGen.load(make_run("young", steps=()))
    run_dir = make_run()
    with pytest.raises(InputError, match="quantum"):
        BitGen.load(run_dir, device="quantum")
    artifact = tmp_path / "model.safetensors"
    export_safetensors(run_dir, artifact)
    with pytest.raises(InputError, match="packed weights only"):
        BitGen.load(artifact, packed=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_layers": 3}, "layers.2.* is missing"),
        ({"num_layers": 1}, "layers.1.* is unknown"),
        ({"vocab_size": 520}, r"\[512, 32\], expected float32 \[520, 32\]"),
        ({"vocab_size": 280}, "expected float32"),
    ],
)
def test_a_config_of_another_model_is_refused(
    make_run: MakeRun, change: dict[str, Any], words: str
) -> None:
    run_dir = make_run()
    values = json.loads((run_dir / "config.json").read_text())
    values["model"].update(change)
    (run_dir / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelFileError, match=words):
        BitGen.load(run_dir)


@pytest.mark.parametrize("file", ["tokenizer.json", "robots.json"])
@pytest.mark.parametrize("text", ["", "{}", '["'])
def test_damaged_parts_of_a_run_are_refused(make_run: MakeRun, file: str, text: str) -> None:
    run_dir = make_run()
    (run_dir / file).write_text(text)
    with pytest.raises(ModelFileError, match=run_dir.name):
        BitGen.load(run_dir)


# Captions ---------------------------------------------------------------------------------------


def test_paths_strings_open_pictures_and_lists(make_run: MakeRun, pictures: list[Path]) -> None:
    bitgen = BitGen.load(make_run())
    (first,) = bitgen.caption(pictures[0])
    assert bitgen.caption(str(pictures[0])) == [first]
    with Image.open(pictures[0]) as picture:
        assert bitgen.caption(picture) == [first]
        assert bitgen.caption([pictures[1], picture])[1].text == first.text
    assert bitgen.caption(tuple(pictures))[0].text == first.text


def test_captions_are_what_the_tokens_say(make_run: MakeRun, pictures: list[Path]) -> None:
    bitgen = BitGen.load(make_run())
    for caption in bitgen.caption(pictures, max_tokens=7):
        assert len(caption.token_ids) <= 7
        assert caption.text == bitgen.tokenizer.decode(caption.token_ids)
        assert caption.tokens == bitgen.tokenizer.tokens(caption.token_ids)
        assert set(caption.token_ids).isdisjoint(bitgen.tokenizer.special_ids)
        assert max(caption.token_ids, default=0) < bitgen.tokenizer.vocab_size < 512
        assert caption.log_probability < 0


@pytest.mark.parametrize(
    "options",
    [{}, {"beam_size": 3}, {"temperature": 1.0, "seed": 4}, {"prompt": "a red ball"}],
)
def test_the_batch_size_changes_nothing(
    make_run: MakeRun, pictures: list[Path], options: dict[str, Any]
) -> None:
    bitgen = BitGen.load(make_run(quantization="none"))
    together = bitgen.caption(pictures, **options)
    for batch_size in (1, 4):
        for got, expected in zip(
            bitgen.caption(pictures, batch_size=batch_size, **options), together, strict=True
        ):
            assert (got.text, got.token_ids) == (expected.text, expected.token_ids)
            assert got.log_probability == pytest.approx(expected.log_probability, abs=1e-3)


def test_a_seed_repeats_and_no_seed_does_not(make_run: MakeRun, pictures: list[Path]) -> None:
    bitgen = BitGen.load(make_run())
    hot = {"temperature": 2.0, "max_tokens": 12}
    first = bitgen.caption(pictures, seed=1, **hot)
    assert bitgen.caption(pictures, seed=1, **hot) == first
    assert bitgen.caption(pictures, seed=2, **hot) != first
    assert bitgen.caption(pictures, **hot) != bitgen.caption(pictures, **hot)


def test_a_prompt_begins_the_caption(make_run: MakeRun, pictures: list[Path]) -> None:
    bitgen = BitGen.load(make_run())
    prompts = ["", "a blue", "a dog runs over the grass"]
    captions = bitgen.caption(pictures[:3], prompt=prompts)
    for prompt, caption in zip(prompts, captions, strict=True):
        assert caption.text.startswith(prompt)
        whole = [*bitgen.tokenizer.encode(prompt), *caption.token_ids]
        assert caption.text == bitgen.tokenizer.decode(whole)
    (same,) = bitgen.caption(pictures[1], prompt="a blue")
    assert same.text == captions[1].text
    with pytest.raises(InputError, match="3 pictures, but 2 prompts"):
        bitgen.caption(pictures[:3], prompt=["a", "b"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": 1000}, "room for"),
        ({"beam_size": 0}, "beam_size must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"temperature": 1.0, "seed": 2**70}, "seed"),
        ({"prompt": "ball " * 400}, "prompt is too long"),
    ],
)
def test_options_that_are_refused(
    make_run: MakeRun, pictures: list[Path], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        BitGen.load(make_run()).caption(pictures, **options)


def test_pictures_that_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    bitgen = BitGen.load(make_run())
    with pytest.raises(InputError, match="no picture"):
        bitgen.caption([])
    (tmp_path / "text.jpg").write_text("not a picture")
    for bad in (tmp_path / "text.jpg", tmp_path / "missing.jpg"):
        with pytest.raises(BitGenError, match=bad.name):
            bitgen.caption(bad)
        with pytest.raises(ImageError):
            bitgen.select_robots("look", bad)


# Robots -----------------------------------------------------------------------------------------


def test_robots_are_ranked_by_probability(make_run: MakeRun, pictures: list[Path]) -> None:
    bitgen = BitGen.load(make_run())
    names = sorted(robot.name for robot in load_catalog())
    for image in (None, pictures[0], Image.new("RGB", (40, 40), (0, 0, 255))):
        choices = bitgen.select_robots("bring back the red ball", image)
        assert sorted(choice.name for choice in choices) == names
        probabilities = [choice.probability for choice in choices]
        assert probabilities == sorted(probabilities, reverse=True)
        assert all(0 < probability < 1 for probability in probabilities)


def test_probabilities_are_the_models_sigmoid_of_one_row_without_padding(
    make_run: MakeRun,
) -> None:
    bitgen = BitGen.load(make_run(quantization="none"))
    task = "inspect the pipe"
    got = {c.name: c.probability for c in bitgen.select_robots(task)}
    ids_1L = torch.tensor([bitgen.tokenizer.encode_task(task)])
    with torch.inference_mode():
        mask = bitgen.model.build_attention_mask(
            torch.ones_like(ids_1L), torch.tensor([ids_1L.shape[1]]), has_images=False
        )
        output = bitgen.model(ids_1L, attention_mask=mask, return_robot_selection=True)
    expected = (output.robot_logits[0] / bitgen.robot_temperature).sigmoid().tolist()
    for robot, probability in zip(bitgen.catalog, expected, strict=True):
        assert got[robot.name] == pytest.approx(probability, abs=1e-5)


def test_a_batch_of_tasks_with_and_without_pictures_equals_one_by_one(
    make_run: MakeRun, pictures: list[Path]
) -> None:
    bitgen = BitGen.load(make_run(quantization="none"))
    tasks = ["go", "carry the blue box up the stairs to the shelf", "dive for the ball", "look"]
    images = [pictures[0], None, pictures[1], None]
    for batch_size in (4, 3):
        together = bitgen.select_robots_batch(tasks, images, batch_size=batch_size)
        for task, image, choices in zip(tasks, images, together, strict=True):
            alone = {c.name: c.probability for c in bitgen.select_robots(task, image)}
            for choice in choices:
                assert choice.probability == pytest.approx(alone[choice.name], abs=1e-4)
    without = bitgen.select_robots_batch(tasks[:1])
    assert without != bitgen.select_robots_batch(tasks[:1], images[:1])
    assert bitgen.select_robots_batch([]) == []
    with pytest.raises(InputError, match="2 tasks, but 1 pictures"):
        bitgen.select_robots_batch(["a", "b"], [None])


def test_other_catalogs_for_one_call_and_for_good(make_run: MakeRun, tmp_path: Path) -> None:
    bitgen = BitGen.load(make_run())
    before = bitgen.select_robots("look around")
    new = [
        Robot("Mole", ("digs",), ("cannot see",), ("soil",)),
        Robot("Balloon", ("floats for days",), ("slow",), ("sky",)),
    ]
    file = tmp_path / "robots.json"
    file.write_text(catalog_to_json(new))
    for catalog in (new, file, str(file)):
        choices = bitgen.select_robots("look around", catalog=catalog)
        assert {choice.name for choice in choices} == {"Mole", "Balloon"}
    assert bitgen.select_robots("look around") == before
    bitgen.set_catalog(file)
    assert bitgen.catalog == new
    assert {choice.name for choice in bitgen.select_robots("look around")} == {"Mole", "Balloon"}
    # A robot is scored by its own text, whatever robots stand beside it.
    (alone,) = bitgen.select_robots("look around", catalog=new[:1])
    beside = {c.name: c.probability for c in bitgen.select_robots("look around")}
    assert alone.probability == pytest.approx(beside["Mole"], abs=0.01)


def test_the_threshold_that_validation_found_goes_with_run_and_artifact(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run_dir, artifact = make_run(), tmp_path / "model.safetensors"
    export_safetensors(run_dir, artifact)
    for source in (run_dir, artifact):
        model = BitGen.load(source, device="cpu")
        assert model.robot_threshold == 0.35
        assert model.robot_temperature == 4.0
        for threshold in (0.0, 0.5, 1.0):
            model.robot_threshold = threshold
            choices = model.select_robots("bring the ball")
            above = [choice.probability >= threshold for choice in choices]
            expected = above if any(above) else [True, *[False] * (len(choices) - 1)]
            assert [choice.chosen for choice in choices] == expected
    with pytest.raises(InputError, match="0 to 1"):
        model.robot_threshold = -0.1


def test_log_odds_are_logits_at_the_temperature_and_the_likeness_of_new_robots(
    make_run: MakeRun,
) -> None:
    """The same model under two temperatures tells the logits."""
    catalog = [
        load_catalog()[0],
        Robot("Mole", ("digs tunnels",), (), ("soil",)),
        Robot("Vole", ("gnaws roots",), (), ("soil",)),
    ]
    model = BitGen.load(make_run(), device="cpu")
    task = "dig tunnels through the soil and look around"

    def log_odds(temperature: float, robots: list[Robot]) -> np.ndarray:
        again = BitGen(
            model.model,
            model.tokenizer,
            model.catalog,
            info={"robot_temperature": temperature},
        )
        return log_odds_of(again, task, robots)

    parts = TaskParts(task, np.ones(TASK_WORD_BINS))
    *_, selector_weight, trained_weight, _ = NEW_ROBOT_WEIGHTS
    logit = log_odds(1.0, catalog)[0]
    assert log_odds(2.0, catalog)[0] == pytest.approx(logit / 2, abs=1e-4)
    for robots, trained in ((catalog, logit), (catalog[1:], 0.0)):  # with a trained one, without
        one, two = (log_odds(temperature, robots)[-2:] for temperature in (1.0, 2.0))
        if trained:
            two += trained_weight * (trained - trained / 2)
        selector = (one - two) / (selector_weight / 2)
        expected = [
            new_robot_log_odds(parts, robot.text(), value, trained)
            for robot, value in zip(catalog[1:], selector, strict=True)
        ]
        assert one == pytest.approx(expected, abs=1e-3)
        assert np.abs(one - two).max() > 1e-3


def log_odds_of(model: BitGen, task: str, catalog: list[Robot]) -> np.ndarray:
    found = {c.name: c.probability for c in model.select_robots(task, catalog=catalog)}
    odds = np.array([found[robot.name] for robot in catalog])
    values: np.ndarray = np.log(odds / (1 - odds))
    return values


def test_words_of_tasks_weigh_beside_the_selector_for_robots_that_were_trained_on(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run_dir, artifact = make_run(robot_sets=(1, 2, 3)), tmp_path / "model.safetensors"
    export_safetensors(run_dir, artifact)
    task, new = "dive to the wreck", Robot("Mole", ("digs tunnels",), (), ())
    torch_model = BitGen.load(run_dir, backend="torch")
    known = load_catalog()[:2]
    words = TaskWords.of_model(
        torch_model.config,
        {n: t.numpy() for n, t in torch_model.model.state_dict().items()},
    )
    assert words is not None

    def log_odds(model: BitGen) -> np.ndarray:
        return log_odds_of(model, task, [*known, new])

    with_words = log_odds(torch_model)
    alone = log_odds(
        BitGen(
            torch_model.model,
            torch_model.tokenizer,
            torch_model.catalog,
            info={**torch_model.info, "robot_word_weight": None},
        )
    )
    expected = 0.75 * alone[:2] + 0.25 * words.log_odds([task])[0]
    # Of the new robot, words say how sure the two others are.
    surer = max(expected) - max(alone[:2])
    expected = [*expected, alone[2] + NEW_ROBOT_WEIGHTS[3] * surer]
    np.testing.assert_allclose(with_words, expected, atol=1e-4)
    assert np.abs(with_words - alone)[:2].max() > 0.01
    for backend in ("torch", "native"):
        if backend == "native" and not library.is_usable():
            continue
        exported = BitGen.load(artifact, backend=backend)
        np.testing.assert_allclose(log_odds(exported), with_words, atol=2e-3)


def test_robot_questions_that_are_refused(make_run: MakeRun) -> None:
    bitgen = BitGen.load(make_run())
    with pytest.raises(InputError, match="task is empty"):
        bitgen.select_robots("  ")
    with pytest.raises(InputError, match="task is too long"):
        bitgen.select_robots("lift " * 1000)
    with pytest.raises(InputError, match="catalog is empty"):
        bitgen.select_robots("look", catalog=[])
    endless = Robot("Endless", ("talks " * 1000,), (), ())
    with pytest.raises(InputError, match="text of a robot is too long"):
        bitgen.select_robots("look", catalog=[endless])
    with pytest.raises(InputError, match="no robots to choose from"):
        BitGen(bitgen.model, bitgen.tokenizer).select_robots("look")
    assert len(bitgen.select_robots("look")) == len(bitgen.catalog)
