"""The README's commands, run one after the other in a folder of their own.

Data and sizes are small, by the rules below: they are all that differs from what the README says.
A command that no rule covers is run as it stands. Not run:

    make, git, cd          they set up a checkout, which is what this test runs in
    bitgen data download   fetches 19 GB; tests/dataset/test_download.py fetches from a local server
    bitgen demo            tests/cli/test_demo.py runs it
    pip install            tests/test_packaging.py builds and unpacks what it installs
    bitgen infer --watch   does not end; tests/cli/test_watch.py runs it

Commands without --model that come before a training are run where a model is in data/model. No
input comes to `bitgen chat`.

Of `torchrun ... -m bitgen train ...` only the training is run, as one process:
tests/training/test_distributed.py starts several.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from bitgen.dataset.scenes import write_scenes

CHECKOUT = Path(__file__).resolve().parents[1]
README = CHECKOUT / "README.md"

NOT_RUN = (
    *(("make",), ("git",), ("cd",), ("pip", "install")),
    *(("bitgen", "data", "download"), ("bitgen", "demo"), ("bitgen", "infer", "--watch")),
)

# Options that are put in the place of the README's, or added. The first rule that fits is used.
SMALLER: tuple[tuple[tuple[str, ...], dict[str, str]], ...] = (
    (("bitgen", "train", "--resume"), {"--max_steps": "3", "--device": "cpu"}),
    (
        ("bitgen", "train"),
        {
            "--model_size": "nano",
            "--image_size": "32",
            "--batch_size": "8",
            "--max_steps": "2",
            "--warmup_steps": "1",
            "--device": "cpu",
        },
    ),
    (("bitgen", "data", "scenes"), {"--num_train": "30", "--num_val": "6"}),
    (("bitgen", "infer"), {"--max_tokens": "4", "--device": "cpu"}),
    (("bitgen", "chat"), {"--max_tokens": "4", "--device": "cpu"}),
    (("bitgen", "evaluate"), {"--max_tokens": "4", "--device": "cpu"}),
)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SECONDS = 120


def fenced(language: str) -> list[str]:
    """The blocks of the README that are marked as `language`."""
    text = README.read_text(encoding="utf-8")
    return [block for name, block in _FENCE.findall(text) if name == language]


def commands_of(block: str) -> list[list[str]]:
    """A shell block as lists of words; comments go, and so do line ends behind a backslash."""
    lines = block.replace("\\\n", " ").splitlines()
    parts = (part for line in lines for part in line.split(" && "))
    commands = [shlex.split(part, comments=True) for part in parts]
    return [_one_name(words) for words in commands if words]


def _one_name(words: list[str]) -> list[str]:
    """`python bitgen_cli.py train` and `torchrun -m bitgen train` as `bitgen train`."""
    if words[:1] == ["torchrun"]:
        return words[words.index("bitgen") :]
    return ["bitgen", *words[2:]] if words[:2] == ["python", "bitgen_cli.py"] else words


def fits(command: Sequence[str], rule: Sequence[str]) -> bool:
    """Whether the command begins with the rule's words and has the rule's options."""
    start = [word for word in rule if not word.startswith("--")]
    options = {word for word in rule if word.startswith("--")}
    return list(command[: len(start)]) == start and options <= set(command)


def made_small(command: Sequence[str]) -> list[str]:
    """The command with the options of the first rule that fits it."""
    for rule, options in SMALLER:
        if fits(command, rule):
            words = list(command)
            for name, value in options.items():
                if name in words:
                    words[words.index(name) + 1] = value
                else:
                    words += [name, value]
            return words
    return list(command)


@pytest.fixture
def reader_dir(tmp_path: Path) -> Path:
    """What a reader of the README has: COCO, the checkout's robots, photographs."""
    coco = tmp_path / "data" / "coco"
    write_scenes(coco, num_train=30, num_val=6, image_size=48)
    shutil.copytree(CHECKOUT / "data" / "robots", tmp_path / "data" / "robots")
    pictures = sorted((coco / "val2017").iterdir())
    shutil.copytree(coco / "val2017", tmp_path / "photos")
    shutil.copyfile(pictures[0], tmp_path / "photo.jpg")
    return tmp_path


def test_commands_stand_in_blocks_that_are_run() -> None:
    """No command hides in a block of another kind, where nothing would try it."""
    text = README.read_text(encoding="utf-8")
    commands = ("bitgen ", "python bitgen_cli.py ")
    elsewhere = [
        line
        for name, block in _FENCE.findall(text)
        if name != "bash"
        for line in block.splitlines()
        if line.removeprefix("$ ").startswith(commands)
    ]
    assert elsewhere == []


def test_rules_replace_and_add_options() -> None:
    """The rules change what they say, and nothing else."""
    block = (
        "bitgen data scenes DIR --num_train 9000 --seed 3  # draws\n"
        "make && python bitgen_cli.py x\n"
        "torchrun --nproc_per_node 4 \\\n -m -- bitgen y"
    )
    first, second, third, fourth = commands_of(block)
    assert made_small(first) == [
        *("bitgen", "data", "scenes", "DIR", "--num_train", "30", "--seed", "3"),
        *("--num_val", "6"),
    ]
    assert any(fits(second, rule) for rule in NOT_RUN)
    assert made_small(third) == ["bitgen", "x"]
    assert made_small(fourth) == ["bitgen", "y"]
    assert "--model_size" not in made_small(["bitgen", "train", "--resume"])


@pytest.mark.slow
def test_commands_of_the_readme_work(reader_dir: Path) -> None:
    """Every command of the README ends with 0 and says something, and its Python runs."""
    commands = [command for block in fenced("bash") for command in commands_of(block)]
    to_run = [made_small(c) for c in commands if not any(fits(c, rule) for rule in NOT_RUN)]
    names = {tuple(command[:2]) for command in to_run}
    assert {("bitgen", "train"), ("bitgen", "infer"), ("bitgen", "export")} <= names
    for command in to_run:
        assert command[0] == "bitgen", f"no rule says how to try {shlex.join(command)!r}"
        output = finish([sys.executable, str(CHECKOUT / "bitgen_cli.py"), *command[1:]], reader_dir)
        assert output.strip(), f"{shlex.join(command)} printed nothing"
        if "--json" in command:
            assert all(json.loads(line) for line in output.splitlines())
    for block in fenced("python"):
        finish([sys.executable, "-c", block], reader_dir)


def finish(command: Sequence[str], directory: Path) -> str:
    """Run a command in a folder; returns its stdout and fails the test if it fails."""
    environment = {
        **os.environ,
        "BITGEN_CACHE": str(directory / "cache"),
        "PYTHONPATH": str(CHECKOUT / "src"),
    }
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout
