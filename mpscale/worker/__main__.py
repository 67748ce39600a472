"""The process of a case, ``python -m mpscale.worker.__main__ --wire DESCRIPTOR``: takes a request, reports events.

The request is ``{"case": ..., "device": ..., "steps_path": ..., "sys_path": [...], "scratch": ..., "energy_s": ...,
"autotuning": ..., "given": ...}``; ``scratch`` is a folder that the session removes when the worker has ended,
``autotuning`` a flag for XLA or None, ``given`` a :class:`mpscale.core.given.Given`. The events are those of
:data:`mpscale.core.processes.events.WORKER_EVENTS`.

With ``--serve DESCRIPTOR`` it is the warm parent instead: a process that has imported TensorFlow, touches no device,
and forks a worker for each case. Importing TensorFlow takes longer than many a small case. A child forked before any
device is touched is as good as a fresh interpreter, on a CPU and on a GPU. What TensorFlow reads on import has the same
value in parent and child.

The warm parent first sends ``{"held": reason}``, None if it holds nothing of a GPU; only then can its children use one.
For each case the session sends ``{"environ": {name: value}}``, the variables that the worker sets or, for None,
removes, with two descriptors: the worker's end of its wire, and the file for its output. The parent answers
``{"pid": ...}`` and, when that worker has ended and nothing is left of what it has started, ``{"status": wait
status}``. It runs one case at a time, and ends when its wire is closed.

A case that fails reports what the user's code or TensorFlow raised (:mod:`mpscale.worker.errors`).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import os
import signal
import sys
import tempfile
import traceback
import types
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpscale.core import given
from mpscale.core.case import Case
from mpscale.core.device import Device
from mpscale.core.processes.events import Channel, Finished
from mpscale.core.processes.keeper import adopt_orphans, die_with_parent, end_children, wait_for_child
from mpscale.core.processes.wire import Wire
from mpscale.worker import autotuning
from mpscale.worker.errors import cause


def main(wire: Wire) -> int:
    """Run the case that is asked for; return the exit code, 0 even if the training diverged."""
    sys.stdout, sys.stderr = _Output.stream(1), _Output.stream(2)
    channel = Channel(wire)
    request = wire.receive()
    try:
        # Before a fresh worker imports TensorFlow, though XLA reads its flags only when it is first used.
        autotuning.begin(request["autotuning"])
        from mpscale.worker.case import execute
        from mpscale.worker.linting import lint

        # Use pytest's path, so that a user's module is the same file here. Not before TensorFlow has been imported: a
        # module beside the suite must not hide one of the same name that TensorFlow needs.
        sys.path[:] = dict.fromkeys([*request["sys_path"], *sys.path])
        _keep_generated_files_in(request["scratch"])
        given.take(replace(given.Given.from_json(request["given"]), in_worker=True))
        steps_path = request["steps_path"]
        case, device = Case.from_json(request["case"]), Device.from_json(request["device"])
        if case.settings.lint:
            status, reason = lint(case, device, channel)
        else:
            path = Path(steps_path) if steps_path else None
            status, reason = execute(case, device, path, channel, request["energy_s"])
    except BaseException as error:  # some libraries derive from it, for instance to cancel
        traceback.print_exc()
        channel.send(cause(error))
        return 1
    channel.send(Finished(status, None if reason is None else str(reason), _runtime()))
    return 0


class _Output(io.FileIO):
    """Standard output or error. What its file cannot take is lost: a full disk there must not end a training."""

    @classmethod
    def stream(cls, descriptor: int) -> io.TextIOWrapper:
        """An unbuffered stream for text, in which characters that it cannot encode are escaped."""
        raw: Any = cls(descriptor, "wb", closefd=False)  # as Python's own, if unbuffered
        return io.TextIOWrapper(raw, sys.stdout.encoding, errors="backslashreplace", write_through=True)

    def write(self, data: Any, /) -> int:
        """Write what can be written."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _keep_generated_files_in(folder: str) -> None:
    """Have TensorFlow put the source files that it generates into ``folder``, which the session removes.

    TensorFlow removes them only when Python ends normally, which a killed worker does not. Everything else keeps its
    folder for temporary files: a workload may store something there.
    """
    try:
        from tensorflow.python.autograph.pyct import loader
    except ImportError:
        return  # another version of TensorFlow: the files stay where they were

    named_in_folder = functools.partial(tempfile.NamedTemporaryFile, dir=folder)

    def named_file(*arguments: Any, **options: Any) -> Any:
        # Something that tidies up temporary files may have removed it.
        Path(folder).mkdir(parents=True, exist_ok=True)
        return named_in_folder(*arguments, **options)

    own = types.ModuleType("tempfile", tempfile.__doc__)
    vars(own).update(vars(tempfile), NamedTemporaryFile=named_file)
    loader.tempfile = own


def _runtime() -> dict[str, Any]:
    """Facts about the environment that only TensorFlow has."""
    import tensorflow as tf

    build = tf.sysconfig.get_build_info()
    details = [tf.config.experimental.get_device_details(gpu) for gpu in tf.config.list_physical_devices("GPU")]
    return {
        "tensorflow": tf.version.VERSION,
        "tensorflow_git": tf.version.GIT_VERSION,
        "cuda": build.get("cuda_version"),
        "cudnn": build.get("cudnn_version"),
        "cuda_compute_capabilities": build.get("cuda_compute_capabilities"),
        "gpus": [str(detail.get("device_name")) for detail in details],
    }


def serve(wire: Wire) -> None:
    """Fork a worker for each request until the wire is closed."""
    # What a case needs is imported here, once; nothing below may create a TensorFlow context.
    import mpscale.worker.linting  # noqa: F401
    from mpscale.worker.device import held_by_this_process

    # What a worker leaves behind becomes a child of this process, which has no others.
    adopt_orphans()
    held = held_by_this_process()
    wire.send({"held": None if held is None else held.to_json()})
    with contextlib.suppress(EOFError):
        while True:
            order = wire.receive()
            (theirs, log), wire.descriptors = wire.descriptors, []
            pid = os.fork()
            if pid == 0:
                _run_child(wire, theirs, log, order["environ"])
            os.close(theirs)
            os.close(log)
            wire.send({"pid": pid})
            status = wait_for_child(pid)
            end_children()
            wire.send({"status": status})


def _run_child(parents: Wire, own: int, log: int, environ: Mapping[str, str | None]) -> None:
    """Be the forked worker; never returns. ``environ``: variables to set, or to remove if they are None."""
    code = 1
    _forget_exit_handlers()
    try:
        die_with_parent()
        os.setsid()
        for name, value in environ.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        parents.close()
        for stream in (1, 2):
            os.dup2(log, stream)
        os.close(log)
        code = main(Wire.inherited(own))
    finally:
        # Not sys.exit, which would unwind the parent's frames. As multiprocessing does it.
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _forget_exit_handlers() -> None:
    """Leave the parent's clean-up to the parent. What the case registers later runs when the case ends."""
    atexit._clear()
    finalize: Any = weakref.finalize
    for inherited in list(finalize._registry):
        inherited.atexit = False
    finalize._registered_with_atexit = False


if __name__ == "__main__":
    # Somebody's SIGINT is no exception of the case. Ctrl-C does not get here: the terminal belongs to another session.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with_parent()
    option, descriptor = sys.argv[1:]
    # A workload's module may parse the command line when it is imported.
    del sys.argv[1:]
    if option == "--serve":
        serve(Wire.inherited(int(descriptor)))
    else:
        sys.exit(main(Wire.inherited(int(descriptor))))
