"""Interleaved timing of several programs, each in a process of its own, a block of steps at a time.

Processes, because in one process the order of building matters: of two identical train steps, the first one built was 5
to 8 % faster. Interleaved, because the speed of a shared machine drifts by more than the differences of interest. New
processes for every restart, because processes of the same program differ too.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any


@dataclass
class Times:
    """Results of one contestant, one entry per restart."""

    step_s: list[float] = field(default_factory=list)
    compile_s: list[float] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)


class Contestant:
    """A process that answers in lines of JSON: when it is ready, then the seconds per step of each requested block.

    It runs this Python with ``command``; ``request`` is sent before it is ready, and ``log`` gets its standard error.
    """

    def __init__(
        self,
        command: Sequence[str],
        cores: set[int] | None = None,
        environment: Mapping[str, str] | None = None,
        request: dict[str, Any] | None = None,
        log: IO[bytes] | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment or os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"},
        )
        self.pid = self._process.pid
        if cores is not None:
            os.sched_setaffinity(self.pid, cores)
        self._sink, self._source = self._process.stdin, self._process.stdout
        self.ready = self._answer() if request is None else self.ask(request)

    def block(self, steps: int) -> float:
        return float(self.ask({"steps": steps})["step_s"])

    def end(self) -> dict[str, Any]:
        facts = self.ask({"end": True})
        self._sink.close()
        if self._process.wait(60) != 0:
            raise RuntimeError(f"{self._process.args} ended with status {self._process.returncode}")
        return facts

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        self._sink.write(json.dumps(question) + "\n")
        self._sink.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._source.readline()
        if not line:
            raise RuntimeError(f"process {self.pid} ended without an answer")
        return json.loads(line)


def race(commands: Mapping[str, Sequence[str]], restarts: int, rounds: int, block_s: float = 0.04) -> dict[str, Times]:
    """Time programs against each other.

    Args:
        commands: arguments for this Python, by name of the program.
        restarts: how often all programs are started.
        rounds: blocks of each program per restart.
        block_s: approximate seconds per block.

    Returns:
        Results by name; ``step_s`` has the median of each restart.
    """
    times = {name: Times() for name in commands}
    for _ in range(restarts):
        running: dict[str, Contestant] = {}
        try:
            for name in random.sample(list(commands), len(commands)):
                running[name] = Contestant(commands[name])
                times[name].compile_s.append(running[name].ready["compile_s"])
            about_s = statistics.median(contestant.block(5) for contestant in running.values())
            steps = max(2, round(block_s / about_s))
            blocks: dict[str, list[float]] = {name: [] for name in commands}
            for _ in range(rounds):
                for name in random.sample(list(commands), len(commands)):
                    blocks[name].append(running[name].block(steps))
            for name, contestant in running.items():
                times[name].step_s.append(statistics.median(blocks[name]))
                times[name].facts.append(contestant.end())
        finally:
            for contestant in running.values():
                contestant.kill()
    return times
