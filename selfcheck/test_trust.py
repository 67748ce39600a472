"""How often a verdict is wrong when nothing changed, and how often a change is found, from real processes.

    pytest selfcheck/test_trust.py --rounds 40                    # measures for about 50 minutes
    pytest selfcheck/test_trust.py --pool results/trust/pool.csv  # the tables again, from the same processes

trust_pool.py runs every row in every round, interleaved: plain, plain again, and with 2, 5, 10 and 20 % of real work
added to its step. A run of n processes is n consecutive rounds, so runs are minutes apart. A comparison has twenty
rows, drawn from the pool's rows with replacement, and n of the 2 n plain processes of their rounds, drawn without:
otherwise two of three processes would often be the same, as if there were no noise. The rows of a run share its rounds,
and so the state of the machine. mpscale's own functions judge them: `compare` with a single-run baseline and with four
earlier runs of the baseline's code; the gate of a pytest run, which measures rows again before it fires; and `ab`,
whose pairs are n rounds out of 2 n.

The true change of a variant is not the work that was meant to be added, but its ratio to plain over all rounds.
"""

from __future__ import annotations

import csv
import random
import re
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tabulate import tabulate

from mpscale.analysis.change import measure_change, with_verdicts
from mpscale.analysis.compare import ComparedRow, Comparison
from mpscale.analysis.gates import judge_gates, parse_gates
from mpscale.analysis.noise_floor import FEWEST_RUNS, assumed_floor, floors_from_samples, pair_noise
from mpscale.analysis.pairs import Pair, State
from mpscale.analysis.quantities import COSTS, Outcome, Verdict
from mpscale.analysis.stats import paired_ratio
from mpscale.core.record import Record
from mpscale.core.runs import Run

TIME = COSTS["step_time"]
ROWS = 20
A_A, A_B = 3000, 200
"""Comparisons per cell of the tables."""
REPEATS = (3, 5, 10, 20, 30)
BETWEEN = 0.5
"""Spread of simulated runs, relative to that of processes."""
PLAIN, AGAIN = 0, 1
STRICTEST = 0.01
"""Threshold without a change, at which nothing may be found; with a change, it is half of the change."""
NOBODY = Run(Path(), "", {}, [], True)
COMMANDS = ("compare, single-run", "compare, 5 runs", "pytest gate, 5 runs", "ab")


@dataclass
class Pool:
    """Step times in ms by row and variant, one per round."""

    times: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    added: dict[int, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path):
        pool = cls()
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                key = f"{line['workload']} {line['mode']}", int(line["variant"])
                pool.times.setdefault(key, []).append(float(line[TIME.column]))
                pool.added[int(line["variant"])] = float(line["added"])
        whole = min(map(len, pool.times.values()))
        pool.times = {key: found[:whole] for key, found in pool.times.items()}
        pool.added = dict(sorted(pool.added.items()))
        return pool

    @property
    def rows(self):
        return list(dict.fromkeys(row for row, _ in self.times))

    @property
    def rounds(self):
        return len(next(iter(self.times.values())))


def windows(pool, processes, number):
    """Return the rounds of ``number`` disjoint runs, drawn at random, oldest first."""
    starts = range(0, pool.rounds - processes + 1, processes)
    return [range(start, start + processes) for start in sorted(random.sample(starts, number))]


def sample(pool, row, variant, rounds):
    """Return step times of a run, drawn from its rounds, which have twice as many plain ones."""
    variants = (PLAIN, AGAIN) if variant == PLAIN else (variant,)
    return random.sample([pool.times[row, each][turn] for turn in rounds for each in variants], len(rounds))


def cases(times):
    return [
        Record({"case_id": "", "seed": 0, "repeat": number, "status": "ok", TIME.column: time})
        for number, time in enumerate(times)
    ]


def judged(before, after, floors, threshold, in_turns=False):
    """Return mpscale's comparison of twenty rows."""
    sides = [{("row", str(place)): found for place, found in enumerate(side)} for side in (before, after)]
    assumed = assumed_floor(sides, TIME)
    pairs = pair_noise(sides, TIME) if in_turns else {}
    changes = [
        measure_change(one, two, TIME, len(before), floors.get(place, assumed), pairs.get(place))
        for (place, one), two in zip(sides[0].items(), after, strict=True)
    ]
    changes = with_verdicts(changes, threshold)
    rows = [
        ComparedRow(Pair(*place, State.PAIRED, None, one, two), {TIME.name: change}, None, (None, None))
        for (place, one), two, change in zip(sides[0].items(), after, changes, strict=True)
    ]
    return Comparison(NOBODY, NOBODY, True, ({}, {}), [], in_turns, rows=rows)


