"""Measure a pool of real processes to draw runs from: every row plain, plain again, and with real work added.

    python selfcheck/trust_pool.py --rounds 40 --output pool.csv

A round runs each row once in each variant, in random order. A few processes with and without extra work first show how
much to add; how much slower a variant really is follows from all rounds.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from mpscale.core.case import Case, Settings
from mpscale.core.device import find_device
from mpscale.harness.run import BenchmarkRun
from mpscale.harness.supervisor import Options
from mpscale.telemetry import host
from mpscale.telemetry.client import open_driver

ROWS = (("mnist1d-mlp", "fp32"), ("mnist1d-mlp", "mixed-dynamic"), ("mnist1d-cnn", "fp32"))
SHARES = (0.0, 0.0, 0.02, 0.05, 0.10, 0.20)
_TRIED = 2000
RECORDED = (
    "step_time_ms_median",
    "step_time_ms_p10",
    "host_other_cpu_share",
    "host_steal_share",
    "host_load",
    "host_clock_mhz",
)
COLUMNS = ("round", "workload", "mode", "variant", "added", "products", "began_s", *RECORDED)


class Pool:
    """Runs processes one by one, with the same harness as any run.

    Args:
        results: where the run's folder goes.
        timing_s: seconds of timing per process.
    """

    def __init__(self, results: Path, timing_s: float) -> None:
        driver = open_driver()
        options = Options(results, Path(__file__).parent, "fork", 600.0, {})
        self._settings = Settings(timing_s=timing_s, energy_s=0.0)
        self.run = BenchmarkRun([], find_device([], os.environ, host.cpu()), driver, options, lambda *_: None)
        self._made = 0

    def measure(self, workload: str, mode: str, products: int) -> dict:
        """Run one process and return its record."""
        self._made += 1
        name = f"trust_workloads:{workload.replace('-', '_')}_x{products}" if products else workload
        record = self.run.run(Case(name, mode, 0, self._made, 0, self._settings)).record
        if record["status"] != "ok":
            raise RuntimeError(f"{name} {mode}: {record['status']}: {record['status_reason']}")
        return record


def products_for(pool: Pool, workload: str, mode: str, tries: int = 4) -> list[int]:
    """Return how many products each variant adds."""
    plain, more = ([], [])
    for _ in range(tries):
        plain.append(pool.measure(workload, mode, 0)["step_time_ms_median"])
        more.append(pool.measure(workload, mode, _TRIED)["step_time_ms_median"])
    base = statistics.median(plain)
    each = (statistics.median(more) - base) / _TRIED
    return [round(share * base / each) for share in SHARES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--timing", type=float, default=1.0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, arguments.output.open("w", newline="") as file:
        pool = Pool(Path(folder), arguments.timing)
        rows = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        rows.writeheader()
        try:
            products = {row: products_for(pool, *row) for row in ROWS}
            print(products, flush=True)
            start = time.monotonic()
            for turn in range(arguments.rounds):
                for row in random.sample(ROWS, len(ROWS)):
                    for variant in random.sample(range(len(SHARES)), len(SHARES)):
                        began_s = time.monotonic() - start
                        record = pool.measure(*row, products[row][variant])
                        rows.writerow(
                            {
                                "round": turn,
                                "workload": row[0],
                                "mode": row[1],
                                "variant": variant,
                                "added": SHARES[variant],
                                "products": products[row][variant],
                                "began_s": round(began_s, 1),
                                **{name: record[name] for name in RECORDED},
                            }
                        )
                file.flush()
                print(f"round {turn + 1} of {arguments.rounds}, {time.monotonic() - start:.0f} s", flush=True)
        finally:
            pool.run.finish(0)


if __name__ == "__main__":
    main()
