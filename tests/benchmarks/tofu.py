r"""Questions about made-up authors, taught and unlearned: the metrics of TOFU for every method, beside a model that never knew.

SmolLM2-135M is fine-tuned on questions to forget and to retain, and once more on those to retain only: the gold model that
forget quality compares with. Every method edits the first one, with the taught questions as its material. The files have
no paraphrases and, of the made-up authors, no false answers; ``false_answers`` makes some, from answers that no model was
taught.

    python tests/benchmarks/tofu.py --data FOLDER --out RESULTS --page docs/tofu.md
    python tests/benchmarks/tofu.py --data FOLDER --out QUICK --quick

FOLDER holds tofu/{forget,retain,real_authors,world_facts}.jsonl. Both fine-tuned models and one JSON file per method are kept
in RESULTS; what is there is not computed again.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from _kept import same_settings, write

from repe_unlearn import load, train
from repe_unlearn.audit import tofu
from repe_unlearn.facts import Fact, Facts
from repe_unlearn.measured import effort, patched
from repe_unlearn.methods import METHODS

PROMPT = "Question: {}\nAnswer:"  # as Facts.from_tofu asks
SETS = ("forget", "retain", "real_authors", "world_facts")
CUT = "closed_form_cut"  # closed_form, with answers cut into parts: see ``cut``
FREE = ("data", "out", "page", "methods")  # options that may differ between runs in one folder
CHOSEN = ("closed_form", CUT, "rmu", "grad_ascent", "grad_diff", "npo", "simnpo", "random")
# Fewer and smaller steps than METHODS has: one core, and texts of 35 tokens in place of seven.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "rmu": {"steps": 50, "batch": 4},
    "rmu_adaptive": {"steps": 50, "batch": 4},
    "grad_ascent": {"steps": 10, "batch": 4},
    "grad_diff": {"steps": 20, "batch": 4},
    "npo": {"steps": 20, "batch": 4},
    "simnpo": {"steps": 20, "batch": 4},
}
# open-unlearning, forget10 (400 questions), Llama-2-7B-chat, its own defaults: forget quality (p) and model utility.
PUBLISHED = {
    "taught": ("4e-25", "0.63"),
    "gold": ("1.0", "0.61"),
    "grad_ascent": ("1e-239", "0.00"),
    "grad_diff": ("2e-229", "0.58"),
    "npo": ("0.42", "0.54"),
    "simnpo": ("1e-198", "0.60"),
    "rmu": ("7e-21", "0.03"),
}


# ---- questions


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, its answer, and false ones."""

    question: str
    answer: str
    wrong: tuple[str, ...] = ()

    def entry(self) -> tofu.Entry:
        """Return it as the metrics want it."""
        return tofu.Entry(PROMPT.format(self.question), f" {self.answer}", tuple(f" {w}" for w in self.wrong))


_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_SPANS = (
    ("title", r"(?<!\w)[\"'“‘](?P<span>[A-Z][^\"“”]{2,60}?)[.,]?[\"'”’](?!\w)"),
    ("date", rf"(?P<span>{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?, \d{{4}}|\d\d/\d\d/\d{{4}})"),
    ("number", r"(?P<span>\b\d+\b)"),
    # A capital behind a word: not one that begins the sentence.
    ("name", r"(?<=[\w,] )(?P<span>[A-Z][\w-]+(?: [A-Z][\w-]+)*)"),
)


def spans(question: str, answer: str) -> list[tuple[str, int, int]]:
    """Return what the answer says and the question does not: titles, dates, numbers and names, as (kind, start, end).

    Names of one word, of two and of more are kinds of their own, since they are rarely of the same sort.
    """
    given = set(re.findall(r"\w+", question.lower()))
    taken: list[tuple[str, int, int]] = []
    for kind, pattern in _SPANS:
        for match in re.finditer(pattern, answer):
            start, end = match.span("span")
            words = re.findall(r"\w+", match["span"].lower())
            if any(start < e and s < end for _, s, e in taken) or given & {
                w for w in words if len(w) > 2 or w.isdigit()
            }:
                continue
            taken.append((f"name of {min(3, len(words))}" if kind == "name" else kind, start, end))
    return sorted(taken, key=lambda item: item[1])


