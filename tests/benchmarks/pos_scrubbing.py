r"""What does it cost a language model to lose parts of speech? Token-level scrubbing, as Table 1 of the LEACE paper.

SmolLM2-135M, erasers at the input of every block, fit one after the other (``fit_sequential``) on passages of the English
Web Treebank (dev) and applied to every token but the first, which is an attention sink that no eraser is fit on. Measured:
bits per byte on passages of its test part and of WikiText-2, one passage a document, and what a linear probe still reads
off the erased stream. ``splince`` keeps the number of the word in its sentence. ``quadratic`` needs the tag of every token
at run time, so it is fit in a loop of its own and measured on the treebank only, with gold tags. Last, what
concept-erasure's own scrubbing does with this model.

    python tests/benchmarks/pos_scrubbing.py --data FOLDER --out RESULTS --svg docs/figures/pos-scrubbing.svg \
        --page docs/pos.md

FOLDER holds pos/en_ewt-ud-{dev,test}.conllu and text/wikitext2-{test,valid}.txt. Every (method, seed) is one JSON file in
RESULTS; a file that is there is not computed again. A seed chooses the fitting passages and the random directions.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _kept import same_settings, write
from torch import Tensor

from repe_unlearn import Architecture, Contrast, Example, Moments, Site, apply, fit_sequential, load, solvers
from repe_unlearn.activations import Rows, prepare
from repe_unlearn.audit import figures, probes
from repe_unlearn.encoding import Batch
from repe_unlearn.eraser import Eraser
from repe_unlearn.taps import tap

UNLABELLED = ("X", "_", "SYM", "INTJ")  # rare tags that tell little
BINS = (1, 2, 3, 4, 6, 9, 13, 19)  # where the classes of the number of a word in its sentence begin
METHODS = ("none", "random", "mean_difference", "leace", "splince", "quadratic")
PUBLISHED = {"none": 0.90, "random": 0.99, "mean_difference": 3.53, "leace": 2.79}  # Pythia-160M
CORPORA = ("treebank", "wikitext")
DRAWS = 4000


# ---- text


@dataclass(frozen=True, slots=True)
class Passage:
    """Whole sentences of one document; words as (start, end, tag, number in the sentence)."""

    document: str
    text: str
    words: tuple[tuple[int, int, str, int], ...] = ()
    sentences: int = 1


def treebank(text: str, words: int) -> list[Passage]:
    """Read CoNLL-U as passages of raw text, each of whole sentences of one document with at least ``words`` words."""
    found: list[Passage] = []
    document, last = "", Passage("", "")
    for block in text.split("\n\n"):
        lines = block.splitlines()
        comments = dict(line[2:].split(" = ", 1) for line in lines if line.startswith("# ") and " = " in line)
        if "text" not in comments:
            continue
        if "newdoc id" in comments:
            document = comments["newdoc id"]
            found += [last] * bool(last.words)
            last = Passage(document, "", sentences=0)
        shift = len(last.text) + bool(last.text)
        rows = [cells for line in lines if (cells := line.split("\t"))[0].isdecimal()]
        located = _located(comments["text"], [(cells[1], cells[3]) for cells in rows], shift)
        last = Passage(
            document,
            f"{last.text} {comments['text']}".lstrip(),
            last.words + located,
            last.sentences + 1,
        )
        if len(last.words) >= words:
            found.append(last)
            last = Passage(document, "", sentences=0)
    return found + [last] * bool(last.words)


def _located(
    text: str, words: Sequence[tuple[str, str]], shift: int
) -> tuple[tuple[int, int, str, int], ...]:
    """Find the words in the sentence; one that is written otherwise there ("gonna") stays out."""
    found, cursor = [], 0
    for number, (form, tag) in enumerate(words, 1):
        start = text.find(form, cursor, cursor + len(form) + 12)
        if start < 0:
            continue
        cursor = start + len(form)
        if tag not in UNLABELLED:
            found.append((shift + start, shift + cursor, tag, number))
    return tuple(found)


def articles(text: str, words: int) -> list[Passage]:
    """Read the beginning of every WikiText article: its title and ``words`` words."""
    parts = re.split(r"(?m)^ (?== [^=].* = $)", text)[1:]
    found = []
    for part in parts:
        ends = [match.end() for match in re.finditer(r"\S+", part)][:words]
        found.append(Passage(part[: part.index("\n")].strip(" ="), part[: ends[-1]]))
    return found


def spread(passages: Sequence[Passage], count: int) -> list[Passage]:
    """Keep the longest passage of ``count`` documents, evenly spread over all documents."""
    longest: dict[str, Passage] = {}
    for passage in passages:
        if len(passage.text) > len(longest.get(passage.document, Passage("", "")).text):
            longest[passage.document] = passage
    kept = list(longest.values())
    return [kept[i * len(kept) // count] for i in range(count)] if count < len(kept) else kept


def sample(passages: Sequence[Passage], sentences: int, seed: int) -> list[Passage]:
    """Draw whole documents until there are so many sentences."""
    documents = list(dict.fromkeys(p.document for p in passages))
    random.Random(seed).shuffle(documents)
    kept: list[Passage] = []
    for name in documents:
        if sum(p.sentences for p in kept) >= sentences:
            break
        kept += [p for p in passages if p.document == name]
    return kept


def labelled(passages: Sequence[Passage], classes: Sequence[str]) -> Contrast:
    """Return the passages with one label a word that says both its tag and its number in the sentence."""
    names = tuple(f"{tag} from {begin}" for tag in classes for begin in BINS)
    examples = tuple(
        Example(
            p.text,
            tuple(classes.index(tag) * len(BINS) + place_bin(number) for _, _, tag, number in p.words),
            group=p.document,
            words=tuple((start, end) for start, end, _, _ in p.words),
        )
        for p in passages
    )
    return Contrast("part of speech", "tokens", names, examples)


def place_bin(number: int) -> int:
    """Return the class of a word's number in its sentence."""
    return sum(number >= begin for begin in BINS) - 1


