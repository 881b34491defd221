"""What masks cost: our attention against a bare call of the kernel.

    python benchmarks/attention.py --lengths 128 256 1024 --precisions fp32 bf16

For B rows, H heads of width D and S tokens, forward alone (no gradient) and forward with backward:

    causal    ours with `AttentionMask.causal()` against `scaled_dot_product_attention(...,
              is_causal=True)`
    padded    ours with causal and right padding (rows of S/2 to S tokens) against the kernel given
              a ready boolean mask of the same
    weights   the path that also returns the weights, against the same kernel calls
    written   softmax written out against the kernel, both under the padding: the figure by which
              ours chooses between them (`chosen` says which one it took)
    mask      building the padding mask and lowering it, which happens once for all layers

Cases take turns call by call; figures are the median time of ours over the median time of the bare
call. `noise` is the bare causal call against itself: what the machine's unrest makes of 1. Every
pair of results is compared before it is timed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812
from common import interleave, make_parser, run, seconds_of, show_result

from bitgen.model import attention
from bitgen.model.attention import masked_attention
from bitgen.model.masks import AttentionMask

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCES = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 4e-3}
MOST_CAUSAL, MOST_PADDED = 1.03, 1.05
FEWEST_CALLS = 9
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> int:
    arguments = read_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    columns = (
        "precision", "S", "pass", "causal", "padded", "weights causal", "weights padded",
        "written", "chosen", "noise", "bare causal", "bare padded", "mask",
    )  # fmt: skip
    rows: list[tuple[object, ...]] = []
    results: list[dict[str, Any]] = []
    failures: list[str] = []
    for precision in arguments.precisions:
        for length in arguments.lengths:
            for backward in (False, True):
                result = measure(arguments, precision, length, backward, failures)
                results.append(result)
                ratios = [f"{result[name]:.3f}" for name in ("causal", "padded")]
                ratios += [f"{result[name]:.2f}" for name in ("weights_causal", "weights_padded")]
                times = [f"{result[n] * 1e3:.2f} ms" for n in ("bare_causal_s", "bare_padded_s")]
                rows.append(
                    (
                        precision, length, result["pass"], *ratios, f"{result['written']:.2f}",
                        result["chosen"], f"{result['noise']:.3f}", *times,
                        f"{result['mask_s'] * 1e3:.2f} ms",
                    )
                )  # fmt: skip
    within = {
        "causal_within_3_percent": all(r["causal"] <= MOST_CAUSAL for r in results),
        "padded_within_5_percent": all(r["padded"] <= MOST_PADDED for r in results),
    }
    shape = {"batch": arguments.batch, "heads": arguments.heads, "head_dim": arguments.head_dim}
    figures = {"shape": shape, "cases": results, **within}
    return show_result("attention", figures, columns, rows, failures)


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--batch", type=int, default=8, help="rows B")
    parser.add_argument("--heads", type=int, default=8, help="heads H")
    parser.add_argument("--head_dim", type=int, default=64, help="width D of a head")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 1024], help="S")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp32", "bf16"])
    parser.add_argument("--calls", type=int, default=60, help="most timed calls of each case")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="for one row; fewer calls where they are long"
    )
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    return parser.parse_args()


def measure(
    arguments: argparse.Namespace,
    precision: str,
    length: int,
    backward: bool,
    failures: list[str],
) -> dict[str, Any]:
    """Ratios and times of one precision, length and pass; adds to `failures` what is not equal."""
    torch.manual_seed(0)
    shape = (arguments.batch, arguments.heads, length, arguments.head_dim)
    dtype = PRECISIONS[precision]
    q, k, v = (torch.randn(shape).to(dtype).requires_grad_(backward) for _ in range(3))
    gradient = torch.randn(shape).to(dtype)
    lengths_B = torch.linspace(length // 2, length, arguments.batch).long()

    def make_padded() -> AttentionMask:
        return AttentionMask.causal() & AttentionMask.from_lengths(lengths_B, length)

    causal, padded = AttentionMask.causal(), make_padded()
    ready = padded.to_bool(length, length)

    def bare(**options: Any) -> Attend:
        return partial(F.scaled_dot_product_attention, **options)

    def ours(mask: AttentionMask, return_weights: bool = False) -> Attend:
        return lambda q, k, v: masked_attention(q, k, v, mask, return_weights)[0]

    def forced(written_out: bool) -> Attend:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with mock.patch.object(attention, "_is_faster_written_out", return_value=written_out):
                return masked_attention(q, k, v, padded)[0]

        return attend

    attends: dict[str, Attend] = {
        "bare causal": bare(is_causal=True),
        "causal": ours(causal),
        "weights causal": ours(causal, return_weights=True),
        "bare causal again": bare(is_causal=True),
        "bare padded": bare(attn_mask=ready),
        "padded": ours(padded),
        "weights padded": ours(padded, return_weights=True),
        "kernel": forced(written_out=False),
        "written": forced(written_out=True),
    }
    for name, attend in attends.items():
        kind = "causal" if "causal" in name else "padded"
        failures += compare(name, attend, attends[f"bare {kind}"], (q, k, v), precision, length)

    def call(attend: Attend) -> None:
        output = attend(q, k, v)
        if backward:
            torch.autograd.grad(output, (q, k, v), gradient)

    cases: dict[str, Callable[[], float]] = {
        name: partial(seconds_of, partial(call, attend)) for name, attend in attends.items()
    }
    scores = (*shape[:3], length)
    cpu = torch.device("cpu")
    cases["mask"] = partial(seconds_of, lambda: make_padded().lower(scores, dtype, cpu))
    with torch.set_grad_enabled(backward):
        chosen = attention._is_faster_written_out(scores, dtype, cpu)
        sweep = sum(one_call for case in cases.values() for one_call in (case(), case())) / 2
        calls = max(FEWEST_CALLS, min(arguments.calls, int(arguments.seconds / sweep)))
        times = interleave(cases, calls, warm_up=1)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "precision": precision,
        "length": length,
        "pass": "forward and backward" if backward else "forward",
        "causal": median["causal"] / median["bare causal"],
        "padded": median["padded"] / median["bare padded"],
        "weights_causal": median["weights causal"] / median["bare causal"],
        "weights_padded": median["weights padded"] / median["bare padded"],
        "written": median["written"] / median["kernel"],
        "chosen": "written out" if chosen else "kernel",
        "noise": median["bare causal again"] / median["bare causal"],
        "bare_causal_s": median["bare causal"],
        "bare_padded_s": median["bare padded"],
        "mask_s": median["mask"],
        "calls": calls,
    }


def compare(
    name: str,
    attend: Attend,
    bare: Attend,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    precision: str,
    length: int,
) -> list[str]:
    """One sentence if the results differ; rows without keys are not finite in some kernels."""
    with torch.no_grad():
        expected = bare(*qkv).nan_to_num(0.0)
        difference = (attend(*qkv) - expected).abs().max().item()
    if difference <= TOLERANCES[precision]:
        return []
    return [f"{name}, {precision}, S = {length}: differs from the kernel by {difference:.2e}."]


if __name__ == "__main__":
    run(main)
