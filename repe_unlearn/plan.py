"""ErasurePlan: which eraser acts at which site of which model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType

from torch import nn
from tqdm.auto import tqdm

from .diagnostics import FitSummary, summarize, warn_weak
from .eraser import Eraser
from .errors import (
    FileFormatError,
    InputError,
    ModelMismatchError,
    NoConceptWarning,
    NumericalWarning,
)
from .fingerprints import fingerprint
from .moments import Moments
from .sites import Site
from .solvers.leace import leace
from .tables import html_table
from .tensorfile import read_tensors, write_tensors

Solver = Callable[[Moments], Eraser]

_KIND = "erasure plan"
_VERSION = 1


@dataclass(frozen=True, slots=True, eq=False)
class ErasurePlan:
    """An immutable map from sites to erasers, with the fingerprint of the model it was fit on.

    Args:
        erasers: at least one site.
        fingerprint: of the model (``fingerprint(model)``); a model with another one is refused.
        provenance: free text facts (solver, concept, number of prompts, versions) that travel with the file.
        diagnostics: numbers of the fit at each site (rank, energy, outliers ...), as far as they are known.

    Raises:
        InputError: no eraser, or diagnostics of a site without one.

    Example:
        >>> import torch
        >>> e = Eraser(torch.eye(4)[:, :1], torch.eye(4)[:1], torch.zeros(4))
        >>> plan = ErasurePlan({Site("model.layers.0.mlp"): e}, fingerprint="0" * 16)
        >>> len(plan), plan[Site("model.layers.0.mlp")].rank
        (1, 1)
    """

    erasers: Mapping[Site, Eraser]
    fingerprint: str
    provenance: Mapping[str, str] = field(default_factory=dict)
    diagnostics: Mapping[Site, FitSummary] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.erasers:
            raise InputError("got a plan without erasers; needed at least one site.")
        object.__setattr__(self, "erasers", MappingProxyType(dict(self.erasers)))
        stray = [str(site) for site in self.diagnostics if site not in self.erasers]
        if stray:
            raise InputError(f"got diagnostics of {stray[0]}, where the plan has no eraser.")
        object.__setattr__(
            self, "provenance", MappingProxyType({k: str(v) for k, v in self.provenance.items()})
        )
        object.__setattr__(self, "diagnostics", MappingProxyType(dict(self.diagnostics)))

    def __len__(self) -> int:
        return len(self.erasers)

    def __getitem__(self, site: Site) -> Eraser:
        return self.erasers[site]

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites in the order they were fit."""
        return tuple(self.erasers)

    @property
    def rank(self) -> int:
        """Largest rank of its erasers."""
        return max(e.rank for e in self.erasers.values())

    def require(self, model: nn.Module) -> None:
        """Refuse a model that this plan was not fit on.

        Raises:
            ModelMismatchError: other fingerprint.
            UnknownSiteError: a site names no module.
        """
        require_model(model, self.erasers, self.fingerprint)

    def replace(self, erasers: Mapping[Site, Eraser]) -> ErasurePlan:
        """Return a plan for the same model with other erasers; diagnostics stay with those that are not replaced."""
        kept = {s: v for s, v in self.diagnostics.items() if erasers.get(s) is self.erasers[s]}
        return ErasurePlan(erasers, self.fingerprint, self.provenance, kept)

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write one safetensors file, atomically.

        Raises:
            OutputExistsError: the file exists and ``force`` is False.
        """
        tensors = {
            f"{i}.{name}": getattr(eraser, name)
            for i, eraser in enumerate(self.erasers.values())
            for name in ("left", "right", "shift")
        }
        header = {
            "sites": [str(site) for site in self.erasers],
            "fingerprint": self.fingerprint,
            "provenance": dict(self.provenance),
            "diagnostics": {str(site): asdict(numbers) for site, numbers in self.diagnostics.items()},
        }
        return write_tensors(path, tensors, kind=_KIND, version=_VERSION, header=header, force=force)

    @classmethod
    def load(cls, path: str | Path) -> ErasurePlan:
        """Read what ``save`` wrote.

        Raises:
            FileFormatError: truncated, foreign or newer file.
        """
        tensors, header = read_tensors(path, kind=_KIND, version=_VERSION)
        try:
            erasers = {
                Site.parse(site): Eraser(*(tensors[f"{i}.{name}"] for name in ("left", "right", "shift")))
                for i, site in enumerate(header["sites"])
            }
            # Files of 0.1.0 have none.
            numbers = header.get("diagnostics", {}).items()
            diagnostics = {Site.parse(site): FitSummary(**record) for site, record in numbers}
            return cls(erasers, header["fingerprint"], header["provenance"], diagnostics)
        except (KeyError, TypeError, AttributeError, InputError) as error:
            raise FileFormatError(f"{path} is not a whole plan ({error}); save it again.") from error

    def __repr__(self) -> str:
        concept = self.provenance.get("concept", "?")
        most = max((numbers.energy for numbers in self.diagnostics.values()), default=None)
        moves = "" if most is None else f", moves<={100 * most:.2g}% of the variance"
        facts = f"{len(self)} sites, rank<={self.rank}{moves}, concept={concept!r}, model={self.fingerprint}"
        return f"ErasurePlan({facts})"

    def _repr_html_(self) -> str:
        rows = []
        for site, eraser in list(self.erasers.items())[:8]:
            found = self.diagnostics.get(site)
            numbers = ("", "", "")
            if found is not None:
                numbers = (f"{found.energy:.2%}", f"{found.effective_rank:.1f}", f"{found.outlier:.3g}")
            rows.append((site, eraser.rank, eraser.dim, *numbers))
        columns = ("site", "rank", "d", "variance moved", "effective rank", "widest / median std")
        return html_table(repr(self), columns, rows, len(self))


def require_model(model: nn.Module, sites: Iterable[Site], expected: str) -> None:
    """Refuse a model with another fingerprint, or without one of the sites.

    Raises:
        ModelMismatchError, UnknownSiteError: as ``ErasurePlan.require``.
    """
    found = fingerprint(model)  # first: it says why a wrapped model has other names
    for site in sites:
        site.module(model)
    if found != expected:
        raise ModelMismatchError(
            f"the plan was fit on a model with fingerprint {expected}; this one has {found}. "
            "Load the same checkpoint (unedited: a baked model needs no plan), or fit a new plan."
        )


def solve(
    moments: Mapping[Site, Moments],
    solver: Solver = leace,
    *,
    model: nn.Module | None = None,
    fingerprint: str | None = None,
    provenance: Mapping[str, str] | None = None,
    progress: bool = False,
) -> ErasurePlan:
    """Return a plan with one eraser per site, each from its own moments.

    Every eraser is exact for the activations of the *untouched* model. If several layers are erased together,
    later ones see changed inputs: use ``fit_sequential`` for that.

    Args:
        moments: what ``capture`` returned.
        solver: a function from Moments to Eraser; set options with ``functools.partial(leace,
            affine=False)``.
        model: the captured model, or give its ``fingerprint``.
        fingerprint: of the captured model.
        provenance: facts to store with the plan.
        progress: show a progress bar.

    Raises:
        InputError: neither model nor fingerprint is given.
        whatever the solver raises.

    Warns:
        NumericalWarning: once per kind, over all sites: an eraser of rank 0, one that moves more than half of the
            variance, a coordinate more than 100 times as wide as the median one, fewer than 2 d rows.
    """
    print_ = fingerprint or (None if model is None else _fingerprint(model))
    if print_ is None:
        raise InputError(
            "solve needs the model or its fingerprint, so that the plan can refuse another model."
        )
    bar = tqdm(moments.items(), desc="solve", unit="site", disable=not progress, leave=False)
    with gathered_warnings() as said:
        erasers = {site: named_solve(site, m, solver) for site, m in bar}
    diagnostics = {site: summarize(erasers[site], m) for site, m in moments.items()}
    warn_weak(diagnostics, skip=said)
    facts = {"solver": solver_name(solver), "residual": worst_residual(diagnostics), **(provenance or {})}
    return ErasurePlan(erasers, print_, facts, diagnostics)


def worst_residual(diagnostics: Mapping[Site, FitSummary]) -> str:
    """Return the largest share of the cross-covariance that is left at any site, as text for the provenance."""
    return f"{max((numbers.residual for numbers in diagnostics.values()), default=0.0):.1e}"


_fingerprint = fingerprint  # the keyword argument of ``solve`` hides the function's name


def named_solve(site: Site, m: Moments, solver: Solver) -> Eraser:
    """Solve one site; errors say which."""
    try:
        return solver(m)
    except (InputError, ValueError) as error:
        error.add_note(f"at site {site}")
        raise


def solver_name(solver: Solver) -> str:
    """Return a readable name with options: ``leace(affine=False)``."""
    inner = getattr(solver, "func", None)
    if inner is not None:
        options = ", ".join(f"{k}={v!r}" for k, v in getattr(solver, "keywords", {}).items())
        return f"{solver_name(inner)}({options})"
    return getattr(solver, "__name__", repr(solver))


class gathered_warnings:  # a context manager that reads like a verb
    """Say once, with a count, what many sites would each warn about.

    The value of ``with`` is a set of what ``warn_weak`` need not repeat afterwards: ``"rank"`` once a solver has said
    that an eraser is the identity.
    """

    def __enter__(self) -> set[str]:
        self._catch = warnings.catch_warnings(record=True)
        self._caught = self._catch.__enter__()
        self._said: set[str] = set()
        warnings.simplefilter("always")
        return self._said

    def __exit__(self, *exc: object) -> None:
        self._catch.__exit__(None, None, None)
        counts: dict[type[Warning], list[str]] = {}
        for w in self._caught:
            if issubclass(w.category, NumericalWarning | NoConceptWarning):
                counts.setdefault(w.category, []).append(str(w.message))
            else:
                warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
        if NoConceptWarning in counts:
            self._said.add("rank")
        for category, texts in counts.items():
            more = f" (and {len(texts) - 1} more sites alike)" if len(texts) > 1 else ""
            warnings.warn(texts[0] + more, category, stacklevel=3)
