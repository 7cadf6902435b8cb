"""Ranks: who this process is among those that torchrun started, and statistics over all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from .errors import NotEnoughDataError, ShapeError
from .moments import Moments
from .sites import Site


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of processes; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def process_group() -> Iterator[int]:
    """Join the processes that torchrun started, for the length of the block; give this one's rank.

    A no-op (rank 0) in a process that torchrun did not start, or that has joined already. All ranks leave together,
    unless one fails.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield rank_and_world()[0]
        return
    dist.init_process_group()  # gloo for tensors on the CPU, nccl for those on a GPU
    try:
        yield dist.get_rank()
        dist.barrier()
    finally:
        dist.destroy_process_group()


def together(moments: Mapping[Site, Moments | None], sites: Sequence[Site]) -> dict[Site, Moments]:
    """Return the moments of the samples of all ranks, the same on every rank; None stands for no sample here.

    Raises:
        NotEnoughDataError: no rank has a sample for a site.
        ShapeError: the ranks hold moments of different widths.
    """
    world = rank_and_world()[1]
    own = [None if (m := moments.get(site)) is None else (m.d, m.k) for site in sites]
    found: list[list[tuple[int, int] | None]] = [own]
    if world > 1:
        found = [[] for _ in range(world)]
        dist.all_gather_object(found, own)
    result: dict[Site, Moments] = {}
    for site, *all_widths in zip(sites, *found, strict=True):
        widths = {w for w in all_widths if w is not None}
        if not widths:
            raise NotEnoughDataError(
                f"no activation reached {site}; check the token selection and the prompts."
            )
        if len(widths) > 1:
            raise ShapeError(f"got moments of widths (d, k) {sorted(widths)} at {site} on different ranks.")
        mine = moments.get(site)
        if world == 1 and mine is not None:
            result[site] = mine
        else:
            result[site] = (mine if mine is not None else Moments.empty(*widths.pop())).all_reduce()
    return result
