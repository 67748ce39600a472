"""``make torture``: runs are hit, starved of disk space and continued until they are complete; then the fuzzers.

Every round begins with a run of a small suite and ends when that run is complete: it must equal an undisturbed one.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random, SystemRandom

from support.nvml_stand_in import build
from torture import disks, kills
from torture.found import Reference
from torture.rounds import Disturb, Result, Round, keep, undisturbed
from torture.suite import LAYOUTS, ROOT, Place
from torture.victims import KINDS, SIGNALS, strike, victims

PARTS = ("kills", "disks", "fuzz")
_ORDER = ("fork", "gpu", "fork", "fork", "fresh", "fork", "gpu", "fork")
"""The layouts of successive rounds."""
_LOCK = threading.Lock()


def main(arguments: Sequence[str] | None = None) -> int:
    """Torture runs; return 1 if anything was found."""
    options = _parse(arguments)
    if "disks" in options.parts:
        disks.enter_namespace()
    seed = options.seed if options.seed is not None else SystemRandom().randrange(1 << 32)
    _say(f"seed {seed}; evidence of violations goes to {options.evidence}")
    begun = time.monotonic()
    results: dict[str, list[Result]] = {}
    fuzzed = 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        _folders.append(Path(folder))
        bench = Bench(Path(folder), options.evidence, seed, options.layout)
        if "kills" in options.parts:
            results["kills"] = bench.rounds("kills", _chosen(options.kills, options.only), options.jobs)
        if "disks" in options.parts:
            if why := disks.why_not():
                _say(f"disks are left out: {why}")
            else:
                results["disks"] = bench.rounds("disks", _chosen(options.disks, options.only), options.jobs)
        results["undisturbed"] = bench.undisturbed
    if "fuzz" in options.parts:
        command = [sys.executable, str(ROOT / "tests" / "fuzz" / "readers.py"), "--seconds", str(options.seconds)]
        with subprocess.Popen(command) as fuzzer:
            _fuzzers.append(fuzzer)
            fuzzed = fuzzer.wait()
    for part, rounds in results.items():
        _say("\n" + "\n".join(table(part, rounds)))
    if options.json is not None:
        text = {part: [dataclasses.asdict(each) for each in rounds] for part, rounds in results.items()}
        options.json.write_text(json.dumps({"seed": seed, **text}, indent=1) + "\n")
    _say(f"seed {seed}, {time.monotonic() - begun:.0f} s")
    found = sum(len(each.violations) for rounds in results.values() for each in rounds)
    return 1 if found or fuzzed else 0


_folders: list[Path] = []
_fuzzers: list[subprocess.Popen[bytes]] = []
"""What must go if this program is stopped."""


def _stop(number: int, frame: object) -> None:
    """End at once, and leave nothing."""
    for fuzzer in _fuzzers:
        fuzzer.terminate()
    for folder in _folders:
        for victim in victims(f"{folder}/"):
            strike(victim, signal.SIGKILL)
        disks.unmount_below(folder)
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(128 + number)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m torture", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    add = parser.add_argument
    add("--kills", type=int, default=100, metavar="N", help="rounds with signals (default: 100)")
    add("--disks", type=int, default=20, metavar="N", help="rounds with full disks (default: 20)")
    add("--seconds", type=int, default=300, metavar="S", help="how long each fuzzer runs (default: 300)")
    add("--seed", type=int, help="of the generator that chooses everything (default: another each time)")
    add("--only", type=int, metavar="I", help="only the round with this number, such as one that found something")
    add("--layout", choices=list(LAYOUTS), help="what runs in every round (default: several in turn)")
    add("--jobs", type=int, default=2, metavar="N", help="rounds at the same time (default: 2)")
    add("--evidence", type=Path, default=Path("build/torture"), metavar="FOLDER", help="(default: build/torture)")
    add("--json", type=Path, metavar="FILE", help="write all rounds to a file")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    options.parts = options.parts or PARTS
    options.evidence = options.evidence.absolute()
    return options


def _chosen(rounds: int, only: int | None) -> list[int]:
    return list(range(rounds)) if only is None else [only]


def _say(text: str) -> None:
    with _LOCK:
        print(text, flush=True)


class Bench:
    """Plays rounds.

    Args:
        folder: for everything.
        evidence: where rounds with violations are kept.
        seed: of the generator.
        layout: of every round; None for several in turn.
    """

    def __init__(self, folder: Path, evidence: Path, seed: int, layout: str | None = None) -> None:
        self.folder, self._evidence, self._seed = folder, evidence, seed
        self._order = _ORDER if layout is None else (layout,)
        self.shared = folder / "shared"
        (self.shared / "cache").mkdir(parents=True)
        if shutil.which("cc") is None:
            _say("no GPU monitor is tortured: its driver library needs a C compiler")
            self._order = tuple(each for each in self._order if each != "gpu") or ("fork",)
        elif "gpu" in self._order:
            build(self.shared / "nvml")
        self._references: dict[str, Reference] = {}
        self.undisturbed: list[Result] = []
        """The runs with which others are compared: they, too, may leave something behind."""

    def rounds(self, part: str, numbers: Iterable[int], jobs: int) -> list[Result]:
        """Play rounds, several at a time."""
        numbers = list(numbers)
        for name in dict.fromkeys(self._order[number % len(self._order)] for number in numbers):
            self.reference(name)
        play: Callable[[int], Result] = self.kills if part == "kills" else self.disks
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(play, numbers))

    def reference(self, name: str) -> Reference:
        """The undisturbed run of a layout, which is made when it is first needed."""
        if name not in self._references:
            place = Place(self.folder / f"undisturbed-{name}", LAYOUTS[name], self.shared)
            begun = time.monotonic()
            self._references[name], wrong = undisturbed(place)
            seconds = round(time.monotonic() - begun, 1)
            result = Result(f"undisturbed-{name}", [], [0], len(self._references[name].cases), wrong, seconds)
            self.undisturbed.append(result)
            _say("\n".join([line(result), *(f"    {each}" for each in wrong)]))
        return self._references[name]

    def kills(self, number: int) -> Result:
        """Play one round of signals."""
        name, rng = self._order[number % len(self._order)], Random(f"kills {self._seed} {number}")
        place = Place(self.folder / f"kills-{self._seed}-{number}-{name}", LAYOUTS[name], self.shared)
        reference = self.reference(name)
        result = self._play(place, reference, rng, kills.plan(rng, reference))
        shutil.rmtree(place.folder, ignore_errors=True)
        return result

    def disks(self, number: int) -> Result:
        """Play one round of full disks."""
        name, rng = self._order[number % len(self._order)], Random(f"disks {self._seed} {number}")
        place = Place(self.folder / f"disks-{self._seed}-{number}-{name}", LAYOUTS[name], self.shared)
        reference = self.reference(name)
        disk = place.temporary if rng.random() < 0.3 else place.results
        with disks.small_disk(disk):
            result = self._play(place, reference, rng, disks.plan(rng, reference, disk))
        shutil.rmtree(place.folder, ignore_errors=True)
        return result

    def _play(self, place: Place, reference: Reference, rng: Random, disturb: Sequence[Disturb]) -> Result:
        result = Round(place, reference, rng, disturb, place.folder.name).play()
        lines = [line(result)]
        if result.violations:
            lines += [f"    {each}" for each in result.violations]
            lines.append(f"    kept in {keep(place, self._evidence)}")
        _say("\n".join(lines))
        return result


def line(result: Result) -> str:
    """A round in a line: what happened to it and how it ended."""
    blows = ", ".join(f"{each.signal} {each.kind} at {each.at_s:g} s ({each.phase})" for each in result.blows)
    ended = f"{len(result.violations)} VIOLATIONS" if result.violations else "complete"
    codes = " ".join(map(str, result.sessions))
    resumes = len(result.sessions) - 1
    return (
        f"{result.name}: {blows or 'never hit'}: {ended} with {resumes} resume{'' if resumes == 1 else 's'}, "
        f"exit codes {codes}, {result.seconds:g} s"
    )


def table(part: str, rounds: Sequence[Result]) -> list[str]:
    """The figures of a part, as markdown."""
    blows = [blow for each in rounds for blow in each.blows]
    rows = [
        ("rounds", len(rounds)),
        ("signals" if part == "kills" else "times that a disk was filled", len(blows)),
        *_counted(blows),
        ("sessions", sum(len(each.sessions) for each in rounds)),
        ("resumed sessions", sum(max(0, len(each.sessions) - 1) for each in rounds)),
        ("finished cases compared", sum(each.compared for each in rounds)),
        ("violations", sum(len(each.violations) for each in rounds)),
        ("seconds, of all rounds together", round(sum(each.seconds for each in rounds))),
    ]
    return [f"| {part} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def _counted(blows: Sequence[object]) -> list[tuple[str, int]]:
    signals = collections.Counter(blow.signal for blow in blows)  # type: ignore[attr-defined]
    kinds = collections.Counter(blow.kind for blow in blows)  # type: ignore[attr-defined]
    phases = collections.Counter(blow.phase for blow in blows)  # type: ignore[attr-defined]
    names = [each.name for each in SIGNALS if each.name in signals]
    return [
        *((f"... {name}", signals[name]) for name in names),
        *((f"... to: {kind}", kinds[kind]) for kind in KINDS if kind in kinds),
        *((f"... in phase: {phase}", count) for phase, count in sorted(phases.items())),
    ]


if __name__ == "__main__":
    sys.exit(main())
