"""Turns the Sphinx markup of mpscale's docstrings into markdown, for mkdocstrings."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([\w.]+)`")
_BLOCK = re.compile(r"::(\n\s*\n)")
_ALONE = re.compile(r"^\s*::\s*$", re.MULTILINE)


class SphinxMarkup(griffe.Extension):
    """Changes each docstring once it has been read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Replace roles by code, and the double colon before a block of code by a colon."""
        if obj.docstring is None:
            return
        text = _ALONE.sub("", obj.docstring.value)
        text = _ROLE.sub(lambda match: f"`{match[1].rpartition('.')[2]}`", text)
        obj.docstring.value = _BLOCK.sub(r":\1", text)