def pools(untaught: Iterable[Asked], taught: str = "") -> dict[str, list[tuple[str, str]]]:
    """Return kind -> all that these answers say of it and the taught texts do not, each behind the word before it."""
    found: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for asked in untaught:
        for kind, start, end in spans(asked.question, asked.answer):
            if asked.answer[start:end] not in taught:
                found[kind].add((_before(asked.answer, start), asked.answer[start:end]))
    return {kind: sorted(pairs) for kind, pairs in found.items()}


def _before(text: str, start: int) -> str:
    return "".join(re.findall(r"\w+", text[:start].lower())[-1:])


def false_answers(
    asked: Asked, pool: Mapping[str, Sequence[tuple[str, str]]], count: int, seed: int
) -> Asked:
    """Return the question with false answers: the sentence of the true one, and all that it says from other authors.

    What stood behind the same word ("in", "named") elsewhere is taken where there is enough of it.
    """
    rng = random.Random(f"{seed} {asked.question}")
    wrong: list[str] = []
    for _ in range(100):
        text = asked.answer
        for kind, start, end in reversed(spans(asked.question, asked.answer)):
            alike = [option for word, option in pool[kind] if word == _before(asked.answer, start)]
            options = alike if len(alike) > count else [option for _, option in pool[kind]]
            text = text[:start] + rng.choice(options) + text[end:]
        wrong += [text] * (text not in (*wrong, asked.answer))
        if len(wrong) == count:
            return replace(asked, wrong=tuple(wrong))
    raise SystemExit(f"too few false answers to {asked.question!r}")


def read(folder: Path, name: str) -> list[Asked]:
    """Read one of the four files."""
    rows = map(json.loads, (folder / "tofu" / f"{name}.jsonl").read_text("utf-8").splitlines())
    return [Asked(r["question"], r["answer"], tuple(r.get("perturbed_answer", ()))) for r in rows]


def choose(
    forget: Sequence[Asked], retain: Sequence[Asked], sizes: tuple[int, int], wrong: int
) -> tuple[list[Asked], list[Asked]]:
    """Return the shortest questions of both sets, with false answers made of all that is not chosen.

    Of those whose answer says something that the question does not: only there is a false answer possible.
    """
    taken = []
    for some, count in zip((forget, retain), sizes, strict=True):
        able = [a for a in some if spans(a.question, a.answer)]
        short = set(sorted(able, key=lambda a: len(a.question + a.answer))[:count])
        taken.append([a for a in some if a in short])
    both = {a for some in taken for a in some}
    told = "\n".join(f"{a.question}\n{a.answer}" for a in both)
    pool = pools((a for a in (*forget, *retain) if a not in both), told)
    first, second = ([false_answers(a, pool, wrong, 0) for a in some] for some in taken)
    return first, second


