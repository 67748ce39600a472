"""What mkdocs has to do beside rendering pages: see the functions, which it calls by name.

The pages are also read on GitHub and in an editor, so their links are those of the repository. On the site, what lies
outside of docs/ is copied in, and links to it are changed accordingly.
"""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
WIDTH = 100
"""Columns of the printed help."""

_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
_REQUEST = re.compile(r"""<(?:script|img|iframe)\b[^>]*\bsrc=["']?https?:|<link\b[^>]*stylesheet[^>]*https?:""")
_COMMANDS = "<!-- the help of every command -->"
_OPTIONS = "<!-- the options of pytest -->"
_PAGES: Mapping[str, str] = {"README.md": "index.md", "results/reference": "reports.md"}
"""Pages of the site that stand for something else in the repository."""


def on_files(files: Any, config: Any) -> Any:
    """Copy the files outside of docs/ that a page links to."""
    from mkdocs.structure.files import File

    for page in sorted(DOCS.rglob("*.md")):
        for target in _outside(page.relative_to(DOCS).as_posix(), page.read_text(encoding="utf-8")):
            place = place_on_site(target)
            if files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Change links that leave docs/, and print commands and options where a page asks for them."""
    source = page.file.src_uri
    markdown = _LINK.sub(lambda match: link_on_site(match[0], source), markdown)
    if _COMMANDS in markdown:
        markdown = markdown.replace(_COMMANDS, command_reference())
    if _OPTIONS in markdown:
        markdown = markdown.replace(_OPTIONS, option_reference())
    return markdown


def on_post_build(config: Any) -> None:
    """Refuse a site that would request something from elsewhere."""
    found = [str(page) for page in Path(config.site_dir).rglob("*.html") if _REQUEST.search(page.read_text("utf-8"))]
    if found:
        from mkdocs.exceptions import PluginError

        raise PluginError(f"pages that request something from elsewhere: {', '.join(found)}")


def place_on_site(target: str) -> str:
    """Where the site has a file of the repository; both paths are relative, to the site and to the repository."""
    if target.startswith("results/reference/") and target.endswith("/report.html"):
        return f"reports/{target.split('/')[2]}.html"
    # Browsers show text files, and download most others. Some servers hide folders that begin with a dot.
    return f"files/{posixpath.basename(target)}.txt"


def link_on_site(link: str, source: str) -> str:
    """What the site has in place of a link on a page, whose path is relative to docs/.

    A link to what does not exist stays as it is, and mkdocs warns about it.
    """
    target = _in_repository(source, link.partition("#")[0])
    if target is None:
        return link
    if target in _PAGES:
        place = _PAGES[target]
    elif (ROOT / target).is_file():
        place = place_on_site(target)
    else:
        return link
    return posixpath.relpath(place, posixpath.dirname(source) or ".")


def command_reference() -> str:
    """The help of every command of ``mpscale``, as markdown."""
    from mpscale.cli import main

    def help_of(*arguments: str) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit), _plain_terminal():
            main([*arguments, "--help"])
        return printed.getvalue().rstrip()

    overview = help_of()
    commands = re.findall(r"^    ([a-z][a-z-]*)\b", overview.partition("\ncommands:")[2], re.MULTILINE)
    if not commands:
        raise ValueError(f"`mpscale --help` lists no commands, or in another way than expected:\n{overview}")
    parts = [f"```text\n{overview}\n```\n"]
    parts += [f"## mpscale {command}\n\n```text\n{help_of(command)}\n```\n" for command in commands]
    return "\n".join(parts)


def option_reference() -> str:
    """What ``pytest --help`` prints of mpscale's options, as markdown."""
    command = [sys.executable, "-m", "pytest", "--help", "-p", "no:cacheprovider"]
    with _plain_terminal():
        printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    sections = re.findall(r"^mpscale.*?:\n(?:(?:  .*)?\n)+", printed, re.MULTILINE)
    if not sections:
        from mkdocs.exceptions import PluginError

        raise PluginError("`pytest --help` prints no options of mpscale: it is not installed in this environment")
    return "\n".join(f"```text\n{section.rstrip()}\n```\n" for section in sections)


@contextlib.contextmanager
def _plain_terminal() -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(COLUMNS=str(WIDTH), NO_COLOR="1", TERM="dumb")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _outside(source: str, markdown: str) -> Iterator[str]:
    """Paths in the repository of the files outside of docs/ that a page links to."""
    for match in _LINK.finditer(markdown):
        target = _in_repository(source, match[1])
        if target is not None and target not in _PAGES and (ROOT / target).is_file():
            yield target


def _in_repository(source: str, link: str) -> str | None:
    """The target of a link, as a path from the root of the repository; None if it is in docs/ or elsewhere."""
    if ":" in link:
        return None
    target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), link))
    return None if target.startswith("docs/") else target
