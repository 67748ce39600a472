"""report.md: what a run found, on what, and what its numbers do not say."""

from __future__ import annotations

from mpscale.report.document import Document
from mpscale.report.tables import escape


def render(document: Document) -> str:
    """The report as markdown."""
    head = [f"# {escape(document.title)}", document.when, document.findings]
    body = [f"## {title}\n\n{text}" for title, text in document.sections.items()]
    return "\n\n".join([part for part in head if part] + body) + "\n"
