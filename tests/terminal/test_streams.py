"""What a stream can show, by its kind and by the environment."""

from __future__ import annotations

import io

import pytest
from support.pseudo_terminal import terminal

from mpscale.terminal.streams import PIPE, Surface, surface_of

NOTHING = {"TERM": "xterm"}


@pytest.mark.parametrize(
    ("environ", "colour", "live"),
    [
        ({}, True, True),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, True, True),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False, False),
        ({"TERM": "dumb"}, False, False),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, True, False),
        ({"CI": "true"}, False, False),
        ({"CI": "false"}, True, True),
        ({"CI": "true", "FORCE_COLOR": "1"}, True, False),
    ],
)
def test_a_terminal_has_what_the_environment_leaves_it(environ, colour, live):
    with terminal(100) as there:
        found = surface_of(there.stream, NOTHING | environ)
    assert found == Surface(100, colour, live, "utf-8")


@pytest.mark.parametrize(("environ", "colour"), [({}, False), ({"FORCE_COLOR": "1"}, True), ({"COLUMNS": "20"}, False)])
def test_a_pipe_has_no_width_and_no_live_line(environ, colour):
    assert surface_of(io.StringIO(), NOTHING | environ) == Surface(colour=colour)


def test_the_user_may_give_the_width():
    with terminal(100) as there:
        assert surface_of(there.stream, NOTHING | {"COLUMNS": "60"}).columns == 60


def test_a_terminal_of_unknown_width_has_80_columns():
    with terminal(0) as there:
        assert surface_of(there.stream, NOTHING).columns == 80


def test_no_stream_is_a_pipe():
    assert surface_of(None, NOTHING) == PIPE


def test_text_is_wrapped_between_words_for_a_terminal_only():
    text = "one two three\nfour"
    assert Surface(8).wrapped(text) == "one two\nthree\nfour"
    assert PIPE.wrapped(text) == text
