"""The command `compare`, on reports with numbers written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from repe_unlearn.audit import Check, Report
from repe_unlearn.cli import app


def run(*args: object) -> Any:
    return CliRunner().invoke(app, ["compare", *map(str, args)], env={"COLUMNS": "200"})


def said(result: Any) -> str:
    return " ".join(result.output.split())


def plain(page: Path) -> str:
    """Return a Markdown file without its escapes."""
    return page.read_text().replace("\\", "")


def audit(folder: Path, verdict: str, leak: float, **more: float) -> Path:
    """Write what an audit writes: one leak, other measures, a verdict."""
    checks = [Check.at_most("leak.lens", leak, 0.1, low=leak - 0.5, high=leak + 0.5)]
    checks += [Check.at_most(name.replace("_", "."), value, 1.0) for name, value in more.items()]
    facts = {"verdict": verdict, "seed": str(len(more))}
    Report("Audit", "", tuple(checks), (), facts, f"It is {verdict}.").save(folder)
    return folder


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return (
        audit(tmp_path / "rmu", "HIDDEN", 0.625),
        audit(tmp_path / "npo", "INCONCLUSIVE", 0.031, cost_retained=0.25),
    )


def test_two_reports_side_by_side(two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    result = run(two[0], two[1] / "report.json", "--out", out)  # a folder, and a file
    assert result.exit_code == 0, result.output  # although one of them failed
    text = said(result)
    for words in (
        "rmu npo",
        "verdict HIDDEN INCONCLUSIVE",
        "leak.lens 0.625 [0.125, 1.125], FAIL 0.031 [-0.469, 0.531], pass",
        "seed: 0 | 1",
    ):
        assert words in text
    assert "cost.retained not run 0.250, pass" in text
    assert {path.name for path in out.iterdir()} == {"comparison.md", "comparison.html"}
    assert "| leak.lens | 0.625 [0.125, 1.125], FAIL | 0.031 [-0.469, 0.531], pass |" in plain(
        out / "comparison.md"
    )
    again = run(*two, "--out", out)
    assert again.exit_code == 1
    assert "already there" in said(again)
    swapped = run(two[1], two[0], "--names", "B, A", "--out", out, "--force")
    assert swapped.exit_code == 0, swapped.output
    assert "| leak.lens | 0.031 [-0.469, 0.531], pass | 0.625 [0.125, 1.125], FAIL |" in plain(
        out / "comparison.md"
    )
    assert "verdict INCONCLUSIVE HIDDEN" in said(swapped)


def test_folders_of_one_name_are_called_by_their_paths(tmp_path: Path) -> None:
    a, b = (audit(tmp_path / which / "report", "HIDDEN", 0.5) for which in ("a", "b"))
    result = run(a, b, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert f"| {a} | {b} |" in plain(tmp_path / "out" / "comparison.md")


def test_mistakes_are_answered_in_words(two: tuple[Path, Path], tmp_path: Path) -> None:
    Report("Verification", "", (Check.at_most("kl", 0.0, 1.0),), (), {}).save(tmp_path / "verified")
    (tmp_path / "broken.json").write_text('{"kind": ')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    for given, complaint in (
        ([two[0], two[0]], "needed two different"),
        ([two[0], tmp_path / "verified"], "no verdict of an audit"),
        ([two[0], tmp_path / "empty"], "needed the folder of a report"),
        ([two[0], tmp_path / "nowhere"], "no file"),
        ([two[0], tmp_path / "broken.json"], "broken.json: this is not strict JSON"),
        ([two[0], tmp_path / "bytes.json"], "is no text"),
        ([*two, "--names", "RMU"], "needed two, such as"),
        ([*two, "--names", "a,a"], "needed two different"),
    ):
        result = run(*given, "--out", out)
        assert result.exit_code == 1, result.output
        assert complaint in said(result), result.output
        assert not out.exists()


def test_a_leak_without_an_interval_is_drawn_as_a_point(tmp_path: Path) -> None:
    for name in ("a", "b"):
        check = Check.at_most("leak.lens", 0.25, 0.1)
        Report("Audit", "", (check,), (), {"verdict": "HIDDEN"}, "It is hidden.").save(tmp_path / name)
    result = run(tmp_path / "a", tmp_path / "b", "--out", tmp_path / "both")
    assert result.exit_code == 0, result.output
    assert "What comes back" in (tmp_path / "both" / "comparison.html").read_text()
