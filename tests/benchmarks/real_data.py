"""What does every solver remove, at what price, on real activations? One table per data set.

One site of SmolLM2-135M. Erasers are fit on one set of sentences and judged on others, by probes that are trained and
tested (cross-fitted over sentences or occupations) on the held-out rows only: logistic regression, a small network and
an RBF support vector machine. Energy is the share of the held-out variance that the eraser moves; KL is against the
untouched model on the built-in neutral passages, hooked at that one site. "Kept" is the cross-fitted correlation of a ridge
regression with a second concept, which ``splince`` preserves and ``joint`` erases too: the number of words of the sentence (Winogender),
the number of the word in its sentence (treebank), both as logarithms. "leace, padded" is LEACE and then as many leading principal
components of what is left as it takes to move as much as ``second_order`` does: the comparison at equal energy.

    python tests/benchmarks/real_data.py --data FOLDER

FOLDER holds pos/en_ewt-ud-{dev,test}.conllu (English Web Treebank) and gender/winogender_all_sentences.tsv (Winogender).
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor

from repe_unlearn import (
    Architecture,
    Contrast,
    ErasurePlan,
    Moments,
    apply,
    fingerprint,
    gather,
    load,
    solvers,
)
from repe_unlearn.activations import Rows
from repe_unlearn.audit import probes
from repe_unlearn.audit.neutral import NEUTRAL
from repe_unlearn.audit.preservation import costs
from repe_unlearn.eraser import Eraser

SVM_ROWS = 2500


def treebank(path: Path, sentences: int) -> Contrast:
    """Read words and universal tags; rare tags that tell little are left unlabelled."""
    found, words, tags = [], [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = line.split("\t")
        if len(cells) == 10 and cells[0].isdecimal() and " " not in cells[1]:
            words.append(cells[1])
            tags.append(None if cells[3] in ("X", "_", "SYM", "INTJ") else cells[3])
        elif not line.strip() and words:
            if 4 <= len(words) <= 40:
                found.append((words, tags))
            words, tags = [], []
    step = max(1, len(found) // sentences)
    classes = sorted({t for _, ts in found for t in ts if t})
    return Contrast.from_tokens(found[::step][:sentences], classes=classes, name="part of speech")


def winogender(path: Path) -> tuple[Contrast, Contrast]:
    """Read female / male sentences as pairs; occupations are divided between fit and held-out."""
    with path.open(encoding="utf-8") as file:
        rows = {
            row["sentid"].removesuffix(".txt"): row["sentence"]
            for row in csv.DictReader(file, delimiter="\t")
        }
    stems = sorted({name.rpartition(".")[0] for name in rows})
    occupations = sorted({stem.split(".")[0] for stem in stems})
    held = set(occupations[1::2])

    def part(wanted: bool) -> Contrast:
        chosen = [stem for stem in stems if (stem.split(".")[0] in held) == wanted]
        pairs = [(rows[f"{stem}.female"], rows[f"{stem}.male"]) for stem in chosen]
        groups = [stem.split(".")[0] for stem in chosen]
        return Contrast.from_pairs(pairs, ("female", "male"), name="gender (Winogender)", groups=groups)

    return part(False), part(True)


def length(contrast: Contrast, rows: Rows) -> Tensor:
    """Return the logarithm of the number of words of each row's sentence."""
    words = torch.tensor([len(text.split()) for text in contrast.texts], dtype=torch.float64)
    return words[rows.owner].log()


def position(_contrast: Contrast, rows: Rows) -> Tensor:
    """Return the logarithm of the running number of each labelled word in its sentence."""
    seen: dict[int, int] = {}
    number = []
    for who in rows.owner.tolist():
        seen[who] = seen.get(who, 0) + 1
        number.append(seen[who])
    return torch.tensor(number, dtype=torch.float64).log()


def correlation(x: Tensor, y: Tensor, labels: probes.Labels) -> float:
    """Return the cross-fitted correlation of a ridge regression with y."""
    found = []
    for side in (0, 1):
        train, test = np.flatnonzero(labels.fold != side), np.flatnonzero(labels.fold == side)
        scaler = StandardScaler().fit(x[train].numpy())
        ridge = RidgeCV(np.logspace(-1, 5, 7)).fit(scaler.transform(x[train].numpy()), y[train].numpy())
        guess = ridge.predict(scaler.transform(x[test].numpy()))
        found.append(0.0 if guess.std() < 1e-12 else float(np.corrcoef(guess, y[test].numpy())[0, 1]))
    return float(np.mean(found))


def padded(m: Moments, x: Tensor, energy: float) -> Eraser:
    """Return LEACE followed by leading principal components of what is left, until it moves that much."""
    start = solvers.leace(m)
    left = Moments.of(start(x.double()), torch.arange(len(x)) % 2)
    low, high = 0, min(m.d, len(x) - 1) - start.rank
    while low < high:  # the energy grows with every component
        rank = (low + high) // 2
        eraser = solvers.pca(left, rank=rank).compose(start) if rank else start
        if moved(eraser, x) >= energy:
            high = rank
        else:
            low = rank + 1
    return solvers.pca(left, rank=low).compose(start) if low else start


def moved(eraser: Eraser, x: Tensor) -> float:
    """Return the mean square change."""
    x = x.double()
    return float((eraser(x) - x).square().sum(1).mean())


