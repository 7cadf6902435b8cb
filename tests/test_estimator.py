from __future__ import annotations

import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from reference import one_hot, planted
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

from repe_unlearn.diagnostics import summarize
from repe_unlearn.errors import InputError, NoConceptWarning, NotEnoughDataError, NumericalWarning
from repe_unlearn.estimator import ConceptEraser
from repe_unlearn.moments import Moments
from repe_unlearn.solvers import leace, mean_difference, random

# Nothing is expected to fail; scikit-learn itself skips its array API check unless SCIPY_ARRAY_API is set.
ESTIMATORS = {
    "default": ConceptEraser(),
    "linear": ConceptEraser(affine=False, shrinkage=0.1),
    "mean_difference": ConceptEraser(mean_difference),
}


# Names of our own: scikit-learn's hold the address of the solver, which every process has elsewhere.
@pytest.mark.parametrize(
    ("estimator", "check"),
    [
        pytest.param(each, check, id=f"{name}-{check.func.__name__}")
        for name, estimator in ESTIMATORS.items()
        for each, check in estimator_checks_generator(estimator)
    ],
)
def test_scikit_learns_own_checks(estimator: ConceptEraser, check: partial) -> None:
    check(estimator)


def sample(k: int = 2) -> tuple[np.ndarray, np.ndarray]:
    x, z = planted(k)
    return x.numpy(), z.numpy()


def covariance(x: np.ndarray, columns: np.ndarray) -> float:
    centred = columns - columns.mean(0)
    return float(np.abs((x - x.mean(0)).T @ centred).max() / len(x))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_is_leace(k: int) -> None:
    X, y = sample(k)
    model = ConceptEraser().fit(X, y)
    ours = leace(Moments.of(torch.from_numpy(X), torch.from_numpy(y)))
    assert model.eraser_.allclose(ours)
    erased = model.transform(X)
    columns = one_hot(torch.from_numpy(y)).numpy()
    assert covariance(X, columns) > 0.1
    assert covariance(erased, columns) < 1e-10
    assert isinstance(erased, np.ndarray)
    assert (model.classes_ is None) == (k == 1)


def test_every_fit_is_diagnosed() -> None:
    X, y = sample()
    model = ConceptEraser().fit(X, y)
    assert model.diagnostics_ == summarize(model.eraser_, model.moments_)
    parts = ConceptEraser().partial_fit(X[:200], y[:200]).partial_fit(X[200:], y[200:])
    assert parts.diagnostics_.energy == pytest.approx(model.diagnostics_.energy)
    assert parts.diagnostics_.n == 400
    with pytest.warns(NumericalWarning, match="^20 rows for d = 12: fewer than 2 d") as caught:
        ConceptEraser().fit(X[:20], y[:20])
    assert caught[0].filename == __file__
    wide = X.copy()
    wide[:, 3] *= 1e5
    with pytest.warns(NumericalWarning, match="^coordinate 3 is"):
        ConceptEraser().fit(wide, y)
    with pytest.warns(NoConceptWarning) as caught:
        ConceptEraser().fit(model.transform(X), y)
    assert len(caught) == 1


def test_options_reach_the_solver() -> None:
    X, y = sample(5)
    m = Moments.of(torch.from_numpy(X), torch.from_numpy(y))
    fitted = ConceptEraser(affine=False, shrinkage=0.3).fit(X, y).eraser_
    assert fitted.allclose(leace(m, affine=False, shrinkage=0.3))
    assert not fitted.allclose(leace(m))
    assert ConceptEraser(mean_difference).fit(X, y).eraser_.allclose(mean_difference(m))
    assert ConceptEraser(partial(random, rank=3)).fit(X, y).eraser_.rank == 3


@pytest.mark.parametrize("names", [["a", "b", "c"], [3, 7, 11], [True, False, True]])
def test_labels_of_any_kind_are_classes(names: list) -> None:
    X, y = sample(5)
    labels = np.array(names)[y % 3]
    model = ConceptEraser().fit(X, labels)
    _, ids = np.unique(labels, return_inverse=True)
    assert model.eraser_.allclose(leace(Moments.of(torch.from_numpy(X), torch.from_numpy(ids))))
    assert model.classes_.tolist() == sorted(set(names))


def test_whole_numbers_are_no_quantity() -> None:
    X, y = sample(5)
    assert ConceptEraser().fit(X, y).eraser_.rank == 4
    assert ConceptEraser().fit(X, y.astype(float)).eraser_.rank == 1


