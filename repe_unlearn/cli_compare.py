"""Command line: compare two audits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import cli
from .errors import FileFormatError, InputError

if TYPE_CHECKING:
    from .audit import Report


@cli.app.command()
def compare(
    first: Annotated[
        Path,
        typer.Argument(metavar="REPORT_A", help="Folder of a report that 'audit' wrote, or its .json file."),
    ],
    second: Annotated[Path, typer.Argument(metavar="REPORT_B", help="The other one.")],
    names: Annotated[
        str, typer.Option(help="What to call the two, e.g. 'RMU,NPO'; default the names of their folders.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Folder for comparison.md and comparison.html.")] = None,
    force: cli.ForceOption = False,
) -> None:
    """Set two audits side by side: verdicts, every leak and cost, and the settings in which they differ.

    Nothing is run. The exit code is 0 whatever the two found: a comparison has no bound of its own.
    """
    with cli._errors():
        from rich.markdown import Markdown

        from .audit.compare import FILES
        from .audit.compare import compare as beside
        from .audit.writing import refuse_taken

        if out is not None:
            refuse_taken(out, FILES, force=force)
        both = beside(_report(first), _report(second), names=_names(names, first, second))
        page = None if out is None else both.save(out, force=force)
    cli.console.print(Markdown(both.to_markdown()))
    if page is not None:
        cli._written("comparison", page)


def _report(path: Path) -> Report:
    """Read a report from its folder or file."""
    from .audit import Report

    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"no file {file}; needed the folder of a report, or its report.json.")
    try:
        return Report.from_json(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{file} is no text; needed the report.json of an audit.") from error
    except FileFormatError as error:
        raise FileFormatError(f"{file}: {error}") from error


def _names(given: str, first: Path, second: Path) -> tuple[str, str]:
    """Return what to call the two reports: as given, else their folders, else their paths where these are alike."""
    if given:
        a, comma, b = (part.strip() for part in given.partition(","))
        if not (a and comma and b) or "," in b:
            raise InputError(f"got --names {given!r}; needed two, such as 'RMU,NPO'.")
        return a, b
    folders = [(path.parent if path.name == "report.json" else path).absolute() for path in (first, second)]
    a, b = (folder.name or str(folder) for folder in folders)
    return (a, b) if a != b else (str(first), str(second))
