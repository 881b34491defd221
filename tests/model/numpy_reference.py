"""The decoder once more, in float64 NumPy: what the tests of the model are compared with.

    embedding -> n x [ RMSNorm -> attention -> + -> RMSNorm -> feed-forward -> + ] -> RMSNorm
              -> tied lm head

Written from the description of BitNet b1.58 2B4T (arXiv 2504.12285), with the weight names of
transformers' `BitNetForCausalLM`. It imports nothing from bitgen, and does in another way what it
can: masks are loops over rows, queries and keys, heads are a loop, and RoPE is a turn of complex
numbers by the distance between query and key.

Shape letters: B batch, S positions, C width, H query heads, G key and value heads, D head width,
Q queries, K keys, V vocabulary, N / K output and input width of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Rule = Callable[[int, int, int], bool]
"""Whether row b's query at token position p may see the key at token position k."""

FORBIDDING = -1e4
"""An additive entry this low or lower forbids."""


def causal() -> Rule:
    return lambda b, p, k: k <= p


def prefix(lengths_B: Sequence[int]) -> Rule:
    """Row b's first `lengths_B[b]` tokens see each other."""
    return lambda b, p, k: k <= p or (p < lengths_B[b] and k < lengths_B[b])


def sliding_window(window: int, sinks: int = 0) -> Rule:
    return lambda b, p, k: k <= p and (k > p - window or k < sinks)


def within_window(window: int, sinks: int = 0) -> Rule:
    """The window alone: later tokens are left to the other rules."""
    return lambda b, p, k: k > p - window or k < sinks


def token_positions(valid_BK: npt.ArrayLike) -> list[list[int | None]]:
    """Each row's tokens counted 0, 1, 2, ...; None where padding stands."""
    rows: list[list[int | None]] = []
    for valid_K in np.asarray(valid_BK):
        row: list[int | None] = []
        count = 0
        for is_token in valid_K:
            row.append(count if is_token else None)
            count += bool(is_token)
        rows.append(row)
    return rows


def additive_mask(
    valid_BK: npt.ArrayLike,
    rules: Sequence[Rule] = (),
    customs: Sequence[npt.NDArray] = (),
    num_heads: int = 1,
    num_queries: int | None = None,
    offset: int = 0,
) -> Array:
    """What is added to the scores, `[B, H, Q, K]`: -inf where any rule or tensor forbids.

    Args:
        valid_BK: False where padding stands, which is neither query nor key.
        rules: of token positions.
        customs: bool or additive, `[B or 1, H or 1, Q, K]`, by columns.
        num_heads: H.
        num_queries: Q; None = K.
        offset: key column at which query 0 stands.
    """
    positions = token_positions(valid_BK)
    batch, num_keys = len(positions), len(positions[0])
    num_queries = num_keys if num_queries is None else num_queries
    added = np.full((batch, num_heads, num_queries, num_keys), -np.inf)
    for b in range(batch):
        for q in range(num_queries):
            for k in range(num_keys):
                p_q, p_k = positions[b][offset + q], positions[b][k]
                if p_q is None or p_k is None:
                    continue
                if not all(rule(b, p_q, p_k) for rule in rules):
                    continue
                for h in range(num_heads):
                    added[b, h, q, k] = _sum_of_entries(customs, b, h, q, k)
    return added


def _sum_of_entries(customs: Sequence[npt.NDArray], b: int, h: int, q: int, k: int) -> float:
    total = 0.0
    for custom in customs:
        entry = custom[min(b, custom.shape[0] - 1), min(h, custom.shape[1] - 1), q, k]
        if custom.dtype == np.bool_:
            total += 0.0 if entry else -np.inf
        else:
            total += float(entry) if entry > FORBIDDING else -np.inf
    return total


def distances(valid_BK: npt.ArrayLike) -> Array:
    """Token positions from each key to each query, `[B, K, K]`; 0 where padding stands."""
    positions = token_positions(valid_BK)
    apart = np.zeros((len(positions), len(positions[0]), len(positions[0])))
    for b, row in enumerate(positions):
        for q, p_q in enumerate(row):
            for k, p_k in enumerate(row):
                if p_q is not None and p_k is not None:
                    apart[b, q, k] = p_q - p_k
    return apart