def svm(rows: Rows, labels: probes.Labels) -> float:
    """Cross-fitted accuracy of an RBF support vector machine on at most SVM_ROWS training rows."""
    right = []
    for side in (0, 1):
        train, test = (
            np.flatnonzero(labels.fold != side)[:SVM_ROWS],
            np.flatnonzero(labels.fold == side)[:SVM_ROWS],
        )
        scaler = StandardScaler().fit(rows.x[train].numpy())
        probe = SVC(C=10.0).fit(scaler.transform(rows.x[train].numpy()), labels.z[train])
        right.append((probe.predict(scaler.transform(rows.x[test].numpy())) == labels.z[test]).mean())
    return float(np.mean(right))


def table(
    name: str,
    model,
    tokenizer,
    site,
    fit: Contrast,
    heldout: Contrast,
    second: Callable[[Contrast, Rows], Tensor],
    select: str,
    most: int,
    skip: Sequence[str] = (),
) -> None:
    """Print one row per solver."""
    look = {"select": select, "progress": False}
    fitting, held = (gather(model, tokenizer, part, [site], **look)[site] for part in (fit, heldout))
    fit_y, held_y = second(fit, fitting), second(heldout, held)[:most]
    held = Rows(held.x[:most], held.z[:most], held.owner[:most])
    labels = probes.Labels.of(held, heldout)
    k, print_ = len(fit.classes), fingerprint(model)
    m = Moments.of(fitting.x, fitting.z, classes=k)
    by_class = [Moments.of(fitting.x[fitting.z == c], fitting.z[fitting.z == c], classes=k) for c in range(k)]
    rank = solvers.leace(m).rank
    methods: dict[str, Callable[[], Callable]] = {
        "none": lambda: None,
        "random": partial(solvers.random, m),
        "pca": partial(solvers.pca, m, rank=rank),
        "mean_difference": partial(solvers.mean_difference, m),
        "leace": partial(solvers.leace, m),
        "splince (keeps the second)": partial(solvers.splince, m, preserve=Moments.of(fitting.x, fit_y)),
        "joint (with the second)": partial(solvers.joint, m, Moments.of(fitting.x, fit_y)),
        "inlp": partial(solvers.inlp, fitting.x, fitting.z),
        "second_order (limit 32)": partial(solvers.second_order, fitting.x, fitting.z, limit=32),
        "rlace": partial(solvers.rlace, fitting.x, fitting.z),
        "oracle (needs labels)": partial(solvers.oracle, m),
        "quadratic (needs labels)": partial(solvers.quadratic, by_class, shrinkage="olse"),
    }
    strong = methods["second_order (limit 32)"]
    methods["leace, padded"] = lambda: padded(m, fitting.x, moved(strong(), fitting.x))
    print(
        f"\n## {name}: {len(fitting.z)} fitting rows, {len(held.z)} held-out rows, {k} classes, majority {labels.chance:.3f}\n"
    )
    print(
        "| solver | rank | solve, s | linear | MLP | RBF-SVM | energy moved | KL mean | kept |\n|---|---|---|---|---|---|---|---|---|"
    )
    variance = float((held.x - held.x.mean(0)).square().sum())
    for label, make in methods.items():
        if label.split(" ")[0] in skip:
            continue
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            eraser = make()
        seconds = time.perf_counter() - start
        if eraser is None:
            x = held.x
        elif isinstance(eraser, Eraser):
            x = eraser(held.x)
        else:
            x = eraser(held.x, held.z)
        rows = {site: Rows(x.float(), held.z, held.owner)}
        linear = probes.accuracy(probes.refit(rows, labels)[site], labels).value
        network = probes.accuracy(probes.mlp(rows, labels)[site], labels).value
        energy = float((x - held.x).square().sum()) / variance
        cost = "–"
        if isinstance(eraser, Eraser):
            plan = ErasurePlan({site: eraser}, print_)
            cost = f"{costs(model, tokenizer, NEUTRAL, {label: lambda p=plan: apply(model, p)})[label].kl_mean:.4f}"
        size = eraser.rank if isinstance(eraser, Eraser) else "–"
        print(
            f"| {label} | {size} | {seconds:.2f} | {linear:.3f} | {network:.3f} | {svm(rows[site], labels):.3f} | {energy:.4f} | {cost} | "
            f"{correlation(x, held_y, labels):.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--sentences", type=int, default=900, help="treebank sentences to fit on")
    parser.add_argument("--rows", type=int, default=5000, help="most held-out rows for the probes")
    parser.add_argument("--only", choices=("winogender", "treebank"), help="one of the two tables")
    parser.add_argument("--skip", nargs="*", default=[], help="solvers to leave out of the treebank table")
    a = parser.parse_args()
    model, tokenizer, _ = load(progress=False)
    site = Architecture.of(model).sites("mlp_in", layers=[a.layer])[0]
    print(f"site {site}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if a.only != "treebank":
        fit, heldout = winogender(a.data / "gender" / "winogender_all_sentences.tsv")
        table("Winogender", model, tokenizer, site, fit, heldout, length, "mean", a.rows)
    if a.only != "winogender":
        files = [a.data / "pos" / f"en_ewt-ud-{part}.conllu" for part in ("dev", "test")]
        fit, heldout = (treebank(path, a.sentences) for path in files)
        name = "English Web Treebank, part of speech"
        table(name, model, tokenizer, site, fit, heldout, position, "words", a.rows, a.skip)


if __name__ == "__main__":
    main()
