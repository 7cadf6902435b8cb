"""One map for the whole residual stream, as a plan that hooks and bake understand alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from torch import nn

from .architectures import Architecture, Write
from .eraser import Eraser
from .errors import UnsupportedModelError
from .fingerprints import fingerprint
from .plan import ErasurePlan
from .sites import Site


def plan_stream(
    model: nn.Module,
    eraser: Eraser,
    *,
    stack: Literal["encoder", "decoder"] | None = None,
    provenance: Mapping[str, str] | None = None,
) -> ErasurePlan:
    """Return the plan after which the residual stream is ``eraser(stream)`` everywhere, between sublayers too.

    The stream is the sum of what the embeddings and the sublayers write. So the embeddings get the eraser and every
    write its linear part: the constant enters once. Fit the eraser on all of the stream, e.g. with
    ``solvers.shared`` of the moments at ``resid_post``.

    Args:
        model: any supported model whose sublayers write to the stream without a LayerNorm on the sum.
        eraser: of the width of the stream.
        stack: which half of an encoder-decoder; default the encoder.
        provenance: facts to store with the plan.

    Raises:
        UnsupportedModelError: a LayerNorm follows each sum (BERT), so the stream is not the sum of the writes.
        UnsupportedArchitectureError: the family has no row.

    Example:
        ``bake(model, plan_stream(model, eraser)).apply_(model)``
    """
    arch = Architecture.of(model, stack=stack)
    if arch.family.post_layernorm:
        raise UnsupportedModelError(
            f"in {arch.model_type} a LayerNorm follows the sum of each sublayer with its input, so no map of the "
            "writes is a map of the stream; erase at resid_post of every layer with hooks, or bake attn_in and "
            "mlp_in."
        )
    linear = replace(eraser, shift=eraser.shift * 0)
    start, *writes = stream_sites(arch)
    return ErasurePlan(
        {start: eraser, **dict.fromkeys(writes, linear)},
        fingerprint(model),
        {**(provenance or {}), "scope": "stream"},
    )


def stream_sites(arch: Architecture) -> tuple[Site, ...]:
    """Return the site after the embeddings and all sites where sublayers write to the stream."""
    writes = (
        site
        for layer, layout in enumerate(arch.layouts)
        for kind in ("attn_out", "cross_out", "mlp_out")
        if isinstance(layout.part(kind), Write)
        for site in arch.sites(kind, layers=[layer])
    )
    return (*arch.sites("resid_pre", layers=[0]), *writes)
