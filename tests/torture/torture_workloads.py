"""Workloads of the runs that are tortured: small, exact, and one that starts processes."""

from __future__ import annotations

import subprocess

from suite_workloads import blobs, make

steady = make("steady", growth_interval=20)


def blobs_with_company():
    """Start two processes that would live for long: one in a session of its own, one that ignores what it can."""
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    subprocess.Popen(["sh", "-c", "trap '' INT TERM HUP; sleep 1000; true"])
    return blobs()


lingers = make("lingers", data=blobs_with_company)