def fired(comparison, threshold):
    gates = parse_gates([f"step_time>{threshold:.2%}"])
    return {int(finding.row[1]) for finding in judge_gates(comparison, gates) if finding.outcome is Outcome.FIRED}


def invoke(pool, command, processes, variant, threshold):
    """Return the rows on which a gate fires and the verdicts of all; row 0 has ``variant``, all others are plain."""
    rows = random.choices(pool.rows, k=ROWS)
    variants = [variant, *[PLAIN] * (ROWS - 1)]
    judge = in_turns if command == "ab" else run_by_run
    comparison = judge(pool, command, processes, rows, variants, threshold)
    return fired(comparison, threshold), [row.changes[TIME.name].verdict for row in comparison.rows]


def in_turns(pool, _, processes, rows, variants, threshold):
    """Compare as `mpscale ab` does."""
    (rounds,) = windows(pool, 2 * processes, 1)
    sides = ([], [])
    for row, variant in zip(rows, variants, strict=True):
        turns = random.sample(rounds, processes)
        for side, each in zip(sides, (PLAIN, AGAIN if variant == PLAIN else variant), strict=True):
            side.append(cases(pool.times[row, each][turn] for turn in turns))
    return judged(*sides, {}, threshold, in_turns=True)


def run_by_run(pool, command, processes, rows, variants, threshold):
    """Compare a run with the previous one, with or without earlier ones; a gate measures again before it fires."""
    anew = "gate" in command
    known = known_runs(command)
    drawn = windows(pool, processes, known + 1 + 2 * anew)
    runs = [[sample(pool, row, PLAIN, rounds) for row in rows] for rounds in drawn[:known]]
    samples = [{("row", str(place), ""): times for place, times in enumerate(run)} for run in runs]
    floors = floors_from_samples(samples) if known >= FEWEST_RUNS else {}
    before = [cases(times) for times in runs[-1]]
    after = [sample(pool, row, variant, drawn[known]) for row, variant in zip(rows, variants, strict=True)]
    comparison = judged(before, [cases(times) for times in after], floors, threshold)
    if anew:
        more = [*drawn[-2], *drawn[-1]]
        for place in fired(comparison, threshold):
            after[place] = sample(pool, rows[place], variants[place], more)
        comparison = judged(before, [cases(times) for times in after], floors, threshold)
    return comparison


def counted(pool, command, processes, variant, times):
    """Return the share of comparisons with each outcome."""
    outcome = Counter()
    threshold = pool.added[variant] / 2 or STRICTEST
    for _ in range(times):
        found, verdicts = invoke(pool, command, processes, variant, threshold)
        plain = verdicts[1:] if variant != PLAIN else verdicts
        outcome["false gate"] += bool(found - ({0} if variant != PLAIN else set()))
        outcome["false verdict"] += bool({Verdict.SLOWER, Verdict.FASTER} & set(plain))
        outcome["found"] += 0 in found
        outcome["wrong way"] += variant != PLAIN and verdicts[0] is Verdict.FASTER
        outcome["same"] += verdicts[0] is Verdict.SAME
    return {name: count / times for name, count in outcome.items()}


def needed(command, processes):
    """Return the number of rounds that a comparison needs."""
    runs = 2 if command == "ab" else known_runs(command) + 1 + 2 * ("gate" in command)
    return processes * runs


def known_runs(command):
    """Return the number of runs of the baseline's code."""
    found = re.search(r"(\d+) runs", command)
    return int(found[1]) if found else 1


def noise(pool, processes):
    """Return relative standard deviations by row: of processes within a run, and of the means of runs."""
    within, between = [], []
    for row in pool.rows:
        times = pool.times[row, PLAIN]
        runs = [times[start : start + processes] for start in range(0, pool.rounds - processes + 1, processes)]
        within.append(statistics.median(statistics.stdev(run) / statistics.fmean(run) for run in runs))
        means = [statistics.geometric_mean(run) for run in runs]
        between.append(statistics.stdev(means) / statistics.fmean(means))
    return within, between


