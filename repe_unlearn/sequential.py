"""Sequential fit: every site is fit on activations that are already erased at all sites before it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .activations import BATCH_TOKENS, StopForward, body, checked, prepare, refuse_nonfinite
from .contrast import Contrast
from .encoding import Batch
from .eraser import Eraser
from .errors import InputError
from .fingerprints import fingerprint
from .hooks import fused
from .moments import Accumulator
from .plan import ErasurePlan, Solver, gathered_warnings, named_solve, residual, solver_name
from .sites import Site
from .solvers.leace import leace
from .taps import tap
from .tokens import Select


def fit_sequential(
    model: nn.Module,
    tokenizer: Any,
    contrast: Contrast,
    sites: Iterable[Site],
    solver: Solver = leace,
    *,
    select: Select | str = "last",
    batch_tokens: int = BATCH_TOKENS,
    provenance: Mapping[str, str] | None = None,
    progress: bool = True,
) -> ErasurePlan:
    """Return a plan whose erasers hold *together*: with all of them applied, z is erased at every site.

    Each eraser is fit on the activations that the model has once every earlier site is erased (Algorithm 1 of
    the LEACE paper), so under ``apply(model, plan)`` the covariance of x and z over the fitting prompts is
    zero at each site, to rounding. The cost is one forward pass of the prompts up to the deepest site plus
    the solves, whatever the number of sites: all batches run side by side, each pausing at a site until its
    eraser is known. No attention signature is touched; any model that hooks work on will do.

    Memory: all prompts are in flight at once, about three tensors of (tokens × d) in the model's dtype.

    Args:
        model: a Hugging Face model.
        tokenizer: its tokenizer.
        contrast: labelled prompts.
        sites: where to erase; the order of execution is found by running.
        solver: a function from Moments to Eraser.
        select: tokens that the erasers are fit on (they are applied to all tokens).
        batch_tokens: positions per batch.
        provenance: facts to store with the plan.
        progress: show a progress bar.

    Raises:
        as ``capture`` and as the solver.

    Reference:
        Belrose et al., LEACE, NeurIPS 2023, arXiv 2306.03819, section 6 (concept scrubbing), Algorithm 1.

    Example:
        ``plan = fit_sequential(model, tokenizer, fit, Architecture.of(model).sites("attn_in", "mlp_in"))``
    """
    sites = checked(sites)
    work = prepare(model, tokenizer, contrast, select, batch_tokens)
    erasers: dict[Site, Eraser] = {}
    worst = 0.0
    paused = _Paused(model, work, sites)
    classes = len(contrast.classes) or None
    with (
        paused,
        gathered_warnings(),
        tqdm(total=len(sites) * len(work), desc="fit", unit="step", disable=not progress, leave=False) as bar,
    ):
        while (site := paused.site()) is not None:
            sums = Accumulator(classes=classes)
            for batch, x in paused.activations():
                rows = batch.pick(x)
                refuse_nonfinite(site, rows)
                sums.add(rows, batch.z)
            moments = sums.moments()
            erasers[site] = named_solve(site, moments, solver)
            worst = max(worst, residual(erasers[site], moments))
            erase = fused(erasers[site])
            bar.set_postfix_str(str(site), refresh=False)
            paused.advance(erase if erasers[site].rank else None, bar.update)
    facts = {
        "solver": solver_name(solver),
        "fit": "sequential",
        "concept": contrast.name,
        "classes": ", ".join(contrast.classes),
        "prompts": str(len(contrast)),
        "select": str(select),
        "residual": f"{worst:.1e}",
    }
    return ErasurePlan(erasers, fingerprint(model), {**facts, **(provenance or {})})


class _Paused:
    """All batches of one forward pass, each a greenlet that stops at every site and waits for its eraser."""

    def __init__(self, model: nn.Module, work: list[Batch], sites: tuple[Site, ...]):
        self._model, self._work, self._sites = model, work, sites
        self._forward = body(model)
        self._runs: list[greenlet.greenlet] = []
        self._at: list[tuple[Site, Tensor]] = []

    def __enter__(self) -> _Paused:
        self._mode = torch.no_grad()  # inference_mode would make erasers that no gradient can pass
        self._taps = tap(self._model, {site: partial(self._pause, site) for site in self._sites})
        self._mode.__enter__()
        try:
            self._runs = [greenlet.greenlet(self._one) for _ in self._work]
            self._at = [run.switch(batch) for run, batch in zip(self._runs, self._work, strict=True)]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        # Unwind what is still paused (after an error or Ctrl-C), so that no frame keeps activations alive.
        for run in self._runs:
            if run and not run.dead:
                run.throw(greenlet.GreenletExit)
        self._runs, self._at = [], []
        self._mode.__exit__(None, None, None)
        self._taps.close()

    def _one(self, batch: Batch) -> None:
        seen: set[Site] = set()
        greenlet.getcurrent().seen = seen  # type: ignore[attr-defined]
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
        erase = run.parent.switch((site, x))
        seen: set[Site] = run.seen  # type: ignore[attr-defined]
        seen.add(site)
        if len(seen) == len(self._sites):
            raise StopForward
        return None if erase is None else erase(x)

    def site(self) -> Site | None:
        """The site where all batches stand, or None when all have finished."""
        here = {at[0] for at in self._at if at is not None}
        if len(here) > 1:
            raise InputError(
                f"batches run through the sites in different orders ({', '.join(map(str, here))}); fit "
                "fewer sites at once."
            )
        return here.pop() if here else None

    def activations(self) -> Iterable[tuple[Batch, Tensor]]:
        return [(batch, at[1]) for batch, at in zip(self._work, self._at, strict=True)]

    def advance(self, erase: Any, tick: Any) -> None:
        """Hand the eraser to every batch and let each run to its next site."""
        for i, run in enumerate(self._runs):
            self._at[i] = None  # type: ignore[call-overload]  # free this batch's activations before the next are made
            self._at[i] = run.switch(erase)
            tick(1)
