"""`bitgen infer`, `export` and `info` on a trained run."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from bitgen.cli import models
from bitgen.cli.models import DEFAULT_CONSENSUS
from bitgen.dataset.robots import load_catalog
from bitgen.export.safetensors import load_artifact
from bitgen.inference.heatmap import group_words
from bitgen.inference.predictor import BitGen
from bitgen.kernels import library

CHECKOUT = Path(__file__).resolve().parents[2]
TASK = "Bring back the red ball."

needs_library = pytest.mark.skipif(
    not library.is_usable(), reason=f"needs the C++ library: {library.describe().reason}"
)

# What an exported file must be answered without.
WITHOUT_TORCH = """
import sys

class Refuser:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchvision", "matplotlib", "transformers", "scipy"}:
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Refuser())
from bitgen.cli.app import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="session")
def pictures(scenes: Path) -> list[Path]:
    return sorted((scenes / "val2017").iterdir())


def test_json_lines_in_input_order_equal_the_predictor(
    run, trained: Path, pictures: list[Path]
) -> None:
    order = [pictures[3], pictures[0], pictures[5]]
    finished = run(
        *("infer", *order, "--model", trained, "--task", TASK, "--json"),
        *("--max_tokens", 6, "--batch_size", 2, "--device", "cpu"),
    )
    assert (finished.code, finished.stderr) == (0, "")
    lines = finished.json_lines()
    model = BitGen.load(trained, device="cpu")
    captions = model.caption(order, max_tokens=6, batch_size=2, consensus=DEFAULT_CONSENSUS)
    # In the same batches: another one adds up in another order, and int8 rounding may then flip.
    choices = model.select_robots_batch([TASK] * len(order), order, batch_size=2)
    for line, path, caption, ranked in zip(lines, order, captions, choices, strict=True):
        assert list(line) == ["image", "caption", "tokens", "log_probability", "robots"]
        assert line["image"] == str(path)
        assert line["caption"] == caption.text
        assert line["tokens"] == caption.tokens
        assert math.isclose(line["log_probability"], caption.log_probability, rel_tol=1e-6)
        probabilities = [robot["probability"] for robot in line["robots"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert [robot["name"] for robot in line["robots"]] == [robot.name for robot in ranked]
        assert probabilities == pytest.approx([robot.probability for robot in ranked], abs=1e-5)


def test_without_task_no_robots_and_a_readable_listing(
    run, trained: Path, pictures: list[Path]
) -> None:
    (line,) = run("infer", pictures[0], "--model", trained, "--json").json_lines()
    assert "robots" not in line
    listing = run("infer", pictures[0], "--model", trained, "--task", TASK).stdout
    assert listing.splitlines()[0] == str(pictures[0])
    for robot in load_catalog():
        assert robot.name in listing


def test_robots_of_at_least_the_threshold_are_chosen_or_else_the_likeliest(
    run, trained: Path
) -> None:
    ask = ("infer", "--model", trained, "--task", TASK)
    ranked = run(*ask, "--json", "--robot_threshold", 0).json()["robots"]
    assert all(robot["chosen"] for robot in ranked)
    second = ranked[1]["probability"]
    two = run(*ask, "--json", "--robot_threshold", second - 1e-6).json()["robots"]
    assert [robot["chosen"] for robot in two] == [True, True, False, False, False]
    none_is_sure = run(*ask, "--json", "--robot_threshold", 1).json()["robots"]
    assert [robot["chosen"] for robot in none_is_sure] == [True, *[False] * 4]
    listing = run(*ask, "--robot_threshold", 1).stdout.splitlines()
    assert [line[0] for line in listing] == ["*", " ", " ", " ", " "]
    assert ranked[0]["name"] in listing[0]


def test_explain_says_which_words_and_pieces_of_the_picture_weighed_most(
    run, trained: Path, pictures: list[Path]
) -> None:
    ask = ("infer", "--model", trained, "--task", TASK, "--explain")
    plain = run("infer", "--model", trained, "--task", TASK, "--json").json()["robots"]
    assert all("why" not in robot for robot in plain)
    for robot in run(*ask, "--json").json()["robots"]:
        assert {reason["part"] for reason in robot["why"]} == {"task", "robot"}
        assert {r["word"] for r in robot["why"] if r["part"] == "task"} <= set(TASK.split())
    (line,) = run(*ask, pictures[0], "--json", "--max_tokens", 2).json_lines()
    boxes = [r["box"] for r in line["robots"][0]["why"] if r["part"] == "picture"]
    assert len(boxes) == 5 and all(0 <= edge <= 1 for box in boxes for edge in box)
    listing = run(*ask, pictures[0], "--max_tokens", 2).stdout
    assert listing.count("its text:") == listing.count("% down") // 3 == len(plain)
    refused = run("infer", pictures[0], "--model", trained, "--explain")
    assert refused.code == 2 and "--task" in refused.stderr


def test_a_catalog_of_other_robots_is_ranked_in_place_of_the_models(
    run, trained: Path, tmp_path: Path
) -> None:
    catalog = tmp_path / "robots.json"
    robot = {"name": "Crane", "capabilities": ["lifts"], "limitations": [], "environments": []}
    catalog.write_text(json.dumps([robot]))
    ask = ("infer", "--model", trained, "--robots", catalog)
    line = run(*ask, "--task", TASK, "--json").json()
    assert [(robot["name"], robot["chosen"]) for robot in line["robots"]] == [("Crane", True)]
    assert run(*ask, "--task", TASK, "--robots", tmp_path / "none.json").code == 2
    without_task = run("infer", "x.jpg", "--model", trained, "--robots", catalog)
    assert without_task.code == 2 and "--task" in without_task.stderr
    above = run(*ask, "--task", TASK, "--robot_threshold", 1.5)
    assert above.code == 2 and "0 to 1" in above.stderr


def test_folders_are_sorted_and_globs_and_files_keep_their_place(
    run, trained: Path, pictures: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("b.PNG", "a.jpg"):
        Image.new("RGB", (40, 40), "red").save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    odd = tmp_path / "odd[1].png"
    shutil.copy(pictures[0], odd)
    finished = run(
        *("infer", pictures[1], folder, pictures[0].parent / "*7.png", odd),
        *("--model", trained, "--json", "--max_tokens", 2),
    )
    assert finished.code == 0, finished.stderr
    globbed = [str(path) for path in pictures if path.name.endswith("7.png")]
    assert len(globbed) == 1
    assert [line["image"] for line in finished.json_lines()] == [
        str(pictures[1]), str(folder / "a.jpg"), str(folder / "b.PNG"), *globbed, str(odd),
    ]  # fmt: skip


def test_a_task_needs_no_picture(run, trained: Path) -> None:
    line = run("infer", "--model", trained, "--task", TASK, "--json").json()
    assert line["image"] is None
    assert line["caption"] is None
    assert {robot["name"] for robot in line["robots"]} == {r.name for r in load_catalog()}


def test_the_newest_run_is_taken_and_told(
    run, trained: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as without_shipped_model:
        without_shipped_model.setattr(models, "shipped_model", lambda: None)
        finished = run("infer", pictures[0])
    assert finished.code == 2
    assert "runs" in finished.stderr
    shutil.copytree(trained, tmp_path / "runs" / "newest", symlinks=True)
    finished = run("infer", pictures[0], "--json")
    assert finished.code == 0
    assert str(Path("runs") / "newest") in finished.stderr
    assert len(finished.json_lines()) == 1


def test_drawing_words_is_repeatable_by_seed(run, trained: Path, pictures: list[Path]) -> None:
    def caption(seed: int) -> list[dict]:
        return run(
            *("infer", *pictures[:3], "--model", trained, "--json", "--temperature", 2),
            *("--top_k", 50, "--top_p", 0.99, "--seed", seed, "--max_tokens", 8),
        ).json_lines()

    assert caption(1) == caption(1)
    assert caption(1) != caption(2)


@needs_library
def test_an_exported_file_needs_no_torch(exported: Path, pictures: list[Path]) -> None:
    """Captions, robots, beams, drawn words and help by the installed command's own start."""
    for options in (
        ("--task", TASK, "--json", "--debug"),
        ("--beam_size", "2", "--prompt", "A"),
        ("--temperature", "1", "--seed", "3", "--batch_size", "2", "--threads", "1"),
    ):
        finished = subprocess.run(
            [
                *(sys.executable, "-c", WITHOUT_TORCH, "infer", *map(str, pictures[:3])),
                *("--model", str(exported), "--max_tokens", "4", *options),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT / "src"), "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        assert len(finished.stdout.splitlines()) >= 3
        assert ("native engine" in finished.stderr) == ("--debug" in options)


def test_backends_answer_alike_and_pytorch_says_why_it_runs(
    run, exported: Path, trained: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("infer", *pictures, "--json", "--max_tokens", 5, "--model", exported)
    arguments = (*arguments, "--beam_size", 5)  # each backend has draws of its own
    by_torch = run(*arguments, "--backend", "torch", "--debug", "--threads", 1)
    assert by_torch.code == 0 and by_torch.stderr == "Runs in PyTorch.\n"
    default = run(*arguments).json_lines()
    assert [line["caption"] for line in default] == [
        line["caption"] for line in by_torch.json_lines()
    ]

    def missing() -> None:
        raise library.KernelsError("There is no library.", remedy="Build it.")

    monkeypatch.setattr(library, "load", missing)
    told = run(*arguments, "--debug")
    assert (told.code, told.stdout) == (0, by_torch.stdout)
    assert told.stderr == "Runs in PyTorch: There is no library.\n"
    refused = run(*arguments, "--backend", "native")
    assert (refused.code, refused.stdout) == (2, "")
    assert "There is no library." in refused.stderr and "Build it." in refused.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_library)])
def test_an_interrupt_ends_a_folder_at_once_and_cleanly(
    exported: Path, pictures: list[Path], backend: str
) -> None:
    # Where these tests run in the background, a shell has told them to ignore interrupts.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        " from bitgen.cli.app import main; main()"
    )
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", program, "infer", *map(str, pictures * 200)),
            *("--model", str(exported), "--backend", backend, "--json", "--batch_size", "4"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT / "src"), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    first = json.loads(process.stdout.readline())
    assert first["image"] == str(pictures[0])
    process.send_signal(signal.SIGINT)
    rest, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert told.split() == ["error:", "Interrupted."]
    lines = [json.loads(line) for line in rest.splitlines()]
    assert len(lines) < 200 * len(pictures) - 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="opens a pseudo terminal")
def test_a_terminal_shows_progress_beside_answers_that_go_elsewhere(
    trained: Path, pictures: list[Path], tmp_path: Path
) -> None:
    import pty

    master, slave = pty.openpty()
    answers = tmp_path / "answers.jsonl"
    with answers.open("w") as file:
        finished = subprocess.run(
            [
                *(sys.executable, "-m", "bitgen", "infer", *map(str, pictures)),
                *("--model", str(trained), "--json", "--max_tokens", "3"),
            ],
            stdout=file,
            stderr=slave,
            timeout=120,
            env={
                **os.environ,
                "PYTHONPATH": str(CHECKOUT / "src"),
                "OMP_NUM_THREADS": "1",
                "TERM": "xterm",
                "COLUMNS": "80",
            },  # fmt: skip
            check=False,
        )
    os.close(slave)
    shown = os.read(master, 100_000).decode()
    os.close(master)
    assert finished.returncode == 0, shown
    assert f"{len(pictures)}/{len(pictures)} pictures" in shown
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["image"] for line in lines] == [str(path) for path in pictures]


def test_prompt_and_beams(run, trained: Path, pictures: list[Path]) -> None:
    line = run(
        *("infer", pictures[0], "--model", trained, "--json", "--prompt", "A red"),
        *("--beam_size", 3, "--max_tokens", 4),
    ).json()
    assert line["caption"].startswith("A red")


def test_length_penalty_ranks_the_beams(run, trained: Path, pictures: list[Path]) -> None:
    model, captions = BitGen.load(trained), []
    for length_penalty in (-4.0, 4.0):
        (expected,) = model.caption(
            pictures[:1], beam_size=4, max_tokens=12, length_penalty=length_penalty
        )
        line = run(
            *("infer", pictures[0], "--model", trained, "--json", "--beam_size", 4),
            *("--max_tokens", 12, "--length_penalty", length_penalty),
        ).json()
        assert line["caption"] == expected.text
        captions.append(expected.text)
    assert len(captions[0]) < len(captions[1])


def test_consensus_is_the_same_every_time_and_has_no_beams(
    run, trained: Path, pictures: list[Path]
) -> None:
    (expected,) = BitGen.load(trained).caption(pictures[:1], consensus=5, max_tokens=12)
    for extra in ((), ("--seed", 0), ("--temperature", 0.5, "--seed", 0)):
        line = run(
            *("infer", pictures[0], "--model", trained, "--json", "--max_tokens", 12),
            *("--consensus", 5, *extra),
        ).json()
        assert line["caption"] == expected.text


