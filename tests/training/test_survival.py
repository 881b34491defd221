"""A training that is killed at any moment and resumed ends as if it had never been killed.

Real processes are ended by real signals. Most are forked by `_serve` at the end of this file, from
one process that has imported everything: that saves each of them seconds of imports.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks a process that imported torch"),
]

CHECKOUT = Path(__file__).resolve().parents[2]
STEPS = 20
EVAL_EVERY = 8
KILLS_IN_TRAINING = 16
KILLS_AT_THE_START = 4
PATIENCE = 120.0  # seconds, for whatever must happen at last
ENVIRONMENT = {
    **os.environ,
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(CHECKOUT / "src"),
}
TIMES = ("seconds", "tokens_per_second", "images_per_second", "seconds_remaining")


# What runs leave on the disk ---------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """One folder with one run in it, and the data that it is trained on."""

    folder: Path
    scenes: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def start(self) -> list[str]:
        """Arguments of a new training, with everything that depends on chance."""
        return [
            *("train", "--quiet", "--coco_data", str(self.scenes)),
            *("--robot_data", str(self.scenes / "robots_train.json")),
            *("--output_dir", str(self.run_dir), "--cache_dir", str(self.folder / "cache")),
            *("--model_size", "nano", "--image_size", "32", "--quantization", "ternary"),
            *("--precision", "fp32", "--device", "cpu", "--dropout", "0.1"),
            *("--batch_size", "2", "--max_steps", str(STEPS), "--warmup_steps", "4"),
            *("--label_smoothing", "0.1", "--prompt_probability", "0.5"),
            *(
                "--word_pretraining_steps",
                "3",
                "--save_every",
                "1",
                "--eval_every",
                str(EVAL_EVERY),
            ),
            *("--keep_checkpoints", "1"),
        ]

    def resume(self) -> list[str]:
        """Arguments that go on with it."""
        return [
            *("train", "--quiet", "--resume", "--output_dir", str(self.run_dir)),
            *("--cache_dir", str(self.folder / "cache")),
        ]

    def go_on(self) -> list[str]:
        """Arguments of a person who finds the run as it is."""
        return self.resume() if self.run_dir.exists() else self.start()

    def metrics(self) -> list[dict[str, Any]]:
        """The lines that were written whole."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def made(self) -> int:
        """The last step that the metrics tell of."""
        return max((line["step"] for line in self.metrics()), default=0)

    def saved(self) -> int:
        """The step of the last checkpoint."""
        link = self.checkpoints / "last"
        return int(os.readlink(link).removeprefix("step_")) if link.is_symlink() else 0

    def log_number(self) -> int:
        """Another one once a process has taken over the metrics."""
        path = self.run_dir / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else 0

    def temporaries(self) -> list[str]:
        """What is hidden in the run and in its checkpoints."""
        folders = [path for path in (self.run_dir, self.checkpoints) if path.exists()]
        return [p.name for folder in folders for p in folder.iterdir() if p.name.startswith(".")]

    def names(self) -> list[str]:
        """Everything in the run, by its name."""
        return sorted(str(path.relative_to(self.run_dir)) for path in self.run_dir.rglob("*"))

    def remove(self) -> None:
        """Give the room back: checkpoints are large."""
        shutil.rmtree(self.folder, ignore_errors=True)


def without_times(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in TIMES}


def assert_same_end(place: Place, reference: Place) -> None:
    """Weights, optimizer, random state, losses, files: all as in the run that was never killed."""
    from bitgen.training.checkpoint import load_checkpoint

    for link in ("last", "best"):
        killed = load_checkpoint(place.checkpoints / link)
        whole = load_checkpoint(reference.checkpoints / link)
        for found, expected in ((killed.model, whole.model), (killed.training, whole.training)):
            assert found.keys() == expected.keys()
            assert not [
                name
                for name, tensor in expected.items()
                if found[name].dtype != tensor.dtype
                or found[name].shape != tensor.shape
                or found[name].numpy().tobytes() != tensor.numpy().tobytes()
            ]
        for state in (killed.state, whole.state):
            state["progress"] = without_times(state["progress"])
        assert killed.state == whole.state
    assert killed.state["step"] <= STEPS == place.saved()
    found_lines = [without_times(line) for line in place.metrics()]
    assert found_lines == [without_times(line) for line in reference.metrics()]
    assert [x["step"] for x in found_lines if x["kind"] == "train"] == list(range(1, STEPS + 1))
    assert place.names() == reference.names()
    assert place.temporaries() == []