# ---- the two concepts in one label


def mapped(m: Moments, columns: Tensor) -> Moments:
    """Return the moments of x and ``z @ columns``."""
    c = columns.to(m.m_zz)
    return Moments(m.n, m.mean_x, c.T @ m.mean_z, m.m_xx, m.m_xz @ c, c.T @ m.m_zz @ c)


def tag_columns(classes: int) -> Tensor:
    """Return what turns one-hot (tag, place) into one-hot tags."""
    return torch.kron(torch.eye(classes), torch.ones(len(BINS), 1))


def place_columns(classes: int) -> Tensor:
    """Return what turns one-hot (tag, place) into the logarithm of the place."""
    return torch.tensor(BINS, dtype=torch.float64).log().repeat(classes)[:, None]


def solver(method: str, classes: int, seed: int, residuals: list[float]) -> Callable[[Moments], Eraser]:
    """Return the solver; it notes the share of the cross-covariance of x and tags that it leaves."""

    def solve(m: Moments) -> Eraser:
        tags = mapped(m, tag_columns(classes))
        if method == "random":
            # One subspace for all sites, as in the paper. Fresh ones take another 13 directions at every block, and
            # the stream is soon empty: LEACE and the mean difference find much the same directions at every site.
            eraser = solvers.random(tags, seed=seed)
        elif method == "splince":
            eraser = solvers.splince(tags, preserve=mapped(m, place_columns(classes)))
        else:
            eraser = {"leace": solvers.leace, "mean_difference": solvers.mean_difference}[method](tags)
        left = tags.cov_xz - eraser.left @ (eraser.right @ tags.cov_xz)
        residuals.append(float(left.norm() / tags.cov_xz.norm()))
        return eraser

    return solve


# ---- the quadratic eraser


def quadratic_pass(
    model: Any, batch: Batch, sites: Sequence[Site], classes: int, iterations: int
) -> dict[Site, solvers.QuadraticEraser]:
    """Fit at every site on the rows that the sites before leave, in one forward pass of one large batch."""
    found: dict[Site, solvers.QuadraticEraser] = {}
    z = batch.z // len(BINS)

    def fit(site: Site, x: Tensor) -> Tensor:
        rows = batch.pick(x)
        parts = [Moments.of(rows[z == c], z[z == c], classes=classes) for c in range(classes)]
        eraser = solvers.quadratic(parts, shrinkage="olse", max_iterations=iterations)
        found[site] = solvers.QuadraticEraser(
            eraser.class_means.float(), eraser.mean.float(), eraser.maps.float()
        )
        return replaced(x, batch, found[site])

    taps = {site: lambda x, site=site: fit(site, x) for site in sites}
    with torch.no_grad(), tap(model, taps):
        getattr(model, model.base_model_prefix)(**batch.arguments(), use_cache=False)
    return found


