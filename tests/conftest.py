"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"

# The files that take longest, the longest one first: begun last, they would run on in one process
# while the other has nothing left to do.
LONGEST = (
    "model/test_compilation.py",
    "test_readme.py",
    "training/test_distributed.py",
    "training/test_survival.py",
    "training/test_trainer.py",
    "cli/test_train.py",
    "kernels/test_triton_matmul.py",
    "cli/test_tensorboard.py",
    "cli/test_infer.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with `LONGEST`; a file's tests stay together, and in their order.

    `--dist loadfile` hands out files in this order if `--no-loadscope-reorder` is given, as the
    Makefile does; else those with most tests come first, and most tests are short.
    """
    folder = Path(__file__).resolve().parent
    ranks = {folder / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"needs real data in shared/{name} beside the checkout")
    return folder


@pytest.fixture(scope="session")
def coco_dir() -> Path:
    """Real COCO photographs and captions, in COCO's layout."""
    return _shared("coco")


@pytest.fixture(scope="session")
def robots_dir() -> Path:
    """Real robot-selection tasks."""
    return _shared("robots")


@pytest.fixture(scope="session", autouse=True)
def curves_of_one_panel() -> Iterator[tuple[Any, ...]]:
    """Trainings in this process draw `curves.png` for real, but of its ten panels only the first.

    To lay out ten takes longer than most trainings of tests do. `all_panels` brings them back.
    """
    from bitgen.training import curves

    panels = curves._PANELS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "_PANELS", panels[:1])
        yield panels


@pytest.fixture
def all_panels(curves_of_one_panel: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """`curves.png` as users get it."""
    monkeypatch.setattr("bitgen.training.curves._PANELS", curves_of_one_panel)


def make_lively(model: Any) -> None:
    """Far from a fresh model's uniform guesses, so that pictures and words change what is said."""
    import torch

    with torch.no_grad():
        torch.nn.init.normal_(model.text_decoder.embed_tokens.weight, std=0.4)
        for name, parameter in model.named_parameters():
            if name.endswith("sub_norm.weight"):
                parameter.fill_(1.0)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A factory of small runs with random weights: `make_run("name", **config changes)`.

    `steps` names the checkpoints to write, each with weights of its own (seeded by the step); the
    first one is the best and the last one the last.
    """
    import torch

    from bitgen.config import BitGenConfig, TrainingConfig
    from bitgen.dataset.robots import catalog_to_json, load_catalog
    from bitgen.dataset.tokenizer import Tokenizer
    from bitgen.model.bitgen import BitGenModel
    from bitgen.training.checkpoint import create_run, save_checkpoint

    catalog = load_catalog()
    words = ["a red ball on the water", "a blue box on the stairs", "a dog runs over the grass"]
    tokenizer = Tokenizer.train([*words, *words, *(r.text() for r in catalog)], 400)

    def make(name: str = "run", steps: Sequence[int] = (5,), **changes: Any) -> Path:
        sizes = {
            "vocab_size": 512, "hidden_size": 32, "num_layers": 2, "num_heads": 2,
            "num_kv_heads": 1, "head_dim": 16, "intermediate_size": 48, "max_positions": 320,
            "image_size": 32, "patch_size": 16, "encoder_hidden_size": 32, "encoder_layers": 1,
            "encoder_heads": 2, "encoder_intermediate_size": 48,
            "robot_names": tuple(robot.name for robot in catalog[:2]),
        }  # fmt: skip
        config = BitGenConfig(**{**sizes, **changes})
        run_dir = create_run(
            tmp_path / name,
            config=config,
            training=TrainingConfig(num_epochs=3),
            data={"coco_data": [str(tmp_path / "private" / "coco")], "train_images": 7},
            tokenizer_json=tokenizer.to_json(),
            robots_json=catalog_to_json(catalog),
        )
        for step in steps:
            with torch.random.fork_rng():
                torch.manual_seed(step)
                model = BitGenModel(config)
                make_lively(model)
                for name, buffer in model.robot_selector.named_buffers():
                    buffer.copy_(torch.rand(buffer.shape) + (name == "word_idf"))
                if config.caption_idf:
                    model.caption_idf.copy_(4 * torch.rand(config.vocab_size))
            save_checkpoint(
                run_dir,
                step,
                model=model.state_dict(),
                training={},
                state={
                    "progress": {
                        "epoch": 1,
                        "loss": 2.5,
                        "best_loss": 2.25,
                        "robot_threshold": 0.35,
                        "robot_temperature": 4.0,
                        "robot_word_weight": 0.25,
                    }
                },
                is_best=step == steps[0],
                keep=9,
            )
        return run_dir

    return make
