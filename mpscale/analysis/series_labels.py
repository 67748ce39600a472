"""What tells the series of one workload and mode apart, in a few words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# See harness.case.series_key. Settings hold slashes: timing=2s/50.
_KEY = re.compile(r".*/(?P<digest>[^/]*)/[^/]*/(?P<settings>batch=.*)/(?P<method>method=[^/]*)")

_ON = "on "
"""Before the names of facts on the machine, so that none is taken for a setting."""


def tell_apart(siblings: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """A text for each of some series of one workload and mode; empty where there is nothing to tell.

    Args:
        siblings: series key (see :func:`mpscale.harness.case.series_key`) and hardware of each; hardware holds only
            what is known.
    """
    facts = [
        key_facts(key) | {f"{_ON}{name}": str(fact) for name, fact in machine.items()} for key, machine in siblings
    ]
    names = dict.fromkeys(name for each in facts for name in each)
    differing = [name for name in names if len({each.get(name) for each in facts}) > 1]
    machines = {tuple(sorted((name, str(fact)) for name, fact in machine.items())) for _, machine in siblings}
    if len({each.get("on name") for each in facts}) == len(machines):
        # The device's name says which machine it is; the rest would only make the text longer.
        differing = [name for name in differing if name == "on name" or not name.startswith(_ON)]
    return [", ".join(_words(name, each[name]) for name in differing if name in each) for each in facts]


def key_facts(key: str) -> dict[str, str]:
    """The digest, the settings and the method that a series key holds, by name."""
    found = _KEY.fullmatch(key)
    if found is None:
        return {"series": key}
    facts = {"digest": found["digest"]}
    for setting in [*found["settings"].split(","), found["method"]]:
        name, _, value = setting.partition("=")
        facts[name] = value
    return facts


def _words(name: str, fact: str) -> str:
    if name in ("on name", "on kind"):
        return fact
    if name == "on cores":
        return f"{fact} core" if fact == "1" else f"{fact} cores"
    # Eight hex digits tell models apart and leave room for the rest.
    return f"digest {fact[:8]}" if name == "digest" else f"{name.removeprefix(_ON)}={fact}"
