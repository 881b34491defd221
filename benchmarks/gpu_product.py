"""How fast packed products and decoding steps are on a CUDA device, by Triton and by PyTorch.

    python benchmarks/gpu_product.py --model_size base

Products: every layer shape of a size's decoder, for one token and for many. The time is that of
the device, between two events around as many calls as take a while; weights that fit into its cache
stay there, for both alike. Each answer is first compared with integer arithmetic on the CPU.

Decoding: a model with random weights continues one token a row, by calls of the model and by the
recorded step (a CUDA graph). The tokens are compared.

Every figure is the median of several rounds; a round measures each case once, in turn.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from common import interleave, make_parser, run, show_result

from bitgen.config import MODEL_SIZES, BitGenConfig
from bitgen.errors import ConfigError
from bitgen.inference.answers import Generation
from bitgen.inference.decoding import DecodingGraphs
from bitgen.inference.generate import generate
from bitgen.kernels.gpu import describe_gpu_kernels, gpu_kernels
from bitgen.kernels.matmul import ternary_matmul, ternary_matmul_reference
from bitgen.kernels.packing import pack_ternary
from bitgen.model.bitgen import BitGenModel
from bitgen.model.device import resolve_device
from bitgen.model.ternary import pack_ternary_layers

_CALLS = 50


def main() -> int:
    arguments = read_arguments()
    device = resolve_device("cuda")
    kernels = gpu_kernels(device)
    if kernels is None:
        raise ConfigError(
            f"There is nothing to compare: packed layers run by {describe_gpu_kernels(device)}.",
            remedy="Install Triton, and use a GPU of compute capability 8.0 or later.",
        )
    config = BitGenConfig.preset(arguments.model_size)
    failures: list[str] = []
    products = measure_products(config, kernels, device, arguments, failures)
    decoding = measure_decoding(config, device, arguments, failures)
    rows = [
        (
            f"{case['rows']} x {case['columns']}, {case['tokens']} tokens",
            f"{case['triton_microseconds']:.1f} us",
            f"{case['torch_microseconds']:.1f} us",
        )
        for case in products
    ] + [
        (
            f"decoding, batch {case['batch']}",
            f"{case['graph_tokens_per_second']:.0f} tokens/s (graph)",
            f"{case['call_tokens_per_second']:.0f} tokens/s (calls)",
        )
        for case in decoding
    ]
    figures = {"model_size": arguments.model_size, "products": products, "decoding": decoding}
    columns = ("", "Triton / graph", "PyTorch / calls")
    return show_result("gpu_product", figures, columns, rows, failures)


def measure_products(
    config: BitGenConfig,
    kernels: ModuleType,
    device: torch.device,
    arguments: argparse.Namespace,
    failures: list[str],
) -> list[dict[str, Any]]:
    width, inner = config.hidden_size, config.intermediate_size
    generator = torch.Generator().manual_seed(0)
    measured = []
    for rows, columns in ((width, width), (inner, width), (width, inner)):
        ternary_NK = torch.randint(-1, 2, (rows, columns), dtype=torch.int8, generator=generator)
        tiles, on_device_NK = pack_ternary(ternary_NK).to(device), ternary_NK.to(device)
        scale = torch.tensor(0.1, device=device)
        for tokens in arguments.tokens:
            x_MK = torch.randint(-128, 128, (tokens, columns), generator=generator).to(torch.int8)
            expected_MN = ternary_matmul_reference(x_MK, ternary_NK)
            x_MK, token_scale_M1 = x_MK.to(device), torch.ones(tokens, 1, device=device)
            sums_MN = kernels.ternary_sums(x_MK, tiles, rows)
            if not torch.equal(sums_MN.cpu().long(), expected_MN):
                failures.append(f"{rows} x {columns}, {tokens} tokens: wrong sums.")
            by_torch = functools.partial(torch_product, x_MK, on_device_NK, scale, token_scale_M1)
            by_triton = functools.partial(
                kernels.ternary_product, x_MK, token_scale_M1, tiles, rows, scale
            )
            seconds = interleave(
                {
                    "triton": functools.partial(device_seconds, by_triton),
                    "torch": functools.partial(device_seconds, by_torch),
                },
                arguments.rounds,
                warm_up=1,
            )
            medians = {name: 1e6 * statistics.median(values) for name, values in seconds.items()}
            measured.append(
                {
                    "rows": rows,
                    "columns": columns,
                    "tokens": tokens,
                    "triton_microseconds": medians["triton"],
                    "torch_microseconds": medians["torch"],
                }
            )
    return measured


def torch_product(
    x_MK: torch.Tensor,
    ternary_NK: torch.Tensor,
    scale: torch.Tensor,
    token_scale_M1: torch.Tensor,
) -> torch.Tensor:
    """What a packed layer does where there are no kernels."""
    return ternary_matmul(x_MK, ternary_NK).mul_(scale / token_scale_M1)


def device_seconds(function: Callable[[], object]) -> float:
    """Time on the device of one call, among many."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(_CALLS):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / _CALLS


def measure_decoding(
    config: BitGenConfig,
    device: torch.device,
    arguments: argparse.Namespace,
    failures: list[str],
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = BitGenModel(config).eval()
    pack_ternary_layers(model)
    model = model.to(device)
    graphs = DecodingGraphs(model)
    measured = []
    for batch in arguments.batch_sizes:
        said: dict[str, list[Generation]] = {}

        def decode(name: str, batch: int, said: dict[str, list[Generation]]) -> float:
            started = time.perf_counter()
            said[name] = generate(
                model,
                None,
                [[1, 5 + row % 50] for row in range(batch)],
                eos_id=0,
                never_ids=[0],  # never ends: all steps are counted
                max_tokens=arguments.max_tokens,
                speculative=False,
                graphs=graphs if name == "graph" else None,
            )
            return batch * arguments.max_tokens / (time.perf_counter() - started)

        rates = interleave(
            {name: functools.partial(decode, name, batch, said) for name in ("graph", "call")},
            arguments.rounds,
            warm_up=1,
        )
        if [row.tokens for row in said["graph"]] != [row.tokens for row in said["call"]]:
            failures.append(f"Batch {batch}: the recorded step said something else.")
        measured.append(
            {
                "batch": batch,
                "graph_tokens_per_second": statistics.median(rates["graph"]),
                "call_tokens_per_second": statistics.median(rates["call"]),
            }
        )
    return measured


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model_size", choices=list(MODEL_SIZES), default="base")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 4096])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--max_tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
