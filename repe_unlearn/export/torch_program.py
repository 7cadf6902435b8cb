"""Write an erased model as one file for torch.export: no hooks, no Python of this package where it runs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from repe_unlearn.errors import OutputExistsError, UnsupportedModelError
from repe_unlearn.export.gguf_file import new_file
from repe_unlearn.export.torch_module import torch_module
from repe_unlearn.plan import ErasurePlan

__all__ = ["torch_program"]


def torch_program(model: nn.Module, plan: ErasurePlan, out: str | Path, *, force: bool = False) -> Path:
    """Write `torch_module(model, plan)` as a program that `torch.export.load` opens; whole or not at all.

    The program takes `input_ids` [batch, tokens] of any size, `use_cache=False`, and returns what the model returns. Before
    it is written it is run on ids of another size and held against the module. It carries all weights, unedited: who has
    the file has the concept.

    Args:
        model: a language model, the one that the plan was fit on.
        plan: what to erase where, at every position.
        out: file to make, by custom `.pt2`.
        force: replace an `out` that exists.

    Returns:
        `out`.

    Raises:
        UnsupportedModelError: the model cannot be traced, or only for one size of input, or as for `torch_module`.
        ModelMismatchError: the plan was fit on another model.
        OutputExistsError: `out` exists and `force` is off.

    Example:
        `torch_program(model, plan, "erased.pt2"); torch.export.load("erased.pt2").module()(input_ids=ids, use_cache=False)`
    """
    out = Path(out)
    if out.exists() and not force:  # tracing takes a while
        raise OutputExistsError(f"{out} exists. Choose another path, or pass force=True to replace a file.")
    erased = torch_module(model, plan)
    device = next(model.parameters()).device
    traced, other = (torch.ones(size, dtype=torch.long, device=device).cumsum(1) for size in ((2, 4), (3, 7)))
    auto = torch.export.Dim.AUTO
    try:
        program = torch.export.export(
            erased,
            (),
            {"input_ids": traced, "use_cache": False},
            dynamic_shapes={"input_ids": {0: auto, 1: auto}, "use_cache": None},
            strict=False,
        )
        with torch.no_grad():
            wanted = erased(input_ids=other, use_cache=False)
            got = program.module()(input_ids=other, use_cache=False)
        torch.testing.assert_close(got[0].float(), wanted[0].float(), rtol=1e-2, atol=1e-2)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedModelError(
            f"torch.export cannot express {type(model).__name__}: {first} A mixture of experts needs "
            'experts_implementation="batched_mm" when it is loaded; for everything else use apply or export.checkpoint.'
        ) from error
    with new_file(out, force=force) as partial, partial.open("wb") as stream:
        torch.export.save(program, stream)
    return out
