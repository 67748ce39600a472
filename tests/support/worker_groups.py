"""Cases whose workers train together, in forks of one interpreter; printed as a line of JSON.

    python worker_groups.py FOLDER < groups.json

The input has for each name ``{"workload": ..., "mode": ..., "workers": [settings, ...]}``, and may have ``chief``, to
call the first worker so, and ``kill``: the number of a worker that gets a signal in mid-training, and the signal.
The output has for each name and worker what it has reported, ``row``, ``remarks``, ``end`` (its last event) and the
columns of its steps, its exit ``code``, and ``seconds``, how long it outlived one that was killed.
"""

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


def tasks(group):
    """TF_CONFIG of each worker."""
    addresses = free_addresses(len(group["workers"]))
    names = [("worker", number) for number in range(len(addresses))]
    cluster = {"worker": addresses}
    if group.get("chief"):
        names = [("chief", 0), *names[:-1]]
        cluster = {"chief": addresses[:1], "worker": addresses[1:]}
    return [json.dumps({"cluster": cluster, "task": {"type": kind, "index": number}}) for kind, number in names]


def start(group, settings, task, folder):
    """Fork a worker; return its pid and its wire."""
    ours, theirs = Wire.pair()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            log = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ["TF_CONFIG"] = task
            code = main(theirs)
        finally:
            os._exit(code)
    theirs.close()
    case = Case(group["workload"], group.get("mode", "fp32"), 0, 0, 0, Settings(**{**PLAIN, **settings}))
    ours.send(
        {
            "case": case.to_json(), "device": Device("cpu", "CPU").to_json(), "energy_s": case.settings.energy_s,
            "steps_path": str(folder / "steps" / f"{pid}.csv.gz"), "scratch": str(folder), "sys_path": sys.path,
            "autotuning": None, "given": Given().to_json(),
        }
    )  # fmt: skip
    return pid, ours


def run(group, folder):
    """Run a group to its end, as a session does."""
    started = [start(group, *each, folder) for each in zip(group["workers"], tasks(group), strict=True)]
    told = [{"row": {}, "remarks": [], "end": None, "seconds": None} for _ in started]
    of_wire = {wire: number for number, (_, wire) in enumerate(started)}
    end, killed, (victim, how) = time.monotonic() + LIMIT_S, None, group.get("kill", (None, None))
    while of_wire and (left := end - time.monotonic()) > 0:
        for wire in wait_for(of_wire, left):
            number = of_wire[wire]
            try:
                event = wire.receive(LIMIT_S)
            except EOFError:
                told[number]["seconds"] = None if killed is None else time.monotonic() - killed
                del of_wire[wire]
                continue
            kind = event.pop("event")
            if kind == "phase":
                wire.send({})
            elif kind == "values":
                told[number]["row"] |= event["values"]
            elif kind == "remark":
                told[number]["remarks"].append(event["text"])
            elif kind in ("done", "error"):
                told[number]["end"] = event
            elif kind == "progress" and killed is None and number == victim:
                os.kill(started[number][0], getattr(signal, how))
                killed = time.monotonic()
    for (pid, wire), one in zip(started, told, strict=True):
        if wire in of_wire:
            os.kill(pid, signal.SIGKILL)
        one["code"] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        steps = folder / "steps" / f"{pid}.csv.gz"
        if steps.exists():
            lines = gzip.decompress(steps.read_bytes()).decode().split()[1:]
            columns = zip(*[line.split(",") for line in lines], strict=True)
            one |= dict(zip(("step", "loss", "scale", "overflow"), map(list, columns), strict=True))
    return told


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / "steps").mkdir()
    print(json.dumps({name: run(group, place) for name, group in json.load(sys.stdin).items()}))
