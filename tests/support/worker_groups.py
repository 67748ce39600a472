"""Cases whose workers train together, in forks of one interpreter; printed as a line of JSON.

    python worker_groups.py FOLDER < groups.json

The input has, for each name, ``{"workers": [settings, ...], "mode": ..., "workload": ..., "kill": number}``. A group of
one is a case that trains alone. Worker ``kill`` is killed in mid-training. The output has for each name what the workers
have reported, ``{"row": ..., "end": the last event, "seconds": since another one was killed, ...}``.
"""

import contextlib
import gzip
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import mpscale.worker.linting  # noqa: F401  imports all that a case needs, before the first fork
from mpscale.core.case import Case, Settings
from mpscale.core.device import Device
from mpscale.core.given import Given
from mpscale.core.processes.wire import Wire, wait_for
from mpscale.worker.__main__ import main

PLAIN = {"jit": False, "timing_s": 0.0, "energy_s": 0.0}
LIMIT_S = 100.0


def free_addresses(number):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    addresses = ["{}:{}".format(*each.getsockname()) for each in sockets]
    for each in sockets:
        each.close()
    return addresses


def start(group, folder):
    """Fork the workers of a group; return the pid, the wire and the log of steps of each."""
    addresses, started = free_addresses(len(group["workers"])), []
    for number, settings in enumerate(group["workers"]):
        ours, theirs = Wire.pair()
        case = Case(
            settings.pop("workload", group["workload"]), settings.pop("mode", group.get("mode", "fp32")), 0, 0, 0,
            Settings(**{**PLAIN, **settings}),
        )  # fmt: skip
        steps = folder / "steps" / f"{os.urandom(8).hex()}.csv.gz"
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setsid()
                os.dup2(os.open(folder / f"{case.mode}-{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
                os.dup2(1, 2)
                if len(addresses) > 1:
                    task = {"type": "worker", "index": number}
                    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
                code = main(theirs)
            finally:
                os._exit(code)
        theirs.close()
        request = {
            "case": case.to_json(), "device": Device("cpu", "CPU").to_json(), "sys_path": sys.path,
            "steps_path": str(steps) if number == 0 else None, "scratch": str(folder), "energy_s": case.settings.energy_s,
            "autotuning": None, "given": Given().to_json(),
        }  # fmt: skip
        ours.send(request)
        started.append((pid, ours, steps))
    return started


def run(group, folder):
    """Run a group to its end as a session does."""
    started, end, killed = start(group, folder), time.monotonic() + LIMIT_S, None
    told = [{"row": {}, "remarks": [], "end": None, "seconds": None} for _ in started]
    open_ones = {wire: (pid, one) for (pid, wire, _), one in zip(started, told, strict=True)}
    while open_ones and (left := end - time.monotonic()) > 0:
        for wire in wait_for(open_ones, left):
            pid, one = open_ones[wire]
            try:
                event = wire.receive(LIMIT_S)
            except EOFError:
                del open_ones[wire]
                one["seconds"] = None if killed is None else time.monotonic() - killed
                continue
            kind = event.pop("event")
            if kind == "phase":
                wire.send({})
            elif kind == "values":
                one["row"] |= event["values"]
            elif kind == "remark":
                one["remarks"].append(event["text"])
            elif kind in ("done", "error"):
                one["end"] = event
            elif kind == "progress" and killed is None and group.get("kill") == told.index(one):
                os.kill(pid, signal.SIGKILL)
                killed = time.monotonic()
    for (pid, _, steps), one in zip(started, told, strict=True):
        if one["end"] is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        one["code"] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if steps.exists():
            lines = gzip.decompress(steps.read_bytes()).decode().split()[1:]
            columns = zip(*[line.split(",") for line in lines], strict=True)
            one |= dict(zip(("step", "loss", "scale", "overflow"), map(list, columns), strict=True))
    return told


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / "steps").mkdir()
    print(json.dumps({name: run(group, place) for name, group in json.load(sys.stdin).items()}))