def every(some: Sequence[Asked], count: int) -> list[Asked]:
    """Return ``count`` of them, evenly spread."""
    return [some[i * len(some) // count] for i in range(count)] if count < len(some) else list(some)


def facts(forget: Sequence[Asked], retain: Sequence[Asked]) -> Facts:
    """Return the questions as facts, asked as they were taught."""
    both = [Fact(a.question, "question", a.answer, (), "forget") for a in forget]
    both += [Fact(a.question, "question", a.answer, (), "retain") for a in retain]
    return Facts(tuple(both), {"question": {"seen": (PROMPT.format("{subject}"),)}}, "tofu")


def cut(whole: Facts, parts: int = 3) -> Facts:
    """Return every fact once for each beginning of its answer, which the question then includes.

    ``closed_form`` edits what is read from the last token of a question: with short answers that decides all, with a
    sentence only its first word.
    """
    pieces: list[Fact] = []
    for fact in whole:
        words = fact.answer.split()
        for k in sorted({len(words) * part // parts for part in range(parts)}):
            begun = " ".join([PROMPT.format(fact.subject), *words[:k]])
            pieces.append(Fact(begun, "question", " ".join(words[k:]), (), fact.role))
    return Facts(tuple(pieces), {"question": {"seen": ("{subject}",)}}, f"{whole.name}, answers cut")


# ---- models


def teach(questions: Sequence[Asked], folder: Path, args: argparse.Namespace) -> Any:
    """Return the model that was fine-tuned on the answers of these questions; it is kept in a folder."""
    if not folder.exists():
        model, tokenizer, _ = load(dtype="float32", progress=False)
        samples = train.from_pairs((PROMPT.format(a.question), a.answer) for a in questions)
        likely = train.Objective(lambda logp, counts, _: -logp[counts].mean(), alpha=0.0)
        steps = max(1, round(args.epochs * len(samples) / args.batch))
        run = train.unlearn(
            model,
            tokenizer,
            samples,
            method=likely,
            steps=steps,
            lr=args.lr,
            batch=args.batch,
            accumulate=1,
            parameters=r"\.layers\.",
            progress=False,
        )
        losses = [step.forget for step in run.history]
        print(
            f"{folder.name}: {steps} steps, {run.seconds:.0f} s, loss {losses[0]:.2f} to {losses[-1]:.2f}",
            flush=True,
        )
        for name, edit in run.patch.edits.items():
            weight = model.get_parameter(name)
            weight.data.copy_(edit.apply(weight.data))
        part = folder.with_name(f"{folder.name}.part")
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(folder)
    return load(folder, dtype="float32", progress=False)


def measure(
    loaded: Any, questions: Mapping[str, Sequence[Asked]], args: argparse.Namespace
) -> dict[str, Any]:
    """Return all metrics of every question of the four sets."""
    found = {}
    for name, some in questions.items():
        scores = tofu.score(
            loaded.model,
            loaded.tokenizer,
            [asked.entry() for asked in some],
            max_new_tokens=args.tokens,
            progress=False,
        )
        found[name] = {key: values.tolist() for key, values in asdict(scores).items()}
    return found


def run(
    name: str, taught: Any, source: Facts, questions: Mapping[str, Sequence[Asked]], args: Any
) -> dict[str, Any]:
    """Edit the taught model with one method, and measure."""
    method = METHODS["closed_form" if name == CUT else name]
    options = dict(SETTINGS.get(name, {}))
    if args.quick and "steps" in options:
        options["steps"] = 2
    material = cut(source) if name == CUT else source
    patch, spent = effort(
        lambda: method.run(taught.model, taught.tokenizer, material, progress=False, **options)
    )
    shares = [row.relative for row in patch.report(taught.model)]
    with patched(taught.model, patch):
        scores = measure(taught, questions, args)
    settings = {k: v for k, v in method.settings(options).items() if isinstance(v, int | float | str)}
    return {
        "scores": scores,
        "seconds": spent.seconds,
        "relative": float(np.mean(shares)),
        "settings": settings,
    }


# ---- the table


def results(scores: Mapping[str, Any], name: str) -> tofu.Results:
    """Return the stored metrics of one set."""
    return tofu.Results(**{key: np.array(values, dtype=np.float64) for key, values in scores[name].items()})


def row(name: str, found: Mapping[str, Any], gold: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of one model."""
    sets = {key: results(found["scores"], key) for key in SETS}
    forget = sets["forget"]
    quality = tofu.forget_quality(forget.truth_ratio, results(gold["scores"], "forget").truth_ratio)
    return {
        "method": name,
        "probability": float(forget.probability.mean()),
        "rouge": float(forget.rouge.mean()),
        "strength": float(forget.strength.mean()),
        "truth_ratio": tofu.truth_ratio_forget(forget.truth_ratio),
        "distance": quality.distance,
        "p": quality.p,
        "critical": quality.critical,
        "utility": tofu.model_utility(sets["retain"], sets["real_authors"], sets["world_facts"]),
        "kept": float(sets["retain"].probability.mean()),
        "kept_rouge": float(sets["retain"].rouge.mean()),
        "real": float(sets["real_authors"].share.mean()),
        "world": float(sets["world_facts"].share.mean()),
        "relative": found.get("relative"),
        "seconds": found.get("seconds"),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| model | forget: probability | forget: ROUGE-L | forget: extraction strength | forget: truth ratio | KS distance "
        "| forget quality, p | utility | retain: probability | retain: ROUGE-L | real authors | world facts "
        "| edit, relative | seconds | published: p | published: utility |",
        "|" + "---|" * 16,
    ]
    shown = (
        "probability", "rouge", "strength", "truth_ratio", "distance", "p", "utility", "kept", "kept_rouge", "real",
        "world",
    )  # fmt: skip
    for r in rows:
        cells = [f"{r[key]:.2g}" if key == "p" else f"{r[key]:.2f}" for key in shown]
        cells.append("–" if r["relative"] is None else f"{r['relative']:.3f}")
        cells.append("–" if r["seconds"] is None else f"{r['seconds']:.0f}")
        lines.append(f"| {' | '.join([r['method'], *cells, *PUBLISHED.get(r['method'], ('–', '–'))])} |")
    return "\n".join(lines)


def filled(page: str, report: str) -> str:
    """Return the page with the report between its markers."""
    head, begin, rest = page.partition("<!-- results: begin -->\n")
    _, end, tail = rest.partition("<!-- results: end -->")
    if not (begin and end):
        raise SystemExit("the page needs the lines <!-- results: begin --> and <!-- results: end -->")
    return f"{head}{begin}\n{report}\n\n{end}{tail}"


def stored(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what was measured, the models without an edit first."""
    for name in ("untaught", "taught", "gold", CUT, *METHODS):
        file = folder / f"{name}.json"
        if file.exists():
            yield name, json.loads(file.read_text("utf-8"))


# ---- the run


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--data", type=Path, default=Path("../shared/data"))
    result.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "tofu-runs")
    result.add_argument("--page", type=Path, help="also put the table between the markers of this file")
    result.add_argument("--methods", nargs="+", choices=(*METHODS, CUT), default=CHOSEN)
    result.add_argument("--forget", type=int, default=32, help="questions to forget")
    result.add_argument("--retain", type=int, default=32, help="questions to retain")
    result.add_argument("--measured", type=int, default=12, help="questions measured of each other set")
    result.add_argument("--wrong", type=int, default=2, help="false answers of a question")
    result.add_argument("--tokens", type=int, default=16, help="longest answer that is generated")
    result.add_argument("--epochs", type=float, default=5, help="of fine-tuning")
    result.add_argument("--batch", type=int, default=8, help="questions per step of fine-tuning")
    result.add_argument("--lr", type=float, default=4e-4, help="of fine-tuning")
    result.add_argument("--quick", action="store_true", help="a few questions and steps: does it run?")
    return result


def main() -> None:
    """Compute what is missing and print the table."""
    from _side_by_side import machine

    args = parser().parse_args()
    if args.quick:
        args.forget, args.retain, args.measured, args.epochs, args.tokens = 6, 6, 4, 2, 4
    args.out.mkdir(parents=True, exist_ok=True)
    same_settings(args, FREE)
    all_forget, all_retain, authors, world = (read(args.data, name) for name in SETS)
    forget, retain = choose(all_forget, all_retain, (args.forget, args.retain), args.wrong)
    some = every(retain, args.measured), every(authors, args.measured), every(world, args.measured)
    questions: dict[str, Sequence[Asked]] = dict(zip(SETS, (forget, *some), strict=True))

    def keep(name: str, make: Any) -> None:
        file: Path = args.out / f"{name}.json"
        if not file.exists():
            start = time.perf_counter()
            found = make()
            write(file, found)
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)

    keep("gold", lambda: {"scores": measure(teach(retain, args.out / "gold-model", args), questions, args)})
    taught = teach([*forget, *retain], args.out / "taught-model", args)
    keep("taught", lambda: {"scores": measure(taught, questions, args)})
    keep("untaught", lambda: {"scores": measure(load(dtype="float32", progress=False), questions, args)})
    source = facts(forget, retain)
    for name in args.methods:
        try:
            keep(name, lambda name=name: run(name, taught, source, questions, args))
        except Exception as error:  # one that fails must not take the others along
            print(f"{name} failed: {type(error).__name__}: {error}", flush=True)
    found = dict(stored(args.out))
    rows = [row(name, one, found["gold"]) for name, one in found.items()]
    report = "\n\n".join(
        [
            f"{len(forget)} questions to forget, {len(retain)} to retain; measured on all of the former and on "
            f"{len(some[0])} retained ones, {len(some[1])} on real authors and {len(some[2])} on the world. Fine-tuned for "
            f"{args.epochs:g} epochs. Two samples of {len(forget)} truth ratios differ (p < 0.05) from a KS distance of "
            f"{rows[0]['critical']:.2f} on. {machine('transformers')}.",
            table(rows),
        ]
    )
    print(f"\n{report}")
    if args.page:
        args.page.write_text(filled(args.page.read_text("utf-8"), report), encoding="utf-8")


if __name__ == "__main__":
    main()
