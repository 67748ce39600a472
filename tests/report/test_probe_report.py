"""What `mpscale probe` says: its advice, its tables, its picture and files, and the section in the report of a run."""

from __future__ import annotations

import csv
import io
import json
import re

import numpy as np
import pytest
from support.runfolder import finished, record, write_run

from mpscale.analysis.probe import Look, Probe, Verdict, advise
from mpscale.core.device import Device
from mpscale.core.magnitudes import Magnitudes, Place
from mpscale.core.reason import Code, Reason
from mpscale.report.files import rebuild
from mpscale.report.probe import render, write
from mpscale.report.probe_tables import percent, sentences, table, values


def counted(values):
    """Count numbers as the worker does, without TensorFlow."""
    array = np.abs(np.asarray(values, np.float32))
    bits = array.view(np.int32)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).view(np.float32)
    place = sum((mantissa > 1.0, mantissa >= 2 - 2**-10, mantissa >= 2 - 2**-11))
    counts = dict(zip(*map(np.ndarray.tolist, np.unique(4 * (bits >> 23) + place, return_counts=True)), strict=True))
    return Magnitudes.from_json({"counts": counts, "largest": float(array[np.isfinite(array)].max(initial=0.0))})


def probe(*looks, scale=None, in_float32=(), problem=None, digest="sha256:1"):
    seen = [
        Look(number, 1.0, {Place(*place): counted(numbers) for place, numbers in look.items()}, frozenset(in_float32))
        for number, look in enumerate(looks, 1)
    ]
    return Probe("toy", Device("cpu", "Test CPU"), len(seen), scale, seen, problem, digest)


def weights(*numbers):
    return {("dense", "weights"): numbers}


@pytest.mark.parametrize(
    ("numbers", "verdict", "scale"),
    [
        ([1e-3, 0.1], Verdict.NOT_NEEDED, 2.0**15),
        ([2.0**-25, 0.1], Verdict.HELPS, 2.0**15),
        ([2.0**-24, 0.1], Verdict.NOT_NEEDED, 2.0**15),
        ([1e-9, 1e-8], Verdict.HELPS, 2.0**24),
        ([1e-20, 1e-8], Verdict.TOO_WIDE, 2.0**24),
        ([1e-10, 100.0], Verdict.TOO_WIDE, 2.0**5),
        ([1e-9, 5000.0], Verdict.TOO_WIDE, 1.0),
        ([0.1, 65519.0], Verdict.NOT_NEEDED, 1.0),
        ([0.1, 65520.0], Verdict.OVERFLOWS, 1.0),
        # A product of exactly 65504 is not below it.
        ([65504.0 / 2**10], Verdict.NOT_NEEDED, 2.0**5),
        ([65504.0 / 2**10 * (1 - 2**-20)], Verdict.NOT_NEEDED, 2.0**6),
        # One of a thousand may vanish, and of a layer's activations one in a hundred.
        ([2.0**-26] + [0.1] * 2000, Verdict.NOT_NEEDED, 2.0**15),
        ([2.0**-26] * 3 + [0.1] * 2000, Verdict.HELPS, 2.0**15),
    ],
)
def test_the_scale_is_the_largest_that_leaves_room(numbers, verdict, scale):
    advice = advise(probe(weights(*numbers)))
    assert (advice.verdict, advice.scale) == (verdict, scale)
    assert advice.headroom == pytest.approx(65504 / (advice.scale * advice.largest))
    whole = " ".join(sentences(probe(weights(*numbers))))
    assert ("needs no loss scale" in whole) == (verdict is Verdict.NOT_NEEDED)
    assert "this is about weights alone" in whole


def test_a_layer_that_loses_much_counts_although_the_total_does_not():
    small = {("a", "weights"): [1e-9], ("b", "weights"): [0.1] * 5000}
    assert advise(probe(small)).verdict is Verdict.HELPS


def test_layers_in_float32_are_shown_and_count_nowhere():
    found = probe({("a", "weights"): [0.1], ("head", "weights"): [1e-20, 1e5]}, in_float32=["head"])
    advice = advise(found)
    assert (advice.verdict, advice.largest) == (Verdict.NOT_NEEDED, pytest.approx(0.1))
    rows = {row["layer"]: row for row in values(found)}
    assert (rows["all"]["gradients"], rows["head"]["gradients"]) == (1, 2)
    assert rows["head"]["vanish_share"] is None
    assert "vanish_share" in rows["head"]["unavailable"]
    assert ["head (float32)", "weights"] in [row[:2] for row in table(found).rows]


def test_gradients_that_are_not_finite_are_said_and_not_taken_for_an_overflow_of_float16():
    problem = Reason(Code.NOT_FINITE, "the training diverged: at step 2")
    found = probe(weights(1e-3), weights(np.inf, np.nan, 1.0), problem=problem)
    assert advise(found).largest == pytest.approx(1e-3)
    assert values(found)[0]["overflow_share"] == 0
    assert "diverged" in next(sentences(found))
    only = probe(weights(np.nan), problem=problem)
    assert advise(only) is None
    assert values(only) == []
    assert "There is no advice" in render(only, "table")
    assert json.loads(render(only, "json"))["recommended_scale"] is None


