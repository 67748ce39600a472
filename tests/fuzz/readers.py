"""Fuzz every reader of files that may come from anywhere, guided by coverage.

    python tests/fuzz/readers.py --seconds 300 [TARGET ...]

Each target writes its input to a file, reads it as `mpscale` does, and makes what is cheap to make of it. Only the
errors that a reader documents may come out. An input may take 20 s and 1 GiB. What breaks a reader stays in
`tests/fuzz/found/`, and the exit code is 1; once it is mended, tests/core/test_hostile_files.py gets it.

Needs atheris: pip install -e ".[fuzz]". Seeds come from results/reference and tests/data, and from `found/`.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOUND = Path(__file__).with_name("found")
REFERENCE = ROOT / "results" / "reference"
LONGEST = 1 << 16
SECONDS_PER_INPUT, MEMORY_MIB = 20, 1024
ODD = ("1e308", "-1e308", "5e-324", "NaN", "Infinity", "9223372036854775808", "9" * 60, "[[[[", '{"a":', "\\udcff")
"""What a fuzzer would need long to find."""


def journal(data: bytes, folder: Path) -> None:
    """journal.jsonl beside a good run.json."""
    run = _run(folder)
    (run / "journal.jsonl").write_bytes(data)
    _use(run)


def info(data: bytes, folder: Path) -> None:
    """run.json beside a good journal."""
    run = _run(folder)
    (run / "run.json").write_bytes(data)
    _use(run)


def cases(data: bytes, folder: Path) -> None:
    """A cases.csv without its run."""
    (folder / "cases.csv").write_bytes(data)
    _use(folder / "cases.csv")


def steps(data: bytes, folder: Path) -> None:
    """The log of steps of a case, as it is, or what is in it."""
    from mpscale.core.run_folder import steps_path
    from mpscale.core.runs import read_run

    path = _run(folder)
    run = read_run(path)
    case_id = str(run.records[0]["case_id"])
    _write_packed(steps_path(path, case_id), data)
    run.step_columns(case_id)


def samples(data: bytes, folder: Path) -> None:
    """The GPU samples of a case."""
    from mpscale.telemetry.samples import CALM_S, Reading, read_sample_file

    path = folder / "samples.jsonl.gz"
    _write_packed(path, data)
    found = read_sample_file(path)
    found.timed(), found.often(), found.alone(), found.other_processes()
    found.unseen(Reading.MEMORY, 0.0, 1.0, CALM_S)


def probe(data: bytes, folder: Path) -> None:
    """probe.json of a workload of a run."""
    from mpscale.analysis.probe import probes_of
    from mpscale.core.runs import read_run
    from mpscale.report.probe_tables import section

    path = folder / "probe" / "one"
    path.mkdir(parents=True, exist_ok=True)
    (path / "probe.json").write_bytes(data)
    section(probes_of(read_run(_run(folder))))


def part(data: bytes, folder: Path) -> None:
    """run.json of a run that is merged."""
    from mpscale.harness.merge import Merger
    from mpscale.harness.merged_folder import write_merged

    run = _run(folder)
    (run / "run.json").write_bytes(data)
    merged = write_merged(Merger.of([run], allow_missing=True, accuracy_only=True), folder / "merged")
    try:
        _use(merged)
    finally:
        shutil.rmtree(merged)


def settings(data: bytes, folder: Path) -> None:
    """[tool.mpscale] in pyproject.toml."""
    from mpscale.pytest_plugin.project import read

    (folder / "pyproject.toml").write_bytes(data)
    read(folder)


def site(data: bytes, folder: Path) -> None:
    """The list of files in a site."""
    from mpscale.report.site_folder import MANIFEST, SiteFolder

    (folder / MANIFEST).write_bytes(data)
    SiteFolder(folder)


def _run(folder: Path) -> Path:
    """A good run of three cases."""
    run = folder / "runs" / "one"
    run.mkdir(parents=True, exist_ok=True)
    source = REFERENCE / "20261126T191040Z-nvidia-h200-32b6"
    for name in ("run.json", "journal.jsonl"):
        (run / name).write_bytes((source / name).read_bytes())
    return run


def _use(path: Path) -> None:
    """Read a run and make what does not take long."""
    from mpscale.analysis.summary import summary_csv, summary_of
    from mpscale.core.machines import environment_facts, hardware
    from mpscale.core.record import to_csv
    from mpscale.core.runs import read_run
    from mpscale.report import merged
    from mpscale.report.first_screen import first_screen, plain
    from mpscale.report.missing import go_on, interruptions

    run = read_run(path)
    about = (plain(first_screen(run)), go_on(run, path.parent), *interruptions(run), *run.problems)
    about += (*merged.sentences(run), merged.parts(run).markdown())
    for text in (to_csv(run.records), summary_csv(summary_of(run)), *about):
        text.encode()
    hardware(run), environment_facts(run), run.not_started, run.waiting, run.methods


def _write_packed(path: Path, data: bytes) -> None:
    """Input that begins with gzip's mark is the file itself, other input is what it unpacks to."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data if data.startswith(b"\x1f\x8b") else gzip.compress(data, 1))


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    each.__name__: each for each in (journal, info, part, cases, steps, samples, probe, settings, site)
}


