"""The same samples, padded otherwise, give the same losses and gradients; and each mask is needed.

Samples: captions with and without prompt, robot tasks with and without picture. What stands at
padding (token ids, the pictures of rows that have none) is random. The second test takes away one
mask at a time and sees the first one fail.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bitgen.config import BitGenConfig
from bitgen.model import attention, bitgen
from bitgen.model.bitgen import BitGenModel
from bitgen.model.masks import AttentionMask
from bitgen.training.losses import caption_loss, image_word_loss, robot_loss

RELATIVE = 1e-6
"""Of each loss and of the gradient, by norm: other lengths are summed in another order."""

LOSSES = ("caption loss", "robot loss", "image word loss")

# (token ids, tokens of the prompt, whether it has a picture, whether it is a robot task)
SAMPLES = (
    ([1, 10, 11, 12, 13, 2], 1, True, False),
    ([1, 20, 21, 22, 23, 24, 25, 26, 2], 4, True, False),
    ([3, 30, 31, 32], 4, True, True),
    ([3, 40, 41], 3, False, True),
)
ROBOTS = ([4, 50, 51, 52, 53], [4, 60])
PADDINGS = {"none more": (0, 0), "right": (0, 7), "left": (5, 0), "both": (3, 4)}


@dataclasses.dataclass
class Padded:
    """A batch as the trainer's, with padding on either side."""

    input_ids: torch.Tensor
    valid: torch.Tensor
    labels: torch.Tensor
    images: torch.Tensor
    has_picture: torch.Tensor
    prefix_lengths: torch.Tensor
    robots: tuple[torch.Tensor, torch.Tensor]


def fill(rows: tuple[list[int], ...], left: int, right: int, noise: torch.Generator) -> Any:
    """Rows between random padding, and which columns are tokens."""
    length = left + max(len(row) for row in rows) + right
    ids = torch.randint(5, 70, (len(rows), length), generator=noise)
    valid = torch.zeros(ids.shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        start = length - right - len(row) if left else 0
        ids[index, start : start + len(row)] = torch.tensor(row)
        valid[index, start : start + len(row)] = True
    return ids, valid


def padded(left: int, right: int, seed: int) -> Padded:
    noise = torch.Generator().manual_seed(seed)
    ids, valid = fill(tuple(sample[0] for sample in SAMPLES), left, right, noise)
    labels = torch.where(valid, ids, -100)
    for index, (_, num_prefix, _, _) in enumerate(SAMPLES):
        first = int(valid[index].int().argmax())
        labels[index, : first + num_prefix] = -100
    pictures = torch.randn(len(SAMPLES), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    has_picture = torch.tensor([sample[2] for sample in SAMPLES])
    nonsense = torch.randn(pictures.shape, generator=noise)
    return Padded(
        input_ids=ids,
        valid=valid,
        labels=labels,
        images=torch.where(has_picture[:, None, None, None], pictures, nonsense),
        has_picture=has_picture,
        prefix_lengths=torch.tensor([sample[1] for sample in SAMPLES]),
        robots=fill(ROBOTS, left, right, noise),
    )


def losses_and_gradients(config: BitGenConfig, batch: Padded) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = BitGenModel(config).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sub_norm.weight"):
                parameter.fill_(1.0)  # branches as strong as the residual stream
    model.set_robots(config.robot_names, *batch.robots)
    mask = model.build_attention_mask(batch.valid, batch.prefix_lengths, batch.has_picture)
    output = model(
        batch.input_ids,
        batch.images,
        mask,
        return_robot_selection=True,
        return_image_words=True,
    )
    robot_labels = torch.tensor([[torch.nan] * 2, [torch.nan] * 2, [1.0, 0.0], [0.0, 1.0]])
    words = torch.tensor([[10, 12], [20, 21], [0, 0], [0, 0]])
    weights = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.0, 0.0], [0.0, 0.0]])
    losses = (
        caption_loss(output.logits, batch.labels)[0],
        robot_loss(output.robot_logits, robot_labels)[0],
        image_word_loss(output.image_words, words, weights)[0],
    )
    torch.stack(losses).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    named = zip(LOSSES, losses, strict=True)
    return {**{name: loss.detach() for name, loss in named}, **gradients}


def largest_differences(
    config: BitGenConfig, change: Callable[[Padded], None] | None = None
) -> tuple[float, float]:
    """Over all paddings, by norm: of a loss or the whole gradient, and of a single tensor's."""
    expected = losses_and_gradients(config, padded(0, 0, seed=1))
    whole = single = 0.0
    for seed, (left, right) in enumerate(PADDINGS.values(), start=2):
        batch = padded(left, right, seed)
        if change is not None:
            change(batch)
        found = losses_and_gradients(config, batch)
        assert found.keys() == expected.keys()
        errors = {name: (found[name] - value).norm() for name, value in expected.items()}
        single = max(single, *(float(e / expected[name].norm()) for name, e in errors.items()))
        for names in (*([name] for name in LOSSES), [n for n in expected if n not in LOSSES]):
            error = torch.stack([errors[name] for name in names]).norm()
            size = torch.stack([expected[name].norm() for name in names]).norm()
            whole = max(whole, float(error / size))
    return whole, single


@pytest.mark.parametrize("mode", ["prefix", "causal"])
@pytest.mark.parametrize("quantization", ["none", "ternary"])
def test_padding_changes_neither_losses_nor_gradients(
    make_config: Callable[..., BitGenConfig], mode: str, quantization: str
) -> None:
    config = make_config(attention_mode=mode, quantization=quantization)
    whole, single = largest_differences(config)
    assert whole <= RELATIVE
    assert single <= 20 * RELATIVE  # a small one is what larger ones leave when they cancel


def label_the_padding(batch: Padded) -> None:
    batch.labels = torch.where(batch.valid, batch.labels, batch.input_ids)


def keep_every_picture(batch: Padded) -> None:
    batch.has_picture = torch.ones_like(batch.has_picture)


def blind(patch: pytest.MonkeyPatch, module: Any, name: str, forget: Callable[..., Any]) -> None:
    original = getattr(module, name)
    patch.setattr(module, name, lambda *given: original(*forget(*given)))


def without_padding(q: Any, k: Any, v: Any, mask: AttentionMask, *rest: Any) -> tuple[Any, ...]:
    return q, k, v, dataclasses.replace(mask, has_padding=False, _lowered={}), *rest


MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], Callable[[Padded], None] | None]] = {
    "labels of padding": lambda patch: label_the_padding,
    "rows without a picture": lambda patch: keep_every_picture,
    "attention": lambda patch: blind(patch, attention, "masked_attention", without_padding),
    "pooling": lambda patch: blind(patch, bitgen, "_pool", lambda hidden, valid: (hidden, None)),
    "positions": lambda patch: blind(
        patch, bitgen, "_rotary_positions", lambda valid, length: (None, length)
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_without_any_one_mask_padding_would_change_them(
    make_config: Callable[..., BitGenConfig], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    change = MUTATIONS[name](monkeypatch)
    whole, _ = largest_differences(make_config(quantization="none"), change)
    assert whole > 1e-3
