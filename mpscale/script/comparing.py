"""``mpscale.compare``: starts the session of ``mpscale run`` on what a script or a notebook has, and waits for it."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mpscale.core import extras
from mpscale.core.files.errors import why
from mpscale.core.files.temporary import TemporaryFolder
from mpscale.core.given import VARIABLE, Parcel, given
from mpscale.core.invocation import RESUME, SCRIPT, as_arguments
from mpscale.workloads import Workload, registry

if TYPE_CHECKING:
    from mpscale.core.mode import Mode
    from mpscale.script.result import Comparison

_INTERRUPTED = 2
"""pytest's exit code."""
_TAIL = 40
"""Lines of the session's output that are kept for an error message."""
_OF_THE_WORKLOAD = ("train_steps", "batch_size")
"""Arguments of ``Workload.from_compiled`` that are given as options of the run."""


class NotCompared(RuntimeError):
    """Nothing was measured; the message says why."""


class Stopped(KeyboardInterrupt):
    """The user stopped a comparison; the message says what is there and how to go on.

    Args:
        text: the message.
        comparison: what was measured; None if nothing was.
    """

    def __init__(self, text: str, comparison: Comparison | None) -> None:
        super().__init__(text)
        self.comparison = comparison


def compare(
    build: Callable[[], Any] | Workload,
    *,
    train: Any = None,
    validation: Any = None,
    modes: Sequence[str | Mode] | str | None = None,
    steps: int | None = None,
    seeds: int | None = None,
    batch_size: int | Iterable[int] | None = None,
    results: str | Path | None = None,
    resume: str | Path | None = None,
    **more: Any,
) -> Comparison:
    """Train a model in several precisions, each in a process of its own, and compare them.

    This is ``mpscale run`` on the model, in a process beside this one: nothing here is changed, no seed, policy or
    variable. The script is not run again, so it needs no ``if __name__ == "__main__"``. Functions that can be imported
    are imported by name; others, and data, are sent to the processes, large arrays only once. Ctrl-C stops the
    comparison in good order and raises :class:`KeyboardInterrupt`, whose message says how to go on.

    Args:
        build: returns a compiled Keras model; called in each process, under the policy of its mode. Or a
            :class:`mpscale.Workload`, which has its data.
        train: data for training, as Keras' ``fit`` takes it, or a function without arguments that returns it, which is
            called in each process.
        validation: data for the metric, likewise.
        modes: such as ``["fp32", "mixed-dynamic"]``; by default those of ``mpscale run``.
        steps: of each training.
        seeds: how many trainings each mode has.
        batch_size: examples per step; with several, a sweep.
        results: the results folder, by default ``results`` in the working directory. The run is in its folder ``runs``.
        resume: a run of this comparison that was stopped: its name, its folder or ``latest``.
        more: other options of ``mpscale run``, such as ``repeats=5``, ``jit=False``, ``timeout=3600``,
            ``static_scale=[8, 128]`` or ``baseline="latest"`` with ``fail_on="step_time>5%"``; and what
            ``Workload.from_compiled`` takes, such as ``name`` and ``metric``.

    Returns:
        The comparison, also if cases failed: a warning says so, and :attr:`Comparison.failed` has them.

    Raises:
        TypeError: an argument is unknown, or something cannot be sent to another process.
        ValueError: an argument has a value that is not allowed.
        NotCompared: nothing was measured, for instance because this process holds the GPU.
        KeyboardInterrupt: it was stopped; ``comparison`` of this exception is what was measured.
    """
    if packages := extras.missing():
        raise ImportError(extras.lacks(packages))
    if registry.is_looking() or given().parcel is not None:
        raise RuntimeError(
            "mpscale.compare was called while the process of a case imports this module; put the call under "
            'if __name__ == "__main__":'
        )
    from mpscale.script import arguments, gpu

    of_workload = _of_from_compiled()
    options = arguments.names()
    arguments.refuse_unknown(more, [*of_workload, *options, *inspect.signature(compare).parameters])
    about = {name: value for name, value in more.items() if name in of_workload}
    workload = _workload(build, train, validation, about)
    asked = {"modes": modes, "steps": steps, "seeds": seeds, "batch_size": batch_size, "results": results}
    typed = arguments.as_options({**asked, **{name: more[name] for name in more if name not in of_workload}})
    if resume is not None:
        typed.append(f"{RESUME}={os.fspath(resume)}")
    if (held := gpu.held()) is not None:
        raise NotCompared(held)
    folder = TemporaryFolder("parcel")
    try:
        parcel = _packed(workload, folder.path, {"build": build, "train": train, "validation": validation, **about})
        code, stopped, tail = _run(typed, workload.name, parcel)
        path = parcel.run()
    finally:
        folder.close()
    return _judged(code, stopped, tail, path)