def test_one_bad_picture_among_several_and_alone(
    run, trained: Path, pictures: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8\xff\xe0 cut off")
    arguments = ("--model", trained, "--json", "--max_tokens", 2, "--batch_size", 1)
    finished = run("infer", pictures[0], bad, pictures[1], *arguments)
    assert finished.code == 2
    assert [line["image"] for line in finished.json_lines()] == [str(p) for p in pictures[:2]]
    assert str(bad) in finished.stderr
    assert "Traceback" not in finished.stderr
    alone = run("infer", bad, *arguments)
    assert (alone.code, alone.stdout) == (2, "")
    assert alone.stderr.count("error: ") == 1


def huge_picture(path: Path) -> None:
    """A PNG whose header promises 200 megapixels; there is nothing behind it."""
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", 20000, 10000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks
        )
    )


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "one pixel", "huge", "missing"])
def test_pictures_that_cannot_be_read(
    run, trained: Path, pictures: list[Path], tmp_path: Path, kind: str
) -> None:
    bad = tmp_path / "bad.png"
    if kind == "truncated":
        bad.write_bytes(pictures[0].read_bytes()[:300])
    elif kind == "empty":
        bad.write_bytes(b"")
    elif kind == "text":
        bad.write_text("This is no picture.")
    elif kind == "one pixel":
        Image.new("RGB", (1, 30)).save(bad)
    elif kind == "huge":
        huge_picture(bad)
    finished = run("infer", bad, "--model", trained)
    assert (finished.code, finished.stdout) == (2, "")
    assert str(bad) in finished.stderr
    assert len([line for line in finished.stderr.splitlines() if "error: " in line]) == 1
    if kind == "huge":
        assert "pixels" in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "picture"),
        (["--task", "  "], "--task"),
        (["{folder}"], "no pictures"),
        (["{folder}/*.png"], "*.png"),
        (["{picture}", "--batch_size", "0"], "batch_size"),
        (["{picture}", "--beam_size", "0"], "beam_size"),
        (["{picture}", "--length_penalty", "inf"], "length_penalty"),
        (["{picture}", "--beam_size", "2", "--temperature", "1"], "temperature"),
        (["{picture}", "--top_p", "2"], "top_p"),
        (["{picture}", "--consensus", "1"], "consensus must be 2 to"),
        (["{picture}", "--consensus", "8", "--beam_size", "5"], "no beams"),
        (["{picture}", "--consensus", "8", "--speculative"], "speculative"),
        (["{picture}", "--max_tokens", "0"], "max_tokens"),
        (["{picture}", "--device", "abacus"], "abacus"),
        (["{picture}", "--backend", "loom"], "loom"),
        (["{picture}", "--threads", "0"], "threads must be"),
        (["{picture}", "--backend", "native", "--device", "cuda"], "native engine"),
        (["{picture}", "--backend", "native", "--attention_window", "9"], "native engine"),
        (["{picture}", "--backend", "native", "--heatmap", "maps"], "--heatmap"),
    ],
)
def test_requests_that_cannot_be(
    run, trained: Path, pictures: list[Path], tmp_path: Path, arguments: list[str], word: str
) -> None:
    filled = [a.format(folder=tmp_path, picture=pictures[0]) for a in arguments]
    finished = run("infer", *filled, "--model", trained)
    assert (finished.code, finished.stdout) == (2, "")
    assert word in finished.stderr
    assert "Traceback" not in finished.stderr