@pytest.fixture
def pool(request, tmp_path):
    path = request.config.getoption("pool")
    if path is None:
        path = tmp_path / "pool.csv"
        rounds = str(request.config.getoption("rounds"))
        script = Path(__file__).with_name("trust_pool.py")
        subprocess.run([sys.executable, str(script), "--rounds", rounds, "--output", str(path)], check=True)
    return Pool.read(Path(path))


def test_trust(pool, capsys):
    random.seed(0)
    truth = [
        [row, *(f"{1 / paired_ratio(one, dict(enumerate(pool.times[row, v]))).estimate - 1:+.1%}" for v in pool.added)]
        for row in pool.rows
        for one in [dict(enumerate(pool.times[row, PLAIN]))]
    ]
    noises = []
    for processes in (3, 5, 10):
        if pool.rounds >= 4 * processes:
            within, between = noise(pool, processes)
            noises.append(
                [processes, pool.rounds // processes]
                + [f"{min(found):.1%} to {max(found):.1%}" for found in (within, between)]
            )
    table, wrong = [], []
    for command in COMMANDS:
        for processes in (3, 5, 10, 20):
            if needed(command, processes) > pool.rounds:
                continue
            same = counted(pool, command, processes, PLAIN, A_A)
            cells = [f"{same['false gate']:.2%}", f"{same['false verdict']:.2%}", f"{same['same']:.0%}"]
            for variant in [v for v, share in pool.added.items() if share]:
                other = counted(pool, command, processes, variant, A_B)
                cells.append(f"{other['found']:.0%}")
                if other["wrong way"]:
                    wrong.append((command, processes, variant, other["wrong way"]))
            table.append([command, processes, *cells])
            if same["false gate"] > 0.01:
                wrong.append((command, processes, PLAIN, same["false gate"]))
    shares = [f"{share:.0%}" for share in pool.added.values() if share]
    with capsys.disabled():
        print(f"\n\n{pool.rounds} rounds; the true slow-down of each variant")
        print(tabulate(truth, ["row", *(f"{share:.0%}" for share in pool.added.values())], "github"))
        print("\nstandard deviations, over the rows")
        print(tabulate(noises, ["processes", "runs", "within a run", "of runs"], "github"))
        print(
            f"\n{A_A} A/A and {A_B} A/B invocations of {ROWS} rows each, threshold {STRICTEST:.0%}, or half of a change"
        )
        headers = ["command", "processes", "A/A gate fails", "A/A verdict", "A/A same", *(f"finds {s}" for s in shares)]
        print(tabulate(table, headers, "github"))
    assert not wrong


@pytest.mark.parametrize("command", ["compare, 5 runs", "compare, 12 runs", "ab"])
def test_repeats_needed(command, capsys):
    """Simulated: the smallest number of processes per row that finds a change in 19 of 20 comparisons."""
    random.seed(1)
    changes = (0.02, 0.05, 0.10, 0.20)
    table = []
    for noise in (0.003, 0.01, 0.03, 0.10):
        fewest = [next((n for n in REPEATS if finds(command, noise, change, n)), None) for change in changes]
        table.append([f"{noise:.1%}", *(count or f"more than {REPEATS[-1]}" for count in fewest)])
    headers = ["spread of processes", *(f"{change:.0%}" for change in changes)]
    with capsys.disabled():
        print(
            f"\n\n{command}: processes needed, of a row among {ROWS}; runs {BETWEEN:g} times as far apart as processes"
        )
        print(tabulate(table, headers, "github"))


def finds(command, noise, change, processes, times=60):
    """Return whether a relative ``change`` is found in 95 % of comparisons if processes spread by ``noise``."""
    found = 0
    for _ in range(times):
        pool = Pool(added={PLAIN: 0.0, AGAIN: 0.0, 2: change})
        state = 1.0
        for turn in range(needed(command, processes)):
            if turn % processes == 0:
                state = random.lognormvariate(0.0, BETWEEN * noise)
            for row in map(str, range(ROWS)):
                for variant, more in pool.added.items():
                    time = state * (1 + more) * random.lognormvariate(0.0, noise)
                    pool.times.setdefault((row, variant), []).append(time)
        found += counted(pool, command, processes, 2, 1)["found"]
    return found >= 0.95 * times
