"""Files of unknown origin in place of those of a run: each costs a clear error, or only itself."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import shutil
import socket
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.runfolder import finished, record, started, write_run, write_steps

from mpscale.analysis.history import read_folder
from mpscale.analysis.probe import probes_of
from mpscale.analysis.summary import summary_csv, summary_of
from mpscale.cli import main
from mpscale.config import SettingsError, training_steps
from mpscale.core.cases_csv import read_cases
from mpscale.core.columns import COLUMNS
from mpscale.core.files import reading
from mpscale.core.files.reading import MOST_CASES, MOST_LINE, MOST_STEPS, Content, RunError, parse_json, unpack
from mpscale.core.machines import environment_facts
from mpscale.core.record import misfit, to_csv
from mpscale.core.runs import read_run
from mpscale.pytest_plugin.project import read
from mpscale.report.document import document, render
from mpscale.report.first_screen import first_screen, plain
from mpscale.report.site_folder import MANIFEST, SiteError, SiteFolder
from mpscale.telemetry import samples
from mpscale.telemetry.samples import read_sample_file

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "results" / "reference"
CASE = "toy--fp32--s0--r0"

READERS = {
    "runs/one/run.json": lambda top: read_run(top / "runs/one"),
    "runs/one/journal.jsonl": lambda top: read_run(top / "runs/one"),
    "runs/one/cases.csv": lambda top: read_run(top / "runs/one/cases.csv"),
    f"runs/one/steps/{CASE}.csv.gz": lambda top: read_run(top / "runs/one").step_columns(CASE),
    "samples.jsonl.gz": lambda top: read_sample_file(top / "samples.jsonl.gz"),
    "pyproject.toml": read,
    MANIFEST: SiteFolder,
}
ERRORS = (RunError, SettingsError, SiteError)


def files(top):
    """Write a good file for each reader."""
    run = write_run(top, finished([record(step_time_ms_median=2.0)]), name="one")
    (run / "cases.csv").write_text(to_csv(read_run(run).records))
    write_steps(run, CASE, "step,loss,loss_scale,overflow\n0,1.5,,0\n")
    (top / "samples.jsonl.gz").write_bytes(gzip.compress(b'{"time_s": 1.0}\n'))
    (top / "pyproject.toml").write_text("[tool.mpscale]\nstrict = true\n")
    (top / MANIFEST).write_text('{"files": []}')


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def listening(path):
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
    finally:
        os.chdir(here)


def sparse(path):
    with path.open("wb") as file:
        file.truncate(10 * 2**30)


def circle(path):
    path.symlink_to(path)


def kernel_log(path):
    path.symlink_to("/proc/kmsg")


INSTEAD = {
    "a pipe": pipe,
    "a device without an end": device,
    "a folder": Path.mkdir,
    "a socket": listening,
    "10 GiB of nothing": sparse,
    "a link to itself": circle,
    "a file that waits for more": kernel_log,
    "nothing": lambda path: path.write_bytes(b""),
    "random bytes": lambda path: path.write_bytes(random.Random(1).randbytes(4000)),
    "UTF-16": lambda path: path.write_bytes("{}\n".encode("utf-16")),
    "zeros": lambda path: path.write_bytes(b"\0" * 4000),
    "brackets": lambda path: path.write_bytes(b"[" * 200_000),
    "objects in objects": lambda path: path.write_bytes(b'{"a":' * 200_000),
    "an integer of 10,000 digits": lambda path: path.write_bytes(b'{"schema_version":' + b"9" * 10_000 + b"}\n"),
}


@pytest.mark.parametrize("what", INSTEAD)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_such_file_is_an_error_that_names_it(tmp_path, name, what):
    files(tmp_path)
    READERS[name](tmp_path)
    (tmp_path / name).unlink()
    INSTEAD[what](tmp_path / name)
    # Without settings there is nothing to complain about; pytest itself may find another pyproject.toml above.
    without = ("nothing", "a link to itself", "a file that waits for more")
    if name == "pyproject.toml" and (not (tmp_path / name).is_file() or what in without):
        read(tmp_path)
        return
    with pytest.raises(ERRORS) as raised:
        READERS[name](tmp_path)
    assert Path(name).name in str(raised.value)
    assert len(str(raised.value)) < 1000


def bomb(mib):
    """Zeros that unpack to that many MiB."""
    engine = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    return b"".join(engine.compress(bytes(2**20)) for _ in range(mib)) + engine.flush()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda data: data[:-9], "was cut off"),
        (lambda data: data[:-8] + bytes(4) + data[-4:], "incorrect data check"),
        (lambda data: b"\x1f\x8b\xff" + data[3:], "not compressed with gzip"),
        (lambda data: data + data, "something follows"),
        (lambda data: data + b"\0\0", "something follows"),
    ],
)
@pytest.mark.parametrize("name", [name for name in READERS if name.endswith(".gz")])
def test_a_broken_or_endless_gzip_is_an_error(tmp_path, name, change, why):
    files(tmp_path)
    path = tmp_path / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(RunError, match=why):
        READERS[name](tmp_path)


def test_no_more_is_unpacked_than_such_a_file_can_hold(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(bomb(3))
    with pytest.raises(RunError, match=r"a\.gz: is larger than 2 MiB, and a log is not"):
        unpack(path, Content("a log", 2))
    assert len(unpack(path, Content("a log", 3))) == 3 * 2**20


def test_the_longest_training_that_can_be_asked_for_has_a_log_that_is_read():
    longest = "9999999,-1.17549435e-38,1.17549435e-38,False\n"
    assert len(longest) * MOST_STEPS < reading.STEPS.most
    assert training_steps(str(MOST_STEPS)) == MOST_STEPS


def test_a_case_may_have_more_samples_than_a_file_that_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "MOST_SAMPLES", 3)
    lines = [f'{{"time_s": {second}.0}}\n' for second in range(5)]
    assert len(samples.read_samples(lines).rows) == 5
    path = tmp_path / "samples.jsonl.gz"
    path.write_bytes(gzip.compress("".join(lines).encode()))
    with pytest.raises(RunError, match="more than 3 samples"):
        read_sample_file(path)
    path.write_bytes(gzip.compress("".join(lines[:3]).encode()))
    assert len(read_sample_file(path).rows) == 3


STEPS = {"step": ["-1", "1.5", "9" * 30], "loss": ["1e308", "-1e200", "x"], "loss_scale": ["1e101"], "overflow": ["2"]}


@pytest.mark.parametrize(("column", "cell"), [(column, cell) for column, cells in STEPS.items() for cell in cells])
def test_a_step_that_cannot_be_is_an_error_with_its_line(tmp_path, column, cell):
    files(tmp_path)
    row = {"step": "1", "loss": "nan", "loss_scale": "", "overflow": "1"} | {column: cell}
    write_steps(tmp_path / "runs/one", CASE, f"{','.join(row)}\n0,inf,,0\n{','.join(row.values())}\n")
    with pytest.raises(RunError, match=r"csv.gz, line 3: "):
        read_run(tmp_path / "runs/one").step_columns(CASE)


@pytest.mark.parametrize(
    "line",
    [
        '{"time_s": 1e308}', '{"time_s": NaN}', '{"time_s": true}', '{"time_s": 1.0, "processes": 1.5}',
        '{"time_s": 1.0, "phase": []}', '{"time_s": 1.0, "other_pids": 3}', '{"time_s": 1.0, "other_pids": ["x"]}',
        '{"time_s": 1.0, "device_memory_mib": -1e300}', '{"reasons": {"energy_j": 3}}', '{"silent": 3}', "3",
    ],
)  # fmt: skip
def test_a_sample_that_cannot_be_is_an_error(tmp_path, line):
    path = tmp_path / "samples.jsonl.gz"
    path.write_bytes(gzip.compress(f'{{"time_s": 0.5}}\n{line}\n'.encode()))
    with pytest.raises(RunError, match="sample"):
        read_sample_file(path)


ODD = [
    0,
    1e100,
    1e308,
    -1e308,
    5e-324,
    -1,
    2**63 - 1,
    -(2**63),
    2**63,
    10**300,
    True,
    [1],
    {"a": 1},
    "x",
    "",
    "\udcff",
    "a\0b",
]


def use(run):
    """Make what tables and first screen say."""
    for text in (to_csv(run.records), summary_csv(summary_of(run)), plain(first_screen(run)), *run.problems):
        text.encode()
    render(document(run))
    assert environment_facts(run) is not None


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: str(odd)[:12].encode("ascii", "replace").decode())
def test_an_odd_value_in_any_column_costs_at_most_its_case(tmp_path, odd):
    """One run in which each case has the value in another column, as often as there are columns."""
    events = [json.loads(line) for line in (REFERENCE / SMALL / "journal.jsonl").read_text().splitlines()]
    good = [event["record"] for event in events if event["event"] == "case_finished"]
    rows = [{**good[0], "seed": seed, "case_id": case_of(good[0], seed)} for seed in range(len(COLUMNS))]
    ends = [{"event": "case_finished", "case_id": row["case_id"], "record": dict(row)} for row in rows]
    for end, column in zip(ends, COLUMNS, strict=True):
        end["record"][column] = odd
    run = shutil.copytree(REFERENCE / SMALL, tmp_path / "run", ignore=shutil.ignore_patterns("gpu", "steps", "*.csv"))
    (run / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in [{"event": "run_started"}, *ends]))
    found = read_run(run)
    assert [row["case_id"] for row in found.records] == [row["case_id"] for row in rows]
    use(found)


def case_of(row, seed):
    return f"{row['workload']}--{row['mode']}--s{seed}--r0"


SMALL = "20261126T191040Z-nvidia-h200-32b6"


def test_a_column_has_a_range_that_real_figures_are_far_from():
    odd = [
        f"{path.name}: {misfit(name, row[name])}"
        for path in sorted(REFERENCE.glob("2*"))
        for row in read_run(path).records
        for name in COLUMNS
        if misfit(name, row[name])
    ]
    assert odd == []
    assert misfit("step_time_ms_median", 1e308) == "step_time_ms_median is 1e+308 ms; it can be from 1e-12 to 1e+12"
    assert "from 0 to" in (misfit("attempted_steps", -1) or "")
    assert misfit("train_loss_final", -3.3e38) is None
    assert misfit("swept_scale", 2.0**-126) is None


def test_parts_of_run_json_of_another_type_count_as_unknown(tmp_path):
    environment = {"device": {"kind": 3, "name": "x"}, "git": {"commit": 1.5}, "cpu": [], "packages": "none"}
    path = write_run(tmp_path, finished([record()]), environment=environment, started=[1], run={})
    run = read_run(path)
    use(run)
    assert run.name == path.name
    assert [problem.split(" ")[1] for problem in run.problems] == [
        "run", "started", "environment.device.kind", "environment.packages", "environment.cpu",
        "environment.git.commit",
    ]  # fmt: skip
    assert main(["list", str(tmp_path)]) == 0


@pytest.mark.parametrize("depth", [33, 500, 900])
def test_nesting_that_would_exhaust_a_stack_is_refused(tmp_path, depth):
    path = write_run(tmp_path, finished([record()]))
    text = (path / "run.json").read_text()
    (path / "run.json").write_text(text[:-1] + ', "x": ' + '{"a":' * depth + "1" + "}" * depth + "}")
    with pytest.raises(RunError, match="nested deeper than 32 levels"):
        read_run(path)


def test_text_that_no_file_can_hold_is_escaped():
    assert parse_json('{"\\udcff": ["\\ud800", {"b": "\\udcfe"}]}') == {"\\udcff": ["\\ud800", {"b": "\\udcfe"}]}


def test_a_line_that_is_too_long_costs_only_its_case(tmp_path):
    path = write_run(tmp_path, finished([record(), record(seed=1), record(seed=2)]))
    lines = (path / "journal.jsonl").read_bytes().splitlines(keepends=True)
    lines[4] = lines[4][:-2] + b" " * MOST_LINE + b"}\n"
    (path / "journal.jsonl").write_bytes(b"\xef\xbb\xbf" + b"".join(lines))
    run = read_run(path)
    assert [r["status"] for r in run.records] == ["ok", "invalid", "ok"]
    assert len(run.problems) == 1 and "longer than" in run.problems[0]


@pytest.mark.parametrize("line", [b"\n", b"x\n", b'{"event": "case_started", "case_id": "%d", "case": {}}\n'])
def test_a_file_of_endless_lines_is_no_journal(tmp_path, line):
    path = write_run(tmp_path)
    many = (line % number for number in range(20 * MOST_CASES + 5)) if b"%d" in line else [line] * (20 * MOST_CASES + 5)
    (path / "journal.jsonl").write_bytes(b"".join(many))
    with pytest.raises(RunError, match="is no journal of a run"):
        read_run(path)


def test_many_broken_lines_are_told_in_a_few(tmp_path):
    path = write_run(tmp_path, finished([record(seed=seed) for seed in range(60)]))
    text = (path / "journal.jsonl").read_bytes().replace(b'"case_finished"', b'"case_finished')
    (path / "journal.jsonl").write_bytes(text)
    run = read_run(path)
    assert {r["status"] for r in run.records} == {"invalid"}
    assert len(run.problems) == 21 and run.problems[-1] == "journal.jsonl: 40 more lines like these"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), cut=st.integers(0, 300), data=st.binary(max_size=40))
def test_any_change_of_a_journal_leaves_it_readable_or_refused(tmp_path, place, cut, data):
    whole = (REFERENCE / SMALL / "journal.jsonl").read_bytes()
    place %= len(whole)
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    (run / "run.json").write_bytes((REFERENCE / SMALL / "run.json").read_bytes())
    (run / "journal.jsonl").write_bytes(whole[:place] + data + whole[place + cut :])
    try:
        found = read_run(run)
    except RunError:
        return
    use(found)


SAMPLES = {
    "20261122T223546Z-intel-xeon-processor-06a5": 1,
    "20261126T153730Z-nvidia-h200-1b51": 5,
}


@pytest.mark.parametrize("name", SAMPLES)
def test_runs_of_older_versions_are_read(name):
    run = read_run(ROOT / "tests/data" / name)
    assert (run.methods, run.problems) == ({SAMPLES[name]}, [])
    assert any(record["step_time_ms_median"] for record in run.records)
    use(run)


def test_one_broken_run_costs_only_itself(tmp_path, capsys):
    for number in range(3):
        one = record(step_time_ms_median=2.0, series_key="k", workload_digest="w")
        write_run(tmp_path, finished([one]), name=f"2026010{number}T000000Z-x")
    broken = tmp_path / "runs" / "20260101T000000Z-x"
    (broken / "journal.jsonl").unlink()
    pipe(broken / "journal.jsonl")
    (tmp_path / "secret").write_text("a password")
    (tmp_path / "runs" / "20260102T000000Z-x" / "report.html").symlink_to(tmp_path / "secret")
    runs, left_out = read_folder(tmp_path)
    assert (len(runs), len(left_out)) == (2, 1)
    assert main(["list", str(tmp_path)]) == 0
    assert "unreadable" in capsys.readouterr().out
    assert main(["site", str(tmp_path / "site"), str(tmp_path)]) == 0
    assert not any("a password" in page.read_text() for page in (tmp_path / "site/runs").iterdir())
    assert main(["report", "latest", "--format", "github-summary", "--results", str(tmp_path)]) == 0
    assert main(["history", "--results", str(tmp_path)]) == 0


def _lines(path):
    return (path / "journal.jsonl").read_bytes().splitlines(keepends=True)


def cut_off(path):
    (path / "journal.jsonl").write_bytes(b"".join(_lines(path)[:4]))


def without_ends(path):
    (path / "journal.jsonl").write_bytes(b"".join(line for line in _lines(path) if b"case_finished" not in line))


def garbled(path):
    lines = [b"{\n" if b"case_finished" in line else line for line in _lines(path)]
    (path / "journal.jsonl").write_bytes(b"".join(lines))


def without_figures(path):
    events = [json.loads(line) for line in _lines(path)]
    for event in events:
        event.get("record", {}).pop("step_time_ms_median", None)
    (path / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def both_broken(path):
    garbled(path)
    (path / "cases.csv").write_bytes(b"\xff\xfe" + (path / "cases.csv").read_bytes())


@pytest.mark.parametrize("lose", [cut_off, without_ends, garbled, without_figures, both_broken])
def test_a_report_never_replaces_more_by_less(tmp_path, capsys, lose):
    cases = [record(mode, seed, step_time_ms_median=2.0) for mode in ("fp32", "mixed-bf16") for seed in range(2)]
    path = write_run(tmp_path, finished(cases))
    assert main(["report", str(path)]) == 0
    lose(path)
    names = ("cases.csv", "summary.csv", "report.md", "report.html")
    before = {name: (path / name).read_bytes() for name in names}
    (path / "summary.csv").unlink()
    capsys.readouterr()
    assert main(["report", str(path)]) == 0
    said = capsys.readouterr().err
    assert "report.html, report.md, cases.csv are left as before" in said
    assert (path / "summary.csv").is_file()
    assert {name: (path / name).read_bytes() for name in names if name != "summary.csv"} == {
        name: data for name, data in before.items() if name != "summary.csv"
    }
    (path / "cases.csv").rename(path / "mine.csv")
    assert main(["report", str(path)]) == 0
    assert (path / "report.md").read_bytes() != before["report.md"]


def test_a_page_keeps_lines_of_samples_that_are_gone(tmp_path, capsys):
    path = shutil.copytree(REFERENCE / "20261126T191040Z-nvidia-h200-32b6", tmp_path / "run")
    before = (path / "report.html").read_bytes()
    next(iter(sorted((path / "gpu").iterdir()))).unlink()
    assert main(["report", str(path)]) == 0
    assert "report.html shows more lines" in capsys.readouterr().err
    assert (path / "report.html").read_bytes() == before


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_what_is_no_file_is_no_reason_to_leave_reports_as_they_are(tmp_path, capsys, make):
    one, other = record(step_time_ms_median=2.0), record("mixed-bf16")
    path = write_run(tmp_path, [*finished([one]), started(other)], finish=False)
    make(path / "cases.csv")
    (path / "summary.csv").write_text("old")
    assert main(["report", str(path)]) == 0
    assert "left as before" not in capsys.readouterr().err
    assert len(read_cases(path / "cases.csv")) == 2
    assert not (path / "cases.csv").is_symlink() and (path / "summary.csv").read_text() != "old"


def test_a_page_keeps_figures_that_can_no_longer_be_drawn(tmp_path, capsys):
    path = shutil.copytree(REFERENCE / "20261126T190729Z-nvidia-h200-e964", tmp_path / "run")
    assert main(["report", str(path)]) == 0
    before = (path / "report.html").read_bytes()
    for words, lost in (("more lines", 1), ("the figures", None)):
        for steps in sorted((path / "steps").iterdir())[:lost]:
            steps.write_bytes(b"")
        assert main(["report", str(path)]) == 0
        assert f"report.html shows {words}" in capsys.readouterr().err
        assert (path / "report.html").read_bytes() == before
    (path / "report.html").unlink()
    assert main(["report", str(path)]) == 0
    assert len((path / "report.html").read_bytes()) < len(before)


def test_a_page_of_another_version_does_not_stay_for_a_figure_that_this_one_does_not_draw(tmp_path, capsys):
    path = write_run(tmp_path, finished([record(step_time_ms_median=2.0)]))
    assert main(["report", str(path)]) == 0
    page = path / "report.html"
    now = page.read_text()
    page.write_text(now.replace("</body>", '<figure id="of-another-version"><h3>x</h3></figure></body>'))
    assert main(["report", str(path)]) == 0
    assert "left as before" not in capsys.readouterr().err
    assert page.read_text() == now


def test_a_link_to_a_page_with_more_figures_is_replaced_and_the_page_stays(tmp_path, capsys):
    path, elsewhere = write_run(tmp_path, finished([record()])), tmp_path / "mine.html"
    elsewhere.write_text('<figure id="how-training-went">')
    (path / "report.html").symlink_to(elsewhere)
    assert main(["report", str(path)]) == 0
    assert "left as before" not in capsys.readouterr().err
    assert not (path / "report.html").is_symlink() and elsewhere.read_text() == '<figure id="how-training-went">'


@pytest.mark.parametrize("before", ["interrupted", "crashed", "invalid"])
@pytest.mark.parametrize("after", ["invalid", "oom", "interrupted"])
def test_a_later_attempt_takes_the_place_of_an_earlier_one_in_a_report(tmp_path, capsys, before, after):
    path = write_run(tmp_path, finished([record(status=before, attempts=1, step_time_ms_median=2.0)]))
    assert main(["report", str(path)]) == 0
    events = finished([record(status=after, status_reason="why", attempts=2)])
    later = write_run(tmp_path / "later", events) / "journal.jsonl"
    later.replace(path / "journal.jsonl")
    assert main(["report", str(path)]) == 0
    assert "left as before" not in capsys.readouterr().err
    assert [row["status"] for row in read_cases(path / "cases.csv")] == [after]


def test_a_row_of_nothing_but_commas_does_not_fill_the_memory(tmp_path):
    (tmp_path / "cases.csv").write_bytes(b"case_id\n" + b"," * (MOST_LINE + 1))
    with pytest.raises(RunError, match="line 2: is longer than"):
        read_run(tmp_path / "cases.csv")


def test_a_long_cell_of_our_own_is_read(tmp_path):
    one = record(status="error", output_tail="x" * 200_000)
    (tmp_path / "cases.csv").write_text(to_csv([one]))
    assert csv.field_size_limit() == 131072
    assert len(read_run(tmp_path / "cases.csv").records[0]["output_tail"]) == 200_000
    assert csv.field_size_limit() == 131072


def test_a_probe_that_is_not_whole_is_passed_over(tmp_path):
    run = read_run(write_run(tmp_path, finished([record(workload_digest="abc")])))
    share = {"activations": 0.1, "weights": None}
    good = {
        "finished": True, "problem": None, "workload_digest": "abc",
        "vanish_share": share, "scaled_vanish_share": share,
        "advice": {"verdict": "helps", "scale": 8.0, "largest": 1},
    }  # fmt: skip
    odd = [{"advice": 3}, {"advice": {"scale": 1e308}}, {"vanish_share": {"weights": "x"}}, {"workload_digest": []}]
    for number, change in enumerate([{}, *odd]):
        folder = tmp_path / "probe" / str(number)
        folder.mkdir(parents=True)
        (folder / "probe.json").write_text(json.dumps({**good, **change}))
    assert [kept.name for kept in probes_of(run)] == ["0"]
