"""report.md shows what the records contain, whatever is missing."""

from __future__ import annotations

import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runfolder import CPU, GPU, NAME, finished, record, started, write_run, write_steps

from mpscale.core.columns import COLUMNS, STATUSES
from mpscale.core.mode import MODES
from mpscale.core.reason import Code, Reason
from mpscale.core.runs import read_run
from mpscale.report.document import document, render
from mpscale.report.files import WRITTEN, rebuild
from mpscale.report.findings import findings
from mpscale.report.gains_figure import gains
from mpscale.report.page import page
from mpscale.report.sections import results
from mpscale.report.table import DASH, Table, escape
from mpscale.report.tradeoff_figure import tradeoff


def rendered(tmp_path, *records, **options):
    return render(document(read_run(write_run(tmp_path, finished(records), **options))))


def table(report, title=""):
    """The cells of the first table of a section, by header. Without a title: of the first section."""
    section = report.split(f"## {title}\n" if title else "## ", 1)[1].split("\n## ", 1)[0]
    lines = [[c.strip() for c in line.strip("|").split(" | ")] for line in section.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def two_seeds(mode, times, values, **more):
    return [
        record(mode, seed, step_time_ms_median=t, metric_value=v, metric_name="accuracy", attempted_steps=100, **more)
        for seed, (t, v) in enumerate(zip(times, values, strict=True))
    ]


def test_the_result_table_of_a_gpu_run(tmp_path):
    checked = {"overflow_steps": 6, "skipped_steps": 6, "applied_steps": 94, "device": "gpu"}
    report = rendered(
        tmp_path,
        *two_seeds("fp32", (8.0, 8.0), (0.90, 0.92), gpu_memory_nvml_peak_mib=2000.0),
        *two_seeds("tf32", (6.0, 6.0), (0.90, 0.92), gpu_memory_nvml_peak_mib=2000.0),
        *two_seeds("mixed-static", (4.0, 4.0), (0.91, 0.91), gpu_memory_nvml_peak_mib=1200.0, **checked),
        device=GPU,
    )
    spread = "91.00 % (90.00 % to 92.00 %)"
    expected = """
        fp32         | 8.00 [8.00, 8.00] ms | 1.00x              | 0.75x [0.75, 0.75] | slower than tf32
        tf32         | 6.00 [6.00, 6.00] ms | 1.33x [1.33, 1.33] | 1.00x              | baseline
        mixed-static | 4.00 [4.00, 4.00] ms | 2.00x [2.00, 2.00] | 1.50x [1.50, 1.50] | faster than tf32
    """
    names = ["mode", "step time", "speed-up over fp32", "speed-up over tf32", "speed"]
    more = ["peak memory", "overflow steps", "final accuracy", "against fp32"]
    rows = table(report, "Results")
    assert list(rows[0]) == ["workload", *names, *more]
    assert [[row[name] for name in names] for row in rows] == [
        [cell.strip() for cell in line.split("|")] for line in expected.strip().splitlines()
    ]
    assert [[row[name] for name in more] for row in rows] == [
        ["2000 MiB", DASH, spread, DASH],
        ["2000 MiB", DASH, spread, "cannot tell"],
        ["1200 MiB", "12/200", "91.00 %", "cannot tell"],
    ]


def test_the_baseline_of_the_headline_is_the_users_default(tmp_path):
    modes = {"fp32": 8.0, "tf32": 6.0, "mixed-bf16": 4.0}
    report = rendered(tmp_path, *(r for m, t in modes.items() for r in two_seeds(m, (t, t), (0.9, 0.9))), device=GPU)
    assert "- **toy**: mixed-bf16 is faster than tf32 (1.50 times the speed)" in report


def test_the_headline_has_accuracy_overflow_and_memory(tmp_path):
    report = rendered(
        tmp_path,
        *two_seeds("fp32", (4.0, 5.0), (0.92, 0.92), gpu_memory_nvml_peak_mib=1000.0),
        *two_seeds("mixed-dynamic", (4.0, 5.0), (0.90, 0.93), overflow_steps=3, gpu_memory_nvml_peak_mib=640.0),
        device=GPU,
    )
    assert (
        "- **toy**: no difference in speed is shown for mixed-dynamic. Accuracy: cannot tell for mixed-dynamic (0.50 "
        "points below fp32 over 2 seeds): the workload has no margin. Overflow in 6 of 200 steps in mixed-dynamic. "
        "Peak GPU memory 0.64 times that of float32 in mixed-dynamic."
    ) in report


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_a_cpu_run_warns_that_it_says_nothing_about_a_gpu(tmp_path, kind):
    report = rendered(tmp_path, record("mixed-bf16", device=kind), device=CPU if kind == "cpu" else GPU)
    for words in (
        "Step times of float16 modes say nothing",
        "The same goes for bfloat16",
        "its compiler more than",
    ):
        assert (words in report) == (kind == "cpu")


def test_overflow_and_loss_scale_over_seeds(tmp_path):
    first = {
        "attempted_steps": 100, "applied_steps": 97, "skipped_steps": 3, "overflow_steps": 3, "nonfinite_loss_steps": 1,
        "longest_skip_run": 2, "first_overflow_step": 0, "last_overflow_step": 41, "loss_scale_initial": 32768.0,
        "loss_scale_final": 8192.0, "loss_scale_min": 8192.0, "loss_scale_max": 32768.0,
    }  # fmt: skip
    second = {
        "attempted_steps": 100, "applied_steps": 100, "skipped_steps": 0, "overflow_steps": 0,
        "nonfinite_loss_steps": 0, "longest_skip_run": 0, "loss_scale_initial": 32768.0, "loss_scale_final": 65536.0,
        "loss_scale_min": 32768.0, "loss_scale_max": 65536.0,
    }  # fmt: skip
    mixed = [record("mixed-dynamic", seed, **values) for seed, values in enumerate((first, second))]
    bf16 = record("mixed-bf16", attempted_steps=100, nonfinite_loss_steps=0)
    report = rendered(tmp_path, record(attempted_steps=100), *mixed, bf16)
    scales = ["32768 -> 8192 to 65536", "8192 to 65536"]
    assert [list(row.values()) for row in table(report, "Overflow and loss scale")] == [
        ["toy", "mixed-dynamic", "200", "197", "3", "3", "1", "2", "0 to 41", *scales],
        ["toy", "mixed-bf16", "100", DASH, DASH, DASH, "0", DASH, DASH, DASH, DASH],
    ]


def test_accuracy_is_judged_against_fp32(tmp_path):
    margin = {"metric_margin": 0.01, "metric_higher_is_better": True}
    report = rendered(
        tmp_path,
        *two_seeds("fp32", (1.0, 1.0), (0.91, 0.92)),
        *two_seeds("mixed-static", (1.0, 1.0), (0.93, 0.94), **margin),
        *two_seeds("mixed-dynamic", (1.0, 1.0), (0.90, 0.93), **margin),
        *two_seeds("mixed-bf16", (1.0, 1.0), (0.81, 0.82), **margin),
    )
    assert [list(row.values()) for row in table(report, "Accuracy against fp32")] == [
        ["toy", "mixed-static", "+2.00 [+2.00, +2.00] points", "2", "1 point", "as good as fp32"],
        # Half-width 6.314 x 1.414 / sqrt(2) points; 8 seeds: 1.895 x 1.414 / sqrt(8) is below 1.
        ["toy", "mixed-dynamic", "+0.00 [-6.31, +6.31] points", "2", "1 point", "cannot tell (8 seeds would decide)"],
        ["toy", "mixed-bf16", "-10.00 [-10.00, -10.00] points", "2", "1 point", "worse than fp32"],
    ]


def test_accuracy_is_shown_seed_by_seed(tmp_path):
    fp32 = two_seeds("fp32", (1.0, 1.0), (0.91, 0.92), published_metric_value=0.5)
    rows = table(rendered(tmp_path, *fp32, *two_seeds("mixed-bf16", (1.0, 1.0), (0.93, 0.94))), "Metric of each seed")
    accuracy, published = "accuracy", "accuracy, published test set"
    assert [list(row.values()) for row in rows] == [
        ["toy", accuracy, "0", "91.00 %", "93.00 %"],
        ["toy", accuracy, "1", "92.00 %", "94.00 %"],
        ["toy", published, "0", "50.00 %", DASH],
        ["toy", published, "1", "50.00 %", DASH],
    ]


def test_timing_quality_flags_dispatch_bound_modes(tmp_path):
    figures = {"timed_blocks": 50, "dispatch_share": 0.75, "trace_time_s": 0.5, "first_step_s": 2.0}
    report = rendered(tmp_path, record(step_time_ms_median=1.0, dispatch_bound=True, **figures))
    assert [list(row.values()) for row in table(report, "Timing quality")] == [
        ["toy", "fp32", "1", "50", "75 % (bound)", "0.500", "2.00"]
    ]
    assert "was busy" not in report
    assert "`bound` means" in report


@pytest.mark.parametrize(
    ("autotuning", "shown"),
    [
        (["tuned", "tuned", "tuned"], "84.0"),
        (["tuned", "reused", "reused"], "82.0 (2 reused: 85.0)"),
        (["reused", "reused", "reused"], "84.0 (reused)"),
        ([None, None, None], "84.0"),
    ],
)
def test_first_steps_that_tuned_and_reused_are_never_averaged(tmp_path, autotuning, shown):
    cases = [
        record(seed=seed, step_time_ms_median=1.0, first_step_s=82.0 + 2 * seed, autotuning=value)
        for seed, value in enumerate(autotuning)
    ]
    assert table(rendered(tmp_path, *cases), "Timing quality")[0]["first step s"] == shown


def test_step_times_of_single_and_of_several_steps_per_call_are_side_by_side(tmp_path):
    figures = {"steps_per_call": 20, "step_time_ms_one_per_call": 3.0}
    several = rendered(
        tmp_path / "several", *(record(mode, step_time_ms_median=1.0, **figures) for mode in ("fp32", "mixed-static"))
    )
    for row in table(several, "Timing quality"):
        assert (row["ms per step"], row["ms with one step per call"]) == ("1.00", "3.00")
    assert "A call took 20 steps." in several
    for name, steps in {"one": 1, "old": None}.items():
        report = rendered(tmp_path / name, record(step_time_ms_median=1.0, steps_per_call=steps))
        assert not {"ms per step", "ms with one step per call"} & set(table(report, "Timing quality")[0])
        assert "A call took" not in report


def test_a_busy_machine_is_reported_with_its_share(tmp_path):
    calm, busy = (record(seed=seed, step_time_ms_median=1.0, host_other_cpu_share=0.04 + 0.3 * seed) for seed in (0, 1))
    assert "was busy" not in rendered(tmp_path / "calm", calm)
    report = rendered(tmp_path / "busy", calm, busy)
    assert table(report, "Timing quality")[0]["other processes' CPU, max"] == "34 %"
    assert "other processes took up to 34 % of its CPU time" in report


def test_failures_are_shown_with_the_last_output(tmp_path):
    bad = record(
        "mixed-static", status="crashed", status_reason="signal 11 | <core>", output_tail="a\x1b[31mb\x1b[0m\n```\nend"
    )
    report = rendered(tmp_path, record(), bad)
    assert table(report.replace("\\|", "/"), "Cases that did not end well") == [
        {"case": bad["case_id"], "status": "crashed", "reason": "signal 11 / &lt;core>"}
    ]
    assert "````text\nab\n```\nend\n````" in report
    assert "1 of 2 cases did not end well (mixed-static on toy: crashed 1)." in report


def test_a_killed_run_is_reported_as_unfinished(tmp_path):
    path = write_run(tmp_path, [*finished([record()]), started(record(seed=1))], finish=False, planned=["a", "b"])
    report = render(document(read_run(path)))
    assert "2 planned cases were not started." in report
    assert "stopped or is still going on" in report
    assert "toy--fp32--s1--r0" in report


def test_columns_that_are_empty_for_the_same_reason_share_a_row(tmp_path):
    first, second = record("fp32"), record("mixed-bf16")
    for one in (first, second):
        one.miss(["tf32", "gpu_allocator"], Reason(Code.NO_GPU, "no GPU"))
    second.miss("overflow_steps", Reason(Code.NOT_IN_MODE, "checks nothing"))
    assert [list(row.values()) for row in table(rendered(tmp_path, first, second), "Missing values")] == [
        ["checks nothing", "overflow_steps", "mixed-bf16", "1 of 2"],
        ["no GPU", "tf32, gpu_allocator", "fp32, mixed-bf16", "2 of 2"],
    ]


def test_environment_and_settings_are_listed(tmp_path):
    report = rendered(tmp_path, record())
    facts = {row["what"]: row["value"] for row in table(report, "Environment")}
    assert (facts["device name"], facts["packages tensorflow"], facts["packages keras"]) == ("Test CPU", "2.21.0", DASH)
    assert {row["what"]: row["value"] for row in table(report, "Settings")} == {"jit": "auto", "seeds": "2"}


def test_empty_sections_are_left_out(tmp_path):
    for values, more in ({}, []), ({"step_time_ms_median": 2.0}, ["Timing quality"]):
        report = rendered(tmp_path / str(len(values)), record(**values), environment={}, settings={})
        titles = [line[3:] for line in report.splitlines() if line.startswith("## ")]
        assert titles == ["Results", *more, "How to read this"]


def test_a_run_without_cases_has_a_report(tmp_path):
    assert "No case was started on Test CPU (CPU)" in rendered(tmp_path)
    assert results(read_run(tmp_path / "runs" / NAME)).text() == ""


def test_the_status_shows_only_if_a_case_failed(tmp_path):
    good = read_run(write_run(tmp_path, finished([record()]), name="a"))
    bad = read_run(write_run(tmp_path, finished([record(), record(seed=1, status="oom")]), name="b"))
    assert "status" not in results(good).text()
    assert "ok 1, oom 1" in results(bad).text()


def test_no_cell_breaks_a_table():
    assert escape("a|b\nc <i> *d* `e`") == "a\\|b c &lt;i> \\*d\\* \\`e\\`"
    assert len(Table(["h"], [["a\nb|c"]]).markdown().splitlines()) == 3


def test_rebuilding_writes_the_same_files_each_time(tmp_path):
    times = {"fp32": 2.0, "mixed-static": 1.0}
    records = [record(mode, seed, step_time_ms_median=ms) for mode, ms in times.items() for seed in (0, 1)]
    path = write_run(tmp_path, finished(records))
    write_steps(path, "toy--mixed-static--s0--r0", "step,loss,loss_scale,overflow\n0,1.5,8,0\n1,1.0,8,0\n")
    assert rebuild(path).name in (path / "report.md").read_text(encoding="utf-8")
    before = [(path / name).read_bytes() for name in WRITTEN]
    assert before[WRITTEN.index("report.html")].count(b"<svg role") == 2
    (path / "run.lock").write_text('{"pid": 1, "host": "elsewhere"}')  # of a process that was killed
    rebuild(path)
    assert not (path / "run.lock").exists()
    assert [(path / name).read_bytes() for name in WRITTEN] == before


VALUES = {
    "str": st.text(max_size=20),
    "int": st.integers(0, 10**6),
    "float": st.floats(1e-6, 1e6),
    "bool": st.booleans(),
}
IDENTITY = ("case_id", "workload", "mode", "seed", "repeat", "status", "unavailable")


@st.composite
def record_lists(draw):
    """Cases with a random choice of values, and reasons for some of the missing ones."""
    keys = st.tuples(
        st.sampled_from([*MODES, "mode-of-tomorrow"]), st.integers(0, 2), st.integers(0, 2), st.sampled_from(["a", "b"])
    )
    free = [c for c in COLUMNS.values() if c.name not in IDENTITY]
    found = []
    for mode, seed, repeat, workload in draw(st.lists(keys, unique=True, max_size=6)):
        chosen = draw(st.sets(st.sampled_from(free), max_size=len(free)))
        one = record(mode, seed, repeat, workload, status=draw(st.sampled_from(list(STATUSES))))
        one.update({c.name: draw(VALUES[c.kind]) for c in chosen})
        one.miss(draw(st.sets(st.sampled_from([c.name for c in free]))), Reason(Code.OTHER, draw(st.text(max_size=20))))
        found.append(one)
    return found


@settings(max_examples=60, deadline=None)
@given(records=record_lists(), device=st.sampled_from([CPU, GPU, {}]), finish=st.booleans())
def test_every_run_has_a_report(records, device, finish):
    with tempfile.TemporaryDirectory() as folder:
        run = read_run(write_run(Path(folder), finished(records), device=device, finish=finish))
        report = render(document(run))
        assert report.startswith("# mpscale: ")
        assert "nan" not in results(run).text()
        assert "<NA>" not in report


@settings(max_examples=15, deadline=None)
@given(records=record_lists(), device=st.sampled_from([CPU, GPU, {}]))
def test_every_run_has_a_page_and_its_pictures_are_sound(records, device):
    with tempfile.TemporaryDirectory() as folder:
        run = read_run(write_run(Path(folder), finished(records), device=device))
        pictures = [picture for picture in (gains(run), tradeoff(run)) if picture is not None]
        assert all(ET.fromstring(picture.svg).tag.endswith("svg") for picture in pictures)
        text = page(document(run), pictures)
        groups = [bool(section.group) for section in document(run).sections]
        assert text.count("<h2>") == any(groups) + groups.count(False)


def judged(mode, values, workload="toy", statuses=()):
    records = [
        record(
            mode, seed, workload=workload, metric_value=value, metric_name="r2_score", metric_margin=0.02,
            metric_higher_is_better=True, step_time_ms_median=1.0 + seed / 100, attempted_steps=10,
        )
        for seed, value in enumerate(values)
    ]  # fmt: skip
    for one, status in zip(records, statuses, strict=False):
        one.update({"status": status, "status_reason": "because"})
    return records


GOOD, BAD = (0.9, 0.91, 0.92), (0.5, 0.51, 0.52)


def test_a_run_that_lost_a_mode_did_not_simply_end_well(tmp_path):
    good = rendered(tmp_path / "good", *judged("fp32", GOOD), *judged("mixed-static", GOOD))
    assert "All 6 cases ran to the end. " in good and "worse" not in good.split("## ")[0]
    bad = rendered(tmp_path / "bad", *judged("fp32", GOOD), *judged("mixed-static", BAD))
    assert "All 6 cases ran to the end; mixed-static on toy is worse than fp32. " in bad
    lost = [*judged("fp32", GOOD), *judged("mixed-static", GOOD, statuses=["stalled"])]
    said = (
        "1 of 6 cases did not end well (mixed-static on toy: ok 2, stalled 1); mixed-static on toy is worse than fp32."
    )
    assert said in rendered(tmp_path / "lost", *lost)
    many = [one for n in range(6) for one in (*judged("fp32", GOOD, f"w{n}"), *judged("mixed-static", BAD, f"w{n}"))]
    assert "All 36 cases ran to the end; 6 rows are worse than fp32. " in rendered(tmp_path / "many", *many)


def test_modes_with_the_same_finding_share_it(tmp_path):
    cases = [one for mode in ("fp32", "mixed-static", "mixed-dynamic", "mixed-bf16") for one in judged(mode, GOOD)]
    lines = rendered(tmp_path, *cases, *judged("mixed-unscaled", BAD)).split("## ")[0].splitlines()
    assert [line for line in lines if line.startswith("- **")] == [
        "- **toy**: no difference in speed is shown for mixed-static, mixed-dynamic, mixed-bf16 and mixed-unscaled. "
        "R²: mixed-static, mixed-dynamic and mixed-bf16 are as good as fp32; mixed-unscaled (0.400 below fp32) is "
        "worse than fp32."
    ]


def test_the_findings_of_a_default_run_are_a_dozen_lines_at_most():
    run = read_run(Path(__file__).parents[2] / "results" / "reference" / "20261127T103907Z-amd-epyc-568d")
    assert len(findings(run).splitlines()) <= 12


def test_one_of_a_kind_is_not_plural(tmp_path):
    planned = [f"toy--mixed-static--s{seed}--r0" for seed in (0, 1)]
    path = write_run(tmp_path, finished([record("mixed-static")]), planned=planned, finish=False)
    text = findings(read_run(path))
    assert "The case that was started ran to the end. 1 planned case was not started." in text


def test_the_mean_over_applied_steps_is_not_taken_for_the_median(tmp_path):
    report = rendered(tmp_path, record("mixed-static", step_time_ms_median=1.0, step_time_ms_per_applied=1.3))
    assert table(report, "Timing quality")[0]["mean ms per applied step"] == "1.30"


def test_a_page_keeps_what_is_said_of_rows_that_are_in_no_table(tmp_path):
    lost = record("mixed-static", status="stalled", status_reason="because", gpu_memory_nvml_peak_mib=900.0)
    run = read_run(write_run(tmp_path, finished([record(), lost]), device=GPU))
    (said,) = document(run).parts_of("Memory")
    assert "measured by an older mpscale" in said
    assert said in page(document(run))
