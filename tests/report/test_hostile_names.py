"""Names and errors may hold anything. Pages, markdown, terminals and CSV show it, and do nothing that it asks for."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from support.nightly import night, row
from support.runfolder import record

from mpscale.analysis.compare import compare_all
from mpscale.analysis.history import make_history
from mpscale.analysis.neighbours import Neighbours
from mpscale.cli import completion, main
from mpscale.core.cases_csv import read_cases
from mpscale.core.reason import Code, Reason
from mpscale.core.record import from_cell, to_cell, to_csv
from mpscale.core.runs import read_run
from mpscale.report.comparison import render as render_comparison
from mpscale.report.comparison_page import comparison_page
from mpscale.report.document import document, render
from mpscale.report.github_summary import github_summary
from mpscale.report.history import render as render_history
from mpscale.report.history_page import history_page
from mpscale.report.page import page
from mpscale.report.table import NOTHING, Table, escape, json_text
from mpscale.terminal.progress import LiveLine, Progress
from mpscale.terminal.streams import on_one_line, visible

NASTY = [
    "[click](javascript:alert(1))", "![x](https://example.org/x.png)", "<img src=x onerror=alert(1)>",
    "</title><script>", "*a* _b_ ~~c~~ `d`", "| a | b |", "a\n\n# heading\n- item\n\n    code", "```\n<b>",
    "\x1b[31mred\x1b]8;;http://x\x07link", "\x9b31m", "abc\u202e\u2066cba", "zero\u200bwidth\u00ad\ufeff\u3164\ufe0f",
    "http://example.org www.example.org a@b.org", "@github #12 org/repo#34 GH-56 :tada: $x$", "&lt;b&gt; &#60; &amp;",
    "[x]: http://example.org", "[^1] [ ] [x]", "--- === +", "1. 2) 3", "\" onmouseover='alert(1)' x=\"", "=1+1",
    "a\u00a0b\u2028c\u2003d", "<!-- a --> <![CDATA[ ]]>", "\\", "a\\|b", "\ud800", "%s {x} $style ${body}",
    "line\rover\bwritten\x00",
]  # fmt: skip
MARKS = "[]()!_*`|<>&#+-=~:@/\\'\"{}$%^;.,x1A \n\t\r\x1b\x9b\x07\x7f\u202e\u2066\u200b\u00a0\u00ad\ufeff\u2028\ue000é"
texts = st.lists(st.one_of(st.sampled_from(MARKS), st.sampled_from(NASTY)), min_size=1, max_size=12).map("".join)
"""Short texts of what is dangerous."""

GITHUB = MarkdownIt("commonmark").enable(["table", "strikethrough"])
LINKED = re.compile(r"https?://|www\.|@[a-z0-9]|#\d|GH-\d|:[a-z0-9_+-]*[a-z][a-z0-9_+-]*:", re.I)
"""What GitHub makes a link, a mention, a reference or a picture of."""


def tokens(markdown):
    """Yield all tokens, inline ones too, without the comments that part a text."""
    for token in GITHUB.parse(markdown):
        for each in token.children or [token]:
            if not (each.type == "html_inline" and each.content == NOTHING):
                yield each


def shape(markdown):
    """What markdown does beside showing text: links, code, emphasis, lists, tables."""
    shown = ("text", "inline", "text_special")
    return [(token.type, token.attrGet("href")) for token in tokens(markdown) if token.type not in shown]


def pieces_of_text(markdown):
    """The texts outside of code, parted where GitHub sees them parted."""
    for block in GITHUB.parse(markdown):
        piece = ""
        for token in block.children or []:
            if token.type in ("text", "text_special"):
                piece += token.content
            else:
                yield piece
                piece = ""
        yield piece


def text_of(markdown):
    return "".join(token.content for token in tokens(markdown) if token.type in ("text", "text_special"))


PLACES = [
    "{}",
    "A {} B",
    "- {}",
    "- **{}**: B",
    "# {}",
    "A ({}), B",
    "| a | b |\n|---|---|\n| x | {} |",
    "A\n\n{}\n\nB",
]


@settings(max_examples=150, deadline=None)
@given(texts, st.sampled_from(PLACES))
def test_markdown_shows_a_text_and_does_nothing_else(text, place):
    made = place.format(escape(text))
    shown = on_one_line(text)
    if not shown:
        return
    assert shape(made) == shape(place.format("Name"))
    assert text_of(made) == text_of(place.format("Name")).replace("Name", shown)
    assert [piece for piece in pieces_of_text(made) if LINKED.search(piece)] == []


def hostile_runs(results, text, count=2):
    """Runs that hold a text wherever a file can: names, errors, output, facts."""
    for day in range(1, count + 1):
        bad = record("mode " + text, workload=text, status="crashed", status_reason=text, output_tail=text)
        timed = {"workload": text, "device_name": text, "metric_name": text}
        rows = [row(ms=2.0, **timed), row("mixed-static", 1.0 + day, **timed)]
        for one in (*rows[0], *rows[1], bad):
            one.update({"case_id": f"{text}{one['case_id']}", "gpu_suspicion": text})
            one.miss("gpu_memory_nvml_peak_mib", Reason(Code.OTHER, text, text))
        device = {"kind": "cpu", "name": text, "uuid": text}
        path = night(results, day, *rows, [bad], device=device, commit=f"{text}{day}")
        info = json.loads((path / "run.json").read_text())
        info |= {
            "run": f"{day} {text}",
            "name": f"run{day}",
            "note": " ".join(text.split()),
            "settings": {text: text, "list": [text, 1.5]},
            "started": f"2026-01-0{day} {text}",
        }
        info["environment"] |= {
            text: {text: text},
            "variables": {"XLA_FLAGS": text, text: text},
            "runtime": {"x": text},
        }
        (path / "run.json").write_text(json.dumps(info))
        with (path / "journal.jsonl").open("a") as journal:
            journal.write(f"{text!r} is no JSON\n")
        yield path


def documents(results, text):
    """Everything that is written in markdown, by name."""
    one, two = map(read_run, hostile_runs(results, text))
    return {
        "report": render(document(two)),
        "summary": github_summary(two),
        "comparison": render_comparison(compare_all([one, two], force=True), [], "markdown"),
        "history": render_history(make_history([one, two], "step_time"), "markdown"),
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return {name: shape(made) for name, made in documents(tmp_path_factory.mktemp("plain"), "Name").items()}


@pytest.mark.parametrize("text", NASTY)
def test_only_mpscales_own_markdown_acts_in_a_report(tmp_path, plain, text):
    for name, made in documents(tmp_path, text).items():
        # The last output of a case is a block of code, in which nothing acts.
        assert shape(made) == plain[name], name
        assert [piece for piece in pieces_of_text(made) if LINKED.search(piece)] == [], name
        assert unseen(made) == "", name


def unseen(text):
    """The characters that a terminal would obey, or that nobody would see."""
    return "".join(c for c in text if c != "\n" and visible(c) != c)


class Tags(HTMLParser):
    """The elements of a page with what could act in them, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.said = [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        acting = ("class", "href", "id", "style", "role", "rel", "type", "http-equiv", "src")
        self.tags.append((tag, sorted(name for name, _ in attrs), [(n, v) for n, v in attrs if n in acting]))

    def handle_data(self, data):
        self.said += data


def pages(results, text):
    """Every kind of page, by name; without the pictures of a report, whose shapes depend on the length of names."""
    one, two = map(read_run, hostile_runs(results, text))
    comparisons = compare_all([one, two], force=True)
    return {
        "report": page(document(two)),
        "comparison": comparison_page(comparisons),
        "history": history_page([make_history([one, two], "step_time")], Neighbours([one, two])),
    }


@pytest.fixture(scope="module")
def plain_pages(tmp_path_factory):
    return {name: Tags(made).tags for name, made in pages(tmp_path_factory.mktemp("plain"), "Name").items()}


@pytest.mark.parametrize("text", NASTY)
def test_only_mpscales_own_elements_are_in_a_page(tmp_path, plain_pages, text):
    for name, made in pages(tmp_path, text).items():
        found = Tags(made)
        # A long cell has a class of its own, and marks in a name allow a line break behind them.
        assert without_widths(found.tags) == without_widths(plain_pages[name]), name
        assert unseen(made) == "", name
        assert " ".join(visible(text).split()) in " ".join(found.said.split()), name


def without_widths(tags):
    def bare(acting):
        kinds = [(name, value.replace("long", "").split() if name == "class" else value) for name, value in acting]
        return [pair for pair in kinds if pair != ("class", [])]

    return [(tag, sorted(set(names) - {"class"}), bare(acting)) for tag, names, acting in tags if tag != "wbr"]


def test_a_browser_shows_names_and_runs_nothing(tmp_path, browser, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "".join(NASTY[:8]) + '"><svg onload="document.title=1"><a href=//x>' + "\u202e\ud800"
    list(hostile_runs(tmp_path / "results", text))
    assert main(["site", "site"]) == 0
    made = sorted((tmp_path / "site").rglob("*.html"))
    assert len(made) == 5
    for one in made:
        browser.get(one.as_uri())
        outside = "return [...document.querySelectorAll('a')].map(a => a.href).filter(to => !to.startsWith('file:'))"
        assert browser.execute_script(outside) == []
        assert (
            browser.execute_script("return document.querySelectorAll('img, script, iframe, form, object').length") == 0
        )
        assert browser.execute_script("return document.title") != "1"
    browser.get((tmp_path / "site" / "index.html").as_uri())
    said = " ".join(browser.execute_script("return document.body.textContent").split())
    assert " ".join(visible(text).split()) in said
    wrong = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert wrong == []


# --- terminals


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


COMMANDS = [
    ["list"], ["list", "--json"], ["report", "{}"], ["report", "{}", "--print"], ["report", "{}", "--json"],
    ["report", "{}", "--format=github-summary"], ["open", "{}", "--print"], ["site", "site"],
    *([command, *how, f"--format={form}"] for command, *how in (["history"], ["compare", "{}", "{}", "--force"])
      for form in ("table", "markdown", "csv", "json")),
]  # fmt: skip


IN_A_PIPE = [command for command in COMMANDS if "--print" in command or command[-1] in ("list", "--format=table")]


@pytest.mark.parametrize(("stream", "commands"), [(io.StringIO, IN_A_PIPE), (Terminal, COMMANDS)])
def test_a_terminal_gets_no_command_from_a_name(tmp_path, monkeypatch, stream, commands):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    text = "name\x1b[31m\x1b]8;;http://x\x07y\x9b2J\x85\r\b\u202e\u200b\x7f\u2028"
    paths = list(hostile_runs(tmp_path / "results", text))
    for command in commands:
        out, err = stream(), stream()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        main([part.format(paths[0].name) if part == "{}" else part for part in command])
        assert unseen(err.getvalue() + out.getvalue()) == "", command
        assert out.getvalue(), (command, err.getvalue())
        if "json" in command[-1]:
            assert text in str(json.loads(out.getvalue())) or text in json.loads(json_text(text))


def test_json_keeps_every_text_as_it_is():
    for text in NASTY:
        made = json_text({"name": text})
        assert unseen(made) == "" and json.loads(made) == {"name": text}


@pytest.mark.parametrize("text", NASTY)
def test_the_lines_of_a_run_have_no_command_from_a_name(text):
    from mpscale.core.case import Case, Settings
    from mpscale.core.processes.events import Again, Noted

    said = []
    progress = Progress(LiveLine(said.append), lambda: 0.0)
    case = Case(text, "mode" + text, 0, 0, 0, Settings())
    progress.plan([case])
    progress.started(case)
    progress.event(case, Again(text))
    progress.event(case, Noted(text))
    progress.finished(case, record(status="error", status_reason=text, metric_name=text, metric_value=1.0))
    assert said and unseen("".join(said)) == ""


def test_a_shell_is_not_offered_a_name_that_it_would_obey(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("good", "bad\x1b[31m", "two\nlines", "\u202edoog"):
        (tmp_path / "results" / "runs" / name).mkdir(parents=True)
        (tmp_path / "results" / "runs" / name / "run.json").touch()
    assert completion.runs("", None) == ["latest", "good"]


# --- spreadsheets


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.sampled_from("=+-@\t'1a.\n\uff1d"), texts), min_size=1, max_size=6).map("".join))
@example("'=1+1")
@example("''")
@example("'")
def test_a_text_in_csv_is_no_formula_and_comes_back_as_it_was(text):
    cell = to_cell(text)
    assert cell[0] not in "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20" or re.fullmatch(
        r"[+-]?[\d.,]+(e[+-]?\d+)?\s?%?", cell, re.I
    )
    assert from_cell(cell) == text


