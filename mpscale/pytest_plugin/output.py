"""The terminal of a pytest session."""

from __future__ import annotations

import contextlib
import os

import pytest

from mpscale.core.given import given
from mpscale.core.invocation import as_arguments
from mpscale.terminal.progress import LiveLine
from mpscale.terminal.streams import PIPE, Surface, in_ci, is_plain, visible


class Output:
    """The terminal of a pytest session, or nothing if it has none."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._mid_line = False

    @property
    def exists(self) -> bool:
        """Whether there is a terminal to write to. Only known once all plug-ins are configured."""
        return self._config.pluginmanager.hasplugin("terminalreporter")

    def printable(self, text: str) -> str:
        """Return ``text`` as the terminal can show it. pytest would write all of it as escapes, even line ends.

        If a script has started the session, options are its arguments.
        """
        return self.surface.printable(text if given().parcel is None else as_arguments(text))

    @property
    def surface(self) -> Surface:
        """What the terminal can show. pytest decides on colours, except that CI has none unless they are asked for."""
        reporter = self._config.pluginmanager.getplugin("terminalreporter")
        if reporter is None:
            return PIPE
        writer = self._config.get_terminal_writer()
        asked = self._config.option.color == "yes" or os.environ.get("FORCE_COLOR") or os.environ.get("PY_COLORS")
        with self._uncaptured():  # else there is no terminal, and its width is unknown
            columns = writer.fullwidth
        return Surface(
            columns=columns if reporter.isatty else None,
            colour=writer.hasmarkup and (bool(asked) or not in_ci(os.environ)),
            live=bool(reporter.isatty) and not is_plain(os.environ),
            encoding=getattr(getattr(writer, "_file", None), "encoding", None),
        )

    def _uncaptured(self) -> contextlib.AbstractContextManager[None]:
        capture = self._config.pluginmanager.getplugin("capturemanager")
        return capture.global_and_fixture_disabled() if capture else contextlib.nullcontext()

    def write(self, text: str) -> None:
        """Write past pytest's capture of standard output, beginning on a line of its own; nothing if quiet."""
        if not self.exists or self._config.get_verbosity() < 0:
            return
        terminal = self._config.get_terminal_writer()
        with self._uncaptured():
            if terminal.width_of_current_line and not self._mid_line:
                terminal.line()
            terminal.write(self.printable(text), flush=True)
        self._mid_line = not text.endswith("\n")

    def say(self, text: str) -> None:
        """Write one line with mpscale's name."""
        self.write(f"mpscale: {visible(text)}\n")

    def live_line(self) -> LiveLine:
        """Return a live line on this terminal."""
        return LiveLine(self.write, self.surface)
