"""Sessions of several machines that train the same cases: the first one leads, the others follow it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from mpscale.core.cluster import Address, BadCluster, Cluster
from mpscale.core.columns import METHOD_VERSION
from mpscale.core.device import Device
from mpscale.pytest_plugin import origin
from mpscale.terminal.streams import visible

if TYPE_CHECKING:
    from mpscale.core.case import Case
    from mpscale.core.record import Record
    from mpscale.harness.coordinator import Coordinator
    from mpscale.harness.supervisor import Options
    from mpscale.telemetry.client import Driver


def cluster_of(config: pytest.Config) -> Cluster | None:
    """Return the workers that TF_CONFIG names; None if it names none, or one process trains alone.

    Raises:
        pytest.UsageError: it cannot be used.
    """
    asked, given = config.getoption("mp_strategy") == "multiworker", config.getoption("mp_coordinator")
    try:
        found = Cluster.of(os.environ) if asked else None
        if found is not None and given is None:
            found.coordinator()
    except BadCluster as error:
        raise pytest.UsageError(str(error)) from error
    if found is None and given is not None:
        raise pytest.UsageError(
            f"{origin.of(config, '--mp-coordinator')}: this is about the sessions of several machines, which need "
            "--mp-strategy multiworker, and TF_CONFIG in their environments"
        )
    return found


def _coordinator(config: pytest.Config, cluster: Cluster) -> Address:
    given: Address | None = config.getoption("mp_coordinator")
    return given or cluster.coordinator()


def _facts(cluster: Cluster, device: Device) -> dict[str, Any]:
    """What has to be the same on all machines, by its name for people."""
    from mpscale.telemetry.host import packages

    known = packages()
    return {
        **{name: known.get(name) for name in ("mpscale", "tensorflow", "keras")},
        "method": METHOD_VERSION,
        "device": device.name if device.kind == "gpu" else device.kind,
        "GPUs": 1 + len(device.beside) if device.kind == "gpu" else 0,
        "workers": ", ".join(cluster.workers),
    }


def lead(config: pytest.Config, cluster: Cluster, device: Device, say: Callable[[str], object]) -> Coordinator:
    """Wait until the sessions of all other machines are connected.

    Args:
        config: of the session.
        cluster: the workers.
        device: where this machine trains.
        say: shows a line.

    Raises:
        pytest.UsageError: one of them does not fit, or did not come in time; or the port is taken.
    """
    from mpscale.harness.coordinator import Coordinator, Refusal

    where, limit_s = _coordinator(config, cluster), config.getoption("mp_timeout")
    try:
        found = Coordinator(cluster, where, _facts(cluster, device), limit_s)
    except OSError as error:
        raise pytest.UsageError(
            f"{where}: the sessions of other machines cannot connect here ({os.strerror(error.errno or 0)}); name "
            "another port, with --mp-coordinator HOST:PORT on all machines"
        ) from error
    try:
        if found.others:
            say(f"waits for {found.others} other session{'' if found.others == 1 else 's'} on port {where.port}")
        found.gather()
    except TimeoutError as error:
        found.close(over=False)
        raise pytest.UsageError(
            f"{error}; start the same command on every machine, each with its own task in TF_CONFIG. --mp-timeout is "
            "how long to wait"
        ) from error
    except Refusal as error:
        raise pytest.UsageError(visible(str(error))) from error
    except BaseException:
        found.close(over=False)
        raise
    return found


class Following:
    """The hook by which a session follows, in place of running its tests.

    Args:
        config: of the session.
        cluster: the workers.
        device: where this machine trains.
        driver: of the GPU.
        options: how workers are started.
        say: shows a line.
    """

    def __init__(
        self,
        config: pytest.Config,
        cluster: Cluster,
        device: Device,
        driver: Driver,
        options: Options,
        say: Callable[[str], object],
    ) -> None:
        self._config, self._cluster, self._device, self._driver = config, cluster, device, driver
        self._options, self._say = options, say

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self) -> bool:
        """Follow until the run is over.

        Raises:
            pytest.UsageError: this session does not fit the first one.
        """
        from mpscale.harness.coordinator import Refusal
        from mpscale.harness.follower import FirstIsGone, Follower

        name = self._cluster.name(self._cluster.place)
        first = _coordinator(self._config, self._cluster)
        facts, limit_s = _facts(self._cluster, self._device), self._config.getoption("mp_timeout")
        follower = Follower(self._cluster, first, facts, limit_s)
        self._say(f"{name}: follows the session at {first}, which has the plan and records the run")

        def tell(case: Case, record: Record) -> None:
            reason = f", {record['status_reason']}" if record["status_reason"] else ""
            self._say(f"{name}: {case.id}: {record['status']}{reason}")

        try:
            follower.join()
            follower.follow(self._device, self._driver, self._options, tell)
        except Refusal as error:
            raise pytest.UsageError(visible(str(error))) from error
        except FirstIsGone as error:
            pytest.exit(visible(f"mpscale: {error}"), returncode=int(pytest.ExitCode.TESTS_FAILED))
        self._say(f"{name}: the run is over")
        return True
