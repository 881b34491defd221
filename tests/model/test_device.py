"""Modules without storage: shapes alone, and no compiler for first values that nobody sees."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn

from bitgen.model.device import without_storage

PROGRAM = """
import sys
from bitgen.config import BitGenConfig
from bitgen.export.loaded import empty_model
before = set(sys.modules)
empty_model(BitGenConfig.preset("nano"), packed=True, embedding="int8")
print([name for name in set(sys.modules) - before if name.startswith("torch._dynamo")])
"""


def test_what_is_made_without_storage_has_shapes_and_draws_nothing() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    with without_storage():
        layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Embedding(5, 6), nn.Linear(6, 7))
        made = torch.empty(2)
    assert made.is_meta and all(parameter.is_meta for parameter in layers.parameters())
    shapes = [tuple(parameter.shape) for parameter in layers.parameters()]
    assert shapes == [(4, 3, 3, 3), (4,), (5, 6), (7, 6), (7,)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert nn.Linear(2, 2).weight.any()  # drawn again behind it


def test_an_empty_model_imports_no_compiler() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"
