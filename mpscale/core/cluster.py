"""The workers of one training on several machines, as a scheduler names them in ``TF_CONFIG``."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VARIABLE = "TF_CONFIG"
_EXAMPLE = (
    '{"cluster": {"worker": ["node1:2222", "node2:2222"]}, "task": {"type": "worker", "index": 0}}, with its own index '
    "on each machine"
)
_LAST_PORT = 65535


class BadCluster(ValueError):
    """``TF_CONFIG``, or another address, is not what it should be; the text says what to do."""


@dataclass(frozen=True)
class Address:
    """Where a process listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: object) -> Address:
        """Read ``HOST:PORT``, such as ``node1:2222`` or ``[::1]:2222``.

        Raises:
            ValueError: it is something else.
        """
        host, _, port = str(text).rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        known = isinstance(text, str) and port.isascii() and port.isdecimal() and 0 < int(port[:9]) <= _LAST_PORT
        # Colons without brackets: part of the host would be taken for a port, or the other way round.
        if not known or not bare or any(c.isspace() for c in host) or (":" in bare and bare == host):
            raise ValueError(f"{text!r:.80} is no HOST:PORT, such as node1:2222")
        return cls(bare, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Cluster:
    """The workers of a training, and which of them this machine runs.

    Args:
        workers: addresses of the workers for TensorFlow; the first one, a ``chief`` if there is any, leads.
        place: which one is this machine's, from 0.
        text: ``TF_CONFIG`` itself.
    """

    workers: tuple[str, ...]
    place: int
    text: str

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Cluster | None:
        """Return what the environment says; None if it names no cluster.

        Raises:
            BadCluster: it names one that mpscale cannot use.
        """
        text = environ.get(VARIABLE, "")
        if not text.strip():
            return None
        try:
            told = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadCluster(f"{VARIABLE} is no JSON ({error}); it should be {_EXAMPLE}") from error
        try:
            tasks = _tasks(told)
            task = told.get("task")
            kind = task.get("type") if isinstance(task, dict) else None
            index = task.get("index") if isinstance(task, dict) else None
            index = int(index) if isinstance(index, str) and index.isascii() and index.isdecimal() else index
            if not isinstance(kind, str) or not isinstance(index, int) or isinstance(index, bool):
                raise ValueError("its task has no type and index")
            if kind in ("ps", "evaluator"):
                raise ValueError(f"its task is a {kind!r}, and only workers and a chief train here")
            if (kind, index) not in tasks:
                raise ValueError(f"its task, {kind!r:.40} {index}, is not in its cluster")
        except ValueError as error:
            raise BadCluster(f"{VARIABLE} cannot be used: {error}; it should be like {_EXAMPLE}") from error
        return cls(tuple(tasks.values()), list(tasks).index((kind, index)), text)

    @property
    def leads(self) -> bool:
        """Whether the session of this machine plans and records the run."""
        return self.place == 0

    def coordinator(self) -> Address:
        """Where the first session listens for the others by default: the port after that of its worker.

        Raises:
            BadCluster: there is no such port.
        """
        first = Address.parse(self.workers[0])
        if first.port == _LAST_PORT:
            raise BadCluster(f"{first} has the last port there is; name another with --mp-coordinator HOST:PORT")
        return Address(first.host, first.port + 1)

    def name(self, place: int) -> str:
        """What a worker is called, from ``worker 1 of 2`` on. Rows get published, so it is without its address."""
        return f"worker {place + 1} of {len(self.workers)}"


def listening(port: int, reuse: bool = False) -> socket.socket:
    """A socket that listens on all addresses of this machine: others may know it by that of any interface.

    Args:
        port: where.
        reuse: whether another process of this user may have the port, too.
    """
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # where IPv6 is switched off
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, reuse_port=reuse)
    return socket.create_server(("", port), reuse_port=reuse)


def _tasks(told: Any) -> dict[tuple[str, int], str]:
    """The addresses of all workers by type and index, the chief first.

    Raises:
        ValueError: the cluster is something else, or has other tasks.
    """
    cluster = told.get("cluster") if isinstance(told, dict) else None
    if not isinstance(cluster, dict) or not cluster:
        raise ValueError("it names no cluster")
    if others := sorted(set(map(str, cluster)) - {"chief", "worker"}):
        raise ValueError(
            f"its cluster has {', '.join(map(repr, others))[:80]}: MultiWorkerMirroredStrategy trains with workers, "
            "and a chief at most"
        )
    found: dict[tuple[str, int], str] = {}
    for kind in ("chief", "worker"):
        addresses = cluster.get(kind, [])
        if not isinstance(addresses, list):
            raise ValueError(f"its {kind} is no list of addresses")
        found |= {(kind, index): str(Address.parse(address)) for index, address in enumerate(addresses)}
    if sum(kind == "chief" for kind, _ in found) > 1:
        raise ValueError("its cluster has several chiefs")
    if len(set(found.values())) < len(found):
        raise ValueError("two tasks of its cluster have the same address")
    if not found:
        raise ValueError("its cluster has no worker")
    return found
