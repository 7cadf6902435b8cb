"""Write the tables of docs/architectures.md from the rows in repe_unlearn/architectures.py.

python docs/make_tables.py           rewrite what stands between the markers
python docs/make_tables.py --check   exit with 1 if that would change anything
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from repe_unlearn.architectures import (
    FAMILIES,
    IN_BLOCK,
    KINDS,
    Absent,
    Experts,
    Family,
    Kind,
    Layout,
    Read,
    Weight,
    Write,
)

PAGE = Path(__file__).parent / "architectures.md"
READ: tuple[Kind, ...] = ("attn_in", "cross_in", "mlp_in", "final")
WRITE: tuple[Kind, ...] = ("attn_out", "cross_out", "mlp_out")


def part(family: Family, layout: Layout, kind: Kind) -> Read | Write | Absent:
    """Return what a row says of a kind of site."""
    return family.final if kind == "final" else layout.part(kind)


def exactness(family: Family, layout: Layout, kind: Kind) -> str:
    """Return what ``bake`` can do at a kind of site: exact, erasure-exact, hook only, or – if there is none."""
    if kind in ("resid_pre", "resid_post"):
        return "hook only"
    found = part(family, layout, kind)
    if isinstance(found, Absent):
        return "–"
    if isinstance(found, Read) and found.hook_only:
        return "hook only"
    return "erasure-exact" if isinstance(found, Write) and found.norm else "exact"


def stream(family: Family, layout: Layout) -> str:
    """Return what ``bake`` can do for one map of the whole stream; impossible where hooks cannot do it either."""
    if family.post_layernorm:
        return "impossible"
    if family.embedding_hook_only:
        return "hook only"
    writes = {exactness(family, layout, kind) for kind in WRITE} - {"–"}
    return "erasure-exact" if family.embedding_norm or "erasure-exact" in writes else "exact"


def label(family: Family, layout: Layout) -> str:
    """Return the name of a family and, where it has several, of its layout."""
    several = sum(bool(set(other.model_types) & set(family.model_types)) for other in FAMILIES) > 1
    settings = [f"`{key}={value}`" for key, value in family.when.items() if several]
    remarks = [remark for remark in (family.stack, *settings, layout.name) if remark]
    return _codes(family.model_types) + (f" ({', '.join(remarks)})" if remarks else "")


def each(families: Iterable[Family]) -> list[tuple[Family, Layout]]:
    """Return every family with every layout of its blocks."""
    return [(family, layout) for family in families for layout in family.layouts]


def summary(families: Iterable[Family]) -> str:
    """Return one line per family: how each kind of site bakes."""
    kinds: tuple[Kind, ...] = (*READ, *WRITE, "resid_pre", "resid_post")
    lines = [
        [label(f, layout), *(exactness(f, layout, kind) for kind in kinds), stream(f, layout)]
        for f, layout in each(families)
    ]
    return _table(["family", *map(_code, kinds), "stream"], lines)


def lacking(families: Iterable[Family]) -> str:
    """Return one line per family and kind of site that it does not have, cross-attention apart."""
    lines = [
        [label(family, layout), _code(kind), found.reason]
        for family, layout in each(families)
        for kind in KINDS
        if kind in (*IN_BLOCK, "final") and not kind.startswith("cross")
        if isinstance(found := part(family, layout, kind), Absent)
    ]
    return _table(["family", "has no", "because"], lines)


def readers(families: Iterable[Family]) -> str:
    """Return one line per family and site that modules read."""
    lines = []
    for family, layout in each(families):
        for kind in READ:
            found = part(family, layout, kind)
            if not isinstance(found, Read) or (kind == "final" and layout is not family.layouts[0]):
                continue
            base = "" if kind == "final" else f"{family.blocks}.*."
            site = f"{base}{found.path}" + (":input" if found.side == "input" else "")
            modules = found.readers if base else ()
            names = found.hook_only or ", ".join(map(_weight, found.readers))
            lines.append([label(family, layout), _code(kind), _code(site), names, _switches(family, modules)])
    return _table(["family", "kind", "site", "all that read it", "bias switch"], lines)


def writers(families: Iterable[Family]) -> str:
    """Return one line per family and sublayer that writes the residual stream."""
    lines = []
    for family, layout in each(families):
        for kind in WRITE:
            found = part(family, layout, kind)
            if not isinstance(found, Write):
                continue
            lines.append(
                [
                    label(family, layout),
                    _code(kind),
                    _code(f"{family.blocks}.*.{found.path}"),
                    ", ".join(map(_weight, found.writers)),
                    _code(found.norm) if found.norm else "–",
                    _switches(family, found.writers),
                ]
            )
    return _table(["family", "kind", "site", "all that write it", "post-norm", "bias switch"], lines)


TABLES = {"summary": summary, "lacking": lacking, "readers": readers, "writers": writers}


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


def _weight(weight: Weight) -> str:
    """Return a reader or writer; of stacked experts also the order of their axes."""
    return f"`{weight.path}` [{weight.axes}]" if isinstance(weight, Experts) else _code(weight)


def _switches(family: Family, modules: Sequence[Weight]) -> str:
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
