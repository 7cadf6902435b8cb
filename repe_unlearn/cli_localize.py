"""Command line: localize."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli import ForceOption, Model, QuietOption, _errors, _escape, _layers, _written, app, console
from .cli_unlearn import _facts
from .errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from .localize import Map, Pair

FILES = ("map.svg", "map.json")
_KINDS = ("resid_pre", "resid_post", "attn_in", "attn_out", "mlp_in", "mlp_out")
_METHODS = ("patch", "attribution")
_STEPS = 5  # of the averaged gradients; see docs/localize.md for how close they come to patching


@app.command()
def localize(
    model: Model,
    facts: Annotated[
        str,
        typer.Option(
            "--facts",
            "-f",
            help="Where to look for whose answers: 'capitals' or 'capitals:Asia', or a .jsonl or .csv file; "
            "facts with the role forget.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for map.svg and map.json.")],
    form: Annotated[str, typer.Option(help="Wordings: seen or unseen.")] = "seen",
    pairs: Annotated[int, typer.Option(help="Most pairs of prompts.", min=1)] = 8,
    kind: Annotated[str, typer.Option(help=f"Where: {', '.join(_KINDS)}.")] = "resid_pre",
    layers: Annotated[str, typer.Option(help="Layers, e.g. '0-9,20' (default all).")] = "",
    method: Annotated[
        str,
        typer.Option(
            help="patch: a run for every place; attribution: estimated from gradients, for large models."
        ),
    ] = "patch",
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find the layers and positions that carry the answers to some facts: a heat map and its numbers.

    A prompt that the model answers rightly is run with another subject in it, and the activation of the first run is
    put back at one place. What is shown is the share of the answer that this brings back.

    It is measured in one form of wording; whether the knowledge sits elsewhere too is for 'audit' to say.
    """
    with _errors():
        from .audit.writing import refuse_taken, write_together

        refuse_taken(out, FILES, force=force)
        for option, value, known in (
            ("--kind", kind, _KINDS),
            ("--method", method, _METHODS),
            ("--form", form, ("seen", "unseen")),
        ):
            if value not in known:
                raise InputError(f"got {option} {value!r}; needed one of {', '.join(known)}.")
        from .audit.figures import to_svg
        from .localize import attribute, fact_pairs, patch_activations
        from .localize.parts import parts
        from .models import load

        chosen = sorted(set(_layers(layers) or ())) or None
        source = _facts(facts)
        loaded = load(model, progress=not quiet)
        network, tokenizer = loaded.model, loaded.tokenizer
        parts(network, kind, chosen)  # refused before questions are asked
        made = fact_pairs(
            network,
            tokenizer,
            source,
            form=form,  # type: ignore[arg-type]  # checked above
            most=pairs,
            progress=not quiet,
        )
        options = {"positions": "groups", "layers": chosen, "progress": not quiet}
        if method == "patch":
            found = patch_activations(network, tokenizer, made, kind, **options)
        else:
            found = attribute(network, tokenizer, made, kind, path="inputs", steps=_STEPS, **options)
        found = _present(found)
        command = shlex.join(
            ["repe-unlearn", "localize", model, "--facts", facts, "--form", form, "--pairs", str(pairs)]
            + ["--kind", kind, "--method", method]
            + (["--layers", layers] if layers else [])
            + ["--out", str(out)]
        )
        facts_of_run = {
            "model": str(loaded.source),
            "fingerprint": loaded.fingerprint,
            "facts": repr(source),
            "command": command,
        }
        picture = to_svg(found.plot().figure)  # type: ignore[arg-type]  # a figure of its own
        contents = (picture, _json(found, made, facts_of_run))
        write_together(out, dict(zip(FILES, contents, strict=True)), force=force)
    console.print(_table(found))
    console.print(_escape(f"{len(made)} pairs, such as {made[0].clean!r} against {made[0].corrupt!r}"))
    for name in FILES:
        _written("written", out / name)


def _present(found: Map) -> Map:
    """Return a map without the positions that no prompt has, such as the middle of subjects of one token."""
    there = (~found.effects.isnan()).any(0).any(0)
    columns = tuple(name for name, kept in zip(found.columns, there.tolist(), strict=True) if kept)
    return replace(found, columns=columns, effects=found.effects[..., there])


def _json(found: Map, pairs: Sequence[Pair], facts: dict[str, str]) -> str:
    """Return a map as strict JSON, layers × columns; null where a prompt has no such position."""
    from .audit.record import to_strict_json

    return to_strict_json(
        {
            **facts,
            "kind": found.what,
            "method": found.method,
            "metric": found.metric,
            "layers": found.layers,
            "columns": found.columns,
            "recovery": _numbers(found.recovery.tolist()),
            "pairs": [
                {**asdict(pair), "gap": gap, "recovery": _numbers(values)}
                for pair, gap, values in zip(pairs, found.gaps.tolist(), found.per_pair.tolist(), strict=True)
            ],
        }
    )


def _numbers(rows: Sequence[Sequence[float]]) -> list[list[float | None]]:
    return [[None if value != value else value for value in row] for row in rows]


def _table(found: Map) -> Table:
    """Return one row per position: where most comes back, and in which layers at least half does."""
    from rich.table import Table

    table = Table(title=f"{found.what}: {found.method}")
    for column in ("position", "most recovered", "in layer", "at least half in layers"):
        table.add_column(column)
    for column, shares in zip(found.columns, found.recovery.T.tolist(), strict=True):
        most = max(range(len(shares)), key=shares.__getitem__)
        halves = [layer for layer, share in zip(found.layers, shares, strict=True) if share >= 0.5]
        table.add_row(column, f"{shares[most]:.0%}", str(found.layers[most]), _ranges(halves) or "none")
    return table


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as ``--layers`` takes them: 0-3,7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
