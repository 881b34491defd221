"""Captions that the model in training writes itself: drawn, or greedily.

    pictures --one call--> cache: picture, <bos> | word 1 of each caption | word 2 of each | ...
                                                     K columns a step, fewer when captions end

All K captions of a picture are written in one row: each sees the picture and its own words, and
stands where it would stand alone. So a picture is encoded, read and kept once, whatever K is.

Shapes: B pictures, K captions of each, S = P + L image and text columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from bitgen.dataset.tokenizer import Tokenizer
from bitgen.model.bitgen import BitGenModel
from bitgen.model.masks import AttentionMask

PREFIX = -1
"""The segment of picture and `<bos>`, which all captions of a row see."""


def never_ids(tokenizer: Tokenizer, model: BitGenModel) -> list[int]:
    """Token ids that are neither words nor the end of a caption."""
    special = [i for i in tokenizer.special_ids if i != tokenizer.eos_id]
    return [*special, *range(tokenizer.vocab_size, model.config.vocab_size)]


def caption_mask(
    base: AttentionMask,
    segments_BK: torch.Tensor,
    positions_BK: torch.Tensor,
    num_queries: int | None = None,
) -> AttentionMask:
    """The mask of rows that hold several captions of a picture, one beside the other.

    Args:
        base: the rules of a row with one caption: causal, or prefix.
        segments_BK: int64, which caption each column is of; `PREFIX` for what all see.
        positions_BK: int64, where it stands in a row with that caption alone; -1 = padding.
        num_queries: the last columns, which are new; None = all.
    """
    new = slice(None) if num_queries is None else slice(-num_queries, None)
    sees_BQK = (segments_BK[:, None, :] == PREFIX) | (
        segments_BK[:, None, :] == segments_BK[:, new, None]
    )
    mask = base & AttentionMask.custom(sees_BQK)
    return mask.at_positions(positions_BK[:, new], positions_BK)


@torch.no_grad()
def write_captions(
    model: BitGenModel,
    images_B3HW: torch.Tensor,
    bos_id: int,
    eos_id: int,
    max_tokens: int,
    never_ids: Collection[int] = (),
    num_captions: int = 1,
    greedy: bool = False,
) -> list[list[list[int]]]:
    """Captions of each picture, as token ids, the end of text included where it was reached.

    Tokens are drawn from the model's own distribution (temperature 1) by random numbers of torch's
    CPU generator: what is drawn depends on its state and on the batch. Dropout is off.

    Args:
        model: on any device; switched to evaluation mode while this runs.
        images_B3HW: normalised pictures.
        bos_id: begins each caption.
        eos_id: ends it.
        max_tokens: most tokens of a caption, the end of text included.
        never_ids: tokens that are never chosen.
        num_captions: K.
        greedy: take the likeliest token, without random numbers.

    Returns:
        K lists of token ids for each of B pictures.
    """
    was_training = model.training
    model.eval()
    try:
        return _write(
            model, images_B3HW, bos_id, eos_id, max_tokens, never_ids, num_captions, greedy
        )
    finally:
        model.train(was_training)


def _write(
    model: BitGenModel,
    images_B3HW: torch.Tensor,
    bos_id: int,
    eos_id: int,
    max_tokens: int,
    never_ids: Collection[int],
    num_captions: int,
    greedy: bool,
) -> list[list[list[int]]]:
    batch, device = len(images_B3HW), images_B3HW.device
    never_V = torch.zeros(model.config.vocab_size)
    never_V[list(never_ids)] = -torch.inf
    never_V = never_V.to(device)
    prefix = model.num_image_tokens + 1
    cache = model.new_cache(batch, prefix + num_captions * (max_tokens - 1))
    ones_B1 = torch.ones(batch, 1, dtype=torch.int64)
    mask = model.build_attention_mask(ones_B1, prefix_lengths_B=ones_B1[:, 0])
    bos_B1 = torch.full((batch, 1), bos_id, device=device)
    output = model(bos_B1, images=images_B3HW, attention_mask=mask, attention_cache=cache)
    logits_BKV = output.logits.expand(-1, num_captions, -1)
    segments_BS = torch.full((batch, prefix), PREFIX)
    positions_BS = torch.arange(prefix).expand(batch, -1)

    captions: list[list[list[int]]] = [[[] for _ in range(num_captions)] for _ in range(batch)]
    pictures = list(range(batch))  # which picture each row is of
    written = [list(range(num_captions)) for _ in pictures]  # which caption each column continues
    while True:
        scores_BKV = logits_BKV.float() + never_V
        chosen_BK = (scores_BKV.argmax(dim=-1) if greedy else _draw(scores_BKV)).tolist()
        following: list[dict[int, int]] = []  # of each row, the captions that go on, and their word
        for picture, numbers, tokens in zip(pictures, written, chosen_BK, strict=True):
            goes_on = {}
            for number, token in zip(numbers, tokens, strict=False):  # behind them comes padding
                caption = captions[picture][number]
                caption.append(token)
                if token != eos_id and len(caption) < max_tokens:
                    goes_on[number] = token
            following.append(goes_on)
        if not any(following):
            return captions
        kept = [row for row, goes_on in enumerate(following) if goes_on]
        if len(kept) < len(pictures):
            cache.reorder(torch.tensor(kept, device=device))
            segments_BS, positions_BS = segments_BS[kept], positions_BS[kept]
            pictures, following = [pictures[row] for row in kept], [following[row] for row in kept]
        written = [list(goes_on) for goes_on in following]
        columns = max(map(len, written))
        new_ids_BK = torch.full((len(pictures), columns), eos_id)
        new_segments_BK = torch.zeros_like(new_ids_BK)
        new_positions_BK = torch.full_like(new_ids_BK, -1)
        for row, (picture, goes_on) in enumerate(zip(pictures, following, strict=True)):
            for column, (number, token) in enumerate(goes_on.items()):
                new_ids_BK[row, column], new_segments_BK[row, column] = token, number
                new_positions_BK[row, column] = prefix - 1 + len(captions[picture][number])
        segments_BS = torch.cat([segments_BS, new_segments_BK], dim=1)
        positions_BS = torch.cat([positions_BS, new_positions_BK], dim=1)
        mask = caption_mask(AttentionMask.causal(), segments_BS, positions_BS, columns)
        output = model(new_ids_BK.to(device), attention_mask=mask, attention_cache=cache)
        logits_BKV = output.logits


def _draw(scores_BKV: torch.Tensor) -> torch.Tensor:
    """One token of each distribution, int64 `[B, K]`, by inverting the cumulative one."""
    cumulative_BKV = scores_BKV.softmax(dim=-1).cumsum(dim=-1)
    total_BK1 = cumulative_BKV[..., -1:].contiguous()
    drawn_BK1 = torch.rand(total_BK1.shape).to(total_BK1.device) * total_BK1
    # Below the total even after rounding: the index found has a probability above zero.
    drawn_BK1 = torch.minimum(drawn_BK1, torch.nextafter(total_BK1, torch.zeros_like(total_BK1)))
    return torch.searchsorted(cumulative_BKV, drawn_BK1, right=True).squeeze(-1)
