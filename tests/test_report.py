"""Report: verdicts, escaping, NaN, exact round trip, all-or-nothing saving, and a page that loads nothing."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from repe_unlearn.audit import Check, Report
from repe_unlearn.audit import writing as writing_module
from repe_unlearn.audit.figures import draw, plot, role_of, to_png, to_svg
from repe_unlearn.audit.report import FILES
from repe_unlearn.audit.series import Series
from repe_unlearn.audit.summary import summarise
from repe_unlearn.audit.text import escape, number
from repe_unlearn.errors import (
    FileFormatError,
    InputError,
    MissingDependencyError,
    OutputExistsError,
    VerificationError,
)

EVIL = '<script>alert("x")</script> | **bold** $x$ [red]`code`\n&amp; \\frac'


def probe_checks(values, limit=0.6):
    return tuple(
        Check.at_most("probe.linear", value, limit, control=0.95, site=f"model.layers.{i}.norm")
        for i, value in enumerate(values)
    )


def curves():
    layers = tuple(range(6))
    before = Series(
        "Probe", "before", layers, (0.9,) * 6, (0.85,) * 6, (0.95,) * 6, panel="attn_in", chance=0.5
    )
    after = Series(
        "Probe", "after", layers, (0.5, 0.51, math.nan, 0.5, 0.49, 0.5), panel="mlp_in", chance=0.5
    )
    cost = Series(
        "Cost",
        "random eraser",
        (1e-3, 1e-2),
        (0.0, 2.0),
        log_x=True,
        log_y=True,
        marker_only=True,
        point_labels=("a", "b"),
    )
    return (before, after, cost)


@pytest.fixture
def report():
    whole = (
        Check.at_most("damage.kl", 0.03, 0.05, low=0.02, high=0.04, control=0.001, note="mean per token"),
        Check.information("seconds", 12.5),
    )
    facts = {"model": "tiny", "command": "repe-unlearn verify plan", "not attacked": "relearning"}
    return Report(
        "Demo", "a subtitle", whole + probe_checks((0.5, 0.55)), curves(), facts, "At chance everywhere."
    )


@pytest.fixture
def plain(report):
    """The same without figures, which take most of the time to write."""
    return dataclasses.replace(report, series=())


def evil_report():
    checks = (
        Check.at_most(EVIL, 1.0, 0.5, note=EVIL),
        Check.at_most(EVIL + "2", 0.1, 0.5, site=EVIL, note=EVIL),
        Check(EVIL, 1.0, EVIL, True, site=EVIL),
    )
    series = (
        Series(
            EVIL,
            EVIL,
            (1, 2),
            (1, 2),
            x_label=EVIL,
            y_label=EVIL,
            panel=EVIL,
            point_labels=(EVIL, "_"),
            caption=EVIL,
        ),
    )
    return Report(EVIL, EVIL, checks, series, {EVIL: EVIL, "command": EVIL, "not attacked": EVIL}, EVIL)


# ---------------------------------------------------------------- Check


@pytest.mark.parametrize(("value", "passed"), [(0.6, True), (0.5, True), (0.61, False), (math.nan, False)])
def test_at_most(value, passed):
    check = Check.at_most("probe", value, 0.6)
    assert check.passed is passed
    assert check.bound == "<= 0.6"


@pytest.mark.parametrize(
    ("value", "passed"), [(0.6, True), (0.59, False), (math.nan, False), (math.inf, False)]
)
def test_at_least(value, passed):
    check = Check.at_least("refusal", value, 0.6)
    assert check.passed is passed
    assert check.bound == ">= 0.6"


def test_minus_infinity_does_not_pass_an_upper_bound():
    assert Check.at_most("probe", -math.inf, 0.6).passed is False


def test_information_has_no_verdict():
    check = Check.information("probe.mlp", math.nan, control=0.9, low=0, high=1, site="a", note="b")
    assert check.passed is None
    assert check.bound == ""


def test_numbers_of_numpy_and_torch_become_python():
    check = Check("probe", torch.tensor(0.5), "", np.bool_(True), control=np.float32(0.25))
    assert type(check.value) is float
    assert check.passed is True
    assert check.control == 0.25


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Check(" ", 0.0, "", None), "dotted name"),
        (lambda: Check("p", "0.5", "", None), "must be a number"),
        (lambda: Check("p", None, "", None), "must be a number"),
        (lambda: Check("p", torch.zeros(2), "", None), "not one number"),
        (lambda: Check("p", math.nan, "", True), "cannot have passed"),
        (lambda: Check("p", 0.0, "", "yes"), "True, False or None"),
        (lambda: Check("p", 0.0, "", None, low=2, high=1), "reversed"),
        (lambda: Check.at_most("p", 0.0, math.inf), "finite limit"),
        (lambda: Check.at_least("p", 0.0, math.nan), "finite limit"),
    ],
)
def test_unusable_checks_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


# ---------------------------------------------------------------- Series


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": (), "y": ()}, "at least one"),
        ({"x": (1, 2), "y": (1,)}, "one y for every x"),
        ({"x": (1,), "y": (1,), "low": (0,)}, "both ends"),
        ({"x": (1,), "y": (1,), "low": (0, 1), "high": (1, 2)}, "both ends"),
        ({"x": (1,), "y": (1,), "point_labels": ("a", "b")}, "one each"),
        ({"x": (math.nan,), "y": (1,)}, "not finite"),
        ({"x": (0,), "y": (1,), "log_x": True}, "logarithmic"),
        ({"x": ("1",), "y": (1,)}, "must be a number"),
    ],
)
def test_unusable_series_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        Series("f", "after", **arguments)


def test_series_takes_arrays():
    series = Series("f", "after", np.arange(3), torch.linspace(0, 1, 3), np.zeros(3), np.ones(3))
    assert series.x == (0.0, 1.0, 2.0)
    assert series.y[1] == 0.5


# ---------------------------------------------------------------- verdict


def test_passes_only_with_a_verdict_and_no_failure(report):
    assert report.passed
    assert report.failed == ()
    report.raise_if_failed()
    silent = Report("t", "", (Check.information("a", 1),), (), {})
    assert not silent.passed
    broken = Report("t", "", probe_checks((0.5, 0.9)), (), {})
    assert not broken.passed
    assert [check.value for check in broken.failed] == [0.9]


def test_error_lists_ten_failures_with_value_bound_and_control():
    broken = Report("Demo", "", probe_checks([0.7 + i / 100 for i in range(13)] + [0.5]), (), {})
    with pytest.raises(VerificationError) as caught:
        broken.raise_if_failed()
    message = str(caught.value)
    assert "Demo: 13 of 14 checks failed" in message
    assert "probe.linear at model.layers.0.norm: 0.700, needed <= 0.6 (control 0.950)" in message
    assert message.count("needed <= 0.6") == 10
    assert "and 3 more" in message


def test_error_where_nothing_was_judged():
    with pytest.raises(VerificationError, match="nothing was verified"):
        Report("t", "", (Check.information("a", 1),), (), {}).raise_if_failed()


def test_report_is_frozen_and_typed(report):
    with pytest.raises(AttributeError):
        report.title = "other"
    with pytest.raises(TypeError):
        report.facts["model"] = "other"
    with pytest.raises(InputError, match="may hold only Check"):
        Report("t", "", ("probe",), (), {})  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------- summary


def test_summary_finds_the_worst_site_for_either_direction():
    row = summarise(probe_checks((0.5, 0.8, 0.7)))[0]
    assert (row.judged, row.passed, row.worst.value, row.median) == (3, 1, 0.8, 0.7)
    assert row.control == 0.95
    assert row.control_within == 0
    assert row.verdict is False
    upward = [Check.at_least("r", v, 0.5, control=0.9, site="s") for v in (0.9, 0.6, 0.7)]
    row = summarise(upward)[0]
    assert row.worst.value == 0.6
    assert row.control_within == 3
    assert row.verdict is True


def test_summary_counts_nan_as_worst_and_keeps_it_out_of_the_median():
    row = summarise(probe_checks((0.9, math.nan, 0.5)))[0]
    assert math.isnan(row.worst.value)
    assert row.median == pytest.approx(0.7)
    assert (row.lowest, row.highest) == (0.5, 0.9)


def test_summary_of_information_has_no_verdict():
    row = summarise([Check.information("seconds", 1.0, site="a")])[0]
    assert row.verdict is None
    assert row.control is None
    assert row.control_within is None


def test_summary_prefers_a_failure_whose_bound_it_cannot_read():
    row = summarise([Check("p", 0.1, "", True, site="a"), Check("p", 0.2, "as before", False, site="b")])[0]
    assert row.worst.site == "b"


# ---------------------------------------------------------------- text, table, Markdown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "—"),
        (math.nan, "NaN"),
        (math.inf, "inf"),
        (0.0, "0"),
        (12.0, "12"),
        (0.5, "0.500"),
        (1.25e-7, "1.25e-7"),
        (0.0001234, "0.000123"),
        (123.456, "123.5"),
        (2e9, "2e9"),
        (-0.25, "-0.250"),
    ],
)
def test_number(value, text):
    assert number(value) == text


def test_text(report):
    text = str(report)
    assert "PASSED: 3 of 3 checks passed, 1 information only" in text
    assert "At chance everywhere." in text
    assert "0.030 [0.020, 0.040]" in text
    assert "pass 2/2" in text
    assert "worst 0.550 at model.layers.1.norm" in text
    assert repr(report) == "Report('Demo', 3 of 3 checks passed, 1 information only)"
    assert "FAILED" in str(Report("t", "", probe_checks((0.9,)), (), {}))
    assert "NO VERDICT" in str(Report("t", "", (), (), {}))


def test_table_never_cuts_a_failure_and_prints_markup_as_text():
    from rich.console import Console

    checks = [Check.at_most(f"c{i}", 0.1, 1) for i in range(8)]
    checks += [Check.at_most("[red]bad[/red]", 2, 1, note="[bold]why[/bold]")]
    report = Report("[i]t[/i]", "", tuple(checks), (), {})
    console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(report.table(max_rows=3))
    shown = console.export_text()
    assert "[red]bad[/red]" in shown
    assert "[bold]why[/bold]" in shown
    assert "[i]t[/i]" in shown
    assert "c1" in shown
    assert "c2" not in shown
    assert "6 more rows, none of them failed" in shown
    assert report.table().row_count == 9
    with pytest.raises(InputError, match="at least 1"):
        report.table(max_rows=0)


def test_markdown(report):
    text = report.to_markdown()
    assert text.startswith("# Demo\n")
    for heading in ("## Whole model", "## Per site", "## Facts", "## Limits"):
        assert heading in text
    assert "## Failed checks" not in text
    assert "Not attacked: relearning" in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 7)
    assert "## Failed checks" in Report("t", "", probe_checks((0.9,)), (), {}).to_markdown()


def test_markdown_escapes_everything():
    text = evil_report().to_markdown()
    assert "<script" not in text
    assert "**bold**" not in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 7)
    assert escape("attn_in") == "attn_in"
    assert escape("_a_") == r"\_a\_"


# ---------------------------------------------------------------- JSON


def same(a, b):
    return repr(a) == repr(b)  # equal, and NaN is NaN


def assert_equal_reports(a, b):
    assert (a.title, a.subtitle, a.verdict, dict(a.facts)) == (b.title, b.subtitle, b.verdict, dict(b.facts))
    assert same(a.checks, b.checks)
    assert same(a.series, b.series)


def test_json_round_trip_is_exact(report):
    back = Report.from_json(report.to_json())
    assert_equal_reports(back, report)
    assert back.checks == report.checks
    assert back.to_json() == report.to_json()
    assert_equal_reports(Report.from_json(evil_report().to_json()), evil_report())


def test_json_holds_what_json_cannot_hold():
    checks = (Check.at_most("a", math.nan, 1, control=-math.inf), Check.information("b", math.inf, low=0.1))
    series = (Series("f", "after", (0, 1, 2), (math.nan, 1.0, -math.inf)),)
    report = Report("t", "", checks, series, {})
    text = report.to_json()

    def refuse(literal):
        raise AssertionError(literal)

    content = json.loads(text, parse_constant=refuse)
    assert content["schema"] == 2
    assert content["passed"] is False
    assert content["checks"][0]["value"] is None
    assert content["checks"][0]["not_finite"] == {"value": "nan", "control": "-inf"}
    assert content["series"][0]["y"] == [None, 1.0, None]
    assert content["series"][0]["not_finite"] == {"y": {"0": "nan", "2": "-inf"}}
    assert_equal_reports(Report.from_json(text), report)


def edited(report, edit):
    content = json.loads(report.to_json())
    edit(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c.update(kind="other"), "not a report"),
        (lambda c: c.update(schema=3), "schema 3 cannot be read"),
        (lambda c: c.pop("facts"), "lacks"),
        (lambda c: c.update(extra=1), "unknown"),
        (lambda c: c.update(passed=False), "it was edited"),
        (lambda c: c.update(title=3), "must be strings"),
        (lambda c: c["facts"].update(seed=3), "must be strings"),
        (lambda c: c.update(checks={}), "must be lists"),
        (lambda c: c.update(checks=[3]), r"checks\[0\] is a int"),
        (lambda c: c["checks"][0].pop("bound"), r"checks\[0\] lacks \['bound'\]"),
        (lambda c: c["checks"][0].update(value="0.5"), r"checks\[0\] cannot be used"),
        (lambda c: c["checks"][0].update(value=None), r"checks\[0\] cannot be used"),
        (lambda c: c["checks"][0].update(not_finite={"value": "nan"}), "not null"),
        (lambda c: c["checks"][1].update(value=None, not_finite={"value": "huge"}), "cannot be used"),
        (lambda c: c["series"][0].update(y=[1.0]), r"series\[0\] cannot be used"),
        (lambda c: c["series"][0].update(not_finite=[1]), r"series\[0\] cannot be used"),
    ],
)
def test_edited_json_is_refused(report, edit, words):
    with pytest.raises(FileFormatError, match=words):
        Report.from_json(edited(report, edit))


@pytest.mark.parametrize("source", ["", "{", "[1]", "report.json", '{"kind": NaN}', "[" * 100_000])
def test_foreign_text_is_refused(source):
    with pytest.raises(FileFormatError):
        Report.from_json(source)


# ---------------------------------------------------------------- HTML


class Page(HTMLParser):
    """Collects tags and attributes and checks that every element is closed in order."""

    VOID = ("meta", "img", "source", "wbr", "br", "link")

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def assert_self_contained(page):
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "srcset", "href"):
            assert value.startswith("data:image/")


def test_html_parses_and_loads_nothing(report):
    source = report.to_html()
    page = Page(source)
    assert_self_contained(page)
    assert not re.search(r"https?:|@import|url\(", source)
    words = " ".join(" ".join(page.words).split())
    for expected in ("Passed", "At chance everywhere.", "≤ 0.6", "Run again", "Not attacked: relearning"):
        assert expected in words
    assert page.tags.count("img") == 2
    assert len(source) < 1_500_000


def test_html_shows_failure_in_words():
    failed = " ".join(Page(Report("t", "", probe_checks((0.9,)), (), {}).to_html()).words)
    assert "Failed" in failed
    assert "Passed" not in failed
    assert "No verdict" in " ".join(Page(Report("t", "", (), (), {}).to_html()).words)


def test_html_escapes_everything():
    report = evil_report()
    for source in (report.to_html(), report._repr_html_()):
        assert source
        page = Page(source)
        assert_self_contained(page)
        assert "<script" not in source
        assert "alert(" in "".join(page.words)  # there, as words


def test_images_in_the_page_are_whole_svg():
    source = evil_report().to_html()
    images = re.findall(r'(?:src|srcset)="data:image/svg\+xml;base64,([^"]+)"', source)
    assert len(images) == 2
    for image in images:
        root = ElementTree.fromstring(base64.b64decode(image))
        assert root.tag.endswith("svg")
        assert not [node for node in root.iter() if node.tag.endswith("script")]


def test_notebook_cell_has_no_page_frame_and_styles_only_itself(report):
    cell = report._repr_html_()
    page = Page(cell)
    assert not {"html", "head", "body", "img"} & set(page.tags)
    style = re.sub(r"@media[^{]*", "", re.search(r"<style>(.*?)</style>", cell, re.DOTALL)[1])
    for selectors in re.findall(r"([^{}]+)\{[^{}]*\}", style):
        for selector in selectors.split(","):
            assert selector.strip().startswith(".ru")


def test_html_is_the_same_every_time(report):
    short = dataclasses.replace(report, series=curves()[:1])
    assert short.to_html() == short.to_html()


def test_thousands_of_sites_and_points_stay_small():
    values = np.full(9000, 0.5)
    values[4321] = 0.9
    cloud = Series("Cloud", "after", np.arange(20_000), np.linspace(0, 1, 20_000), marker_only=True)
    source = Report("t", "", probe_checks(values), (cloud,), {}).to_html()
    assert len(source) < 1_500_000
    assert "worst 2000 of 9000" in " ".join(Page(source).words)
    assert "layers.<wbr>4321.<wbr>norm" in source


# ---------------------------------------------------------------- figures


def test_draw_makes_one_figure_per_title_with_panels():
    figures = draw(curves())
    assert list(figures) == ["Probe", "Cost"]
    assert [axes.get_title(loc="left") for axes in figures["Probe"].axes] == ["attn_in", "mlp_in"]
    assert figures["Probe"].axes[0].get_ylim()[1] > 1.0
    wide, narrow = (draw(curves(), narrow=flag)["Probe"].get_size_inches() for flag in (False, True))
    assert wide[0] > 2 * narrow[0]
    assert narrow[1] > wide[1]
    assert draw([]) == {}


def test_a_role_has_one_colour_everywhere():
    def color_of(series):
        return plot(series).lines[0].get_color()

    one = color_of(Series("a", "after", (0,), (1,)))
    assert one == color_of(Series("b", "after, MLP", (0, 1), (1, 2), chance=0.5))
    assert one != color_of(Series("a", "before", (0,), (1,)))
    assert [role_of(label) for label in ("before", "After", "random eraser", "mean")] == [
        "before",
        "after",
        "random",
        "",
    ]
    both = plot([Series("a", "after", (0,), (1,)), Series("a", "after, MLP", (0,), (2,))]).lines
    assert both[0].get_color() == both[1].get_color()
    assert both[0].get_linestyle() != both[1].get_linestyle()


def test_points_off_a_logarithmic_axis_are_counted():
    shown = draw(curves())["Cost"].axes[0].get_xlabel()
    assert "1 point at or below 0" in shown
    assert "at or below" not in plot(Series("a", "after", (1,), (0.5,), log_y=True)).get_xlabel()


def test_plot_uses_the_axes_given_and_refuses_two_panels():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    assert plot(curves()[0], axes) is axes
    assert len(axes.get_legend().get_texts()) == 2  # the curve and chance
    with pytest.raises(InputError, match="plot draws one panel and got 2"):
        plot(curves()[:2])
    with pytest.raises(InputError, match="got 0"):
        plot([])


def test_figures_render_and_pyplot_stays_out():
    figure = draw(evil_report().series)[EVIL]
    assert to_svg(figure) == to_svg(figure)
    assert to_png(figure)[1:4] == b"PNG"
    code = (
        "import sys, repe_unlearn.audit as a, repe_unlearn.audit.figures as f;"
        "heavy = ('matplotlib', 'jinja2', 'rich', 'transformers', 'sklearn');"
        "assert not [m for m in heavy if m in sys.modules];"
        "from repe_unlearn.audit.series import Series;"
        "f.draw([Series('a', 'after', (0,), (1,))]);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_drawing_leaves_the_settings_of_the_user_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    to_svg(draw(curves())["Probe"])
    assert dict(matplotlib.rcParams) == before


# ---------------------------------------------------------------- saving


def test_save_writes_three_files_that_agree(plain, tmp_path):
    folder = tmp_path / "deep" / "er"
    assert plain.save(folder) == folder / "report.html"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert_equal_reports(Report.from_json((folder / "report.json").read_text("utf-8")), plain)
    assert (folder / "report.md").read_text("utf-8") == plain.to_markdown()
    assert (folder / "report.html").read_text("utf-8") == plain.to_html()


@pytest.mark.parametrize("name", FILES)
def test_save_refuses_to_overwrite(plain, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputExistsError, match="force=True"):
        plain.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"
    plain.save(tmp_path, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


def test_save_refuses_a_file_as_folder_and_a_folder_as_file(plain, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputExistsError, match="is a file"):
        plain.save(tmp_path / "file")
    (tmp_path / "report.md").mkdir()
    with pytest.raises(OutputExistsError):
        plain.save(tmp_path, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "report.md"]


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_failed_save_leaves_nothing(plain, tmp_path, monkeypatch, fails_at):
    calls = 0
    replace = os.replace

    def full_disk(source, target):
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError("No space left on device")
        replace(source, target)

    monkeypatch.setattr(writing_module.os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        plain.save(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_without_the_extra_nothing_is_written_and_the_error_names_it(report, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'repe-unlearn\[verify\]'"):
        report.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert (report._repr_html_() is None) is (missing == "jinja2")


def test_a_prompt_cut_inside_a_character_does_not_lose_the_report(tmp_path):
    report = Report("t", "", (Check.at_most("p", 0.1, 1, note="cut \ud83d here"),), (), {})
    report.save(tmp_path)
    assert_equal_reports(Report.from_json((tmp_path / "report.json").read_text("utf-8")), report)