def seeds(target: str) -> Iterable[bytes]:
    """Inputs to begin with."""
    runs = sorted(path.parent for path in [*REFERENCE.glob("*/run.json"), *(ROOT / "tests/data").glob("*/run.json")])
    for run in runs:
        for path in {
            "journal": [run / "journal.jsonl"],
            "info": [run / "run.json"],
            "part": [run / "run.json"],
            "cases": [run / "cases.csv"],
            "steps": sorted(run.glob("steps/*"))[:2],
            "samples": sorted(run.glob("gpu/*"))[:2],
        }.get(target, []):
            if not path.exists():
                continue
            data = path.read_bytes()
            lines = (zlib.decompress(data, zlib.MAX_WBITS | 16) if path.suffix == ".gz" else data).splitlines(True)
            yield b"".join(lines[:6])[:LONGEST]
            if target not in ("journal", "cases"):  # these take longest
                yield b"".join(lines[:40] + lines[-3:])[:LONGEST]
            if path.suffix == ".gz":
                yield data[:LONGEST]
    if target == "probe":
        records = (json.loads(line).get("record", {}) for line in _first_journal())
        digest = next(record["workload_digest"] for record in records if "workload_digest" in record)
        share = {"activations": 0.1, "weights": 0.2}
        advice = {"verdict": "helps", "scale": 1024.0, "largest": 0.5}
        facts = {"finished": True, "problem": None, "workload_digest": digest, "advice": advice}
        yield json.dumps({**facts, "vanish_share": share, "scaled_vanish_share": share}).encode()
    if target in ("info", "part"):
        info = json.loads((runs[0] / "run.json").read_text())
        info["planned"] = info["planned"][:3]
        shard = {"part": 1, "of": 2, "plan": info["planned"]}
        yield json.dumps({**info, "shard": shard}).encode()
        one = {"run": "a", "started": info["started"], "shard": shard, "cases": info["planned"], "environment": {}}
        yield json.dumps({**info, "merged": {"parts": [one, one], "missing_parts": [2]}}).encode()
    if target == "settings":
        yield b'[tool.mpscale]\nbaseline = "latest"\nfail-on = ["step_time>5%"]\nstrict = true\nthreshold = "5%"\n'
        yield b'[tool.mpscale]\nworkloads = ["a:b"]\nbatch-size = [1, 2]\ndynamic-scale = { initial = 4 }\njit = "on"\n'
    if target == "site":
        yield b'{"about": "x", "files": ["index.html", "runs/a.html", ".nojekyll"]}'
    yield from (path.read_bytes() for path in sorted(FOUND.glob(f"{target}-*")))


def _first_journal() -> list[str]:
    return (REFERENCE / "20261126T191040Z-nvidia-h200-32b6" / "journal.jsonl").read_text().splitlines()


def fuzz(target: str, seconds: int, corpus: Path) -> None:
    """Fuzz one target in this process, which atheris ends."""
    import atheris

    with atheris.instrument_imports(include=["mpscale"]):
        import mpscale.analysis.probe
        import mpscale.analysis.summary
        import mpscale.report.first_screen
        import mpscale.report.probe_tables
        import mpscale.report.site_folder
        import mpscale.telemetry.samples
        from mpscale.config import SettingsError
        from mpscale.core.columns import COLUMNS
        from mpscale.core.files.reading import RunError
    folder = Path(tempfile.mkdtemp(dir=corpus.parent))
    words = corpus.parent / "words"
    texts = [text.replace("\\", "\\\\").replace('"', '\\"') for text in (*COLUMNS, *ODD)]
    words.write_text("".join(f'"{text}"\n' for text in texts))

    def one(data: bytes) -> None:
        with contextlib.suppress(RunError, SettingsError, mpscale.report.site_folder.SiteError):
            TARGETS[target](data, folder)

    limits = [f"-rss_limit_mb={MEMORY_MIB}", f"-timeout={SECONDS_PER_INPUT}", f"-max_total_time={seconds}"]
    more = [f"-max_len={LONGEST}", f"-dict={words}", f"-artifact_prefix={FOUND}/{target}-", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *limits, *more, str(corpus)], one)
    atheris.Fuzz()


def main() -> int:
    """Fuzz targets one after the other; return 0 only if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: all of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=int, default=300, help="for each target (default: 300)")
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"there is no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    if options.corpus is not None:
        fuzz(options.targets[0], options.seconds, options.corpus)
    failed = []
    FOUND.mkdir(exist_ok=True)
    for target in options.targets or TARGETS:
        # In memory if possible: every input is written to a file.
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        with tempfile.TemporaryDirectory(prefix="mpscale-fuzz-", dir=memory) as folder:
            corpus = Path(folder) / "corpus"
            corpus.mkdir()
            for number, data in enumerate(seeds(target)):
                (corpus / f"seed-{number}").write_bytes(data)
            command = [sys.executable, __file__, target, f"--seconds={options.seconds}", f"--corpus={corpus}"]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        said = done.stderr.splitlines()
        executed = next((line.split()[-1] for line in said if line.startswith("stat::number_of_executed_units")), "?")
        print(f"{target}: {executed} inputs, {'nothing found' if done.returncode == 0 else 'FAILED'}", flush=True)
        if done.returncode:
            failed.append(target)
            print("\n".join([*done.stdout.splitlines()[-25:], *said[-25:]]), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
