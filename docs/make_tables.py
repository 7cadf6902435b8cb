"""Write the tables of docs/architectures.md from the rows in repe_unlearn/architectures.py.

python docs/make_tables.py           rewrite what stands between the markers
python docs/make_tables.py --check   exit with 1 if that would change anything
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from repe_unlearn.architectures import FAMILIES, Family, Kind, Read, Write

PAGE = Path(__file__).parent / "architectures.md"
READ: tuple[Kind, ...] = ("attn_in", "mlp_in", "final")
WRITE: tuple[Kind, ...] = ("attn_out", "mlp_out")


def exactness(family: Family, kind: Kind) -> str:
    """Return what ``bake`` can do at a kind of site: exact, erasure-exact or hook only."""
    if kind in ("resid_pre", "resid_post"):
        return "hook only"
    part = getattr(family, kind)
    return "erasure-exact" if isinstance(part, Write) and part.norm else "exact"


def summary(families: Iterable[Family]) -> str:
    """Return one line per family: how each kind of site bakes."""
    kinds: tuple[Kind, ...] = (*READ, *WRITE, "resid_pre", "resid_post")
    lines = [[_name(f), *(exactness(f, kind) for kind in kinds)] for f in families]
    return _table(["family", *map(_code, kinds)], lines)


def readers(families: Iterable[Family]) -> str:
    """Return one line per family and site that modules read."""
    lines = []
    for family in families:
        for kind in READ:
            part: Read = getattr(family, kind)
            base = "" if kind == "final" else f"{family.blocks}.*."
            site = f"{base}{part.path}" + (":input" if part.side == "input" else "")
            switch = _switches(family, part.readers if base else ())
            lines.append([_name(family), _code(kind), _code(site), _codes(part.readers), switch])
    return _table(["family", "kind", "site", "readers that bake edits", "bias switch"], lines)


def writers(families: Iterable[Family]) -> str:
    """Return one line per family and sublayer that writes the residual stream."""
    lines = []
    for family in families:
        for kind in WRITE:
            part: Write = getattr(family, kind)
            lines.append(
                [
                    _name(family),
                    _code(kind),
                    _code(f"{family.blocks}.*.{part.path}"),
                    _code(part.writer),
                    _code(part.norm) if part.norm else "–",
                    _switches(family, (part.writer,)),
                ]
            )
    return _table(["family", "kind", "site", "writer that bake edits", "post-norm", "bias switch"], lines)


TABLES = {"summary": summary, "readers": readers, "writers": writers}


def render(page: str, families: Iterable[Family] = FAMILIES) -> str:
    """Return the page with every table made anew."""
    families = tuple(families)
    for name, make in TABLES.items():
        page = replaced(page, name, make(families))
    return page


def replaced(page: str, name: str, content: str) -> str:
    """Return the page with ``content`` between the markers of one table.

    Raises:
        SystemExit: the page does not hold the two markers once, in order.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    head, found, rest = page.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed) or begin in rest:
        raise SystemExit(
            f"{PAGE.name}: needs the lines {begin.strip()} and {end.strip()}, once each, in order."
        )
    return f"{head}{begin}\n{content}\n{end}{tail}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the page, or with ``--check`` only say whether it is up to date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if the page is out of date"
    )
    old = PAGE.read_text(encoding="utf-8")
    new = render(old)
    if parser.parse_args(arguments).check:
        if new != old:
            print(f"{PAGE} is out of date; run: make tables", file=sys.stderr)
        return int(new != old)
    if new != old:
        PAGE.write_text(new, encoding="utf-8")
    return 0


def _name(family: Family) -> str:
    return ", ".join(map(_code, family.model_types))


def _switches(family: Family, modules: Sequence[str]) -> str:
    """Return the config keys that give the modules a bias."""
    keys = [key for key, names in family.bias_switches.items() if set(modules) & set(names)]
    return _codes(keys) if keys else "–"


def _code(text: str) -> str:
    return f"`{text}`"


def _codes(texts: Iterable[str]) -> str:
    return ", ".join(map(_code, texts))


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
