"""Captions pictures once in a process of its own, for infer_speed.py: one JSON line.

Not run by hand. Nothing here imports torch but for the backend that needs it, so that time and
memory are the backend's own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from bitgen.inference.predictor import BitGen

_STATUS = Path("/proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--max_tokens", type=int, required=True)
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("images", nargs="+")
    arguments = parser.parse_args()
    model = BitGen.load(
        arguments.model, device="cpu", backend=arguments.backend, threads=arguments.threads
    )
    if arguments.bfloat16:
        import torch
        from models import convert

        convert(model, torch.bfloat16)
    options = {"max_tokens": arguments.max_tokens, "batch_size": arguments.batch_size}
    model.caption(arguments.images[: arguments.batch_size], **options)
    started = time.perf_counter()
    captions = model.caption(arguments.images, **options)
    seconds = time.perf_counter() - started
    figures = {
        "seconds": seconds,
        "tokens": sum(len(caption.token_ids) for caption in captions),
        "peak_bytes": peak_bytes(),
        "torch_imported": "torch" in sys.modules,
    }
    sys.stdout.write(json.dumps(figures) + "\n")


def peak_bytes() -> int:
    """Most memory of this process since its start, bytes (resident)."""
    if _STATUS.is_file():
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows, which has no /proc either

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
