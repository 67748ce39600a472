"""The warm parent: a process that has imported TensorFlow, has touched no device, and forks a child for each case.

Importing TensorFlow takes longer than many a small case. A child forked before any device is touched is as good as a
fresh interpreter on a CPU; where a GPU or a setting read at import is involved, it is not, and the supervisor starts
fresh ones.

The supervisor sends one byte with three file descriptors (the child's standard input, output and error) and gets
back ``{"pid": n}`` and, when that child has ended, ``{"status": wait status}``, a line each. One case at a time.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import sys
import weakref
from typing import Any


def serve(descriptor: int) -> None:
    """Answers requests on the socket ``descriptor`` until its other end is closed."""
    # What a case needs is imported here, once; nothing below may create a TensorFlow context.
    import mpscale.harness.execute  # noqa: F401
    from mpscale.harness.worker import main
    from mpscale.lifeline import die_with_parent

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
