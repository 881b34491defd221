"""Text generation with a cache: greedy, speculative, sampling, and beam search.

    images, prompts --one call--> cache and logits --choose--> token --.
                                           ^--------one call a token---'

Prompts of different length are padded on the left, so that all rows of a batch grow at the same
column. What a row answers depends on its own picture, prompt and random numbers, not on the rows
beside it (up to the last bits of float sums, which some kernels order by the batch's shape).

Shapes: B rows, K beams, N rows of the cache (B times the beams or samples of each), V vocabulary, T
tokens that may be generated.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from bitgen.inference.answers import Generation, Speculation
from bitgen.inference.decoding import Decoder, DecodingGraphs, EagerDecoder
from bitgen.inference.options import (
    TEXT_SINKS,
    check_future_heads,
    check_lengths,
    check_options,
    check_writes,
)
from bitgen.model.bitgen import BitGenModel, BitGenOutput
from bitgen.model.cache import AttentionCache, StaticCache

_MOST_ROWS_BY_DEFAULT = 4
"""Drafts save time in batches up to this (benchmarks/speculative.py); a larger one keeps the
processor busy with one column already."""
_WORTH_CHECKING = 0.2
"""A draft is checked where it is right with this probability: one more column costs a call of the
model so much of its time (on a CPU, nano and tiny, up to 16 rows)."""
_WORTH_GOING_ON = 0.4
"""Another draft is made where the last one is right with this probability: it costs more than the
column, and is right less often."""

_NEXT_SEED = np.uint64(0xD1342543DE82EF95)
"""From the seed of a sample to that of the next."""


@torch.inference_mode()
def generate(
    model: BitGenModel,
    images: torch.Tensor | None,
    prompt_ids: Sequence[Sequence[int]],
    eos_id: int,
    max_tokens: int,
    beam_size: int = 1,
    length_penalty: float = 1.0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    never_ids: Sequence[int] = (),
    vocab_size: int | None = None,
    attention_window: int = 0,
    speculative: bool | None = None,
    graphs: DecodingGraphs | None = None,
    num_samples: int = 1,
) -> list[Generation]:
    """Continue each prompt until the end of text or `max_tokens`.

    Greedy by default; sampling with `temperature` above 0; beam search with `beam_size` above 1.

    Args:
        model: on any device; switched to evaluation mode while this runs.
        images: as in `BitGenModel.forward`, or None for text alone.
        prompt_ids: one list of token ids a row, at least one id each (`<bos>`).
        eos_id: the token that ends a row.
        max_tokens: most tokens generated a row, the end of text included.
        beam_size: hypotheses kept a row (see `_beam_search`).
        length_penalty: hypotheses are ranked by `log_probability / length ** length_penalty`,
            where length counts generated tokens and the end of text (as in transformers).
        temperature: divides the logits before sampling; 0 takes the likeliest token.
        top_k: sample among the so many likeliest tokens; 0 among all.
        top_p: sample among the fewest likeliest tokens that hold this probability.
        seeds: of each row's draws when sampling, the same as the native engine's by the same seed;
            None draws seeds by torch's generator.
        never_ids: tokens that are never chosen (special tokens other than the end of text).
        vocab_size: ids from here on are never chosen (rows of the embedding without a token).
        attention_window: tokens that each token looks back on, beside the picture and the first
            few (attention sinks, arXiv 2309.17453). Memory then stays the same, and `max_tokens`
            may be any number; 0 looks back on all.
        speculative: draft further tokens by the model's future token heads and check them in one
            call (see `_generate_speculatively`): the same greedy tokens, sooner. None does so where
            it can be done and the batch is small.
        graphs: read token after token by recorded steps of this model (CUDA graphs), which are kept
            there for later calls; None calls the model. The same answers up to rounding.
        num_samples: texts drawn of each row, above 1 only with a temperature. They are spread
            evenly over what the model may say (see `_Sampler`).

    Returns:
        One `Generation` a row, in order; or `num_samples` of the first row, then of the next.

    Raises:
        InputError: an option out of range, options that exclude each other, prompt and
            `max_tokens` that do not fit the model's positions, a bidirectional model, or
            `speculative` with a model without future token heads.
        BitGenError: a recorded step answers otherwise than the model.
    """
    check_writes(model.config)
    check_options(
        max_tokens=max_tokens,
        beam_size=beam_size,
        length_penalty=length_penalty,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        attention_window=attention_window,
        speculative=speculative,
        cuda_graphs=graphs is not None,
    )
    check_future_heads(model.config, speculative)
    if speculative is None:
        is_greedy = beam_size == 1 and temperature == 0 and not attention_window and graphs is None
        is_small = len(prompt_ids) <= _MOST_ROWS_BY_DEFAULT
        speculative = is_greedy and is_small and len(model.future_heads) > 0
    if not prompt_ids:
        return []
    image_tokens = model.num_image_tokens if images is not None else 0
    check_lengths(
        [len(ids) for ids in prompt_ids],
        image_tokens,
        max_tokens,
        model.config.max_positions,
        attention_window,
    )
    if images is not None and len(images) != len(prompt_ids):
        raise ValueError(f"{len(images)} images, but {len(prompt_ids)} prompts.")
    if graphs is not None and graphs.model is not model:
        raise ValueError("The recorded steps are those of another model.")
    if seeds is not None and len(seeds) != len(prompt_ids):
        raise ValueError(f"{len(seeds)} seeds, but {len(prompt_ids)} prompts.")
    if num_samples < 1 or (num_samples > 1 and temperature == 0):
        raise ValueError(f"{num_samples} samples cannot be drawn at temperature {temperature}.")

    was_training = model.training
    model.eval()
    try:
        never_V = _never_mask(model, never_ids, vocab_size)
        # A recorded step has a cache of its own: the prompts' one needs no room for more.
        later_tokens = max_tokens - 1
        room = 0 if graphs is not None else later_tokens
        read, cache = read_prompts(model, images, prompt_ids, room, attention_window)
        if speculative:
            assert isinstance(cache, StaticCache)
            return _generate_speculatively(model, read, cache, never_V, eos_id, max_tokens)
        logits_BV = read.logits[:, -1].float()
        # From here on each row is so many rows of the cache.
        copies = max(beam_size, num_samples)
        row_N = torch.arange(len(prompt_ids), device=never_V.device).repeat_interleave(copies)
        decoder: Decoder
        if graphs is not None and later_tokens:
            assert isinstance(cache, StaticCache)
            decoder = graphs.decoder(cache, row_N, cache.length + later_tokens)
        else:
            decoder = EagerDecoder(model, cache)
            if copies > 1:
                decoder.reorder(row_N)
        if beam_size > 1:
            return _beam_search(
                decoder, logits_BV, never_V, eos_id, max_tokens, beam_size, length_penalty
            )
        if temperature > 0:
            if seeds is None:
                seeds = torch.randint(2**62, (len(prompt_ids),)).tolist()
            uniform_NT = torch.from_numpy(_uniform_numbers(seeds, num_samples, max_tokens))
            sampler = _Sampler(
                temperature, top_k, top_p, uniform_NT.to(never_V.device), num_samples
            )
        else:
            sampler = None
        return _generate_one_by_one(decoder, logits_BV[row_N], never_V, eos_id, max_tokens, sampler)
    finally:
        model.train(was_training)


def _never_mask(
    model: BitGenModel, never_ids: Sequence[int], vocab_size: int | None
) -> torch.Tensor:
    """Bool `[V]`, True for tokens that may not be chosen."""
    never_V = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    never_V[list(never_ids)] = True
    if vocab_size is not None:
        never_V[vocab_size:] = True
    return never_V.to(next(model.parameters()).device)


def read_prompts(
    model: BitGenModel,
    images: torch.Tensor | None,
    prompt_ids: Sequence[Sequence[int]],
    room: int,
    attention_window: int,
) -> tuple[BitGenOutput, AttentionCache]:
    """Run pictures and prompts through the model; the last column is each row's last token.

    A cache that keeps every token has room for `room` more.
    """
    device = next(model.parameters()).device
    rows, longest = len(prompt_ids), max(len(ids) for ids in prompt_ids)
    input_ids_BL = torch.zeros(rows, longest, dtype=torch.int64)
    valid_BL = torch.zeros(rows, longest, dtype=torch.bool)
    for row, ids in enumerate(prompt_ids):
        input_ids_BL[row, longest - len(ids) :] = torch.tensor(ids)
        valid_BL[row, longest - len(ids) :] = True
    # Built on the CPU, where it is seen for free that nothing is padded.
    mask = model.build_attention_mask(
        valid_BL, prefix_lengths_B=valid_BL.sum(dim=1), has_images=images is not None
    )
    image_tokens = model.num_image_tokens if images is not None else 0
    cache: AttentionCache
    if attention_window:
        cache = model.new_sliding_window_cache(rows, attention_window, image_tokens + TEXT_SINKS)
    else:
        cache = model.new_cache(rows, image_tokens + longest + room)
    output = model(
        input_ids_BL.to(device), images=images, attention_mask=mask, attention_cache=cache
    )
    return output, cache


def _generate_one_by_one(
    decoder: Decoder,
    logits_BV: torch.Tensor,
    never_V: torch.Tensor,
    eos_id: int,
    max_tokens: int,
    sampler: _Sampler | None,
) -> list[Generation]:
    """Greedy choice, or the sampler's, one token a step and row."""
    rows, device = len(logits_BV), logits_BV.device
    tokens_BT = torch.full((rows, max_tokens), eos_id, device=device)
    log_probability_B = torch.zeros(rows, device=device)
    finished_B = torch.zeros(rows, dtype=torch.bool, device=device)
    for step in range(max_tokens):
        if step > 0:
            logits_BV = decoder.read(tokens_BT[:, step - 1])
        allowed_BV = logits_BV.masked_fill(never_V, -torch.inf)
        chosen_B = sampler(allowed_BV) if sampler else allowed_BV.argmax(dim=-1)
        chosen_B = chosen_B.masked_fill(finished_B, eos_id)
        tokens_BT[:, step] = chosen_B
        chosen_logit_B = logits_BV.gather(1, chosen_B.unsqueeze(1)).squeeze(1)
        step_B = chosen_logit_B - logits_BV.logsumexp(dim=-1)
        log_probability_B += step_B.masked_fill(finished_B, 0.0)
        finished_B |= chosen_B == eos_id
        if finished_B.all():
            break
    return [
        Generation(_until(tokens, eos_id), log_probability, finished)
        for tokens, log_probability, finished in zip(
            tokens_BT.tolist(), log_probability_B.tolist(), finished_B.tolist(), strict=True
        )
    ]


