"""The process of one case: ``python -m mpscale.harness.worker`` reads a request and answers in JSON lines.

With ``--serve SOCKET_FD`` it is the warm parent instead, which imports TensorFlow once and forks a child for each
case that it is asked for; see forkserver.py.
"""

from __future__ import annotations

import os
import sys
import traceback
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
    # The suite's own folders, so that a workload defined there can be found by module:attribute.
    sys.path += [entry for entry in request["sys_path"] if entry not in sys.path]
    try:
        from mpscale.harness.execute import execute

        steps_path = request.get("steps_path")
        status, reason = execute(
            Case.from_json(request["case"]),
            Device.from_json(request["device"]),
            Path(steps_path) if steps_path else None,
            channel,
            request.get("energy_s", 0.0),
        )
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        channel.send("error", **cause(error, request["case"]["settings"]["jit"]))
        return 1
    channel.send("done", status=status, reason=reason, runtime=_runtime())
    return 0


def _open_channel() -> PipeChannel:
    """The protocol on copies of standard input and output; what libraries print goes to standard error."""
    source = os.fdopen(os.dup(0), "r", encoding="utf-8")
    sink = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
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
    if sys.argv[1:2] == ["--serve"]:
        from mpscale.harness.forkserver import serve

        serve(int(sys.argv[2]))
    else:
        sys.exit(main())
