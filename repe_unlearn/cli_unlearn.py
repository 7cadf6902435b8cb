"""Command line: unlearn, end to end."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli import (
    ForceOption,
    Model,
    QuietOption,
    SeedOption,
    _errors,
    _escape,
    _exit,
    _layers,
    _written,
    app,
    console,
)
from .errors import InputError, OutputExistsError

if TYPE_CHECKING:
    from rich.table import Table

    from .audit.report import Report
    from .facts import Facts, Role
    from .facts_files import Corpus
    from .measured import Measured
    from .outlook import Outlook

PATCH = "patch.safetensors"
MODEL = "model"


@app.command()
def unlearn(
    model: Model,
    forget: Annotated[
        str,
        typer.Option(
            help="capitals:Europe or planted (built in), a .csv or .jsonl file of facts, a folder with forget.jsonl and "
            "retain.jsonl, or free text: .txt, or .jsonl with the column text."
        ),
    ],
    out: Annotated[Path, typer.Option(help=f"Folder to make: {PATCH}, report.html, report.md, report.json.")],
    retain: Annotated[
        Path | None, typer.Option(help="Free text to keep (.txt, .jsonl), or questions and answers to keep.")
    ] = None,
    method: Annotated[str, typer.Option(help="See docs/unlearn.md for all of them.")] = "closed_form",
    layers: Annotated[
        str, typer.Option(help="Layers to edit, e.g. '10-29'; default those of the method.")
    ] = "",
    alpha: Annotated[
        float | None, typer.Option(help="Weight of what is to be kept, for methods that have one.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="Further settings of the method: -o steps=40 -o lr=1e-4."),
    ] = None,
    auto: Annotated[
        bool,
        typer.Option(
            "--auto", help="Let the spectrum of the activations choose layers and alpha, then measure."
        ),
    ] = False,
    known: Annotated[
        int,
        typer.Option(help="Leave out facts that the model knows in fewer wordings; 0 takes all.", min=0),
    ] = 2,
    checkpoint: Annotated[
        bool, typer.Option("--checkpoint", help=f"Also write the edited model to OUT/{MODEL}.")
    ] = False,
    seed: SeedOption = 0,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a model forget facts or a text, and measure what that did to what should stay.

    Only 'seen' wordings go into the method; what is reported is over unseen ones, next to neighbours, other facts and
    neutral text.

    The folder appears whole or not at all. Exit code 3 if a check fails.
    """
    with _errors():
        _refuse_taken(out, force)
        from .architectures import Architecture
        from .export.checkpoint import checkpoint as write_checkpoint
        from .export.folder import new_folder
        from .facts import Facts
        from .measured import attempt, measure
        from .methods import method_named
        from .models import load

        chosen = method_named(method)
        options = _options(layers, alpha, option or [])
        chosen.settings(options)
        source, corpus = _read(forget, retain)
        if auto and not isinstance(source, Facts):
            raise InputError("--auto needs facts, at whose questions it looks; got free text.")
        if auto and "layers" not in chosen.options:
            raise InputError(f"--auto chooses layers, which {method} has no option for; leave it out.")
        loaded = load(model, progress=not quiet)
        network, tokenizer = loaded.model, loaded.tokenizer
        if layers:
            Architecture.of(network).sites(
                "mlp_out", layers=options["layers"]
            )  # refused before questions are asked
        outlook = None
        if isinstance(source, Facts):
            if known:
                source = _known(network, tokenizer, source, known, not quiet)
            if auto:
                from .outlook import foresee

                given = chosen.settings(options)
                same = {name: given[name] for name in ("target", "ridge", "beta") if name in given}
                outlook = foresee(
                    network,
                    tokenizer,
                    source,
                    layers=options.get("layers"),
                    progress=not quiet,
                    **(same if method.startswith("closed_form") else {}),
                )
                console.print(_escape(repr(outlook)), soft_wrap=True, highlight=False)
                options["layers"] = list(outlook.chosen)
                if alpha is None and method.startswith("closed_form"):
                    options["alpha"] = outlook.alpha
        with new_folder(out, force) as folder:
            before = measure(network, tokenizer, source, retain=corpus, progress=not quiet)
            patch, after = attempt(
                network,
                tokenizer,
                source,
                chosen,
                options,
                retain=corpus,
                seed=seed,
                progress=not quiet,
            )
            command = shlex.join(
                ["repe-unlearn", "unlearn", model, "--forget", forget, "--method", method]
                + (["--retain", str(retain)] if retain else [])
                + (["--layers", layers] if layers else [])
                + (["--alpha", f"{alpha:g}"] if alpha is not None else [])
                + [word for text in option or [] for word in ("-o", text)]
                + (["--auto"] if auto else [])
                + ["--known", str(known), "--seed", str(seed), "--out", str(out)]
            )
            report = _report(source, before, after, str(loaded.source), loaded.fingerprint, outlook, command)
            patch.save(folder / PATCH)
            report.save(folder)
            if checkpoint:
                write_checkpoint(
                    loaded.source, patch, folder / MODEL, tokenizer=tokenizer, progress=not quiet
                )
    console.print(_table(before, after, outlook))
    console.print(f"\n[bold]{_escape(report.verdict)}[/]")
    _written("patch", out / PATCH)
    _written("report", out / "report.html")
    if checkpoint:
        _written("patched model", out / MODEL)
    _exit(report.passed)


def _refuse_taken(out: Path, force: bool) -> None:
    """Refuse a place that must not be written; only an earlier result or an empty folder is ever replaced."""
    if not (out.exists() or out.is_symlink()):
        return
    if not force:
        raise OutputExistsError(f"{out} exists; choose another folder or pass --force.")
    folder = out.is_dir() and not out.is_symlink()
    if not folder or (any(out.iterdir()) and not (out / PATCH).is_file()):
        raise OutputExistsError(f"{out} is not replaced even with --force: it holds no {PATCH}.")


