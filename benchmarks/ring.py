"""Whether torch's ring attention computes what attention in one piece does, on the GPUs here.

Each rank compares its part of the outputs and gradients, in bf16, with those of whole sequences,
and the time of both passes. One GPU shows that the kernels are found, several that parts are put
together as they should be.

    python benchmarks/ring.py
    torchrun --nproc-per-node 2 benchmarks/ring.py [--tokens 8192 --heads 8]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import closing, nullcontext
from typing import Any

import common
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from paceline import Parallel
from paceline.parallel.context_parallel import Sequences, attention, positions, ring_attention
from paceline.world.world import World

ROUNDS = 10
APART = 0.02  # at most, in parts of the largest value: bf16 keeps 8 bits


def mesh_of(world: World) -> DeviceMesh:
    """The ranks that share sequences; one that is alone has a ring with itself."""
    if world.open().context_mesh is not None:
        return world.context_mesh  # pyright: ignore[reportReturnType]
    kind = world.device.type
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(kind, (1,))


def passes(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output of causal attention, and the gradients of a sum of its squares."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = attention(*leaves, is_causal=True)
    out.float().square().sum().backward()
    return [out.detach(), *[t.grad for t in leaves if t.grad is not None]]


def timed(device: torch.device, tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], float]:
    """What both passes give, and their seconds after a first time."""
    found = passes(tensors)
    _wait(device)
    start = time.perf_counter()
    for _ in range(ROUNDS):
        passes(tensors)
    _wait(device)
    return found, (time.perf_counter() - start) / ROUNDS


def compare(world: World, mesh: DeviceMesh, tokens: int, heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = 1, heads, tokens, 64
    whole = [torch.randn(shape, generator=generator).bfloat16().to(world.device) for _ in range(3)]
    wanted, alone = timed(world.device, whole)
    with ring_attention(), Sequences(mesh, nullcontext(), ring=True):
        here = positions(tokens // mesh.size(), world.device)
        found, ringed = timed(world.device, [t[:, :, here] for t in whole])
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        worst = max(worst, float((a - b[:, :, here]).abs().max() / b.abs().max()))
    text = f"rank {world.rank} of {mesh.size()}: {worst:.1e} apart, "
    text += f"{ringed * 1e3:.2f} ms; in one piece {alone * 1e3:.2f} ms"
    print(text, flush=True)
    if world.is_main:
        data = {"ranks": mesh.size(), "apart": worst, "ring": ringed, "in one piece": alone}
        common.tell(text=f"## Ring attention\n\n{tokens} tokens, {heads} heads; {text}.", data=data)
    if not worst < APART:
        sys.exit(f"rank {world.rank}: the ring computes something else")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=8)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here, and torch's ring attention has no kernel for anything else")
    count: Any = int(os.environ.get("WORLD_SIZE", 1))
    with closing(World(Parallel(context=count, context_attention="ring"))) as world:
        compare(world, mesh_of(world), options.tokens, options.heads)
    if dist.is_initialized():
        dist.destroy_process_group()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
