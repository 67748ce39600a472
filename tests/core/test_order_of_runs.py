"""Runs have one order wherever they are sorted, also those that began in the same second."""

import json
import multiprocessing

import pytest
from support.runfolder import finished, record, write_run

from mpscale.analysis.history import oldest_first, read_folder
from mpscale.analysis.noise_floor import runs_of_the_same_code
from mpscale.cli import main
from mpscale.cli.completion import runs as complete
from mpscale.core.run_folder import new_folder
from mpscale.core.runs import by_age, read_run, resolve_run

SECOND = "20260102T030405Z"
AGES = {"zz": None, "mm": "000001", "bb": "250000", "aa": "250001", "cc": "250001"}
"""From the oldest to the newest: the end of the name, and microseconds; None as an older mpscale wrote it."""
BEFORE, AFTER = "20260102T030404Z-x-ffff", "20260102T030406Z-x-0000"
IN_ORDER = [BEFORE, *(f"{SECOND}-x-{end}" for end in AGES), AFTER]


@pytest.fixture
def results(tmp_path):
    names = {f"{SECOND}-x-{end}": f".{micro}" if micro else "" for end, micro in AGES.items()}
    for name, micro in sorted({BEFORE: ".9", AFTER: ".0", **names}.items()):
        second = name[13:15]
        started = f"2026-01-02T03:04:{second}{micro}+00:00"
        write_run(tmp_path, finished([record(step_time_ms_median=1.0)]), name=name, started=started)
    return tmp_path


def listed(results, capsys):
    assert main(["list", str(results), "--json"]) == 0
    return [run["run"] for run in json.loads(capsys.readouterr().out)["runs"]]


def test_every_reader_has_the_same_order(results, capsys, monkeypatch):
    monkeypatch.chdir(results.parent)
    assert [folder.name for folder in by_age((results / "runs").iterdir())] == IN_ORDER
    assert listed(results, capsys) == IN_ORDER
    assert [facts.name for facts, _ in oldest_first(read_folder(results)[0])] == IN_ORDER
    newest = read_run(results / "runs" / AFTER)
    assert [run.name for run in runs_of_the_same_code(newest)] == IN_ORDER

    class Parsed:
        pass

    parsed = Parsed()
    parsed.results = str(results)
    assert complete("2", parsed) == IN_ORDER[::-1]
    assert complete("l", parsed) == ["latest"]


def test_latest_is_the_newest_of_its_second_also_while_it_goes_on(results):
    for folder in [AFTER, IN_ORDER[-2]]:
        assert resolve_run("latest", results).name == folder
        (results / "runs" / folder / "run.json").unlink()
    name = f"{SECOND}-x-0001"
    write_run(results, name=name, finish=False, started="2026-01-02T03:04:05.999999+00:00")
    assert resolve_run("latest", results).name == name


def make(results):
    return [new_folder(results, "cpu") for _ in range(20)]


def test_processes_that_make_folders_at_once_get_different_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", Few())
    with multiprocessing.get_context("fork").Pool(2) as pool:
        made = [each for part in pool.map(make, [tmp_path / "runs"] * 2) for each in part]
    assert len({folder for _, folder in made}) == 40
    assert all(folder.name.startswith(f"{started:%Y%m%dT%H%M%SZ}-cpu-") for started, folder in made)


class Few:
    """Names that meet again and again: each number is drawn twice by each process."""

    def __init__(self):
        self._number = 0

    def __call__(self, _):
        self._number += 1
        return f"{self._number // 2:04x}"
