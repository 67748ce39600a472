"""Every command prints everything on terminals that are not UTF-8. Files are UTF-8 on any terminal."""

from __future__ import annotations

import io
import sys

import pytest
from support.runfolder import NAME, finished, record, write_run

from mpscale.cli import main
from mpscale.terminal import streams

pytestmark = pytest.mark.filterwarnings("ignore:Glyph .* missing from font:UserWarning")  # in pictures

ENCODINGS = ["ascii", "latin-1", "cp1252", "utf-8"]


class Terminal(io.TextIOWrapper):
    """Standard output of a process under PYTHONIOENCODING."""

    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", newline="\n")

    def shown(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Two runs whose names have letters that some terminals lack, and a reason with undecodable bytes."""
    for name, time in ((NAME, 2.0), (NAME.replace("0405", "0505"), 2.5)):
        made = [
            record(
                mode,
                seed,
                workload=workload,
                step_time_ms_median=time + seed / 100,
                series_key=f"{workload}/abc/{mode}/batch=1/method=1",
                metric_name="genauigkeit-°",
                metric_value=0.5,
                gpu_suspicion="the GPU reached 91 °C" if seed else None,
            )
            for workload in ("größe", "日本")
            for mode in ("fp32", "mixed-static")
            for seed in range(2)
        ]
        reason = "no file d\udcff/ä – or ×"  # noqa: RUF001
        made.append(record("mixed-bf16", workload="größe", status="error", status_reason=reason))
        write_run(tmp_path / "results", finished(made), name=name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch):
    def run(encoding, *arguments):
        out, err = Terminal(encoding), Terminal(encoding)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        return main(arguments), out.shown(), err.shown()

    return run


COMMANDS = [
    ("workloads",),
    ("report", "latest", "--print"),
    ("report", "latest", "--format", "github-summary"),
    ("compare", NAME, "latest"),
    ("compare", NAME, "latest", "--format", "markdown"),
    ("compare", NAME, "latest", "--format", "csv"),
    ("compare", NAME, "latest", "--format", "json"),
    ("history",),
    ("history", "--workload", "größe", "--format", "csv"),
]


def as_shown(text, encoding):
    for character, plain in {"–": "-", "…": "...", "°": "deg ", "×": "x", "±": "+/-"}.items():  # noqa: RUF001
        try:
            character.encode(encoding)
        except UnicodeError:
            text = text.replace(character, plain)
    return text.encode(encoding, "backslashreplace").decode(encoding)


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_every_command_prints_the_same_on_every_terminal(project, run, arguments):
    code, whole, _ = run("utf-8", *arguments)
    for encoding in ENCODINGS:
        assert run(encoding, *arguments)[:2] == (code, as_shown(whole, encoding))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_error_message_can_be_shown_on_every_terminal(project, run, encoding):
    code, out, err = run(encoding, "report", "größe–日本")  # noqa: RUF001
    assert (code, out) == (2, "")
    assert err.startswith("mpscale: error: no run is called 'gr") and err.count("\n") == 1


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_file_is_utf8_whatever_the_terminal_is(project, run, encoding):
    assert run(encoding, "compare", NAME, "latest", "-o", "c.md", "--format", "markdown")[0] in (0, 1, 3)
    text = (project / "c.md").read_bytes().decode("utf-8")
    assert "größe" in text and "日本" in text
    assert run(encoding, "report", "latest")[0] == 0
    assert "größe" in (project / "results" / "runs" / NAME.replace("0405", "0505") / "report.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("text", "encoding", "shown"),
    [
        ("1 – 2 × 3 °C", "ascii", "1 - 2 x 3 deg C"),  # noqa: RUF001
        ("1 – 2 × 3 °C", "latin-1", "1 - 2 × 3 °C"),  # noqa: RUF001
        ("1 – 2 × 3 °C", "cp1252", "1 – 2 × 3 °C"),  # noqa: RUF001
        ("größe", "ascii", r"gr\xf6\xdfe"),
        ("日本", "cp1252", r"\u65e5\u672c"),
        ("d\udcff", "utf-8", r"d\udcff"),
        ("grün", None, "grün"),
    ],
)
def test_characters_that_a_terminal_lacks_are_replaced(text, encoding, shown):
    stream = io.StringIO() if encoding is None else Terminal(encoding)
    assert streams.surface_of(stream).printable(text) == shown


@pytest.mark.parametrize("typed", ["größe", "日本", "plain", "m:größe"])
def test_a_name_is_what_was_typed_even_if_python_takes_the_terminal_for_ascii(monkeypatch, typed):
    monkeypatch.setattr(streams.os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    assert streams.as_typed(typed.encode().decode("ascii", "surrogateescape")) == typed