def test_exported_file_answers_the_same(
    run, trained: Path, exported: Path, pictures: list[Path]
) -> None:
    arguments = ("infer", *pictures, "--task", TASK, "--json", "--device", "cpu", "--model")
    assert run(*arguments, exported).json_lines() == run(*arguments, trained).json_lines()


def test_heat_maps_of_each_picture_beside_its_caption(
    run, exported: Path, pictures: list[Path], tmp_path: Path
) -> None:
    same_stem = tmp_path / "other" / pictures[0].with_suffix(".webp").name
    same_stem.parent.mkdir()
    Image.new("RGB", (40, 30), "red").save(same_stem)
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    maps = tmp_path / "new" / "maps"
    finished = run(
        *("infer", pictures[0], bad, same_stem, pictures[1], "--model", exported),
        *("--max_tokens", 4, "--batch_size", 2, "--prompt", "A", "--heatmap", maps),
    )
    assert finished.code == 2
    assert str(bad) in finished.stderr
    stem = pictures[0].stem
    folders = [maps / stem, maps / f"{stem}_2", maps / pictures[1].stem]
    lines = finished.stdout.splitlines()
    assert [line for line in lines if "sheet.png" in line] == [
        f"  heat maps: {folder / 'sheet.png'}" for folder in folders
    ]
    assert sorted(maps.iterdir()) == sorted(folders)
    captions = BitGen.load(exported).caption(
        [pictures[0], same_stem, pictures[1]], prompt="A", max_tokens=4, consensus=DEFAULT_CONSENSUS
    )
    for folder, caption in zip(folders, captions, strict=True):
        names = sorted(path.name for path in folder.iterdir())
        assert len(names) == 1 + len(group_words(caption.tokens))
        assert names[-1] == "sheet.png"
        for name in names:
            with Image.open(folder / name) as page:
                page.load()


