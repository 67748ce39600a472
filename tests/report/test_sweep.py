"""How reports show a sweep: rows by batch and scale, tables, and the picture over the batch."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from support.runfolder import GPU, finished, record, started, write_run

from mpscale.analysis.summary import summary_csv, summary_of
from mpscale.core.case import CaseId, Variant, scale_text
from mpscale.core.record import place_of
from mpscale.core.runs import read_run
from mpscale.report.document import document, render
from mpscale.report.findings import findings
from mpscale.report.gains_figure import gains
from mpscale.report.sweep import by_batch, by_replicas, by_scale
from mpscale.report.sweep_figure import over_batch
from mpscale.report.table import DASH

SVG = "{http://www.w3.org/2000/svg}"
MS = {"fp32": (1.0, 2.0, 8.0), "mixed-dynamic": (1.25, 1.6, 4.0), "mixed-static": (1.25, 1.6, 4.0)}
BATCHES = (64, 256, 1024)


def swept(mode, seed=0, batch=None, scale=None, workload="toy", replicas=None, **values):
    variant = Variant(batch, scale, replicas)
    case_id = str(CaseId(workload, mode, seed, 0, variant))
    return record(mode, seed, workload=workload, **{**variant.columns(), "case_id": case_id, **values})


def timed(mode, number, seed, **values):
    batch, ms = BATCHES[number], MS[mode][number] * (1 + seed / 100)
    facts = {"step_time_ms_median": ms, "examples_per_s": 1e3 * batch / ms, "batch_size": batch, "device": "gpu"}
    return swept(mode, seed, batch, **{**facts, "gpu_memory_nvml_peak_mib": 1000.0 * (number + 1), **values})


def over_batches(*modes, batches=range(3), **values):
    return [timed(mode, number, seed, **values) for seed in (0, 1) for number in batches for mode in modes]


def trained(scale, seed, metric, overflow):
    mode = "fp32" if scale is None else "mixed-static"
    facts = {"metric_value": metric, "metric_name": "accuracy", "metric_margin": 0.01, "metric_higher_is_better": True}
    counts = {"attempted_steps": 100} if scale is None else {"attempted_steps": 100, "overflow_steps": overflow}
    return swept(mode, seed, scale=scale, **facts, **counts)


SCALES = [
    trained(scale, seed, metric + seed / 1000, overflow)
    for scale, metric, overflow in ((None, 0.9, 0), (2.0**24, 0.7, 60), (8.0, 0.9, 0), (0.1, 0.9, 0))
    for seed in (0, 1)
]


def run_of(tmp_path, records, **options):
    return read_run(write_run(tmp_path, finished(records), **options))


def scaled(number, ms, seed, mode="fp32"):
    """A process on some replicas, each with a batch of 10."""
    facts = {"step_time_ms_median": ms, "examples_per_s": 1e4 * number / ms, "device": "cpu"}
    return swept(mode, seed, replicas=number, **facts)


def test_scaling_efficiency_is_of_pairs_and_of_the_fewest_replicas(tmp_path):
    times = {("fp32", 1): (1.0, 2.0), ("fp32", 2): (1.25, 2.5), ("fp32", 4): (2.0, 4.4), ("mixed-bf16", 2): (1.0, 1.0)}
    known = [scaled(n, ms, seed, mode) for (mode, n), of in times.items() for seed, ms in enumerate(of)]
    lost = [swept("mixed-bf16", 0, replicas=n, device="cpu", status="error") for n in (1, 4)]
    run = run_of(tmp_path, known + lost)
    table, note = by_replicas(run)
    assert cells(table, "workload", "mode", "replicas", "scaling efficiency") == [
        ("toy", "fp32", "1", "1 by definition"),
        ("toy", "fp32", "2", "0.800 [0.800, 0.800]"),
        ("toy", "fp32", "4", "0.477 [0.260, 0.873]"),
        ("toy", "mixed-bf16", "1", DASH),
        ("toy", "mixed-bf16", "2", "1 by definition"),
        ("toy", "mixed-bf16", "4", DASH),
    ]
    assert cells(table, "examples per second")[1] == ("11314",)
    assert "share its cores" in note
    assert "over 1, 2 and 4 replicas; a mode is compared with fp32 of the same number of replicas" in findings(run)
    assert by_replicas(run_of(tmp_path / "other", SCALES)) == []
    alike = [record("fp32", seed, replicas=2, strategy="mirrored") for seed in (0, 1)]
    assert "fp32 on CPU, by 2 replicas." in findings(run_of(tmp_path / "alike", alike)).replace("Test CPU (CPU)", "CPU")


def cells(table, *names):
    places = [list(table.headers).index(name) for name in names]
    return [tuple(row[place] for place in places) for row in table.rows]


@pytest.mark.parametrize(
    ("scale", "text"),
    [(8.0, "8"), (128.0, "128"), (65536.0, "2^16"), (2.0**24, "2^24"), (1000.0, "1000"), (0.1, "0.1"), (1 / 3, None)],
)
def test_scales_are_written_so_that_no_two_look_alike(scale, text):
    assert scale_text(scale) == (text or repr(scale))


def test_rows_are_by_batch_each_with_the_baseline_of_its_own(tmp_path):
    run = run_of(tmp_path, over_batches("fp32", "mixed-dynamic"), device=GPU)
    rows = summary_of(run)
    assert [place_of(row) for row in rows] == [
        (f"toy @{batch}", mode) for batch in BATCHES for mode in ("fp32", "mixed-dynamic")
    ]
    assert [row["speedup_fp32"] for row in rows] == pytest.approx([1.0, 0.8, 1.0, 1.25, 1.0, 2.0])
    assert {row["workload"] for row in rows} == {"toy"}
    assert summary_csv(rows).splitlines()[1].startswith("toy,fp32,64,,,gpu")


def test_table_over_the_batch_can_be_read_downwards_mode_by_mode(tmp_path):
    table, note = by_batch(run_of(tmp_path, over_batches("fp32", "mixed-dynamic"), device=GPU))
    assert cells(table, "workload", "mode", "batch", "GPU memory over fp32") == [
        ("toy", mode, str(batch), "1.00") for mode in ("fp32", "mixed-dynamic") for batch in BATCHES
    ]
    rates = [
        1e3 * batch / MS[mode][number] / 1.01**0.5
        for mode in ("fp32", "mixed-dynamic")
        for number, batch in enumerate(BATCHES)
    ]
    assert [float(text) for (text,) in cells(table, "examples per second")] == pytest.approx(rates, rel=1e-4)
    assert [text[:5] for (text,) in cells(table, "speed-up over fp32")][3:] == ["0.80x", "1.25x", "2.00x"]
    assert "fp32 of the same batch" in note


def test_a_batch_that_does_not_fit_has_its_status(tmp_path):
    records = over_batches("fp32", "mixed-dynamic", batches=(0, 1)) + over_batches("mixed-dynamic", batches=(2,))
    records += [swept("fp32", seed, 1024, status="oom", status_reason="too large") for seed in (0, 1)]
    run = run_of(tmp_path, records, device=GPU)
    assert cells(by_batch(run)[0], "mode", "batch", "speed-up over fp32", "status")[2::3] == [
        ("fp32", "1024", DASH, "oom 2"),
        ("mixed-dynamic", "1024", DASH, DASH),
    ]
    assert (
        "**toy @<!-- -->1024**: mixed-dynamic (4.02 ms per step), with no fp32 that ended well to compare with"
        in findings(run)
    )


def test_table_over_the_scale_shows_overflow_and_metric(tmp_path):
    run = run_of(tmp_path, SCALES)
    table, _ = by_scale(run)
    assert cells(table, "workload", "mode", "loss scale", "overflow steps", "share of steps", "verdict") == [
        ("toy", "mixed-static", "0.1", "0/200", "0.0 %", "as good as fp32"),
        ("toy", "mixed-static", "8", "0/200", "0.0 %", "as good as fp32"),
        ("toy", "mixed-static", "2^24", "120/200", "60.0 %", "worse than fp32"),
    ]
    text = render(document(run))
    assert "| toy | mixed-static @<!-- -->2^24 |" in " ".join(text.split())
    assert "constant loss scales of 0.1, 8 and 2^24; a mode is compared with fp32." in text


def test_without_a_sweep_nothing_is_said_about_one(tmp_path):
    run = run_of(tmp_path, [record(mode, step_time_ms_median=1.0) for mode in ("fp32", "mixed-static")])
    assert by_batch(run) == by_scale(run) == []
    assert over_batch(run) is None
    assert "@" not in render(document(run))
    assert "sweep" not in render(document(run))


def test_a_planned_or_interrupted_case_belongs_to_the_row_of_its_batch(tmp_path):
    records = over_batches("fp32", "mixed-dynamic", batches=(0, 1))
    cut = swept("fp32", 2, 256)
    waiting = [str(CaseId("toy", "mixed-dynamic", 2, 0, Variant(256))), str(CaseId("toy", "fp32", 2, 0, Variant(64)))]
    planned = [str(one["case_id"]) for one in records] + waiting
    run = run_of(tmp_path, records, finish=False, planned=planned)
    assert run.waiting == {("toy @256", "mixed-dynamic"): [(2, 0)], ("toy @64", "fp32"): [(2, 0)]}
    # As a run that was killed leaves it: the start of a case, and no end.
    folder = write_run(tmp_path / "cut", [*finished(records), started(cut)], finish=False)
    (found,) = [one for one in read_run(folder).records if one["status"] == "interrupted"]
    assert found.place == ("toy @256", "fp32")


def groups(picture, name):
    return [group for group in ET.fromstring(picture.svg).iter(f"{SVG}g") if group.get("id") == name]


def test_picture_has_a_line_per_mode_and_a_row_of_panels_per_workload(tmp_path):
    records = over_batches("fp32", "mixed-dynamic", "mixed-static")
    records += [
        swept(mode, seed, batch, workload="other", step_time_ms_median=1.0, examples_per_s=5.0)
        for mode in ("fp32", "mixed-dynamic")
        for seed in (0, 1)
        for batch in (2, 4)
    ]
    picture = over_batch(run_of(tmp_path, records, device=GPU))
    assert [len(groups(picture, f"{name}-1")) for name in ("speedup", "throughput", "memory")] == [2, 3, 3]
    assert [len(groups(picture, f"{name}-2")) for name in ("speedup", "throughput", "memory")] == [1, 2, 0]
    texts = {"".join(text.itertext()) for text in ET.fromstring(picture.svg).iter(f"{SVG}text")}
    assert {"64", "256", "1024", "2", "4", "batch", "toy: speed-up over fp32", "other: examples per second"} <= texts
    assert "Hollow" not in picture.caption


def test_a_doubtful_speedup_is_hollow(tmp_path):
    records = over_batches("fp32", "mixed-dynamic", dispatch_bound=True, dispatch_share=0.9)
    assert "Hollow" in over_batch(run_of(tmp_path, records, device=GPU)).caption


def test_scales_of_a_mode_have_its_colour_and_markers_of_their_own(tmp_path):
    records = [
        swept(mode, seed, batch, scale, step_time_ms_median=1.0 + (scale or 0) / 100)
        for seed in (0, 1)
        for batch in (64, 256)
        for mode, scale in (("fp32", None), ("mixed-static", 8.0), ("mixed-static", 128.0))
    ]
    run = run_of(tmp_path, records)
    svg = over_batch(run).svg
    assert ">mixed-static @8<" in svg and ">mixed-static @128<" in svg
    assert len(groups(over_batch(run), "speedup-1")) == 2
    assert ">toy @256<" in gains(run).svg and ">mixed-static @128<" in gains(run).svg
