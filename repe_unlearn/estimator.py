"""ConceptEraser: concept erasure as a scikit-learn transformer (needs scikit-learn, imported at the top)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from .diagnostics import FitSummary, summarize, warn_weak
from .eraser import Eraser
from .errors import InputError, MissingDependencyError
from .moments import Moments
from .plan import gathered_warnings
from .sites import Site
from .solvers import leace

try:
    from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError:
    raise MissingDependencyError(
        "repe_unlearn.estimator needs scikit-learn 1.6 or newer: "
        "pip install 'repe-unlearn[verify]' 'scikit-learn>=1.6'"
    ) from None

if TYPE_CHECKING:
    from sklearn.utils import Tags

_DTYPES = [np.float64, np.float32, np.float16]


class ConceptEraser(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Transformer after which no linear predictor of the concept beats a constant on the fitting sample.

    The guarantee is that of the solver: for ``"leace"`` zero covariance of the transformed features and the
    concept over the rows that were fit, to rounding; about other rows ask ``repe_unlearn.diagnostics.diagnose``.
    ``transform`` needs no labels, works row by row and keeps the number, the names and the dtype of the
    features. Statistics are float64 and merge exactly, so ``partial_fit`` over batches gives what ``fit``
    gives on all rows, up to rounding.

    The concept goes where scikit-learn has its target, so the class works in pipelines and searches. As in
    ``Moments.of``, real numbers are one quantity to be erased and everything else (integers, strings, booleans)
    names classes. Two-dimensional ``y`` holds one concept per column, and all are erased at once.

    Args:
        solver: ``"leace"``, or a function from ``Moments`` to ``Eraser`` such as
            ``repe_unlearn.solvers.mean_difference`` (options by ``functools.partial``).
        affine: keep the mean of the features; only for ``"leace"``.
        shrinkage: ``"olse"``, a weight from 0 to 1, or None, as in ``solvers.leace``; only for ``"leace"``.

    Attributes:
        eraser_: the ``Eraser`` that ``transform`` applies; after ``partial_fit`` solved when first needed.
        diagnostics_: the ``FitSummary`` of that eraser: its rank, the share of the variance that it moves, how many
            directions and how wide a coordinate the features have.
        moments_: the ``Moments`` of all rows so far.
        classes_: sorted class labels, None for a real concept; a list with one entry per column for 2-D y.
        n_features_in_: number of features d.
        feature_names_in_: their names, if X had any.

    Raises:
        MissingDependencyError: when this module is imported without scikit-learn.

    Reference:
        Belrose, Schneider-Joseph, Ravfogel, Cotterell, Raff, Biderman: LEACE: Perfect linear concept erasure
        in closed form, NeurIPS 2023, arXiv 2306.03819.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = np.array(["cat", "dog"] * 100)
        >>> X = rng.normal(size=(200, 5)) + (y == "dog")[:, None]
        >>> erased = ConceptEraser().fit_transform(X, y)
        >>> bool(abs(erased[y == "dog"].mean(0) - erased[y == "cat"].mean(0)).max() < 1e-12)
        True
    """

    def __init__(
        self,
        solver: str | Callable[[Moments], Eraser] = "leace",
        *,
        affine: bool = True,
        shrinkage: str | float | None = "olse",
    ):
        self.solver = solver
        self.affine = affine
        self.shrinkage = shrinkage

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> ConceptEraser:
        """Forget earlier rows and fit to these.

        Args:
            X: ``[n, d]`` features: array, data frame or anything scikit-learn takes as dense. n >= 2.
            y: ``[n]`` or ``[n, c]`` the concept.
            sample_weight: ``[n]`` non-negative weights; default 1.

        Returns:
            The estimator itself.

        Raises:
            ValueError: wrong shapes, NaN or infinity (raised by scikit-learn).
            NotEnoughDataError: one class, or a concept that is the same everywhere.
            InputError: unknown solver, or options that the solver does not take.

        Warns:
            NumericalWarning: an eraser of rank 0, one that moves more than half of the variance, a feature more
                than 100 times as wide as the median one, fewer than 2 d rows.
        """
        solve = self._chosen()
        X, y = _checked(self, X, y, reset=True, ensure_min_samples=2)
        classes = _classes(y)
        moments = self._moments(X, y, sample_weight, classes)
        solved = _solved(solve, moments)
        self.moments_, self._fit, self.classes_ = moments, solved, classes
        return self

    def partial_fit(
        self, X: Any, y: Any, classes: Sequence[Any] | None = None, sample_weight: Any = None
    ) -> ConceptEraser:
        """Add rows; the eraser is solved again when it is next needed.

        Args:
            X: ``[n, d]`` features, n >= 1.
            y: ``[n]`` or ``[n, c]`` the concept.
            classes: all labels that will occur (for 2-D y a sequence of them, one per column); default those of
                the first batch. Looked at in the first call only.
            sample_weight: ``[n]`` non-negative weights; default 1.

        Returns:
            The estimator itself.

        Raises:
            InputError: a label that is not among the classes; the rows of that batch are not added.
            ValueError: as ``fit``, and another number of features than before.
        """
        self._chosen()
        first = not hasattr(self, "moments_")
        X, y = _checked(self, X, y, reset=first)
        known = _given(y, classes) if first else self.classes_
        batch = self._moments(X, y, sample_weight, known)
        moments = batch if first else self.moments_ + batch
        self.moments_, self._fit, self.classes_ = moments, None, known
        return self

    @property
    def eraser_(self) -> Eraser:
        """The ``Eraser`` of all rows so far.

        Raises:
            NotEnoughDataError: the batches so far hold one class only.
        """
        return self._current()[0]

    @property
    def diagnostics_(self) -> FitSummary:
        """The ``FitSummary`` of ``eraser_`` on all rows so far; raises as ``eraser_``."""
        return self._current()[1]

    def _current(self) -> tuple[Eraser, FitSummary]:
        if not hasattr(self, "moments_"):
            raise AttributeError("not fitted yet: call fit or partial_fit first.")
        if self._fit is None:
            self._fit = _solved(self._chosen(), self.moments_)
        return self._fit

    def transform(self, X: Any) -> Any:
        """Return X without the concept, same shape and floating dtype (integers become float64).

        Args:
            X: ``[n, d]``.

        Raises:
            sklearn.exceptions.NotFittedError: before ``fit``.
            ValueError: another number of features than in ``fit``, or NaN or infinity.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=_DTYPES, order="C", reset=False)
        return self.eraser_(_tensor(X)).numpy()

    def _chosen(self) -> Callable[[Moments], Eraser]:
        if isinstance(self.solver, str):
            if self.solver != "leace":
                raise InputError(
                    f"got solver={self.solver!r}; needed 'leace' or a function from Moments to Eraser, "
                    "e.g. repe_unlearn.solvers.mean_difference."
                )
            shrinkage = cast(Any, self.shrinkage)  # an unknown value is refused by the solver
            return lambda m: leace(m, affine=self.affine, shrinkage=shrinkage)
        if not callable(self.solver):
            raise InputError(
                f"got solver of type {type(self.solver).__name__}; needed 'leace' or a function."
            )
        if self.affine is not True or self.shrinkage != "olse":
            raise InputError(
                f"got affine={self.affine!r}, shrinkage={self.shrinkage!r} with a solver function, which they "
                "do not reach; needed the defaults. Use functools.partial(solver, affine=...)."
            )
        return self.solver

    def _moments(self, X: np.ndarray, y: np.ndarray, sample_weight: Any, classes: Any) -> Moments:
        weight = None
        if sample_weight is not None:
            checked = _check_sample_weight(sample_weight, X, dtype=np.float64)  # the sign: Moments
            weight = _tensor(np.ascontiguousarray(checked))
        return Moments.of(_tensor(X), torch.from_numpy(_encoded(y, classes)), weight=weight)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.multi_output = True
        assert tags.transformer_tags is not None
        tags.transformer_tags.preserves_dtype = ["float64", "float32", "float16"]
        return tags


def _solved(solve: Callable[[Moments], Eraser], moments: Moments) -> tuple[Eraser, FitSummary]:
    with gathered_warnings() as said:
        eraser = solve(moments)
    numbers = summarize(eraser, moments)
    warn_weak({Site("features"): numbers}, skip=said, stacklevel=4)
    return eraser, numbers


def _checked(
    estimator: ConceptEraser, X: Any, y: Any, *, reset: bool, ensure_min_samples: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    X, y = validate_data(
        estimator,
        X,
        y,
        dtype=_DTYPES,
        order="C",
        reset=reset,
        multi_output=True,
        ensure_min_samples=ensure_min_samples,
    )
    if y.ndim > 2:
        raise InputError(f"got y of shape {y.shape}; needed [n] or [n, c].")
    return X, y


def _classes(y: np.ndarray) -> Any:
    """Return the class labels of y, None where it is real; a list of these for 2-D y."""
    if y.ndim == 2:
        return [_classes(column) for column in _columns(y)]
    return None if y.dtype.kind == "f" else np.unique(y)


def _columns(y: np.ndarray) -> list[np.ndarray]:
    # A data frame of mixed columns arrives as objects: every column is then looked at for itself.
    return [np.array(column.tolist()) if y.dtype.kind == "O" else column for column in y.T]


def _given(y: np.ndarray, classes: Sequence[Any] | None) -> Any:
    """Return the classes of a first batch: as given where given, else those that it shows."""
    if classes is None:
        return _classes(y)
    if y.ndim == 1:
        return np.unique(np.asarray(classes))
    if len(classes) != y.shape[1]:
        raise InputError(f"got classes for {len(classes)} columns; y has {y.shape[1]}.")
    return [_given(column, part) for column, part in zip(_columns(y), classes, strict=True)]


def _encoded(y: np.ndarray, classes: Any) -> np.ndarray:
    """Return y as float64 columns [n, k], one per class or real concept."""
    if isinstance(classes, list):
        columns = _columns(y) if y.ndim == 2 else []
        if len(columns) != len(classes):
            raise InputError(f"got y of shape {y.shape}; needed {len(classes)} columns, as before.")
        return np.hstack([_encoded(c, known) for c, known in zip(columns, classes, strict=True)])
    if y.ndim == 2:
        raise InputError(f"got y of shape {y.shape}; needed one dimension, as before.")
    if classes is None:
        return y.astype(np.float64)[:, None]
    unknown = np.setdiff1d(y, classes)
    if unknown.size:
        raise InputError(
            f"got labels {unknown[:3].tolist()}; needed some of {classes[:5].tolist()}. "
            "Give classes= in the first call of partial_fit."
        )
    return (y[:, None] == classes).astype(np.float64)


def _tensor(array: np.ndarray) -> Tensor:
    # PyTorch has no read-only tensors and warns about arrays of that kind (memory maps).
    return torch.from_numpy(array if array.flags.writeable else array.copy())
