"""What do both libraries do with the 25 known defects of concept-erasure 0.2.4? The cases are those of the tests.

python tests/benchmarks/defects.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from _side_by_side import machine

CASES = Path(__file__).parent.parent / "test_defects.py"


class Notes:
    """A pytest plugin that keeps what every test noted, and the tests that failed."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, str]]] = []
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the notes of one finished test."""
        if report.failed:
            self.failed.append(report.nodeid)
        noted = {name: str(value) for name, value in report.user_properties}
        number = report.location[2].removeprefix("test_")[:2]
        if report.when == "call" and noted and number.isdigit():
            self.rows.append((int(number), noted))


def main() -> int:
    """Print the table; return 1 if a case fails here."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    notes = Notes()
    pytest.main([str(CASES), "-q", "--no-header", "--no-summary", "-p", "no:cacheprovider"], plugins=[notes])
    print(f"\n{machine('concept-erasure', 'transformers')}\n")
    print("| # | case | concept-erasure | repe_unlearn |")
    print("|---|---|---|---|")
    for number, noted in sorted(notes.rows, key=lambda row: row[0]):
        print(f"| {number} | {noted['what']} | {noted['theirs']} | {noted['ours']} |")
    for name in notes.failed:
        print(f"failed: {name}")
    return int(bool(notes.failed))


if __name__ == "__main__":
    raise SystemExit(main())
