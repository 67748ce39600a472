"""The workers of a case that trains in several processes: how they join, agree, and notice that one is lost.

Every worker runs the same code, and each collective operation waits for all of them. So a decision that could differ
between them, such as how many steps take two seconds, is made by the first worker, and the others get it from
TensorFlow's coordination service (:meth:`JoinedCluster.agreed`). That takes no part in the order of collective
operations and does not touch a GPU.

TensorFlow aborts what waits for a worker that has died at once, and after ten seconds without a sign of life if nothing
waits or the worker is stopped.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.distribute import collective_all_reduce_strategy as of_tensorflow
from tensorflow.python.eager import context

from mpscale.core.case import Settings
from mpscale.core.cluster import VARIABLE, Address, BadCluster, Cluster, listening
from mpscale.worker.errors import PeerLost, message_of, unwrapped

_JOIN_S = 180.0
"""How long to wait for the other workers, which import TensorFlow first."""
_ANSWER_S = 600.0
"""How long to wait for the first worker's word. TensorFlow notices much sooner that it has died."""
_LOST = (
    tf.errors.UnavailableError,
    tf.errors.DeadlineExceededError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
)
"""What TensorFlow raises in a worker that waits for one that is gone, or has said something else."""
_SOON_S = 1.0  # how long a connection may take
_ALL_HERE = b"all here\n"
_SHOWN = 60  # characters of a fact


class JoinedCluster:
    """The workers of a case as one of them sees it.

    Args:
        cluster: who they are, and which of them this process is.
        replicas: of each worker.

    Raises:
        PeerLost: another worker did not come.
    """

    def __init__(self, cluster: Cluster, replicas: int) -> None:
        self.cluster, self.workers, self.replicas = cluster, len(cluster.workers), replicas
        meet(cluster, _JOIN_S)
        self.strategy = _strategy(replicas)
        self._asked = 0  # how often the workers have agreed on something

    def agreed(self, value: Any) -> Any:
        """The first worker's value, a number or an array.

        All workers have to call this equally often, and in the same order.
        """
        key = self._next_key()
        if self.cluster.leads:
            context.context().set_config_key_value(key, json.dumps(np.asarray(value).tolist()))
            return value
        told = json.loads(_said(key))
        return np.asarray(told, np.asarray(value).dtype) if isinstance(told, list) else float(told)

    def mean(self, values: Any) -> Any:
        """The mean of the workers' arrays, float32 of any shape; the same on all. All of them have to call this."""
        return self.total(values) / np.float32(self.workers)

    def total(self, values: Any) -> Any:
        """The sum of the workers' arrays, as :meth:`mean`."""
        if self.workers == 1:
            # TensorFlow refuses to add up a tensor of one worker with several devices.
            return values
        return self.strategy.reduce(tf.distribute.ReduceOp.SUM, tf.constant(values), axis=None).numpy()

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Check that all workers know the same ``facts``, values of JSON by name. All have to call this.

        Raises:
            ValueError: they do not; on all workers.
        """
        key = self._next_key()
        context.context().set_config_key_value(f"{key}/{self.cluster.place}", json.dumps(dict(facts)))
        told = [json.loads(_said(f"{key}/{place}")) for place in range(self.workers)]
        for place, theirs in enumerate(told):
            differing = [name for name in told[0] | theirs if told[0].get(name) != theirs.get(name)]
            if differing:
                words = "; ".join(f"{name}: {_short(theirs, name)}, not {_short(told[0], name)}" for name in differing)
                self.end()
                raise ValueError(
                    f"{self.cluster.name(place)} would not train the same as worker 1 ({words}); give all of them the "
                    "same workload, data, options and software"
                )

    def end(self) -> None:
        """Wait for the others, so that none is gone while another one still waits for its word. Call it once."""
        with contextlib.suppress(tf.errors.OpError):  # whoever has lost the others here has all its figures
            context.context().wait_at_barrier("mpscale/end", int(_ANSWER_S * 1e3))

    def _next_key(self) -> str:
        self._asked += 1
        return f"mpscale/{self._asked}"


def replicas_here(settings: Settings) -> int:
    """How many of a case's replicas this process trains.

    Raises:
        BadCluster: TF_CONFIG does not say who trains.
        ValueError: the number of workers does not divide that of the replicas.
    """
    if settings.strategy != "multiworker":
        return settings.replicas
    workers = len(_cluster().workers)
    if settings.replicas % workers:
        raise ValueError(
            f"{settings.replicas} replicas cannot be shared equally by {workers} workers; give --mp-replicas a "
            f"multiple of {workers}"
        )
    return settings.replicas // workers


def cluster_of(settings: Settings) -> JoinedCluster | None:
    """The cluster of a case, joined when this is called first, which must be before TensorFlow touches a device.

    None if the case trains in this process alone.

    Raises:
        BadCluster, ValueError: as of :func:`replicas_here`.
        PeerLost: another worker did not come.
    """
    return _joined(replicas_here(settings)) if settings.strategy == "multiworker" else None


def check_same(settings: Settings, facts: Mapping[str, Any]) -> None:
    """As :meth:`JoinedCluster.check_same`; nothing if the case trains in this process alone."""
    if (cluster := cluster_of(settings)) is not None:
        cluster.check_same(facts)


@functools.cache
def _joined(replicas: int) -> JoinedCluster:
    """A process can join once, and its strategy numbers the collective operations from the start."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        return JoinedCluster(_cluster(), replicas)
    finally:
        # TensorFlow takes SIGTERM for the notice of a preemption, which nothing here looks at.
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _cluster() -> Cluster:
    found = Cluster.of(os.environ)
    if found is None:
        raise BadCluster(f"a worker of --mp-strategy multiworker needs {VARIABLE}, which says who trains with it")
    return found


