"""The process of one case: ``python -m mpscale.harness.worker`` reads a request and answers in JSON lines.

With ``--serve SOCKET_FD`` it is the warm parent instead, which imports TensorFlow once and forks a child for each
case that it is asked for; see forkserver.py.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import traceback
import types
from pathlib import Path
from typing import Any

from mpscale.harness.case import Case
from mpscale.harness.cause import cause
from mpscale.harness.protocol import PipeChannel
from mpscale.lifeline import die_with_parent
from mpscale.telemetry.device import Device


def main() -> int:
    """Runs the case on standard input; the exit code, 0 also for a case whose training diverged."""
    channel = _open_channel()
    request = channel.request()
    try:
        from mpscale.harness.execute import execute

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


if __name__ == "__main__":
    die_with_parent()
    arguments = sys.argv[1:]
    # A workload's module may look for arguments of its own when it is imported. These are not.
    del sys.argv[1:]
    if arguments[:1] == ["--serve"]:
        from mpscale.harness.forkserver import serve

        serve(int(arguments[1]))
    else:
        sys.exit(main())