def _of_from_compiled() -> list[str]:
    """The names of the arguments that describe a compiled model."""
    ours = {*inspect.signature(compare).parameters, *_OF_THE_WORKLOAD}
    return [name for name in inspect.signature(Workload.from_compiled).parameters if name not in ours]


def _workload(build: Any, train: Any, validation: Any, about: dict[str, Any]) -> Workload:
    if isinstance(build, Workload):
        given_too = {"train": train, "validation": validation, **about}
        if extra := [name for name, value in given_too.items() if value is not None]:
            raise TypeError(f"mpscale.compare: {', '.join(extra)} belong to a function; {build.name} is a Workload")
        return build
    if not callable(build) or hasattr(build, "trainable_weights"):  # a model can be called, too
        kind = type(build).__name__
        raise TypeError(
            f"mpscale.compare: build must be a function that returns a compiled Keras model, not a {kind}, since each "
            "process makes a model of its own, in its precision"
        )
    if train is None:
        raise TypeError("mpscale.compare: train is missing, the data for training or a function that returns it")
    workload = Workload.from_compiled(build, train=train, validation=validation, **about)
    if not callable(train) and not callable(validation):
        workload.data()  # what is wrong with it is said here, rather than by each case
    return workload


def _packed(workload: Workload, folder: Path, parts: dict[str, Any]) -> Parcel:
    from mpscale.script import sending

    path = [str(Path(entry).absolute()) for entry in sys.path]
    parcel = Parcel(str(folder), os.getpid(), path, [workload.name])
    try:
        sending.send(workload, parcel.file(workload.name), parts)
        sending.send_outline(workload, parcel.file(workload.name, outline=True))
        parcel.write()
    except OSError as error:
        text = f"the model and its data cannot be written to {folder}: {why(error)}"
        raise NotCompared(f"{text}; set TMPDIR to another folder, or pass functions that return the data") from error
    return parcel


def _run(typed: Sequence[str], name: str, parcel: Parcel) -> tuple[int, bool, Sequence[str]]:
    """Run the session; return its exit code, whether the user stopped it, and the end of its output.

    Its output goes where that of this process goes: to the terminal itself, or line by line to the notebook.
    """
    command = [sys.executable, "-P", "-m", "mpscale", "run", f"--mp-workloads={name}", "--no-header", *typed]
    # pytest-benchmark would take the session for one of pytest-xdist's workers, and time nothing.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    direct = _is_own(sys.stdout, 1)
    sys.stdout.flush()
    # In a session of its own, so that Ctrl-C reaches it once, from here.
    process = subprocess.Popen(
        command,
        env={**environ, VARIABLE: parcel.folder},
        stdin=subprocess.DEVNULL,
        stdout=None if direct else subprocess.PIPE,
        stderr=subprocess.PIPE if direct else subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    source, target = (process.stderr, sys.stderr) if direct else (process.stdout, sys.stdout)
    assert source is not None  # a pipe
    stopped, tail = False, deque[str](maxlen=_TAIL)
    try:
        while True:
            try:
                _relay(source, target, tail)
                return process.wait(), stopped, tail
            except KeyboardInterrupt:
                stopped = True
                process.send_signal(signal.SIGINT)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        source.close()


def _relay(source: IO[str], target: Any, tail: deque[str]) -> None:
    for line in source:
        tail.append(line)
        target.write(line)
        target.flush()


def _is_own(stream: Any, descriptor: int) -> bool:
    """Whether a stream is that of the process, which a child has too, and not one that a notebook or a test reads."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return bool(stream.fileno() == descriptor)
    return False


def _judged(code: int, stopped: bool, tail: Sequence[str], path: Path | None) -> Comparison:
    """Return the comparison, or raise why there is none."""
    comparison = None
    if path is not None:
        from mpscale.script.result import Comparison

        comparison = Comparison(path, code)
    if stopped or code == _INTERRUPTED:
        if comparison is None:
            raise Stopped("stopped before anything was measured", None)
        run = comparison.run
        ready = sum(record["status"] != "interrupted" for record in run.records)
        text = f"stopped: {path} has {ready} of {len(run.info['planned'])} cases"
        raise Stopped(f"{text}; to go on: {SCRIPT}(..., resume={run.name!r})", comparison)
    if comparison is None or code not in (0, 1):
        said = [line.strip() for line in tail if line.startswith("ERROR: ")] or [line.strip() for line in tail][-10:]
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        kept = "" if path is None else f"; {path} keeps every case that had ended"
        text = "\n".join([f"`mpscale run` ended with {how}{kept}", *map(as_arguments, said)])
        raise NotCompared(text.removeprefix("ERROR: "))
    if code == 1:
        trouble = comparison.trouble or "`mpscale run` failed, though every case went well; its output says why"
        warnings.warn(trouble, stacklevel=3)
    return comparison
