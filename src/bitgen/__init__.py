"""BitGen: ternary vision-language models that caption pictures and choose robots.

    from bitgen import BitGen
    BitGen.load("runs/tiny").caption("photo.jpg")

The names below are imported when they are first used, so that `import bitgen` stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitgen.config import BitGenConfig
    from bitgen.inference.predictor import BitGen
    from bitgen.model.bitgen import BitGenModel
    from bitgen.model.masks import AttentionMask

__version__ = "0.1.0"
__all__ = ["AttentionMask", "BitGen", "BitGenConfig", "BitGenModel", "__version__"]

_HOMES = {
    "AttentionMask": "bitgen.model.masks",
    "BitGen": "bitgen.inference.predictor",
    "BitGenConfig": "bitgen.config",
    "BitGenModel": "bitgen.model.bitgen",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
