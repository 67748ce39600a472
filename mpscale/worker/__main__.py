"""The process of a case, ``python -m mpscale.worker.__main__ --wire DESCRIPTOR``: takes a request, reports events.

The request is ``{"case": ..., "device": ..., "steps_path": ..., "sys_path": [...], "scratch": ..., "energy_s": ...}``;
``scratch`` is a folder that the session removes when the worker has ended. The events are those of
:data:`mpscale.core.wire.WORKER_EVENTS`.

With ``--serve DESCRIPTOR`` it is the warm parent instead: a process that has imported TensorFlow, touches no device,
and forks a worker for each case. Importing TensorFlow takes longer than many a small case. On a CPU, a child forked
before any device is touched is as good as a fresh interpreter. With a GPU, or a setting that is read on import, it is
not, so the session then starts fresh ones.

The warm parent first sends an empty message. For each case the session sends an empty message with two descriptors:
the worker's end of its wire, and the file for its output. The parent answers ``{"pid": ...}`` and, when that worker has
ended, ``{"status": wait status}``. It runs one case at a time, and ends when its wire is closed.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import signal
import sys
import tempfile
import traceback
import types
import weakref
from pathlib import Path
from typing import Any

from mpscale.core.case import Case
from mpscale.core.device import Device
from mpscale.core.process import die_with_parent
from mpscale.core.wire import Channel, Finished, Wire
from mpscale.worker.cause import cause


def main(wire: Wire) -> int:
    """Run the case that is asked for; return the exit code, 0 even if the training diverged."""
    # A training is worth no less because its progress bar does not fit the terminal's encoding.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    channel = Channel(wire)
    request = wire.receive()
    try:
        from mpscale.worker.case import execute

        # Python's path as pytest has it, so that a module of the user's is the same file here. After TensorFlow's
        # import: a module beside a suite must not stand in for one of the same name that TensorFlow needs.
        sys.path[:] = dict.fromkeys([*request["sys_path"], *sys.path])
        _keep_generated_files_in(request["scratch"])
        steps_path = request["steps_path"]
        status, reason = execute(
            Case.from_json(request["case"]),
            Device.from_json(request["device"]),
            Path(steps_path) if steps_path else None,
            channel,
            request["energy_s"],
        )
    except BaseException as error:  # libraries derive their own, to stop or to cancel something
        traceback.print_exc()
        channel.send(cause(error, request["case"]["settings"]["jit"]))
        return 1
    channel.send(Finished(status, None if reason is None else str(reason), _runtime()))
    return 0


def _keep_generated_files_in(folder: str) -> None:
    """Have TensorFlow put the source files that it generates into ``folder``, which the session removes.

    TensorFlow removes them only when Python ends normally, which a killed worker does not. Everything else keeps its
    folder for temporary files: a workload may store something there.
    """
    try:
        from tensorflow.python.autograph.pyct import loader
    except ImportError:
        return  # another version of TensorFlow: the files stay where they were
    own = types.ModuleType("tempfile", tempfile.__doc__)
    vars(own).update(vars(tempfile), NamedTemporaryFile=functools.partial(tempfile.NamedTemporaryFile, dir=folder))
    loader.tempfile = own


def _runtime() -> dict[str, Any]:
    """What only a process that has imported TensorFlow knows about the environment."""
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
    import mpscale.worker.case  # noqa: F401

    wire.send({})
    with contextlib.suppress(EOFError):
        while True:
            wire.receive()
            (theirs, log), wire.descriptors = wire.descriptors, []
            pid = os.fork()
            if pid == 0:
                _run_child(wire, theirs, log)
            os.close(theirs)
            os.close(log)
            wire.send({"pid": pid})
            _, status = os.waitpid(pid, 0)
            wire.send({"status": status})


def _run_child(parents: Wire, own: int, log: int) -> None:
    """Be the forked worker; never returns."""
    code = 1
    _forget_exit_handlers()
    try:
        die_with_parent()
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
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
    """Leave the parent's clean-up to the parent; what a case registers from here on runs when it ends."""
    atexit._clear()
    finalize: Any = weakref.finalize
    for inherited in list(finalize._registry):
        inherited.atexit = False
    finalize._registered_with_atexit = False


if __name__ == "__main__":
    die_with_parent()
    what, descriptor = sys.argv[1:]
    # A workload's module may look for arguments of its own when it is imported. These are not.
    del sys.argv[1:]
    if what == "--serve":
        serve(Wire.inherited(int(descriptor)))
    else:
        sys.exit(main(Wire.inherited(int(descriptor))))
