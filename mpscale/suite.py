"""The suite that ``mpscale run`` and ``pytest --pyargs mpscale.suite --benchmark-only`` run; one to copy, too."""

from typing import Any


def test_training(mp_case: Any, benchmark: Any) -> None:
    """Train one workload in one mode from one seed to the end, then time its steps."""
    mp_case.measure(benchmark)