def _generate_speculatively(
    model: BitGenModel,
    read: BitGenOutput,
    cache: StaticCache,
    never_V: torch.Tensor,
    eos_id: int,
    max_tokens: int,
) -> list[Generation]:
    """Greedy choice, several tokens a call (blockwise parallel decoding, arXiv 1811.03115).

    The future token heads draft what follows the last token; one call of the model reads it and the
    drafts, and so says what it would have chosen behind each. Drafts count as long as they are what
    it chose, and its choice behind the last of them comes on top: each call yields one token at
    least. The cache then forgets the drafts that were wrong, each row its own.
    """
    drafter = _Drafter(model, never_V, eos_id)
    rows, first_length = len(read.logits), cache.length
    logits_BSV, states_BSC = read.logits[:, -1:], read.states[:, -1:]
    drafts_BD = torch.empty(rows, 0, dtype=torch.int64, device=logits_BSV.device)
    row_B = torch.arange(rows, device=logits_BSV.device)
    progress = [_SpeculativeRow(eos_id, max_tokens) for _ in range(rows)]
    while True:
        logits_BSV = logits_BSV.float()
        choices_BS = logits_BSV.masked_fill(never_V, -torch.inf).argmax(dim=-1)
        chosen_logits_BS = logits_BSV.gather(2, choices_BS.unsqueeze(2)).squeeze(2)
        log_probabilities_BS = chosen_logits_BS - logits_BSV.logsumexp(dim=-1)
        right_BD = drafts_BD == choices_BS[:, :-1]
        num_right = right_BD.long().cumprod(dim=1).sum(dim=1).tolist()
        running = [not row.is_done for row in progress]
        drafter.hear(sum(itertools.compress(num_right, running)), sum(running))
        new_tokens = [
            row.take(*choices)
            for row, *choices in zip(
                progress,
                choices_BS.tolist(),
                log_probabilities_BS.tolist(),
                num_right,
                strict=True,
            )
        ]
        if all(row.is_done for row in progress):
            return [row.generation() for row in progress]
        # A row that is done goes back to its prompt: it must not be the longest.
        lengths = [first_length + (0 if row.is_done else len(row.tokens) - 1) for row in progress]
        cache.rewind(lengths)
        last_B = torch.tensor([max(0, count - 1) for count in new_tokens], device=row_B.device)
        tokens_B, state_BC = choices_BS[row_B, last_B], states_BSC[row_B, last_B]
        drafts_BD = drafter.draft(
            state_BC,
            tokens_B,
            running=[not row.is_done for row in progress],
            most=cache.max_length - cache.length - 1,  # what comes behind would be of no use
        )
        input_ids_BS = torch.cat([tokens_B.unsqueeze(1), drafts_BD], dim=1)
        output = model(input_ids_BS, attention_cache=cache)
        logits_BSV, states_BSC = output.logits, output.states