def test_heat_maps_leave_the_json_lines_alone(
    run, trained: Path, pictures: list[Path], tmp_path: Path
) -> None:
    arguments = ("infer", *pictures[:3], "--model", trained, "--json", "--max_tokens", 3)
    plain = run(*arguments)
    mapped = run(*arguments, "--heatmap", tmp_path / "maps")
    assert (mapped.code, mapped.stdout, mapped.stderr) == (0, plain.stdout, plain.stderr)
    assert all((tmp_path / "maps" / path.stem / "sheet.png").is_file() for path in pictures[:3])


def test_places_for_heat_maps_are_checked_before_a_model_is_loaded(
    run, pictures: list[Path], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for place in (file, file / "below"):
        finished = run("infer", pictures[0], "--model", tmp_path / "no_model", "--heatmap", place)
        assert (finished.code, finished.stdout) == (2, "")
        assert str(place) in finished.stderr
        assert "no_model" not in finished.stderr
    assert file.read_text() == "mine"
    no_picture = run("infer", "--task", TASK, "--model", tmp_path, "--heatmap", tmp_path / "maps")
    assert (no_picture.code, no_picture.stdout) == (2, "")
    assert "--heatmap" in no_picture.stderr
    assert not (tmp_path / "maps").exists()


def test_export_report_and_output_that_exists(run, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.safetensors"
    report = run("export", "--model", trained, "--output", output, "--json").json()
    assert report["bytes"] == output.stat().st_size
    parts = ("ternary_bytes", "float_bytes", "metadata_bytes")
    assert sum(report[part] for part in parts) == report["bytes"]
    before = output.read_bytes()
    finished = run("export", "--model", trained, "--output", output)
    assert finished.code == 2
    assert "--overwrite" in finished.stderr
    assert output.read_bytes() == before
    assert run("export", "--model", trained, "--output", output, "--overwrite").code == 0
    assert run("export", "--model", trained, "--output", output, "--format", "onnx").code == 2


def test_files_packed_in_other_ways_are_described_and_run(
    run, trained: Path, exported: Path, pictures: list[Path], tmp_path: Path
) -> None:
    plain = run("infer", pictures[0], "--model", exported, "--json").json()
    small, smallest = tmp_path / "1.6.safetensors", tmp_path / "int8.safetensors"
    export = ("export", "--model", trained, "--pack", "1.6", "--output")
    assert "1.6 bits each" in run(*export, small).stdout
    assert run("infer", pictures[0], "--model", small, "--json").json() == plain
    report = run(*export, smallest, "--embedding", "int8", "--json").json()
    assert (report["packing"], report["embedding"]) == ("1.6", "int8")
    assert exported.stat().st_size > small.stat().st_size > smallest.stat().st_size
    assert run("infer", pictures[0], "--model", smallest).code == 0
    table, info = run("info", smallest), run("info", smallest, "--json").json()
    assert "ternary weights at 1.6 bits, embedding and lm head in int8" in table.stdout
    assert (info["packing"], info["embedding"]) == ("1.6", "int8")
    assert info["bits_per_ternary_weight"] < 1.61
    for wrong in (("--pack", "4"), ("--embedding", "int4")):
        refused = run("export", "--model", trained, "--output", tmp_path / "no", *wrong)
        assert refused.code == 2 and wrong[1] in refused.stderr


def test_info_of_run_and_file(run, trained: Path, exported: Path) -> None:
    of_run, of_file = (run("info", path, "--json").json() for path in (trained, exported))
    assert (of_run["kind"], of_file["kind"]) == ("run", "artifact")
    model = load_artifact(exported).model
    assert of_run["parameters"] == of_file["parameters"]
    ternary = sum(part["ternary_parameters"] for part in of_file["parts"])
    assert ternary == of_file["ternary_parameters"] > 0
    assert of_file["bytes_on_disk"] == exported.stat().st_size
    assert of_file["decoder_layers"] == model.config.num_layers
    assert of_file["data"]["train_images"] == 40
    text = run("info", exported).stdout
    assert "bits a weight" in text
    assert f"{of_file['parameters']:,}" in text


@pytest.mark.parametrize("kind", ["truncated", "foreign", "newer", "missing", "not a run"])
@pytest.mark.parametrize("command", ["infer", "info", "export"])
def test_model_files_that_cannot_be_used(
    run,
    exported: Path,
    trained: Path,
    pictures: list[Path],
    tmp_path: Path,
    kind: str,
    command: str,
) -> None:
    bad = tmp_path / "bad"
    if kind == "truncated":
        bad.write_bytes(exported.read_bytes()[:-100])
    elif kind == "foreign":
        bad.write_bytes(pictures[0].read_bytes())
    elif kind == "newer":
        shutil.copytree(trained, bad, symlinks=True)
        config = json.loads((bad / "config.json").read_text())
        (bad / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    elif kind == "not a run":
        bad.mkdir()
    arguments: dict[str, tuple] = {
        "infer": ("infer", pictures[0], "--model", bad),
        "info": ("info", bad),
        "export": ("export", "--model", bad, "--output", tmp_path / "out.safetensors"),
    }
    finished = run(*arguments[command])
    assert (finished.code, finished.stdout) == (2, ""), finished.stderr
    assert str(bad) in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "out.safetensors").exists()


# Python reports sockets and unpickling to audit hooks, whichever library asks for them.
AUDITED = """
import fractions, pickle, socket, sys
import torch

class Refused(Exception):
    pass

def refuse(event, arguments):
    if event.startswith("socket.") or event == "pickle.find_class":
        raise Refused(f"{event} {arguments}")

def refuse_load(*arguments, **options):
    raise Refused("torch.load")

torch.load = refuse_load
pickled = pickle.dumps(fractions.Fraction(1))
sys.addaudithook(refuse)
for forbidden in (socket.socket, lambda: pickle.loads(pickled), lambda: torch.load("x")):
    try:
        forbidden()
    except Refused:
        continue
    raise SystemExit("This was not refused.")

from bitgen.cli.app import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("kind", ["run", "file"])
def test_infer_opens_no_socket_and_unpickles_nothing(
    trained: Path, exported: Path, pictures: list[Path], kind: str
) -> None:
    finished = subprocess.run(
        [
            *(sys.executable, "-c", AUDITED, "infer", str(pictures[0])),
            *("--model", str(trained if kind == "run" else exported)),
            *("--task", TASK, "--json", "--debug"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT / "src"), "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["image"] == str(pictures[0])


def test_a_window_lets_captions_be_of_any_length(run, make_run, pictures: list[Path]) -> None:
    model = ("--model", make_run(), "--max_tokens", 400, "--json")
    refused = run("infer", pictures[0], *model)
    assert refused.code == 2 and "has room for" in refused.stderr
    finished = run("infer", pictures[0], *model, "--attention_window", 12)
    assert (finished.code, finished.stderr) == (0, "")
    assert math.isfinite(finished.json()["log_probability"])
    both = run("infer", pictures[0], *model, "--attention_window", 12, "--heatmap", "maps")
    assert both.code == 2 and "one of them" in both.stderr
    too_wide = run("infer", pictures[0], *model, "--attention-window", 400)
    assert too_wide.code == 2 and "attention_window is 400" in too_wide.stderr


def test_speculative_decoding_says_the_same_and_says_what_it_saved(
    run, make_run, pictures: list[Path], trained: Path, tmp_path: Path
) -> None:
    heads, dropped = make_run("heads", predict_tokens=4), tmp_path / "dropped.safetensors"
    infer = ("infer", *pictures[:2], "--model", heads, "--json", "--max_tokens", 12)
    infer = (*infer, "--backend", "torch")
    plain = run(*infer, "--no_speculative", "--beam_size", 1).json_lines()
    for finished in (run(*infer), run(*infer, "--speculative")):
        for line, other in zip(finished.json_lines(), plain, strict=True):
            counts = line.pop("speculation")
            assert set(counts) == {"model_calls", "drafted", "accepted"}
            assert math.isclose(line.pop("log_probability"), other["log_probability"], abs_tol=0.05)
            assert line == {key: other[key] for key in line}
    refused = run(*infer, "--speculative", "--beam_size", 2)
    assert refused.code == 2 and "Speculative decoding is greedy" in refused.stderr
    refused = run("infer", pictures[0], "--model", trained, "--speculative")
    assert refused.code == 2 and "no future token heads" in refused.stderr
    assert "predicts 4 tokens at a time" in run("info", heads).stdout
    info = run("info", heads, "--json").json()
    assert info["predict_tokens"] == 4 and info["parts"][-1]["name"] == "future token heads"
    export = ("export", "--model", heads, "--drop_future_heads", "--output", dropped)
    assert run(*export).code == 0
    info = run("info", dropped, "--json").json()
    assert info["predict_tokens"] == 1 and info["parts"][-1]["name"] == "robot selector"


def test_a_bidirectional_model_ranks_robots_and_says_that_it_writes_no_captions(
    run, scenes: Path, small_training: list[str], tmp_path: Path, pictures: list[Path]
) -> None:
    model = tmp_path / "both_ways"
    trained = run(
        *("train", "--coco_data", scenes, "--robot_data", scenes / "robots_train.json"),
        *("--output_dir", model, "--attention_mode", "bidirectional", *small_training),
    )
    assert trained.code == 0
    assert "captions have no loss" in trained.stderr
    assert "Rank robots with" in trained.stdout and "Caption pictures" not in trained.stdout
    refused = run("infer", pictures[0], "--model", model)
    assert refused.code == 2 and "writes no captions" in refused.stderr
    line = run("infer", pictures[0], "--model", model, "--task", TASK, "--json").json()
    assert line["caption"] is None and line["tokens"] is None
    assert len(line["robots"]) == len(load_catalog(model / "robots.json"))
    listing = run("infer", pictures[0], "--model", model, "--task", TASK).stdout
    assert listing.splitlines()[0] == str(pictures[0]) and "%" in listing.splitlines()[1]
