"""Several processes that train one model, as `torchrun` starts them.

Every process computes its share of each update. Gradients are added up by DistributedDataParallel
(every process holds the whole model), or model, gradients and optimizer state are cut in pieces
among the processes by FSDP2. What is sent besides is numbers and text, nothing pickled.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from bitgen.errors import ConfigError

_TIMEOUT = timedelta(hours=2)  # the first process may decode many pictures while others wait


@dataclass(frozen=True)
class World:
    """The processes of one training; by default this one alone.

    Attributes:
        rank: this process, from 0; the first one alone writes and reports.
        size: how many there are, on all machines.
        local_rank: this process among those of its machine: which GPU is its own.
        restarts: how often `torchrun` has started all of them anew after one had failed.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """This process's own device of that kind."""
        if self.size == 1 or device.type != "cuda":
            return device
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes of a CPU tensor, the same in each."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Every process's CPU tensor, by rank; all have the same shape."""
        if self.size == 1:
            return [values]
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        torch.distributed.all_gather(gathered, values)
        return gathered

    def text_of_main(self, text: str) -> str:
        """The first process's text, in every process."""
        if self.size == 1:
            return text
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        length = torch.tensor([len(data)])
        torch.distributed.broadcast(length, src=0)
        if not self.is_main:
            data = torch.empty(int(length), dtype=torch.uint8)
        torch.distributed.broadcast(data, src=0)
        return bytes(data.tolist()).decode()

    def wait(self) -> None:
        """Go on when every process has come here."""
        self.sum(torch.zeros(1))


@contextmanager
def joined_world() -> Iterator[World]:
    """Join the processes that `torchrun` started (its environment variables tell), and leave them.

    Without torchrun this process is alone.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    # Numbers on the host go by gloo, so that they never wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    distributed: Any = torch.distributed
    store, rank, size = next(distributed.rendezvous("env://", timeout=_TIMEOUT))
    # The store may be that of the processes before a restart: what they left would be answered by
    # nobody.
    store = distributed.PrefixStore(f"bitgen/start_{restarts}", store)
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT
    )
    try:
        yield World(rank, size, int(os.environ.get("LOCAL_RANK", "0")), restarts)
        # Torch before 2.8 holds the interpreter's lock while gloo's threads end, and a thread that
        # then lets go of the last reference to a tensor waits for that lock for ever. While this
        # sum is waited for they let go of all others, and its own tensor is still held here.
        last = torch.zeros(1)
        torch.distributed.all_reduce(last)
    finally:
        torch.distributed.destroy_process_group()


def leave_at_once(world: World) -> None:
    """End this process with success where it is one of several; its work is done and written.

    A thread of gloo may still be letting go of the last tensors. It asks for the interpreter's
    lock, and if the interpreter is being taken down by then, the thread is ended in the middle of
    C++ and takes the process with it (SIGABRT): torchrun would train again what is done.
    """
    if world.size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def replicated(module: nn.Module, device: torch.device) -> nn.Module:
    """The module in DistributedDataParallel; gradients live in its buckets, for the whole run.

    Some losses leave some weights out (robots, word pretraining), so these are looked for.
    """
    library = nn.parallel.DistributedDataParallel
    options: dict[str, Any] = {
        "device_ids": [device] if device.type == "cuda" else None,
        "find_unused_parameters": True,
        "gradient_as_bucket_view": True,
    }
    # Running statistics are averaged when they are used. Newer torch has another name for that.
    is_newer = "forward_sync_buffers" in inspect.signature(library).parameters
    options["forward_sync_buffers" if is_newer else "broadcast_buffers"] = False
    return library(module, **options)


def shard(
    module: nn.Module, layers: Iterable[nn.Module], methods: Sequence[str], device: torch.device
) -> None:
    """Cut weights in pieces among all processes, in place (FSDP2, arXiv 2304.11277).

    Each of `layers` is put together only while it computes, the rest of `module` for the whole of
    a step: of its `forward`, or of one of its `methods`.

    Raises:
        ConfigError: this torch has no FSDP2.
    """
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    except ImportError as error:
        raise ConfigError(
            f"torch {torch.__version__} has no fully_shard: FSDP2 came with torch 2.6.",
            remedy="Upgrade torch, or take --parallel ddp.",
        ) from error
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for method in methods:
        register_fsdp_forward_method(module, method)


@contextmanager
def synchronized(module: nn.Module, enabled: bool) -> Iterator[None]:
    """Whether a backward pass inside sends its gradients to the other processes."""
    library: Any = module
    if hasattr(library, "set_requires_gradient_sync"):  # FSDP2
        library.set_requires_gradient_sync(enabled)
    replicates = hasattr(library, "no_sync")
    with library.no_sync() if replicates and not enabled else nullcontext():
        yield


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor put together from its pieces; every process has to ask. Others are as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def cut_like(tensor: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """This process's piece of a whole tensor, cut as `example` is; others are as they are."""
    if not hasattr(example, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = example
    piece: torch.Tensor = distribute_tensor(
        tensor.to(sharded.device_mesh.device_type), sharded.device_mesh, sharded.placements
    )
    return piece


@torch.no_grad()
def average_buffers(module: nn.Module, world: World) -> None:
    """Make running statistics the mean of all processes', in place."""
    if world.size == 1:
        return
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.copy_(world.sum(buffer.double().cpu()).div_(world.size))