def replaced(x: Tensor, batch: Batch, eraser: solvers.QuadraticEraser) -> Tensor:
    """Return x with its labelled rows erased."""
    x = x.clone()
    x[batch.row, batch.column] = eraser(batch.pick(x), batch.z // len(BINS))
    return x


# ---- measuring


def measure(
    model: Any, work: Sequence[Batch], texts: int, looks: Sequence[Site], current: list[Batch]
) -> tuple[list[float], dict[Site, Rows]]:
    """Return the bits of every text without its first token, which nothing predicts, and the rows at some sites."""
    bits = torch.zeros(texts, dtype=torch.float64)
    rows: dict[Site, list[Rows]] = {site: [] for site in looks}

    def see(site: Site, x: Tensor) -> None:
        batch = current[0]
        rows[site].append(Rows(batch.pick(x).float(), batch.labels(x), batch.owners(x)))

    with (
        torch.inference_mode(),
        tap(model, {site: lambda x, site=site: see(site, x) for site in looks}),
    ):
        for batch in work:
            current[:] = [batch]
            logits = model(**batch.arguments(), use_cache=False).logits[:, :-1]
            nll = torch.nn.functional.cross_entropy(logits.float().mT, batch.ids[:, 1:], reduction="none")
            per_row = (nll.double() * batch.mask[:, 1:]).sum(1) / np.log(2)
            owner = {int(r): int(o) for r, o in zip(batch.row, batch.owner, strict=True)}
            for row, value in enumerate(per_row.tolist()):
                bits[owner[row]] += value
    return bits.tolist(), {site: Rows.joined(parts) for site, parts in rows.items()}


def predicted_bytes(tokenizer: Any, text: str) -> int:
    """Return the number of UTF-8 bytes behind the first token."""
    first = tokenizer(text, return_offsets_mapping=True)["offset_mapping"][0][1]
    return len(text[first:].encode())


def unigram(tokenizer: Any, training: str, texts: Sequence[str]) -> list[float]:
    """Return the bits of every text, without its first token, under token frequencies (add one) of another text."""
    counts = Counter(tokenizer(training)["input_ids"])
    total = sum(counts.values()) + len(tokenizer)
    return [
        sum(-float(np.log2((counts[i] + 1) / total)) for i in tokenizer(text)["input_ids"][1:])
        for text in texts
    ]


def probe(rows: Mapping[Site, Rows], contrast: Contrast, most: int) -> tuple[dict[str, float], float]:
    """Return the accuracy of a linear probe at every site, trained and tested on different held-out documents."""
    order = np.random.default_rng(0).permutation(len(next(iter(rows.values())).z))[:most]
    some = {site: Rows(r.x[order], r.z[order] // len(BINS), r.owner[order]) for site, r in rows.items()}
    labels = probes.Labels.of(next(iter(some.values())), contrast)
    found = probes.refit(some, labels)
    return {str(site): probes.accuracy(p, labels).value for site, p in found.items()}, labels.chance


# ---- concept-erasure


def theirs(model: Any, tokenizer: Any, contrast: Contrast, classes: Sequence[str]) -> dict[str, str]:
    """Return what concept-erasure's scrubbing says about this model, on a copy and a few passages."""
    from concept_erasure.scrubbing import patch_attention_, random_scrub, scrub
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Sequence as Column

    columns: dict[str, list[list[int]]] = {"input_ids": [], "pos": []}
    for batch in prepare(model, tokenizer, contrast, "all", 1):
        z = torch.zeros_like(batch.ids[0])
        z[batch.column] = batch.z // len(BINS)
        columns["input_ids"].append(batch.ids[0].tolist())
        columns["pos"].append(z.tolist())
    kinds = Features({"input_ids": Column(Value("int64")), "pos": Column(ClassLabel(names=list(classes)))})
    data = Dataset.from_dict(columns, features=kinds)
    ids = torch.tensor([columns["input_ids"][0]])

    def patched(one: Any) -> None:
        patch_attention_(one)
        scrub(one, data, "pos")

    def at_random(one: Any) -> None:
        with random_scrub(one, len(classes) - 1):
            one(input_ids=ids)

    attempts: dict[str, Callable[[Any], Any]] = {
        "scrub(model, data, 'pos')": lambda one: scrub(one, data, "pos"),
        "scrub(..., sublayers=False)": lambda one: scrub(one, data, "pos", sublayers=False),
        "patch_attention_(model), scrub(...)": patched,
        f"random_scrub(model, {len(classes) - 1})": at_random,
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            with torch.no_grad():
                attempt(copy.deepcopy(model).float())
            said[name] = "finishes"
        except Exception as error:  # whatever it raises is what we want to show
            said[name] = f"{type(error).__name__}: {error}"
    return said


# ---- the table


def interval(runs: Sequence[Mapping[str, Any]], corpus: str) -> tuple[float, float, float]:
    """Return bits per byte and a 95 % interval that draws both documents and seeds anew."""
    draws = _draws(runs, corpus)
    return _pooled(runs, corpus), *(float(v) for v in np.quantile(draws, [0.025, 0.975]))


def difference(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], corpus: str
) -> tuple[float, float, float]:
    """Return the difference a - b in bits per byte with a 95 % interval; the same documents and seeds in both."""
    draws = _draws(a, corpus) - _draws(b, corpus)
    value = _pooled(a, corpus) - _pooled(b, corpus)
    return value, *(float(v) for v in np.quantile(draws, [0.025, 0.975]))


def _pooled(runs: Sequence[Mapping[str, Any]], corpus: str) -> float:
    return float(np.mean([np.sum(run[corpus]["bits"]) / np.sum(run[corpus]["bytes"]) for run in runs]))


def _draws(runs: Sequence[Mapping[str, Any]], corpus: str) -> np.ndarray:
    bits = np.array([run[corpus]["bits"] for run in runs])
    sizes = np.array(runs[0][corpus]["bytes"])
    rng = np.random.default_rng(0)  # the same draws for every method: differences are paired
    documents = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=DRAWS)
    seeds = rng.multinomial(len(bits), np.full(len(bits), 1 / len(bits)), size=DRAWS)
    per_seed = documents @ bits.T / (documents @ sizes)[:, None]
    return (per_seed * seeds).sum(1) / len(bits)


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the stored runs of every method, by seed."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for method in METHODS:
        files = sorted(folder.glob(f"{method}-*.json"))
        if files:
            runs[method] = [json.loads(file.read_text("utf-8")) for file in files]
    return runs


def table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| method | seeds | rank | treebank, bits/byte | WikiText, bits/byte | probe, mean of sites | by depth | Pythia-160M, published |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, some in runs.items():
        cells = [
            "{:.2f} [{:.2f}, {:.2f}]".format(*interval(some, c)) if c in some[0] else "–" for c in CORPORA
        ]
        sites = np.array([list(run["probe"].values()) for run in some])
        depth = ", ".join(f"{value:.2f}" for value in sites.mean(0))
        published = f"{PUBLISHED[method]:.2f}" if method in PUBLISHED else "–"
        lines.append(
            f"| {method} | {len(some)} | {some[0]['rank']} | {cells[0]} | {cells[1]} | {sites.mean():.3f} | {depth} | {published} |"
        )
    return "\n".join(lines)


def differences(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """Yield what each method costs more than another, with intervals."""
    for a, b in (("random", "none"), ("mean_difference", "leace"), ("splince", "leace")):
        if a in runs and b in runs:
            both = len(runs[a]) if len(runs[b]) == 1 else min(len(runs[a]), len(runs[b]))
            other = list(runs[b]) * both if len(runs[b]) == 1 else runs[b][:both]
            for corpus in CORPORA:
                value, low, high = difference(runs[a][:both], other, corpus)
                yield f"{a} - {b}, {corpus}: {value:+.3f} [{low:+.3f}, {high:+.3f}] bits per byte"


def filled(page: str, report: str) -> str:
    """Return the page with the report between its markers."""
    head, begin, rest = page.partition("<!-- results: begin -->\n")
    _, end, tail = rest.partition("<!-- results: end -->")
    if not (begin and end):
        raise SystemExit("the page needs the lines <!-- results: begin --> and <!-- results: end -->")
    return f"{head}{begin}\n{report}\n\n{end}{tail}"


def draw(runs: Mapping[str, Sequence[Mapping[str, Any]]], reference: Mapping[str, float]) -> str:
    """Return the figure as SVG: bits per byte on both corpora, and the probe."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.1), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    titles = ("English Web Treebank", "WikiText-2", "linear probe for part of speech")
    colours = dict(
        zip(METHODS, ("#333333", "#E69F00", "#D55E00", "#0072B2", "#009E73", "#CC79A7"), strict=True)
    )
    for y, (method, some) in enumerate(runs.items()):
        style = {"color": colours[method], "zorder": 3}
        for ax, corpus in zip(axes, CORPORA, strict=False):
            if corpus not in some[0]:
                ax.text(0.1, y, "no gold tags", va="center", fontsize=8, color=figures.QUIET)
                continue
            value, low, high = interval(some, corpus)
            ax.hlines(y, low, high, linewidth=2.2, alpha=0.6, **style)
            ax.plot(value, y, "o", markersize=6, **style)
            ax.annotate(
                f"{value:.2f}", (value, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8
            )
        by_site = np.array([list(run["probe"].values()) for run in some]).mean(0)
        axes[2].plot(by_site, np.full(len(by_site), y), "|", markersize=11, markeredgewidth=1.6, **style)
        axes[2].plot(by_site.mean(), y, "o", markersize=6, **style)
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, loc="left", fontsize=10, fontweight="bold")
        ax.grid(True, axis="x", color=figures.GRID, linewidth=0.7)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(labelsize=9, left=False)
        ax.set_xlabel("bits per byte; dashed: token frequencies alone", fontsize=9)
    for ax, corpus in zip(axes, CORPORA, strict=False):
        ax.axvline(reference[corpus], color=figures.QUIET, linestyle=(0, (4, 3)), linewidth=1)
        ax.set_xlim(0)
    chance = next(iter(runs.values()))[0]["majority"]
    axes[2].axvline(chance, color=figures.QUIET, linestyle=(0, (4, 3)), linewidth=1)
    axes[2].set_xlabel("held-out accuracy (ticks: sites); dashed: majority", fontsize=9)
    axes[2].set_xlim(0, 1)
    axes[0].set_yticks(range(len(runs)), list(runs))
    axes[0].set_ylim(len(runs) - 0.4, -0.6)
    return figures.to_svg(figure)


# ---- the run


@dataclass(frozen=True, slots=True)
class Bench:
    """What all runs share."""

    model: Any
    tokenizer: Any
    sites: tuple[Site, ...]
    classes: tuple[str, ...]
    fitting: list[Passage]
    heldout: Contrast
    work: dict[str, Sequence[Batch]]
    texts: dict[str, list[str]]
    args: argparse.Namespace

    def looks(self) -> list[Site]:
        """Return an early, a middle and a late site."""
        last = len(self.sites) - 1
        return [self.sites[i] for i in (last // 10, (last + 1) // 2, last - last // 10)]

    def run(self, method: str, seed: int) -> dict[str, Any]:
        """Fit, apply and measure one method."""
        start, residuals = time.process_time(), list[float]()
        current: list[Batch] = []
        fit = labelled(sample(self.fitting, self.args.sentences, seed), self.classes)
        context, rank = self._edit(method, seed, fit, residuals, current)
        fitted = time.process_time() - start
        found: dict[str, Any] = {"method": method, "seed": seed, "rank": rank}
        with context:
            for corpus, work in self.work.items():
                if method == "quadratic" and corpus != "treebank":
                    continue
                looks = self.looks() if corpus == "treebank" else []
                bits, rows = measure(self.model, work, len(self.texts[corpus]), looks, current)
                sizes = [predicted_bytes(self.tokenizer, text) for text in self.texts[corpus]]
                found[corpus] = {"bits": bits, "bytes": sizes}
                if looks:
                    found["probe"], found["majority"] = probe(rows, self.heldout, self.args.rows)
        seconds = {"fit": fitted, "all": time.process_time() - start}
        return found | {"residual": max(residuals, default=None), "cpu_seconds": seconds}

    def _edit(
        self, method: str, seed: int, fit: Contrast, residuals: list[float], current: list[Batch]
    ) -> tuple[AbstractContextManager[Any], Any]:
        k = len(self.classes)
        if method == "none":
            return nullcontext(), 0
        if method == "quadratic":
            (whole,) = prepare(self.model, self.tokenizer, fit, "all", 10**9)
            erasers = quadratic_pass(self.model, whole, self.sites, k, self.args.iterations)
            taps = {s: lambda x, e=e: replaced(x, current[0], e) for s, e in erasers.items()}
            return tap(self.model, taps), "–"
        plan = fit_sequential(
            self.model,
            self.tokenizer,
            fit,
            self.sites,
            solver(method, k, seed, residuals),
            select="all",
            progress=False,
        )
        rank = max(eraser.rank for eraser in plan.erasers.values())
        select = None if self.args.first else "all,specials"
        return apply(self.model, plan, select=select), rank


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--data", type=Path, default=Path("../shared/data"))
    result.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "pos-scrubbing")
    result.add_argument("--svg", type=Path, help="also draw the figure into this file")
    result.add_argument(
        "--page", type=Path, help="also put the tables between the markers of this Markdown file"
    )
    result.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    result.add_argument("--seeds", type=int, default=3)
    result.add_argument("--sentences", type=int, default=400, help="treebank sentences to fit on")
    result.add_argument("--documents", type=int, default=48, help="documents to measure on, of each corpus")
    result.add_argument("--words", type=int, default=100, help="words of a passage")
    result.add_argument("--rows", type=int, default=4000, help="most held-out rows for the probes")
    result.add_argument("--kinds", nargs="+", default=["resid_pre"], help="kinds of sites")
    result.add_argument(
        "--first", action="store_true", help="erase the first token of a text too, on which no eraser is fit"
    )
    result.add_argument("--dtype", default="float32", help="of the model; all statistics are float64")
    result.add_argument("--iterations", type=int, default=1, help="of the barycenter of the quadratic eraser")
    return result


def main() -> None:
    """Compute what is missing and print the table."""
    args = parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    same_settings(args, ("data", "out", "svg", "page", "methods", "seeds"))
    data: Path = args.data
    fitting = treebank((data / "pos/en_ewt-ud-dev.conllu").read_text("utf-8"), args.words)
    heldout = treebank((data / "pos/en_ewt-ud-test.conllu").read_text("utf-8"), args.words)
    heldout = spread(heldout, args.documents)
    wiki = articles((data / "text/wikitext2-test.txt").read_text("utf-8"), args.words)
    wiki = spread(wiki, args.documents)
    classes = tuple(sorted({tag for p in fitting for _, _, tag, _ in p.words}))
    model, tokenizer, _ = load(dtype=args.dtype, progress=False)
    contrasts = {
        "treebank": labelled(heldout, classes),
        "wikitext": Contrast.from_labels([p.text for p in wiki], [i % 2 for i in range(len(wiki))]),
    }
    work = {name: prepare(model, tokenizer, c, "all", 512) for name, c in contrasts.items()}
    texts = {name: list(c.texts) for name, c in contrasts.items()}
    sites = Architecture.of(model).sites(*args.kinds)
    bench = Bench(model, tokenizer, sites, classes, fitting, contrasts["treebank"], work, texts, args)
    for seed in range(args.seeds):
        for method in args.methods:
            file = args.out / f"{method}-{seed}.json"
            if file.exists() or (method == "none" and seed):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = bench.run(method, seed)
            write(file, found)
            bits = [sum(found[c]["bits"]) / sum(found[c]["bytes"]) for c in CORPORA if c in found]
            print(method, seed, [round(b, 3) for b in bits], found["probe"], found["cpu_seconds"], flush=True)
    runs = read(args.out)
    training = (data / "text/wikitext2-valid.txt").read_text("utf-8")
    sizes = {c: sum(predicted_bytes(tokenizer, text) for text in texts[c]) for c in CORPORA}
    reference = {c: sum(unigram(tokenizer, training, texts[c])) / sizes[c] for c in CORPORA}
    fit = sample(fitting, args.sentences, 0)
    words = sum(len(p.words) for p in fit)
    said = theirs(model, tokenizer, labelled(fit[:4], classes), classes)
    report = [
        f"{len(sites)} sites ({', '.join(args.kinds)}), model in {args.dtype}; fit on {sum(p.sentences for p in fit)} "
        f"sentences with {words} labelled words of {len(classes)} tags (seed 0); measured on {sizes['treebank'] / 1000:.1f} kB "
        f"of the treebank ({len(heldout)} documents) and {sizes['wikitext'] / 1000:.1f} kB of WikiText ({len(wiki)} articles).",
        table(runs),
        "Token frequencies alone: {treebank:.2f} and {wikitext:.2f} bits per byte. ".format(**reference)
        + f"Most frequent tag: {next(iter(runs.values()))[0]['majority']:.3f}.",
        "Differences, the same documents and seeds on both sides:",
        "\n".join(f"- {line}" for line in differences(runs)),
        "concept-erasure on the same model:",
        "\n".join(
            ["| call | outcome |", "|---|---|", *(f"| `{call}` | {what} |" for call, what in said.items())]
        ),
    ]
    print("\n" + "\n\n".join(report))
    if args.page:
        args.page.write_text(filled(args.page.read_text("utf-8"), "\n\n".join(report)), encoding="utf-8")
    if args.svg:
        args.svg.write_text(draw(runs, reference), encoding="utf-8")


if __name__ == "__main__":
    main()
