"""Options of the self-checks."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mpscale self-checks")
    group.addoption("--restarts", type=int, default=5, help="how often all processes of a comparison are started")
    group.addoption("--scalings", help="kinds of loss scaling to compare, separated by commas (default: all)")
    group.addoption("--pool", help="processes measured before, in the format of trust_pool.py")
    group.addoption("--rounds", type=int, default=60, help="blocks of each process per restart")
