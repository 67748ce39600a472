"""The warm parent: a process that has imported TensorFlow, has touched no device, and forks a child for each case.

Importing TensorFlow takes longer than many a small case. A child forked before any device is touched is as good as a
fresh interpreter on a CPU; where a GPU or a setting read at import is involved, it is not, and the supervisor starts
fresh ones.

The supervisor sends one byte with three file descriptors (the child's standard input, output and error) and gets
back ``{"pid": n}`` and, when that child has ended, ``{"status": wait status}``, a line each. One case at a time.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys


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
            try:
                die_with_parent()
                os.setsid()
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                connection.close()
                for target, source in enumerate(descriptors):
                    os.dup2(source, target)
                    os.close(source)
                code = main()
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                # Not sys.exit: the parent's clean-up handlers are not the child's to run.
                os._exit(code)
        for source in descriptors:
            os.close(source)
        connection.sendall(json.dumps({"pid": pid}).encode() + b"\n")
        _, status = os.waitpid(pid, 0)
        connection.sendall(json.dumps({"status": status}).encode() + b"\n")