def test_zeros_alone_give_no_advice():
    found = probe(weights(0.0, 0.0))
    assert advise(found) is None
    (row, _) = values(found)
    assert (row["zero"], row["vanish_share"]) == (2, None)
    assert "vanish_share" in row["unavailable"]


def test_the_formats_say_the_same(tmp_path):
    found = probe({("dense", "activations"): [1e-9, 0.0, 1e-3], ("dense", "weights"): [1e-5, 0.5]}, scale=2.0**20)
    rows = list(csv.DictReader(io.StringIO(render(found, "csv"))))
    whole = json.loads(render(found, "json"))
    assert [row["vanish_share"] for row in rows] == [str(row["vanish_share"]) for row in whole["gradients"]]
    assert whole["recommended_scale"] == float(rows[0]["recommended_scale"]) == 2.0**12
    assert {row["scale"] for row in whole["gradients"]} == {2.0**20}
    assert "With the scale 1048576" in render(found, "table")
    write(tmp_path, found, {"probe": "name", "finished": True})
    names = {"report.html", "report.md", "probe.csv", "gradients.csv", "probe.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    counts = list(csv.DictReader(io.StringIO((tmp_path / "gradients.csv").read_text())))
    assert [tuple(row.values()) for row in counts] == [
        ("dense", "activations", "optimizer", "zero", "", "1"),
        ("dense", "activations", "optimizer", "number", "-30", "1"),
        ("dense", "activations", "optimizer", "number", "-10", "1"),
        ("dense", "weights", "optimizer", "number", "-17", "1"),
        ("dense", "weights", "optimizer", "number", "-1", "1"),
    ]
    html = (tmp_path / "report.html").read_text()
    drawn = {of: len(re.findall(f'id="bars-{of}', html)) for of in ("activations-1", "activations-2", "weights-2")}
    assert drawn == dict.fromkeys(drawn, 30)
    assert "Gradients by power of two" in html


def test_the_terminal_shows_the_layers_that_lose_most_and_how_many_are_left_out():
    looks = {(f"layer{n:02}", "weights"): [1e-9] * n + [0.1] for n in range(30)}
    shown = render(probe(looks), "table")
    assert "layer29" in shown and "layer20" in shown and "layer19" not in shown
    assert "the report has 20 more rows" in shown
    assert len(table(probe(looks)).rows) == 31


@pytest.mark.parametrize(
    ("share", "text"),
    [(None, "–"), (0.0, "0 %"), (1e-9, "< 0.01 %"), (0.0007, "0.07 %"), (0.5, "50.0 %")],  # noqa: RUF001
)
def test_a_share_that_is_not_zero_never_looks_like_zero(share, text):
    assert percent(share) == text


def test_the_report_of_a_run_shows_the_newest_probe_of_its_workloads(tmp_path):
    run = write_run(tmp_path, finished([record(workload_digest="sha256:1")]))
    rebuild(run)
    assert "Gradient range" not in (run / "report.md").read_text()
    for name, found in {
        "1-old": probe(weights(1e-3)),
        "2-new": probe(weights(1e-9, 0.5)),
        "3-other": probe(weights(1e-3), digest="sha256:2"),
        "4-broken": probe(weights(1e-3), problem=Reason(Code.OTHER, "died")),
    }.items():
        (tmp_path / "probe" / name).mkdir(parents=True)
        write(tmp_path / "probe" / name, found, {"probe": name, "finished": True})
    (tmp_path / "probe" / "5-torn").mkdir()
    (tmp_path / "probe" / "5-torn" / "probe.json").write_text("{")
    rebuild(run)
    written = (run / "report.md").read_text()
    assert "## Gradient range" in written
    (row,) = [line for line in written.splitlines() if "2-new" in line]
    assert "4096 (it helps)" in row
    assert not re.search("1-old|3-other|4-broken", written)


def test_several_optimizers_are_shown_apart_and_each_has_a_scale():
    both = {
        ("d", "weights", "of_d"): [1e-9, 0.5],
        ("d", "activations", "of_g"): [2.0**-20],
        ("g", "weights", "of_g"): [0.0],
    }
    found = probe(both)
    rows = {(row["layer"], row["of"], row["optimizer"]): row["gradients"] for row in values(found)}
    totals = {("all", "weights", "all"): 3, ("all", "activations", "all"): 1, ("all", "weights", "of_d"): 2}
    totals |= {("all", "activations", "of_g"): 1, ("all", "weights", "of_g"): 1}
    assert rows == totals | {place: len(numbers) for place, numbers in both.items()}
    assert ["d", "weights", "of_d"] in [row[:3] for row in table(found).rows]
    said = " ".join(sentences(found))
    assert "0.500 (4096) of of_d and 9.54e-07 (16777216) of of_g" in said
    assert "most vanishes in d (weights, of_d, 50.0 %)" in said
    assert "optimizer" not in table(probe(weights(0.1))).headers