def meet(cluster: Cluster, seconds: float) -> None:
    """Wait until all workers are there, at the address that the first one's server is about to have.

    TensorFlow itself would wait for ever and not say for whom, and a worker that comes before the first one would try
    again only after a second.

    Raises:
        PeerLost: that took more than ``seconds``.
        OSError: something else uses the address.
    """
    end, first = time.monotonic() + seconds, Address.parse(cluster.workers[0])
    if cluster.leads:
        _receive_workers(cluster, first.port, seconds, end)
        return
    late, answer = f"{cluster.name(0)} did not come within {seconds:g} s", b""
    while answer != _ALL_HERE:
        with _connection(first, end, late) as door, contextlib.suppress(OSError):
            door.settimeout(max(end - time.monotonic(), _SOON_S))
            door.sendall(b"%d\n" % cluster.place)
            answer = door.recv(len(_ALL_HERE))
        # Something else may have answered, such as the server of a case before, or a first worker that ended meanwhile.
        if answer != _ALL_HERE and time.monotonic() > end:
            raise PeerLost(late)
    # Until its server listens there.
    _connection(first, end, late).close()


def _receive_workers(cluster: Cluster, port: int, seconds: float, end: float) -> None:
    """Wait for all other workers, as the first one, until ``end``."""
    others = range(1, len(cluster.workers))
    doors: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as closing:
        with listening(port, reuse=True) as server:  # the harness may hold it for this process
            while len(doors) < len(others):
                server.settimeout(max(end - time.monotonic(), 0.01))
                try:
                    door = closing.enter_context(server.accept()[0])
                except TimeoutError as error:
                    names = " and ".join(cluster.name(place) for place in others if place not in doors)
                    raise PeerLost(f"{names} did not come within {seconds:g} s") from error
                door.settimeout(_SOON_S)
                # Whatever else may connect says something else, or nothing.
                with contextlib.suppress(OSError, ValueError):
                    if (place := int(door.recv(20))) in others:
                        doors[place] = door
        for door in doors.values():
            with contextlib.suppress(OSError):
                door.sendall(_ALL_HERE)


def _connection(address: Address, end: float, late: str) -> socket.socket:
    """Connect to an address as soon as somebody listens there.

    Raises:
        PeerLost: nobody did until ``end``; it says ``late``.
    """
    while True:
        time.sleep(0.02)
        try:
            return socket.create_connection((address.host, address.port), timeout=_SOON_S)
        except OSError as error:
            if time.monotonic() > end:
                raise PeerLost(f"{late} ({error})") from error


@contextlib.contextmanager
def noticing_lost_peers(settings: Settings) -> Iterator[None]:
    """Raise :class:`PeerLost` for what TensorFlow raises because another worker is gone; at the end wait for them."""
    try:
        yield
        if (cluster := cluster_of(settings)) is not None:
            cluster.end()
    except Exception as error:
        if settings.strategy != "multiworker" or not isinstance(unwrapped(error), _LOST):
            raise
        said = message_of(unwrapped(error)).strip().partition("\n")[0]
        raise PeerLost(f"another worker of the case ended, or cannot be reached: {said}") from error


def _strategy(replicas: int) -> tf.distribute.Strategy:
    """The strategy of a worker of so many replicas, each on a logical device of its own."""
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    tasks = resolver.cluster_spec()
    jobs = [job for job in ("chief", "worker") if job in tasks.jobs]
    context.context().configure_coordination_service(
        service_type="standalone",
        service_leader=f"/job:{jobs[0]}/replica:0/task:0",
        cluster_register_timeout_in_ms=int(_JOIN_S * 1e3),
        coordinated_jobs=[
            context.coordination_config_pb2.CoordinatedJob(name=job, num_tasks=tasks.num_tasks(job)) for job in jobs
        ],
    )
    with _on_logical_cpus(replicas):
        return tf.distribute.MultiWorkerMirroredStrategy(resolver)


@contextlib.contextmanager
def _on_logical_cpus(number: int) -> Iterator[None]:
    """Have MultiWorkerMirroredStrategy use this many logical devices of a CPU; it would use one."""
    kind = of_tensorflow.CollectiveAllReduceExtended
    local_devices = kind._initialize_local_devices

    def all_devices(self: Any, resolver: Any, worker: str) -> tuple[tuple[str, ...], str]:
        devices, device_type = local_devices(self, resolver, worker)
        if device_type == "CPU":
            devices = tuple(f"{worker}/device:CPU:{place}" for place in range(number))
        return devices, device_type

    kind._initialize_local_devices = all_devices
    try:
        yield
    finally:
        kind._initialize_local_devices = local_devices


def _said(key: str) -> str:
    return str(context.context().get_config_key_value(key, int(_ANSWER_S * 1e3)))


def _short(facts: Mapping[str, Any], name: str) -> str:
    text = json.dumps(facts.get(name))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