class _Drafter:
    """Greedy drafts by the future token heads, for as long as they are likely to be right."""

    def __init__(self, model: BitGenModel, never_V: torch.Tensor, eos_id: int) -> None:
        self.model, self.eos_id = model, eos_id
        # Rows of the embedding behind the last token that may be chosen need not be scored.
        self.num_tokens = int((~never_V).nonzero().max()) + 1
        self.never_V = never_V[: self.num_tokens]
        self.failures = self.pause = 0
        self.has_tried = False

    def hear(self, accepted: int, rows: int) -> None:
        """How many drafts were right in the last call, of so many rows that were still running."""
        if not self.has_tried:
            return
        self.failures = 0 if accepted >= _WORTH_GOING_ON * rows else min(self.failures + 1, 6)
        self.pause = max(0, (1 << self.failures) // 4 - 1)

    def draft(
        self, state_BC: torch.Tensor, tokens_B: torch.Tensor, running: Sequence[bool], most: int
    ) -> torch.Tensor:
        """Int64 `[B, D]`: what may follow `tokens_B`, which `state_BC` was taken to predict.

        How many is decided by the probability that all so far are right, as the heads judge it, on
        average over the rows that are `running` (dynamic draft lengths: arXiv 2406.16858). After
        calls in which they were of no use, more and more go without: 0, 0, 1, 3, 7, 15.
        """
        drafts: list[torch.Tensor] = []
        self.has_tried = most > 0 and not self.pause
        if self.pause:
            self.pause -= 1
            most = 0
        confidence = [1.0] * len(running)
        for index in range(min(len(self.model.future_heads), most)):
            state_BC = self.model.future_state(index, state_BC, tokens_B)
            scores_BV = self.model.text_decoder.lm_head(state_BC, self.num_tokens).float()
            best_B, tokens_B = scores_BV.masked_fill(self.never_V, -torch.inf).max(dim=-1)
            probability = (best_B - scores_BV.logsumexp(dim=-1)).exp().tolist()
            confidence = [c * p for c, p in zip(confidence, probability, strict=True)]
            expected = sum(itertools.compress(confidence, running)) / sum(running)
            if expected < _WORTH_CHECKING:
                break
            drafts.append(tokens_B)
            confidence = [  # nothing is wanted behind the end
                0.0 if token == self.eos_id else c
                for c, token in zip(confidence, tokens_B.tolist(), strict=True)
            ]
            if sum(itertools.compress(confidence, running)) < _WORTH_GOING_ON * sum(running):
                break
        return torch.stack(drafts, dim=1) if drafts else tokens_B.new_empty(len(running), 0)


class _SpeculativeRow:
    """What one row has generated by now, on the host."""

    def __init__(self, eos_id: int, max_tokens: int) -> None:
        self.eos_id, self.max_tokens = eos_id, max_tokens
        self.tokens: list[int] = []
        self.log_probability = 0.0
        self.is_done = False
        self.model_calls = self.drafted = self.accepted = 0

    def take(self, choices: list[int], log_probabilities: list[float], num_right: int) -> int:
        """Add one call's choices, of which those behind right drafts count; how many were added."""
        if self.is_done:
            return 0
        new = choices[: min(num_right + 1, self.max_tokens - len(self.tokens))]
        if self.eos_id in new:
            new = new[: new.index(self.eos_id) + 1]
        self.tokens += new
        self.log_probability += sum(log_probabilities[: len(new)])
        self.model_calls += 1
        self.drafted += len(choices) - 1
        self.accepted += min(num_right, len(new))
        self.is_done = new[-1] == self.eos_id or len(self.tokens) == self.max_tokens
        return len(new)

    def generation(self) -> Generation:
        kept = _until(self.tokens, self.eos_id)
        counts = Speculation(self.model_calls, self.drafted, self.accepted)
        return Generation(kept, self.log_probability, len(kept) < len(self.tokens), counts)


def _until(tokens: list[int], eos_id: int) -> list[int]:
    return tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens


class _Sampler:
    """Draws one token a row from logits `[B, V]`, by inverting the cumulative distribution.

    Each prompt is `num_samples` rows, and each row has its own numbers. Several rows of a prompt
    share out the unit interval instead (arithmetic sampling, arXiv 2210.15458): each has a number
    in it, its code, and where it says a token, the token's part of the interval is stretched to the
    whole. So tokens come as often as their probabilities say, not by luck, and each row is still
    drawn from the model. Where a row is alone in the interval that is left, it goes on by its own
    numbers.
    """

    def __init__(
        self,
        temperature: float,
        top_k: int,
        top_p: float,
        uniform_NT: torch.Tensor,
        num_samples: int = 1,
    ) -> None:
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.uniform_NT = uniform_NT
        self.num_used_N = torch.zeros(len(uniform_NT), dtype=torch.int64, device=uniform_NT.device)
        shift_B1 = uniform_NT[::num_samples, :1]
        sample_S = torch.arange(num_samples, device=uniform_NT.device)
        self.num_samples = num_samples
        self.code_N = ((shift_B1 + sample_S) / num_samples).flatten()
        self.width_N = torch.full_like(self.code_N, 1.0 if num_samples > 1 else 0.0)

    def __call__(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """Token ids `[B]`. Logits of -inf are never chosen."""
        tokens: torch.Tensor | None = None
        if 0 < self.top_k < logits_BV.shape[1]:
            logits_BV, tokens = logits_BV.topk(self.top_k)
        elif self.top_p < 1:
            logits_BV, tokens = logits_BV.sort(descending=True)
        # The largest logit is taken off first: a tiny temperature must not overflow.
        logits_BV = logits_BV - logits_BV.amax(dim=-1, keepdim=True)
        probability = torch.softmax(logits_BV.double() / self.temperature, dim=-1)
        cumulative = probability.cumsum(dim=-1)
        if self.top_p < 1:
            # The first token that reaches top_p is the last one kept.
            probability = probability.masked_fill(cumulative - probability >= self.top_p, 0.0)
            cumulative = probability.cumsum(dim=-1)
        total_B1 = cumulative[:, -1:].contiguous()
        is_alone_B = self.width_N * self.num_samples < 1
        uniform_B = self.uniform_NT.gather(1, self.num_used_N.unsqueeze(1)).squeeze(1)
        self.num_used_N += is_alone_B
        code_B1 = torch.where(is_alone_B, uniform_B, self.code_N).unsqueeze(1)
        # Below the total even after rounding: the index found has a probability above zero.
        drawn_B1 = torch.minimum(
            code_B1 * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1))
        )
        index_B1 = torch.searchsorted(cumulative, drawn_B1, right=True)
        high_B1 = cumulative.gather(1, index_B1)
        low_B1 = cumulative.gather(1, (index_B1 - 1).clamp(min=0)).masked_fill(index_B1 == 0, 0.0)
        self.code_N = ((drawn_B1 - low_B1) / (high_B1 - low_B1)).clamp(max=1.0).squeeze(1)
        self.width_N = self.width_N * ((high_B1 - low_B1) / total_B1).squeeze(1)
        return (index_B1 if tokens is None else tokens.gather(1, index_B1)).squeeze(1)