def _options(layers: str, alpha: float | None, given: list[str]) -> dict[str, Any]:
    """Return the options of a method from the command line; values are JSON where they can be, else text."""
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise InputError(f"got --option {text!r}; needed NAME=VALUE, such as steps=40.")
        try:
            found[name.strip()] = json.loads(value)
        except ValueError:
            found[name.strip()] = value
    if alpha is not None:
        found["alpha"] = alpha
    if layers:
        found["layers"] = _layers(layers)
    return found


def _read(forget: str, retain: Path | None) -> tuple[Facts | Corpus, Corpus | None]:
    """Return what to forget, and free text to keep if there is any."""
    from .facts import Facts
    from .facts_files import Corpus
    from .readers import read_jsonl

    path = Path(forget)
    columns = set(read_jsonl(path).columns) if path.suffix == ".jsonl" and path.is_file() else set()
    if {"question", "answer"} <= columns:
        if retain is None:
            raise InputError(
                f"{forget} holds questions and answers to forget; needed --retain, a file of others."
            )
        return Facts.from_tofu(path, retain), None
    corpus = None if retain is None else Corpus.read(retain)
    if path.suffix == ".txt" or "text" in columns:
        if corpus is None:
            raise InputError(f"{forget} is free text to forget; needed --retain, a file of text to keep.")
        return Corpus.read(path), corpus
    return _facts(forget), corpus


def _facts(source: str) -> Facts:
    """Return the facts that the command line names: capitals:Europe, planted, a file or a folder."""
    from .facts import Facts

    path, (name, colon, rest) = Path(source), source.partition(":")
    if colon and not path.exists():
        what = rest.split(",")
        return Facts.builtin(name, forget=what[0] if len(what) == 1 else what)
    return Facts.read(path if path.exists() or path.suffix else source)


def _known(model: Any, tokenizer: Any, facts: Facts, wordings: int, progress: bool) -> Facts:
    """Return the facts that the model knows in so many wordings, or in all if there are fewer."""
    from .answers import answers

    roles: list[Role] = [role for role in facts.roles if role != "decoy"]
    fewest = min(len(t.get("seen", ())) + len(t.get("unseen", ())) for t in facts.templates.values())
    found = answers(model, tokenizer, facts, roles=roles, progress=progress).known(min(wordings, fewest))
    for role in roles:
        if role != "neighbour" and role not in found.roles:
            raise InputError(
                f"the model knows none of the facts to {role}; use another model or facts, or --known 0 to take all."
            )
    counts = ", ".join(
        f"{sum(f.role == r for f in found)} of {sum(f.role == r for f in facts)} {r}" for r in roles
    )
    console.print(f"known: {counts}", highlight=False)
    return found


def _report(
    source: Facts | Corpus,
    before: Measured,
    after: Measured,
    model: str,
    fingerprint: str,
    outlook: Outlook | None,
    command: str,
) -> Report:
    from .audit.report import Check, Report
    from .facts import Facts
    from .measured import COLUMNS, GOALS

    checks = list(GOALS.checks(before, after)) if isinstance(source, Facts) else []
    listed = {check.name for check in checks}
    for name, value in after.rows():
        if name not in listed and name not in ("seconds", "peak_bytes"):
            then = getattr(before, name)
            control = None if math.isnan(then) else then
            checks.append(Check(name, value, "", None, control=control, note=COLUMNS[name]))
    failed = [
        f"{check.name} {check.value:.3g} (needed {check.bound})" for check in checks if check.passed is False
    ]
    judged = any(check.passed is not None for check in checks)
    verdict = (
        "Measured; free text has no bounds of its own, read the numbers."
        if not judged
        else f"Not reached: {', '.join(failed)}."
        if failed
        else "No longer said in unseen wordings, and what should stay is there."
        + (
            ""
            if math.isnan(after.forget_chosen)
            else f" Among the options it still picks the right one in {after.forget_chosen:.0%}."
        )
        + " Not attacked."
    )
    facts = {
        "model": model,
        "fingerprint": fingerprint,
        "forgets": repr(source),
        "method": after.method,
        "settings": json.dumps(dict(after.settings), default=str),
        "seed": after.seed,
        "command": command,
        "seconds": f"{after.seconds:.1f}",
        "not attacked": "This report asks plainly. Whether the knowledge comes back under attack is for an audit to say.",
    }
    if not math.isnan(after.peak_bytes):
        facts["peak memory"] = f"{after.peak_bytes / 2**30:.2f} GiB"
    if outlook is not None:
        facts["predicted"] = repr(outlook)
    return Report(
        f"Unlearning by {after.method}",
        str(source.name),
        tuple(checks),
        (),
        {k: str(v) for k, v in facts.items()},
        verdict,
    )


def _table(before: Measured, after: Measured, outlook: Outlook | None) -> Table:
    from rich.table import Table

    from .measured import COLUMNS

    table = Table(title=after.method)
    for column in ("measure", "before", "after", *(["predicted"] if outlook else [])):
        table.add_column(column, overflow="fold")
    predicted = {}
    if outlook is not None:
        # What is left of the wanted change at the best weight, next to what is left of the answers.
        predicted = {
            "forget_seen": f"{outlook.best[1].remaining:.0%} of the change missing",
            "retain": f"moved by {outlook.best[1].distortion:.1%}",
        }
    for name, value in after.rows():
        then = getattr(before, name)
        cells = [COLUMNS[name], "" if math.isnan(then) else f"{then:.3g}", f"{value:.3g}"]
        table.add_row(*cells, *([predicted.get(name, "")] if outlook else []))
    return table
