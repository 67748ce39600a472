"""What the plug-in may write: in colour as pytest does, and a live line only where somebody watches."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from _pytest.config import create_terminal_writer
from support.pseudo_terminal import terminal

from mpscale.pytest_plugin.output import Output
from mpscale.terminal.streams import Surface


def surface(color, file):
    """The surface of a session with this option ``--color`` and this standard output."""
    config = SimpleNamespace(option=SimpleNamespace(color=color, code_highlight="no"))
    writer = create_terminal_writer(config, file)
    plugins = {"terminalreporter": SimpleNamespace(isatty=file.isatty())}
    config.get_terminal_writer = lambda: writer
    config.pluginmanager = SimpleNamespace(getplugin=plugins.get, hasplugin=plugins.__contains__)
    return Output(config).surface


@pytest.mark.parametrize(
    ("color", "environ", "colour_in_pipe", "colour", "live"),
    [
        ("auto", {}, False, True, True),
        ("auto", {"CI": "true"}, False, False, False),
        ("auto", {"NO_COLOR": "1"}, False, False, False),
        ("auto", {"TERM": "dumb"}, False, False, False),
        ("auto", {"FORCE_COLOR": "1"}, True, True, True),
        ("auto", {"CI": "true", "FORCE_COLOR": "1"}, True, True, False),
        ("auto", {"NO_COLOR": "1", "FORCE_COLOR": "1"}, False, False, False),
        ("yes", {}, True, True, True),
        ("yes", {"CI": "true"}, True, True, False),
        ("no", {}, False, False, True),
        ("no", {"FORCE_COLOR": "1"}, False, False, True),
    ],
)
def test_colours_are_those_of_pytest(monkeypatch, color, environ, colour_in_pipe, colour, live):
    for name in ("NO_COLOR", "FORCE_COLOR", "PY_COLORS", "CI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", "COLUMNS": "90", **environ}.items():
        monkeypatch.setenv(name, value)
    assert surface(color, io.StringIO()) == Surface(colour=colour_in_pipe)
    with terminal(90) as screen:
        assert surface(color, screen.stream) == Surface(90, colour, live, "utf-8")