# Processes ---------------------------------------------------------------------------------------


class Nursery:
    """Starts training processes, one at a time, by asking `_serve`."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(output)],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._ask("hello") == "ready"

    def start(self, arguments: list[str], die_at: tuple[str, str] | None = None) -> None:
        """Start a process; with `die_at` it kills itself at the first such audit event."""
        self._ask("start", arguments=arguments, die_at=die_at)

    def status(self) -> int | None:
        """None while the process lives, then its exit code, or minus the signal that ended it."""
        status: int | None = self._ask("status")
        return status

    def kill(self) -> int:
        """End the process by SIGKILL, at once; its status."""
        status: int = self._ask("kill")
        return status

    def wait(self) -> int:
        """Its status, once it has ended by itself."""
        wait_until(lambda: self.status() is not None, lambda: True)
        status = self.status()
        assert status is not None
        return status

    def run(self, arguments: list[str], die_at: tuple[str, str] | None = None) -> int:
        """Start a process and wait for its end."""
        self.start(arguments, die_at)
        return self.wait()

    def run_until(self, arguments: list[str], condition: Callable[[], bool]) -> None:
        """Start a process and return once `condition` holds; it must not end before."""
        self.start(arguments)
        wait_until(condition, lambda: self.status() is None)

    def close(self) -> None:
        """End the server, which ends its process."""
        self._server.communicate(timeout=PATIENCE)

    def _ask(self, request: str, **more: Any) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps({"request": request, **more}) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def wait_until(condition: Callable[[], bool], alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert alive(), "the process ended too early"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.003)


@contextmanager
def command(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process as a person starts it."""
    with subprocess.Popen(
        [sys.executable, "-m", "bitgen", *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@dataclass(frozen=True)
class Reference:
    """The run that was never killed, and how long its parts took (seconds)."""

    place: Place
    saving: float  # from a line of the metrics to its checkpoint
    updating: float  # from a checkpoint to the next line


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from bitgen.dataset.scenes import write_scenes

    directory = tmp_path_factory.mktemp("survival") / "scenes"
    write_scenes(directory, num_train=12, num_val=4, seed=3, image_size=32)
    return directory


@pytest.fixture(scope="module")
def reference(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    place = Place(tmp_path_factory.mktemp("reference"), scenes)
    seen: dict[str, float] = {}

    def ended() -> bool:
        # The checkpoint is looked at first: its line is then known to be there.
        for kind, step in (("saved", place.saved()), ("made", place.made())):
            seen.setdefault(f"{kind} {step}", time.monotonic())
        return process.poll() is not None

    with command(place.start()) as process:
        wait_until(ended, lambda: True)
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert place.saved() == STEPS
    middle = [
        s for s in range(2, STEPS) if {f"saved {s - 1}", f"made {s}", f"saved {s}"} <= {*seen}
    ]
    assert len(middle) > STEPS // 2
    yield Reference(
        place,
        saving=statistics.median(seen[f"saved {s}"] - seen[f"made {s}"] for s in middle),
        updating=statistics.median(seen[f"made {s}"] - seen[f"saved {s - 1}"] for s in middle),
    )
    place.remove()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    opened = Nursery(tmp_path_factory.mktemp("nursery") / "output.txt")
    yield opened
    opened.close()


@pytest.fixture
def place(scenes: Path, tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path / "place", scenes)
    made.folder.mkdir()
    yield made
    made.remove()


# Tests -------------------------------------------------------------------------------------------


def where_it_was_hit(place: Place, log_before: int) -> str:
    if place.log_number() == log_before:
        return "start"
    if any(name.startswith(".step_") for name in place.temporaries()):
        return "saving"
    return "updating" if place.made() == place.saved() else "between"


def test_kills_at_twenty_random_moments_change_nothing(
    nursery: Nursery, reference: Reference, place: Place, record_property: Callable[..., None]
) -> None:
    chance = random.Random(20)
    spare = Place(place.folder / "spare", place.scenes)
    started = time.monotonic()
    nursery.run_until(spare.start(), lambda: spare.made() > 0)
    starting = time.monotonic() - started
    assert nursery.kill() == -signal.SIGKILL
    spare.remove()

    # Which checkpoint or line is waited for grows, so that the kills lie all along the training.
    steps = sorted(chance.sample(range(1, STEPS - 1), KILLS_IN_TRAINING))
    kinds = ["updating", "saving"] * (KILLS_IN_TRAINING // 2)
    chance.shuffle(kinds)
    plan: list[tuple[str, int]] = list(zip(kinds, steps, strict=True))
    plan.insert(0, ("start", 0))
    for _ in range(KILLS_AT_THE_START - 1):
        plan.insert(chance.randrange(len(plan) + 1), ("start", 0))
    assert len(plan) == 20

    hits: Counter[str] = Counter()
    steps_hit = set()
    for kind, step in plan:
        log_before = place.log_number()
        if kind == "start":
            nursery.start(place.go_on())
            time.sleep(chance.random() * starting)
        else:
            reached = place.saved if kind == "updating" else place.made
            wanted = max(step, place.saved() + 1)
            nursery.run_until(
                place.go_on(),
                lambda log=log_before, reached=reached, wanted=wanted: (
                    place.log_number() != log and reached() >= wanted
                ),
            )
            usual = reference.updating if kind == "updating" else reference.saving
            time.sleep(chance.random() * usual)
        assert nursery.kill() == -signal.SIGKILL, nursery.output.read_text()
        hit = where_it_was_hit(place, log_before)
        hits[hit] += 1
        if hit != "start":
            steps_hit.add(place.made())
    record_property("hits", dict(hits))
    record_property("steps_hit", sorted(steps_hit))
    assert hits["updating"] >= 3 and hits["saving"] >= 3
    assert hits.total() - hits["start"] >= KILLS_IN_TRAINING - 2
    between_first_and_last = sorted(steps_hit & {*range(1, STEPS)})
    assert len(between_first_and_last) >= KILLS_IN_TRAINING // 2
    assert between_first_and_last[0] < STEPS // 4 < 3 * STEPS // 4 < between_first_and_last[-1]

    assert nursery.run(place.resume()) == 0, nursery.output.read_text()
    assert_same_end(place, reference.place)


def test_kills_while_the_first_checkpoint_is_written_change_nothing(
    nursery: Nursery, reference: Reference, place: Place
) -> None:
    # As soon as something of it is there; before it gets its name; before `last` points at it.
    nursery.run_until(
        place.start(), lambda: any(name.startswith(".step_000001") for name in place.temporaries())
    )
    assert nursery.kill() == -signal.SIGKILL
    assert place.made() == 1
    assert [name for name in place.temporaries() if name.startswith(".step_000001")]
    for event, part in (("os.rename", ".step_000001"), ("os.symlink", ".last")):
        assert place.saved() == 0
        assert nursery.run(place.resume(), die_at=(event, part)) == -signal.SIGKILL
        assert place.made() == 1
    assert place.saved() == 0
    assert (place.checkpoints / "step_000001" / "state.json").is_file()

    assert nursery.run(place.resume()) == 0, nursery.output.read_text()
    assert_same_end(place, reference.place)


def test_kills_while_it_resumes_and_at_its_very_end_change_nothing(
    nursery: Nursery, reference: Reference, place: Place
) -> None:
    assert nursery.run(place.start(), die_at=("os.rename", ".step_000003")) == -signal.SIGKILL
    assert (place.made(), place.saved()) == (3, 2)
    metrics = place.metrics()
    for event, part in (
        ("shutil.rmtree", ".step_000003"),  # removing what the killed one left
        ("os.rename", ".config.json"),
        ("os.rename", ".metrics.jsonl"),
    ):
        assert nursery.run(place.resume(), die_at=(event, part)) == -signal.SIGKILL
        assert (place.metrics(), place.saved()) == (metrics, 2)
    # After the last checkpoint, when only the curves are missing.
    assert nursery.run(place.resume(), die_at=("os.rename", ".curves.png")) == -signal.SIGKILL
    assert place.saved() == STEPS
    assert not (place.run_dir / "curves.png").exists()

    assert nursery.run(place.resume()) == 0, nursery.output.read_text()
    assert_same_end(place, reference.place)


def test_a_command_ended_by_sigterm_has_saved_and_loses_nothing(
    nursery: Nursery, reference: Reference, place: Place
) -> None:
    # Far from the next validation: one that a signal cuts short is not made up for.
    with command(place.start()) as process:
        wait_until(lambda: place.made() > EVAL_EVERY, lambda: process.poll() is None)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and "--resume" in errors
    stopped_at = place.made()
    assert EVAL_EVERY < stopped_at == place.saved() < 2 * EVAL_EVERY
    assert place.temporaries() == []

    nursery.run_until(place.resume(), lambda: place.made() > stopped_at)
    assert nursery.kill() == -signal.SIGKILL
    assert place.saved() < STEPS

    assert nursery.run(place.resume()) == 0, nursery.output.read_text()
    assert_same_end(place, reference.place)


def test_a_kill_while_the_run_is_made_leaves_room_for_another_start_that_tidies_up(
    nursery: Nursery, place: Place
) -> None:
    def hidden() -> list[str]:
        return [path.name for path in place.folder.iterdir() if path.name.startswith(".")]

    assert nursery.run(place.start(), die_at=("os.rename", ".run.tmp-")) == -signal.SIGKILL
    assert not place.run_dir.exists()
    assert nursery.run(place.resume()) == 2  # there is nothing to resume
    assert "There is no model" in nursery.output.read_text()
    assert hidden()
    assert nursery.run([*place.start(), "--max_steps", "4"]) == 0
    assert place.saved() == 4
    assert not hidden()


# The process that the others are forked from -----------------------------------------------------


def _serve(output: Path) -> None:
    """Fork a process for each line of stdin that asks for one, and tell how it fares."""
    import matplotlib.backends.backend_agg  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import torch._dynamo  # noqa: F401

    import bitgen.cli.app
    import bitgen.cli.training_run
    import bitgen.training.setup  # noqa: F401
    from bitgen.training import curves

    curves._PANELS = curves._PANELS[:1]  # as `curves_of_one_panel` in tests/conftest.py

    process: int | None = None
    status: int | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = "ready"
        if request["request"] == "start":
            if process is not None and status is None:  # of a test that failed
                os.kill(process, signal.SIGKILL)
            process, status = os.fork(), None
            if process == 0:
                _train(request["arguments"], request["die_at"], output)
        elif request["request"] in ("status", "kill"):
            assert process is not None
            if status is None:
                if request["request"] == "kill":
                    os.kill(process, signal.SIGKILL)
                ended, code = os.waitpid(process, 0 if request["request"] == "kill" else os.WNOHANG)
                status = os.waitstatus_to_exitcode(code) if ended else None
            answer = status
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    if process is not None and status is None:
        os.kill(process, signal.SIGKILL)


def _train(arguments: list[str], die_at: list[str] | None, output: Path) -> NoReturn:
    from bitgen.cli.app import main

    with open(os.devnull) as nothing, output.open("w") as log:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if die_at is not None:

        def die(event: str, details: tuple[Any, ...]) -> None:
            if event == die_at[0] and die_at[1] in str(details):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
    main(arguments)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