@pytest.mark.parametrize("number", ["-3.5", "+2", "-1e-7", "-3.1%", "-0"])
def test_a_number_in_a_text_stays_one(number):
    assert to_cell(number) == from_cell(number) == number


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts)
def test_cases_csv_comes_back_as_it_was(tmp_path, text):
    # A zero byte is refused by readers; a lone surrogate becomes an escape; line ends become those of Unix.
    text = text.replace("\0", "").encode("utf-8", "backslashreplace").decode().replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip() or text != text.strip():
        return
    path = tmp_path / "cases.csv"
    one = record(workload=text, status_reason=text, metric_value=-1.5, metric_name=text)
    path.write_text(to_csv([one]), newline="")
    (again,) = read_cases(path)
    assert {name: again[name] for name in ("workload", "status_reason", "metric_name", "case_id")} == {
        name: one[name] for name in ("workload", "status_reason", "metric_name", "case_id")
    }


@pytest.mark.parametrize("text", ["=1+1", "@SUM(A1)", "\t=1", "-x", "+x"])
def test_no_csv_file_has_a_formula(tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(tmp_path)
    first, second = hostile_runs(tmp_path / "results", text)
    assert main(["report", first.name]) == 0
    made = [(first / name).read_text() for name in ("cases.csv", "summary.csv")]
    capsys.readouterr()
    for command in (["history"], ["compare", first.name, second.name, "--force"]):
        main([*command, "--format=csv"])
        made.append(capsys.readouterr().out)
    made.append(Table(["a"], [[text], [-1.5]]).csv())
    for content in made:
        cells = [cell for line in csv.reader(io.StringIO(content, newline="")) for cell in line]
        assert f"'{text}" in cells
        assert [cell for cell in cells if cell[:1] in list("=+-@\t") and not re.fullmatch(r"-?[\d.e-]+", cell)] == []