def _uniform_numbers(seeds: Sequence[int], num_samples: int, count: int) -> npt.NDArray[np.float64]:
    """float64 `[N, count]`, in [0, 1): SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), 24 bits.

    As the native engine draws: a sample's seed is its prompt's and so many times `_NEXT_SEED`.
    """
    sample_S = np.arange(num_samples, dtype=np.uint64)
    step_T = np.arange(1, count + 1, dtype=np.uint64)
    seed_B = np.array([seed % 2**64 for seed in seeds], dtype=np.uint64)
    seed_N = (seed_B[:, None] + sample_S * _NEXT_SEED).ravel()
    bits_NT = seed_N[:, None] + step_T * np.uint64(0x9E3779B97F4A7C15)
    bits_NT = (bits_NT ^ (bits_NT >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    bits_NT = (bits_NT ^ (bits_NT >> 27)) * np.uint64(0x94D049BB133111EB)
    return ((bits_NT ^ (bits_NT >> 31)) >> 40) / 2**24


def _beam_search(
    decoder: Decoder,
    logits_BV: torch.Tensor,
    never_V: torch.Tensor,
    eos_id: int,
    max_tokens: int,
    beam_size: int,
    length_penalty: float,
) -> list[Generation]:
    """Standard beam search: the best hypothesis that was finished, or cut off at `max_tokens`.

    Each step ranks all continuations of a row's hypotheses. Those among the best `beam_size` that
    end the text are finished and set aside; the best others go on, always `beam_size` of them. A
    row is done when `beam_size` hypotheses have finished (fairseq's rule, transformers'
    `early_stopping=True`) or none that goes on can beat the best finished one. With `beam_size` 1
    this is greedy.
    """
    rows, vocab_size, device = len(logits_BV), logits_BV.shape[1], logits_BV.device
    row_B = torch.arange(rows, device=device)
    in_place_N = torch.arange(rows * beam_size, device=device)
    logits_BKV = logits_BV.unsqueeze(1).expand(-1, beam_size, -1)

    # All hypotheses start equal, so only the first one counts at the first step.
    sum_BK = torch.full((rows, beam_size), -torch.inf, device=device)
    sum_BK[:, 0] = 0.0
    tokens_BKT = torch.full((rows, beam_size, max_tokens), eos_id, device=device)
    best = _BestHypotheses(rows, max_tokens, eos_id, length_penalty, device)
    for step in range(max_tokens):
        if step > 0:
            logits_NV = decoder.read(tokens_BKT[:, :, step - 1].flatten())
            logits_BKV = logits_NV.view(rows, beam_size, vocab_size)
        candidate_BKV = torch.log_softmax(logits_BKV, dim=-1).masked_fill(never_V, -torch.inf)
        candidate_BKV = candidate_BKV + sum_BK.unsqueeze(2)
        # One ending each at most: among twice as many there are always enough that go on.
        candidates = min(2 * beam_size, beam_size * vocab_size)
        top_BM, index_BM = candidate_BKV.flatten(1).topk(candidates)
        parent_BM, token_BM = index_BM // vocab_size, index_BM % vocab_size
        ends_BM = token_BM == eos_id

        ending_BK = (ends_BM & top_BM.isfinite())[:, :beam_size]
        first_B = ending_BK.int().argmax(dim=1)  # equal lengths: the first ranks highest
        best.offer(
            ending_BK.sum(dim=1),
            top_BM[row_B, first_B],
            tokens_BKT[row_B, parent_BM[row_B, first_B]],
            length=step + 1,
        )

        sum_BK, kept_BK = top_BM.masked_fill(ends_BM, -torch.inf).topk(beam_size)
        parent_BK, token_BK = parent_BM.gather(1, kept_BK), token_BM.gather(1, kept_BK)
        tokens_BKT = tokens_BKT[row_B.unsqueeze(1), parent_BK]
        tokens_BKT[:, :, step] = token_BK
        if step + 1 == max_tokens:
            count_B = sum_BK[:, 0].isfinite().long()
            best.offer(count_B, sum_BK[:, 0], tokens_BKT[:, 0], length=max_tokens)
            break
        best.close(sum_BK[:, 0], step + 1, beam_size)
        if best.done_B.all():
            break
        origin_N = (row_B.unsqueeze(1) * beam_size + parent_BK).flatten()
        if not torch.equal(origin_N, in_place_N):  # a copy of the whole cache otherwise
            decoder.reorder(origin_N)
    return best.generations()


class _BestHypotheses:
    """The best hypothesis of each row so far, and which rows are done."""

    def __init__(
        self, rows: int, max_tokens: int, eos_id: int, length_penalty: float, device: torch.device
    ) -> None:
        self.max_tokens, self.eos_id, self.length_penalty = max_tokens, eos_id, length_penalty
        self.score_B = torch.full((rows,), -torch.inf, device=device)
        self.log_probability_B = torch.full((rows,), -torch.inf, device=device)
        self.tokens_BT = torch.full((rows, max_tokens), eos_id, device=device)
        self.count_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.done_B = torch.zeros(rows, dtype=torch.bool, device=device)

    def offer(
        self,
        count_B: torch.Tensor,
        log_probability_B: torch.Tensor,
        tokens_BT: torch.Tensor,
        length: int,
    ) -> None:
        """Count `count_B` hypotheses of `length` tokens as ended; the given one is their best."""
        score_B = log_probability_B / length**self.length_penalty
        better_B = (count_B > 0) & ~self.done_B & (score_B > self.score_B)
        self.count_B += count_B
        self.score_B = torch.where(better_B, score_B, self.score_B)
        self.log_probability_B = torch.where(better_B, log_probability_B, self.log_probability_B)
        self.tokens_BT = torch.where(better_B.unsqueeze(1), tokens_BT, self.tokens_BT)

    def close(self, running_B: torch.Tensor, length: int, beam_size: int) -> None:
        """Close rows that are done, given the best sum of those that go on with `length` tokens."""
        # Sums only fall, so no running one can score above its sum at the kindest length.
        shortest, longest = length + 1, self.max_tokens
        reachable_B = torch.maximum(
            running_B / shortest**self.length_penalty, running_B / longest**self.length_penalty
        )
        beaten_B = (self.count_B > 0) & (self.score_B >= reachable_B)
        self.done_B = self.done_B | beaten_B | (self.count_B >= beam_size)

    def generations(self) -> list[Generation]:
        generations = []
        for tokens, log_probability in zip(
            self.tokens_BT.tolist(), self.log_probability_B.tolist(), strict=True
        ):
            kept = _until(tokens, self.eos_id)
            generations.append(Generation(kept, log_probability, len(kept) < self.max_tokens))
        return generations
