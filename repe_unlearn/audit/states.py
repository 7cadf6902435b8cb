"""States: the residual stream of a model after every block, at chosen positions of token sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from repe_unlearn.activations import BATCH_TOKENS, run
from repe_unlearn.architectures import Architecture
from repe_unlearn.encoding import Encoded, batches
from repe_unlearn.shards import Rows
from repe_unlearn.sites import Site


def blocks(model: nn.Module, layers: Iterable[int] | None) -> tuple[int, ...]:
    """Return block numbers, counted from 0 and sorted; None is all.

    Raises:
        InputError: a block that does not exist.
        UnsupportedArchitectureError: no row for the family.
    """
    arch = Architecture.of(model)
    sites = arch.sites("resid_post", layers=layers)
    return tuple(sorted({located[1] for site in sites if (located := arch.locate(site)) is not None}))


def states(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
    label: str = "states",
) -> Tensor:
    """Return what blocks hand on at some positions, sequence by sequence; the forward stops after the last block.

    Args:
        model: of a family with a row.
        sequences: token ids.
        positions: of every sequence, ascending.
        layers: block numbers, ascending.
        batch_tokens: positions per batch.
        progress: show a progress bar.
        label: of the bar.

    Returns:
        ``[layers, positions of all sequences, d]`` in the model's dtype, on the CPU.

    Raises:
        UnsupportedArchitectureError: no row.
        NonFiniteError: the states hold NaN or infinity.
    """
    encoded = [
        Encoded(list(ids), list(at), [0.0] * len(at), i)
        for i, (ids, at) in enumerate(zip(sequences, positions, strict=True))
    ]
    work = batches(encoded, batch_tokens=batch_tokens, pad_id=0, side="right", pooled=False, real=True)
    sites = Architecture.of(model).sites("resid_post", layers=layers)
    found: dict[Site, list[Rows]] = {site: [] for site in sites}

    def visit(site: Site, rows: Rows) -> None:
        found[site].append(Rows(rows.x.cpu(), rows.z.cpu(), rows.owner.cpu()))

    run(model, work, sites, visit, progress, label)
    return torch.stack([Rows.joined(found[site]).x for site in sites])
