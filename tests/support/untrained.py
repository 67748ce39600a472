"""A plug-in for a session in a process of its own, ``-p support.untrained``: its cases train nothing.

With the variable ``USES_DATA`` their metric is the mean of the workload's test set, so a workload that was sent to the
session is used there. ``HAPPEN`` says what else happens, for each mode: ``crashed``, or ``wait`` for somebody's signal.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support import no_training

from mpscale.core.cause import Cause
from mpscale.core.given import given, take
from mpscale.core.processes import stopping
from mpscale.workloads import registry


def pytest_configure(config):
    no_training.replace_trainings(pytest.MonkeyPatch(), happen)


def happen(case):
    what = json.loads(os.environ.get("HAPPEN", "{}")).get(case.mode)
    if what == "wait":
        Path(os.environ["WAITS"]).touch()
        with stopping.opened():  # as while a worker is waited for
            time.sleep(60)
    if what == "crashed":
        return {"status": "crashed", "status_reason": "SIGSEGV", "cause": Cause.FATAL_SIGNAL, "metric_value": None}
    if "USES_DATA" not in os.environ:
        return {}
    take(replace(given(), in_worker=True))
    return {"metric_value": float(registry.get(case.workload).data().test_x.mean())}
