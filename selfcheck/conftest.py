"""Options of the self-checks."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mpscale self-checks")
    group.addoption("--restarts", type=int, default=5, help="how often all processes of a comparison are started anew")
    group.addoption("--scalings", help="kinds of loss scaling to compare, with commas; all where none is named")
    group.addoption("--pool", help="processes that were measured before, as trust_pool.py leaves them")
    group.addoption("--rounds", type=int, default=60, help="blocks of each process per restart")
