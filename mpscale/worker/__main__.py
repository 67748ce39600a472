"""The process of one case: ``python -m mpscale.worker.__main__`` reads a request and answers in JSON lines.

With ``--serve SOCKET_FD`` it is the warm parent instead, which imports TensorFlow once and forks a child for each
case that it is asked for; see forkserver.py.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import sys
import tempfile
import traceback
import types
import weakref
from pathlib import Path
from typing import Any

from mpscale.core.case import Case
from mpscale.core.device import Device
from mpscale.core.wire import PipeChannel, die_with_parent
from mpscale.worker.cause import cause


def main() -> int:
    """Runs the case on standard input; the exit code, 0 also for a case whose training diverged."""
    channel = _open_channel()
    request = channel.request()
    try:
        from mpscale.worker.case import execute

        # Python's path as pytest has it, so that a module of the user's is the same file here. After TensorFlow has
        # been imported: what lies beside a suite must not stand in for a module of the same name that it needs.
        sys.path[:] = dict.fromkeys([*request["sys_path"], *sys.path])
        _keep_generated_files_in(request["scratch"])
        steps_path = request.get("steps_path")
        status, reason = execute(
            Case.from_json(request["case"]),
            Device.from_json(request["device"]),
            Path(steps_path) if steps_path else None,
            channel,
            request.get("energy_s", 0.0),
        )
    except BaseException as error:  # libraries raise their own, as to stop or to cancel something
        traceback.print_exc()
        channel.send("error", **cause(error, request["case"]["settings"]["jit"]))
        return 1
    channel.send("done", status=status, reason=reason, runtime=_runtime())
    return 0


def _keep_generated_files_in(folder: str) -> None:
    """Has TensorFlow put the source files that it generates into ``folder``, which the supervisor removes.

    It removes them itself only where Python comes to its regular end, which a worker that is killed does not. The
    folder for temporary files stays what it is for everybody else: a workload may keep something there.
    """
    try:
        from tensorflow.python.autograph.pyct import loader
    except ImportError:
        return  # another TensorFlow: the files stay where they were
    own = types.ModuleType("tempfile", tempfile.__doc__)
    vars(own).update(vars(tempfile), NamedTemporaryFile=functools.partial(tempfile.NamedTemporaryFile, dir=folder))
    loader.tempfile = own


def _open_channel() -> PipeChannel:
    """The protocol on copies of standard input and output; what libraries print goes to standard error."""
    source = os.fdopen(os.dup(0), "r", encoding="utf-8")
    sink = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # A training is not worth less because its progress bar does not fit the terminal's encoding.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    return PipeChannel(source, sink)


def _runtime() -> dict[str, Any]:
    """What only a process with TensorFlow in it knows about the environment."""
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


# The warm parent: a process that has imported TensorFlow, has touched no device, and forks a child for each case.
# Importing TensorFlow takes longer than many a small case. A child forked before any device is touched is as good as
# a fresh interpreter on a CPU; where a GPU or a setting read at import is involved, it is not, and the supervisor
# starts fresh ones. The supervisor sends one byte with three file descriptors (the child's standard input, output and
# error) and gets back ``{"pid": n}`` and, when that child has ended, ``{"status": wait status}``, a line each. One
# case at a time.


def serve(descriptor: int) -> None:
    """Answers requests on the socket ``descriptor`` until its other end is closed."""
    # What a case needs is imported here, once; nothing below may create a TensorFlow context.
    import mpscale.worker.case  # noqa: F401

    pass
    from mpscale.core.wire import die_with_parent

    connection = socket.socket(fileno=descriptor)
    connection.sendall(b'{"ready": true}\n')
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 1, 3)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            code = 1
            _forget_exit_handlers()
            try:
                die_with_parent()
                os.setsid()
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                connection.close()
                for target, source in enumerate(descriptors):
                    os.dup2(source, target)
                    os.close(source)
                code = main()
            finally:
                # Not sys.exit, which would unwind the parent's frames. As multiprocessing does it.
                with contextlib.suppress(BaseException):
                    atexit._run_exitfuncs()
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        for source in descriptors:
            os.close(source)
        connection.sendall(json.dumps({"pid": pid}).encode() + b"\n")
        _, status = os.waitpid(pid, 0)
        connection.sendall(json.dumps({"status": status}).encode() + b"\n")


def _forget_exit_handlers() -> None:
    """Leaves the parent's clean-up to the parent; what a case registers from here on is run when it ends."""
    atexit._clear()
    finalize: Any = weakref.finalize
    for inherited in list(finalize._registry):
        inherited.atexit = False
    finalize._registered_with_atexit = False


if __name__ == "__main__":
    die_with_parent()
    arguments = sys.argv[1:]
    # A workload's module may look for arguments of its own when it is imported. These are not.
    del sys.argv[1:]
    if arguments[:1] == ["--serve"]:
        pass

        serve(int(arguments[1]))
    else:
        sys.exit(main())
