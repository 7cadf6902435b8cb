"""Sequential fit: every site is fit on activations that are already erased at all sites before it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import greenlet
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from .activations import (
    BATCH_TOKENS,
    Data,
    StopForward,
    body,
    checked,
    classes_of,
    columns,
    prepare,
    refuse_nonfinite,
    selection,
)
from .contrast import Contrast
from .diagnostics import FitSummary, summarize, warn_weak
from .encoding import Batch
from .eraser import Eraser
from .errors import InputError
from .fingerprints import fingerprint
from .hooks import Erase, fused
from .inputs import InputBatch
from .moments import Accumulator
from .parking import Parking, in_bytes
from .placement import input_device
from .plan import ErasurePlan, Solver, gathered_warnings, named_solve, solver_name, worst_residual
from .ranks import rank_and_world, together
from .sites import Site
from .solvers.leace import leace
from .taps import tap
from .tokens import Select


def fit_sequential(
    model: nn.Module,
    tokenizer: Any,
    contrast: Data,
    sites: Iterable[Site],
    solver: Solver = leace,
    *,
    select: Select | str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    memory: int | str | None = "4GiB",
    scratch: str | Path | None = None,
    provenance: Mapping[str, str] | None = None,
    progress: bool = True,
) -> ErasurePlan:
    """Return a plan whose erasers hold *together*: with all of them applied, z is erased at every site.

    Each eraser is fit on the activations that the model has once every earlier site is erased (Algorithm 1 of
    the LEACE paper), so under ``apply(model, plan)`` the covariance of x and z over the fitting prompts is
    zero at each site, to rounding. The cost is one forward pass of the prompts up to the deepest site plus
    the solves, whatever the number of sites: all batches run side by side, each pausing at a site until its
    eraser is known. No attention signature is touched; any model that hooks work on will do.

    Memory: all prompts are in flight at once, about two to three tensors of (tokens × d) in the model's dtype.
    What exceeds ``memory`` waits in files, with the same result bit for bit; every site then costs one writing
    and one reading of the excess.

    Several processes: under ``torchrun`` every rank runs its share of the batches, the moments of each site are
    added up over the ranks, and every rank returns the same plan.

    Args:
        model: a Hugging Face model.
        tokenizer: its tokenizer; None with ``Inputs``.
        contrast: labelled prompts, or a sequence of ``Inputs``.
        sites: where to erase; the order of execution is found by running.
        solver: a function from Moments to Eraser.
        select: tokens that the erasers are fit on (they are applied to all tokens); default ``"last"``, and ``"all"``
            for ``Inputs``.
        batch_tokens: positions per batch.
        memory: most bytes of activations that wait on the model's device, e.g. ``"500MB"`` (on an accelerator
            as many again wait on the host); None for no limit. The weights and the one batch that is computing
            are not counted.
        scratch: where to make the folder for files, which is removed at the end, also after an error or
            Ctrl-C; default the system's temporary folder.
        provenance: facts to store with the plan.
        progress: show a progress bar.

    Raises:
        as ``capture`` and as the solver.
        InputError: batches meet the sites in different orders; memory is not a size, scratch is not a folder.
        OSError: the disk that holds scratch is full.

    Reference:
        Belrose et al., LEACE, NeurIPS 2023, arXiv 2306.03819, section 6 (concept scrubbing), Algorithm 1.

    Example:
        ``plan = fit_sequential(model, tokenizer, fit, Architecture.of(model).sites("attn_in", "mlp_in"))``
    """
    sites = checked(sites)
    limit = None if memory is None else in_bytes(memory)
    if scratch is not None and not Path(scratch).is_dir():
        raise InputError(f"got scratch={str(scratch)!r}; needed an existing folder.")
    work = prepare(model, tokenizer, contrast, select, batch_tokens)
    erasers: dict[Site, Eraser] = {}
    diagnostics: dict[Site, FitSummary] = {}
    classes = classes_of(contrast)
    with (
        Runs(model, work, sites, limit, scratch) as runs,
        gathered_warnings() as said,
        tqdm(total=len(sites) * len(work), desc="fit", unit="step", disable=not progress, leave=False) as bar,
    ):
        erase: Erase | None = None
        while True:
            site, sums = None, Accumulator()
            for batch, here, x in runs.advance(erase):
                site = site or here
                if here != site:
                    raise InputError(
                        f"batches run through the sites in different orders ({site}, {here}); fit fewer sites at once."
                    )
                rows = batch.pick(x)
                refuse_nonfinite(site, rows)
                sums.add(rows, columns(batch.labels(x), classes), check=False)
                bar.update()
            mine = None if site is None else sums.moments()
            site = _common(site)
            if site is None:
                break
            moments = together({site: mine}, [site])[site]
            erasers[site] = named_solve(site, moments, solver)
            diagnostics[site] = summarize(erasers[site], moments)
            erase = fused(erasers[site]) if erasers[site].rank else None
            bar.set_postfix_str(str(site), refresh=False)
    warn_weak(diagnostics, skip=said)
    facts = {
        "solver": solver_name(solver),
        "fit": "sequential",
        "prompts": str(len(contrast) if isinstance(contrast, Contrast) else sum(map(len, contrast))),
        "select": str(selection(contrast, None) if select is None else select),
        "residual": worst_residual(diagnostics),
    }
    if isinstance(contrast, Contrast):
        facts |= {"concept": contrast.name, "classes": ", ".join(contrast.classes)}
    return ErasurePlan(erasers, fingerprint(model), {**facts, **(provenance or {})}, diagnostics)


def _common(site: Site | None) -> Site | None:
    """Return the site where the batches of all processes stand, also to one without batches; None at the end."""
    world = rank_and_world()[1]
    if world == 1:
        return site
    stands: list[Site | None] = [None] * world
    dist.all_gather_object(stands, site)
    found = {stand for stand in stands if stand is not None}
    if len(found) > 1:
        raise InputError(
            f"the ranks stand at {', '.join(map(str, found))}; needed the same model and sites on each."
        )
    return found.pop() if found else None


class Runs:
    """All batches of one forward pass, each a greenlet that stops at every site and waits for its eraser."""

    def __init__(
        self,
        model: nn.Module,
        work: Sequence[Batch] | Sequence[InputBatch],
        sites: tuple[Site, ...],
        memory: int | None,
        scratch: str | Path | None,
    ):
        self._model, self._work, self._sites = model, work, sites
        self._memory, self._scratch = memory, scratch
        self._forward, self._device = body(model, sites), input_device(model)
        self._runs = [greenlet.greenlet(self._one) for _ in range(len(work))]

    def __enter__(self) -> Runs:
        with ExitStack() as stack:
            stack.enter_context(tap(self._model, {site: partial(self._pause, site) for site in self._sites}))
            # inference_mode would make erasers that no gradient can pass.
            stack.enter_context(torch.no_grad())
            self._limit = stack.enter_context(ExitStack())
            self._parking = None if self._memory is None else self._limited(self._memory)
            stack.callback(self._unwind)
            self._stack = stack.pop_all()
        return self

    def _limited(self, memory: int) -> Parking:
        folder = tempfile.TemporaryDirectory(prefix="repe-unlearn-", dir=self._scratch)
        return self._limit.enter_context(Parking(memory, Path(self._limit.enter_context(folder))))

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _unwind(self) -> None:
        # What is still paused after an error or Ctrl-C goes, so that no frame keeps activations alive.
        for run in self._runs:
            if run and not run.dead:
                run.throw(greenlet.GreenletExit)

    def _one(self, index: int) -> None:
        batch, seen = self._work[index].to(self._device), set[Site]()
        greenlet.getcurrent().state = batch, seen  # type: ignore[attr-defined]
        try:
            self._forward(batch)
        except StopForward:
            return
        missing = [str(site) for site in self._sites if site not in seen]
        raise InputError(
            f"the forward never reached {', '.join(missing[:3])}; it is not part of this model's text path."
        )

    def _pause(self, site: Site, x: Tensor) -> Tensor | None:
        run = greenlet.getcurrent()
        assert run.parent is not None
        batch, seen = run.state  # type: ignore[attr-defined]
        erase = run.parent.switch((batch, site, x))
        seen.add(site)
        if len(seen) == len(self._sites):
            raise StopForward
        return None if erase is None else erase(x)

    def advance(
        self, erase: Callable[[Tensor], Tensor] | None
    ) -> Iterator[tuple[Batch | InputBatch, Site, Tensor]]:
        """Hand the eraser to every batch in turn and yield it with its next site and the activations there."""
        parking = self._parking
        for i, run in enumerate(self._runs):
            with parking.running(i) if parking else nullcontext():
                at = run.switch(erase if run else i)  # a run that has not started is false
            if at is not None:
                yield at
            del at  # or one batch more than the budget allows is held while the next one runs
            if parking:
                parking.park(i)
        if parking and parking.roomy():
            self._limit.close()  # watching every operation has a price too
            self._parking = None
