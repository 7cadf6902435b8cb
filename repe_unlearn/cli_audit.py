"""Command line: audit."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import cli
from .errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from .patch import Patch
    from .plan import ErasurePlan

_PAIRS, _SELECT = 900, "mean"  # what 'fit' takes by default


@cli.app.command()
def audit(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The original model, as elsewhere.")],
    edited: Annotated[
        str,
        typer.Argument(
            metavar="EDITED",
            help="The same model after any edit, by any tool: a folder, a .gguf file or a hub name; or a patch file; or a "
            "plan file, which is audited as somebody who can only ask would see it.",
        ),
    ],
    facts: Annotated[
        str,
        typer.Option(
            "--facts",
            "-f",
            help="What was to be forgotten and to stay: 'capitals', or a .jsonl or .csv file.",
        ),
    ] = "",
    contrast: Annotated[
        str,
        typer.Option(
            "--contrast",
            "-c",
            help="In place of --facts, for an erased attribute: 'gender', 'tense', or a .jsonl or .csv file of labelled "
            "prompts. For a plan this is 'verify'.",
        ),
    ] = "",
    site: Annotated[
        list[str] | None,
        typer.Option(
            help="With --contrast, where to read: module paths such as model.layers.3.mlp.up_proj, may be repeated; default "
            "the stream behind up to 8 blocks."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html, report.md, report.json.")] = Path(
        "report"
    ),
    level: Annotated[str, typer.Option(help="quick, standard or full.")] = "standard",
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="In place of the attacks of the level: one by name (relearn.facts) or kind (relearn); may be repeated."
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Most minutes; attacks that do not fit are left out, and the report lists them."),
    ] = None,
    gold: Annotated[
        str, typer.Option(help="A model of the same shape that never knew, if there is one.")
    ] = "",
    kept: Annotated[
        list[str] | None,
        typer.Option(
            help="Facts from elsewhere that should stay: a .jsonl of questions and answers (TOFU's world facts), or as "
            "--facts; may be repeated. What is lost there counts as damage."
        ),
    ] = None,
    tier: Annotated[
        int, typer.Option(help="Strongest attacker: 0 asks, 1 reads the model, 2 changes it.", min=0, max=2)
    ] = 2,
    seeds: Annotated[
        int, typer.Option(help="Runs of every attack that draws at random, at the full level.", min=1)
    ] = 1,
    resume: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps what is done, so that an interrupted audit goes on from there."),
    ] = None,
    seed: cli.SeedOption = 0,
    force: cli.ForceOption = False,
    quiet: cli.QuietOption = False,
) -> None:
    """Find out whether knowledge was removed from a model or merely hidden, and write a report.

    Exit code 0 only if nothing was recovered at this budget and nothing is damaged; 3 for every other verdict
    (NOT_FORGOTTEN, HIDDEN, INCONCLUSIVE, or a flag).
    """
    with cli._errors():
        from .audit.report import FILES
        from .audit.writing import refuse_taken

        refuse_taken(out, FILES, force=force)
        if bool(facts) == bool(contrast):
            raise InputError("got both or none of --facts and --contrast; needed one of them.")
        if contrast:
            if level != "standard" or only or minutes or gold or kept or tier != 2 or seeds != 1 or resume:
                raise InputError(
                    "got --contrast with an option of attacks on facts (--level, --only, --minutes, --gold, --kept, "
                    "--tier, --seeds, --resume); they go with --facts."
                )
            _attribute(base, edited, contrast, site or (), out, seed, force, quiet)
            return
        if site:
            raise InputError("got --site with --facts; it goes with --contrast.")
        from .audit import audit as run
        from .facts import Facts
        from .models import load

        known = Facts.read(facts)
        loaded = load(base, progress=not quiet)
        report = run(
            loaded.model,
            _edited(edited, quiet),
            loaded.tokenizer,
            known,
            level=level,
            only=only or None,
            minutes=minutes,
            gold=load(gold, progress=not quiet).model if gold else None,
            tier_limit=tier,
            kept=kept or (),
            seed=seed,
            seeds=seeds,
            resume=resume,
            command=_command(
                base, edited, facts, level, only or (), minutes, gold, kept or (), tier, seeds, seed
            ),
            progress=not quiet,
        )
        page = report.save(out, force=force)
    cli.console.print(report.table())
    cli.console.print(f"\n[bold]{cli._escape(report.facts['verdict'])}[/]: {cli._escape(report.verdict)}")
    cli._written("report", page)
    cli._exit(report.passed)


def _attribute(
    base: str,
    edited: str,
    contrast: str,
    sites: Sequence[str],
    out: Path,
    seed: int,
    force: bool,
    quiet: bool,
) -> None:
    """Audit an erased attribute; the split is the one that 'fit' makes by default."""
    from .audit import audit_contrast
    from .models import load
    from .plan import ErasurePlan
    from .recipe import Recipe
    from .sites import Site

    other = _edited(edited, quiet)
    if isinstance(other, ErasurePlan):
        if sites:
            raise InputError("got --site with a plan, which is verified at its own sites.")
        cli.verify(base, Path(edited), out, contrast=contrast, seed=seed, force=force, quiet=quiet)
        return
    fitting, heldout = Recipe(contrast, _PAIRS, seed=seed).split()
    loaded = load(base, progress=not quiet)
    words = ["repe-unlearn", "audit", base, edited, "--contrast", contrast, "--seed", str(seed)]
    words += [word for site in sites for word in ("--site", site)]
    report = audit_contrast(
        loaded.model,
        other,
        loaded.tokenizer,
        fit=fitting,
        heldout=heldout,
        sites=[Site.parse(one) for one in sites] or None,
        select=_SELECT,
        seed=seed,
        command=shlex.join(words),
        progress=not quiet,
    )
    page = report.save(out, force=force)
    cli.console.print(report.table())
    cli.console.print(f"\n[bold]{cli._escape(report.verdict)}[/]")
    cli._written("report", page)
    cli._exit(report.passed)


def _edited(edited: str, quiet: bool) -> nn.Module | Patch | ErasurePlan:
    if Path(edited).suffix != ".safetensors":
        from .models import load

        return load(edited, progress=not quiet).model
    from .patch import Patch
    from .plan import ErasurePlan
    from .tensorfile import kind_of

    is_plan = kind_of(edited, among=("patch", "erasure plan")) == "erasure plan"
    return ErasurePlan.load(edited) if is_plan else Patch.load(edited)


def _command(
    base: str,
    edited: str,
    facts: str,
    level: str,
    only: Sequence[str],
    minutes: float | None,
    gold: str,
    kept: Sequence[str],
    tier: int,
    seeds: int,
    seed: int,
) -> str:
    words = ["repe-unlearn", "audit", base, edited, "--facts", facts, "--level", level]
    words += [word for name in only for word in ("--only", name)]
    words += ["--minutes", f"{minutes:g}"] if minutes else []
    words += ["--gold", gold] if gold else []
    words += [word for one in kept for word in ("--kept", one)]
    words += ["--tier", str(tier), "--seeds", str(seeds), "--seed", str(seed)]
    return shlex.join(words)
