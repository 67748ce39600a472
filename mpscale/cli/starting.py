"""The command ``init``: what a project needs to train its own workloads, written once and then the project's."""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

from mpscale.cli.output import OK, add_json_option, fail
from mpscale.config import folder
from mpscale.core.files.errors import in_words
from mpscale.core.files.reading import SETTINGS, NoSuchFileError, RunError, read_bytes, text_of
from mpscale.core.files.writing import write_named
from mpscale.terminal.streams import visible

_MODULE, _WORKLOAD = "my_workloads", "signs"
_SUITE = "bench/test_mixed_precision.py"  # a name that a project does not have: pytest refuses two of a name

_TABLE = f"""\
[tool.mpscale]
workloads = ["{_MODULE}:{_WORKLOAD}"]
seeds = 3
# Every option of mpscale in `pytest --help` is a key, without --mp-. The command line wins. For instance:
# modes = ["fp32", "mixed-dynamic", "mixed-bf16"]
# baseline = "before" # a run that was made with `mpscale run --mp-name before`
# fail-on = ["step_time>5%", "metric"]
"""

_FILES = {
    f"{_MODULE}.py": f'''\
"""Workloads of this project. Each is a compiled model with its data; edit this one, or add others."""

import mpscale
import numpy as np


def examples():
    x = np.random.default_rng(0).normal(size=(5000, 16)).astype("float32")
    return x, (x[:, 0] * x[:, 1] > 0).astype("int64")


def train():
    x, y = examples()
    return x[:4000], y[:4000]


def validation():
    x, y = examples()
    return x[4000:], y[4000:]


def build():
    import keras

    hidden = [keras.layers.Dense(512, activation="relu") for _ in range(2)]
    last = keras.layers.Dense(2, dtype="float32")  # logits in float32, whatever the mode
    model = keras.Sequential([keras.Input((16,)), *hidden, last])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss=loss, metrics=["accuracy"])
    return model


{_WORKLOAD} = mpscale.Workload.from_compiled(
    build,
    train=train,
    validation=validation,
    name="{_WORKLOAD}",
    batch_size=64,
    train_steps=1000,
    target=0.9,
)
''',
    _SUITE: '''\
"""Trains the workloads in [tool.mpscale] of pyproject.toml: `pytest bench/ --benchmark-only`, or `mpscale run`."""

from mpscale.suite import test_training  # noqa: F401 - pytest finds it here
''',
}
_IGNORED = ("results/runs/", "results/fit/", "results/probe/", "results/cache/")
"""What runs and searches leave; results/reference/ is for what a repository keeps."""

_NEXT = (
    f"mpscale probe {_MODULE}:{_WORKLOAD}",
    "mpscale run --mp-seeds 1",
    "mpscale open",
    "pytest bench/ --benchmark-only",
)


class _Refused(Exception):
    """Nothing was written. The message says why, and what to do."""


def init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f"Write into a project what it needs to train its own workloads: [tool.mpscale] in pyproject.toml, a small "
        f"workload to edit ({_MODULE}.py), a suite ({_SUITE}) and lines of .gitignore. What is there already stays as "
        "it is: an existing pyproject.toml or .gitignore is added to at its end, and any other file of these names, "
        "unless it is the same, is refused before anything is written."
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=folder,
        default=Path(),
        metavar="FOLDER",
        help="the folder of the project (default: the current one)",
    )
    add_json_option(parser)


def init(options: argparse.Namespace) -> int:
    root = options.folder
    try:
        planned = _plan(root)
    except _Refused as why:
        return fail(str(why))
    for path, content in planned.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_named(path, content)
    if options.json:
        from mpscale.report.table import json_document

        print(json_document("init", {"written": [str(path) for path in planned], "next": list(_NEXT)}), end="")
        return OK
    lines = [f"wrote {path}" for path in planned]
    here = [] if root.resolve() == Path.cwd() else [f"  cd {root}"]
    lines += ["", "next:", *here, *(f"  {command}" for command in _NEXT), ""]
    lines.append(f"Plain `pytest` also runs {_SUITE}, unless testpaths of its settings names other folders.")
    print(visible("\n".join(lines)))
    return OK


def _plan(root: Path) -> dict[Path, bytes]:
    """Return what is to be written, by file. The settings come last: with them, all is there.

    Raises:
        _Refused: a file of the project is in the way, or cannot be read.
    """
    planned: dict[Path, bytes] = {}
    in_the_way = []
    for name, text in _FILES.items():
        there = _content(root / name)
        if there is None:
            planned[root / name] = text.encode()
        elif there != text.encode():
            in_the_way.append(str(root / name))
    settings = root / "pyproject.toml"
    before = _content(settings) or b""
    after = _with_table(settings, before)
    if in_the_way:
        raise _Refused(
            f"nothing was written: {', '.join(in_the_way)} is there already, and would be overwritten; move it, or "
            "name another folder"
        )
    ignore = root / ".gitignore"
    lines = _content(ignore) or b""
    known = {line.strip().strip(b"/") for line in lines.splitlines()}
    missing = [line for line in _IGNORED if not {b"results", line.strip("/").encode()} & known]
    if missing:
        planned[ignore] = _appended(lines, "".join(f"{line}\n" for line in missing))
    return {**planned, settings: after}


def _content(path: Path) -> bytes | None:
    """Return what is in a file; None if there is none."""
    try:
        return read_bytes(path, SETTINGS)
    except NoSuchFileError:
        if path.is_symlink():
            raise _Refused(f"nothing was written: {path} is a link that leads nowhere; remove it") from None
        return None
    except (RunError, OSError) as error:
        said = in_words(error) if isinstance(error, OSError) else str(error)
        raise _Refused(f"nothing was written: {said}") from error


def _with_table(path: Path, before: bytes) -> bytes:
    """Return a pyproject.toml with the table at its end, and nothing else changed."""
    after = _appended(before, _TABLE, blank=True)
    try:
        old = tomllib.loads(text_of(path, before))
    except (RunError, ValueError, RecursionError) as error:
        raise _Refused(f"nothing was written: {path}: cannot be read: {error}") from error
    tools = old.get("tool", {})
    if isinstance(tools, dict) and "mpscale" in tools:
        raise _Refused(f"nothing was written: {path} has a table [tool.mpscale] already; edit that one")
    try:
        new = tomllib.loads(text_of(path, after))
        grown = {**old, "tool": {**tools, "mpscale": tomllib.loads(_TABLE)["tool"]["mpscale"]}}
        fits = new == grown
    except (ValueError, TypeError):
        fits = False
    if not fits:
        # Such as `tool = {}`, to which no table can be added.
        raise _Refused(
            f"nothing was written: a table [tool.mpscale] at the end of {path} would not be one; add it by hand"
        )
    return after


def _appended(before: bytes, text: str, blank: bool = False) -> bytes:
    """Return a file with lines at its end, which end as its own do."""
    end = b"\r\n" if b"\r\n" in before else b"\n"
    gap = b"" if not before or before.endswith(b"\n") else end
    gap += end if before and blank else b""
    return before + gap + text.encode().replace(b"\n", end)
