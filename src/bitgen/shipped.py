"""Files that ship with BitGen: the robot catalog and a trained model. No torch.

An installed package holds them in its own folder `data`. A checkout keeps them beside `src`, where
people look for data; pyproject.toml names what a wheel takes from there.
"""

from __future__ import annotations

from pathlib import Path

from bitgen.errors import ModelFileError

SHIPPED_MODEL = "shipped"
"""What asks for the model that ships, in the place of a path."""
MODEL_CARD = "model/README.md"
"""Data, figures and limits of the model that ships."""

_MODEL_FILE = "model/tiny.safetensors"
_PACKAGE = Path(__file__).resolve().parent


def shipped_file(name: str) -> Path:
    """Where the file `name`, relative to the data folder, lies; it need not be there."""
    installed = _PACKAGE / "data" / name
    return installed if installed.exists() else _PACKAGE.parents[1] / "data" / name


def shipped_model() -> Path | None:
    """The model that ships: an exported file; None in a BitGen that was built without it."""
    path = shipped_file(_MODEL_FILE)
    return path if path.is_file() else None


def model_path(model: Path | str) -> Path:
    """The path that `model` is, or that of the model that ships where it is `shipped`.

    A file or folder of that name in the working folder comes first.

    Raises:
        ModelFileError: `shipped`, in a BitGen that was built without a model.
    """
    path = Path(model)
    if str(model) != SHIPPED_MODEL or path.exists():
        return path
    found = shipped_model()
    if found is None:
        raise ModelFileError(
            "This BitGen was built without a model.",
            remedy="Train one with `bitgen train`, or name a run's folder or an exported file.",
        )
    return found