def distances_with_held_sinks(valid_BK: npt.ArrayLike, sinks: int, max_positions: int) -> Array:
    """`distances`, but a sink k goes no further away than `max_positions - 1 - k`."""
    positions = token_positions(valid_BK)
    apart = distances(valid_BK)
    for b, row in enumerate(positions):
        for q, p_q in enumerate(row):
            for k, p_k in enumerate(row):
                if p_q is not None and p_k is not None and p_k < sinks and p_q >= max_positions:
                    apart[b, q, k] = max_positions - 1 - p_k
    return apart


def softmax(scores_BHQK: Array) -> Array:
    """Over the keys; a row of -inf alone gets zeros."""
    highest = scores_BHQK.max(axis=-1, keepdims=True)
    exponentials = np.exp(scores_BHQK - np.where(np.isneginf(highest), 0.0, highest))
    sums = exponentials.sum(axis=-1, keepdims=True)
    return np.divide(exponentials, sums, out=np.zeros_like(exponentials), where=sums > 0)


def attention(
    q_BHQD: Array,
    k_BGKD: Array,
    v_BGKD: Array,
    added_BHQK: Array,
    distances_BQK: Array | None = None,
    theta: float = 10000.0,
) -> tuple[Array, Array]:
    """Output `[B, H, Q, D]` and weights `[B, H, Q, K]`; RoPE where distances are given."""
    batch, heads, num_queries, width = q_BHQD.shape
    per_group = heads // k_BGKD.shape[1]
    scores = np.zeros((batch, heads, num_queries, k_BGKD.shape[2]))
    output = np.zeros(q_BHQD.shape)
    for h in range(heads):
        q_BQD, k_BKD = q_BHQD[:, h], k_BGKD[:, h // per_group]
        if distances_BQK is None:
            scores[:, h] = np.einsum("bqd,bkd->bqk", q_BQD, k_BKD)
        else:
            scores[:, h] = _rotary_products(q_BQD, k_BKD, distances_BQK, theta)
    weights = softmax(scores / np.sqrt(width) + added_BHQK)
    for h in range(heads):
        output[:, h] = weights[:, h] @ v_BGKD[:, h // per_group]
    return output, weights


def _rotary_products(q_BQD: Array, k_BKD: Array, distances_BQK: Array, theta: float) -> Array:
    """Products of pairs `(x[i], x[i + D/2])`, the query's turned by distance / theta^(2i/D)."""
    half = q_BQD.shape[-1] // 2
    q = q_BQD[..., :half] + 1j * q_BQD[..., half:]
    k = k_BKD[..., :half] + 1j * k_BKD[..., half:]
    turns_BQKI = np.exp(1j * distances_BQK[..., None] / theta ** (np.arange(half) / half))
    return np.einsum("bqi,bki,bqki->bqk", q, k.conj(), turns_BQKI).real


def attention_gradients(
    q_BHQD: Array, k_BGKD: Array, v_BGKD: Array, weights_BHQK: Array, gradient_BHQD: Array
) -> tuple[Array, Array, Array]:
    """Gradients with respect to queries, keys and values (no RoPE), by the chain rule."""
    heads, width = q_BHQD.shape[1], q_BHQD.shape[3]
    per_group = heads // k_BGKD.shape[1]
    q_gradient, k_gradient, v_gradient = (np.zeros(x.shape) for x in (q_BHQD, k_BGKD, v_BGKD))
    for h in range(heads):
        g = h // per_group
        weights, gradient = weights_BHQK[:, h], gradient_BHQD[:, h]
        v_gradient[:, g] += weights.transpose(0, 2, 1) @ gradient
        by_weight = gradient @ v_BGKD[:, g].transpose(0, 2, 1)
        mean = (weights * by_weight).sum(axis=-1, keepdims=True)
        by_product = weights * (by_weight - mean) / np.sqrt(width)
        q_gradient[:, h] = by_product @ k_BGKD[:, g]
        k_gradient[:, g] += by_product.transpose(0, 2, 1) @ q_BHQD[:, h]
    return q_gradient, k_gradient, v_gradient


def rms_norm(x: Array, weight_C: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight_C


def quantized_weight(weight_NK: Array) -> tuple[Array, float]:
    """T in {-1, 0, 1} and s with `W ~ s * T`; halves go to the even number."""
    scale = max(float(np.abs(weight_NK).mean()), 1e-5)
    return np.clip(np.rint(weight_NK / scale), -1, 1), scale


def quantized_activation(x: Array) -> tuple[Array, Array]:
    """Whole numbers in [-128, 127] and a scale a token, with `x ~ q / scale`."""
    scale = 127 / np.maximum(np.abs(x).max(axis=-1, keepdims=True), 1e-5)
    return np.clip(np.rint(x * scale), -128, 127), scale


def linear(x: Array, weight_NK: Array, ternary: bool = False) -> Array:
    if not ternary:
        return x @ weight_NK.T
    quantized, token_scale = quantized_activation(x)
    ternary_NK, scale = quantized_weight(weight_NK)
    return (quantized @ ternary_NK.T) * scale / token_scale


@dataclass(frozen=True)
class Decoder:
    """Weights by the names of `BitNetForCausalLM`, and the numbers that they do not tell."""

    weights: Mapping[str, Array]
    num_heads: int
    num_kv_heads: int
    rope_theta: float
    eps: float
    ternary: bool = False

    def embed(self, ids_BS: npt.NDArray[np.int64]) -> Array:
        return self.weights["model.embed_tokens.weight"][ids_BS]

    def logits(self, x_BSC: Array, added_BHSS: Array, distances_BSS: Array) -> Array:
        """`[B, S, V]` of embedded tokens.

        Args:
            x_BSC: of `embed`, or image tokens.
            added_BHSS: of `additive_mask`.
            distances_BSS: of `distances`.
        """
        index = 0
        while f"model.layers.{index}.input_layernorm.weight" in self.weights:
            layer = f"model.layers.{index}"
            normed = self._norm(x_BSC, f"{layer}.input_layernorm")
            x_BSC = x_BSC + self._attend(normed, f"{layer}.self_attn", added_BHSS, distances_BSS)
            normed = self._norm(x_BSC, f"{layer}.post_attention_layernorm")
            x_BSC = x_BSC + self._feed_forward(normed, f"{layer}.mlp")
            index += 1
        return self._norm(x_BSC, "model.norm") @ self.weights["model.embed_tokens.weight"].T

    def _norm(self, x: Array, name: str) -> Array:
        return rms_norm(x, self.weights[f"{name}.weight"], self.eps)

    def _linear(self, x: Array, name: str) -> Array:
        return linear(x, self.weights[f"{name}.weight"], self.ternary)

    def _attend(self, x_BSC: Array, name: str, added: Array, distances_BSS: Array) -> Array:
        q_BHSD = _split(self._linear(x_BSC, f"{name}.q_proj"), self.num_heads)
        k_BGSD = _split(self._linear(x_BSC, f"{name}.k_proj"), self.num_kv_heads)
        v_BGSD = _split(self._linear(x_BSC, f"{name}.v_proj"), self.num_kv_heads)
        attended, _ = attention(q_BHSD, k_BGSD, v_BGSD, added, distances_BSS, self.rope_theta)
        merged = np.concatenate([attended[:, h] for h in range(self.num_heads)], axis=-1)
        return self._linear(self._norm(merged, f"{name}.attn_sub_norm"), f"{name}.o_proj")

    def _feed_forward(self, x_BSC: Array, name: str) -> Array:
        gate = np.maximum(self._linear(x_BSC, f"{name}.gate_proj"), 0.0) ** 2
        gated = gate * self._linear(x_BSC, f"{name}.up_proj")
        return self._linear(self._norm(gated, f"{name}.ffn_sub_norm"), f"{name}.down_proj")


def _split(x_BSC: Array, heads: int) -> Array:
    """`[B, S, heads * D]` as `[B, heads, S, D]`."""
    return np.stack(np.split(x_BSC, heads, axis=-1), axis=1)