def test_several_concepts_at_once() -> None:
    X, y = sample(5)
    both = np.stack([y % 2, y // 2], axis=1)
    model = ConceptEraser().fit(X, both)
    erased = model.transform(X)
    for column in both.T:
        assert covariance(erased, one_hot(torch.from_numpy(column)).numpy()) < 1e-10
    assert [c.tolist() for c in model.classes_] == [[0, 1], [0, 1, 2]]
    one = ConceptEraser().fit_transform(X, both[:, 0])
    assert covariance(one, one_hot(torch.from_numpy(both[:, 1])).numpy()) > 1e-3
    frame = pd.DataFrame({"sex": np.array(["f", "m"])[both[:, 0]], "age": X[:, 0] ** 2})
    mixed = ConceptEraser().fit(X, frame)
    assert mixed.classes_[0].tolist() == ["f", "m"]
    assert mixed.classes_[1] is None
    assert covariance(mixed.transform(X), frame[["age"]].to_numpy()) < 1e-8


@pytest.mark.parametrize("weighted", [False, True])
def test_batches_give_what_all_rows_give(weighted: bool) -> None:
    X, y = sample(5)
    labels = np.array(["e", "d", "c", "b", "a"])[np.sort(y)]  # the first batches show one class only
    weight = np.linspace(0.5, 2, len(X)) if weighted else np.ones(len(X))
    whole = ConceptEraser().fit(X, labels, sample_weight=weight)
    parts = ConceptEraser()
    for rows in np.array_split(np.arange(len(X)), 7):
        parts.partial_fit(X[rows], labels[rows], classes=list("abcde"), sample_weight=weight[rows])
    assert parts.eraser_.allclose(whole.eraser_)
    assert parts.moments_.n == pytest.approx(weight.sum())
    assert whole.eraser_.allclose(ConceptEraser().fit(X, labels).eraser_) != weighted
    parts.fit(X[:50], y[:50])  # forgets
    assert parts.moments_.n == 50


def test_batches_of_one_class_wait() -> None:
    X, y = sample()
    model = ConceptEraser().partial_fit(X[y == 0], y[y == 0], classes=[0, 1])
    with pytest.raises(NotEnoughDataError, match="one class"):
        model.transform(X)
    model.partial_fit(X[y == 1], y[y == 1])
    assert covariance(model.transform(X), y[:, None]) < 1e-10


def test_a_refused_batch_leaves_no_trace() -> None:
    X, y = sample()
    model = ConceptEraser().partial_fit(X, y)
    before, eraser = model.moments_, model.eraser_
    for bad_X, bad_y in ((X, y + 1), (X[:, 1:], y), (X * np.nan, y), (X, np.stack([y, y], 1))):
        with pytest.raises(ValueError):
            model.partial_fit(bad_X, bad_y)
        assert model.moments_ is before
        assert model.eraser_ is eraser
    with pytest.raises(InputError, match=r"got labels \[2\].*Give classes="):
        model.partial_fit(X, y + 1)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_keeps_the_dtype(dtype: type) -> None:
    X, y = sample()
    erased = ConceptEraser().fit(X, y).transform(X.astype(dtype))
    assert erased.dtype == dtype
    assert ConceptEraser().fit_transform(X.astype(dtype), y).dtype == dtype
    assert ConceptEraser().fit(X, y).transform((10 * X).astype(int)).dtype == np.float64


def test_data_frames_keep_their_names() -> None:
    X, y = sample()
    frame = pd.DataFrame(X, columns=[f"f{i}" for i in range(12)], index=np.arange(len(X)) + 5)
    model = ConceptEraser().set_output(transform="pandas").fit(frame, pd.Series(y))
    erased = model.transform(frame)
    assert list(erased.columns) == list(frame.columns) == list(model.get_feature_names_out())
    assert list(erased.index) == list(frame.index)
    assert np.allclose(erased, ConceptEraser().fit_transform(X, y))
    with pytest.raises(ValueError, match="feature names"):
        model.transform(frame[frame.columns[::-1]])


def test_in_a_pipeline_a_probe_reads_nothing() -> None:
    X, y = sample()
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01))
    erased = make_pipeline(ConceptEraser(), clone(probe))
    majority = max(np.mean(y), 1 - np.mean(y))
    assert cross_val_score(probe, X, y).mean() > majority + 0.2
    assert erased.fit(X, y).score(X, y) <= majority
    search = GridSearchCV(erased, {"concepteraser__shrinkage": ["olse", None, 0.5]}, cv=2).fit(X, y)
    assert search.best_score_ < majority + 0.05


def test_survives_a_pickle_and_a_clone() -> None:
    X, y = sample()
    model = ConceptEraser(shrinkage=0.2).fit(X, y)
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.transform(X), model.transform(X))
    fresh = clone(model)
    assert fresh.get_params() == model.get_params()
    with pytest.raises(NotFittedError):
        fresh.transform(X)
    assert not hasattr(fresh, "eraser_")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "inlp"}, "needed 'leace' or a function"),
        ({"solver": 3}, "got solver of type int"),
        ({"solver": mean_difference, "affine": False}, "functools.partial"),
        ({"solver": mean_difference, "shrinkage": None}, "functools.partial"),
        ({"shrinkage": "ols"}, "shrinkage"),
    ],
)
def test_refuses_options_that_would_do_nothing(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ConceptEraser(**options).fit(*sample())


def test_refuses_one_class_and_constant_reals() -> None:
    X, y = sample()
    for constant in (np.zeros_like(y), np.full(len(y), 0.5)):
        with pytest.raises(NotEnoughDataError, match="constant"):
            ConceptEraser().fit(X, constant)
    with pytest.raises(InputError, match="negative sample weight"):
        ConceptEraser().fit(X, y, sample_weight=np.linspace(-1, 1, len(y)))
    with pytest.raises(ValueError, match="requires y"):
        ConceptEraser().fit(X, None)


def test_without_scikit_learn_the_message_says_what_to_install() -> None:
    program = "import sys; sys.modules['sklearn'] = None\nimport repe_unlearn\nimport repe_unlearn.estimator"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode != 0
    assert "MissingDependencyError" in result.stderr
    assert "pip install 'repe-unlearn[verify]'" in result.stderr
