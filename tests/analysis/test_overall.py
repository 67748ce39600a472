"""What a comparison answers as a whole."""

from __future__ import annotations

import pytest
from support.nightly import night, row
from support.runfolder import GPU

from mpscale.analysis.compare import compare
from mpscale.analysis.neighbours import Neighbours
from mpscale.analysis.overall import Overall, overall_of
from mpscale.core.runs import RunError, read_run

STATIC = "mixed-static"


def answer_of(tmp_path, before, after, device=None, **how):
    runs = [read_run(night(tmp_path, 1, *before)), read_run(night(tmp_path, 2, *after, **(device or {})))]
    return overall_of(compare(*runs, **how))


@pytest.mark.parametrize(
    ("after", "answer", "worse", "better"),
    [
        ([row(ms=2.0), row(STATIC, 1.0)], Overall.SAME, 0, 0),
        ([row(ms=2.0), row(STATIC, 3.0)], Overall.WORSE, 1, 0),
        ([row(ms=1.0), row(STATIC, 3.0)], Overall.WORSE, 1, 1),
        ([row(ms=1.0), row(STATIC, 1.0)], Overall.BETTER, 0, 1),
        ([row(ms=2.0, spread=(0.6, 1.0, 1.6, 0.8, 1.2)), row(STATIC, 1.0)], Overall.NO_DIFFERENCE, 0, 0),
        ([row(ms=2.0), row(STATIC, None, status="crashed", status_reason="signal 11")], Overall.WORSE, 1, 0),
        ([row(ms=2.0), row(STATIC, 1.0, metric=0.5)], Overall.WORSE, 1, 0),
        ([row(ms=2.0)], Overall.NO_DIFFERENCE, 0, 0),
        ([row("mixed-bf16", 1.0)], Overall.CANNOT_TELL, 0, 0),
        (
            [row(ms=2.0), row(STATIC, 1.0), row("mixed-bf16", None, status="crashed", status_reason="x")],
            Overall.SAME,
            0,
            0,
        ),
    ],
    ids=[
        "same",
        "slower",
        "both",
        "faster",
        "noisy",
        "crashed",
        "metric",
        "row-missing",
        "other-rows",
        "new-row-crashed",
    ],
)
def test_the_answer(tmp_path, after, answer, worse, better):
    before = [row(ms=2.0), row(STATIC, 1.0)]
    found = answer_of(tmp_path, before, after)
    assert (found.answer, found.worse, found.better) == (answer, worse, better)


def test_one_process_on_each_side_cannot_tell(tmp_path):
    before, after = [row(ms=2.0, spread=(1.0,))], [row(ms=3.0, spread=(1.0,))]
    found = answer_of(tmp_path, before, after)
    assert (found.answer, found.judged, found.rows) == (Overall.CANNOT_TELL, 0, 1)


def test_another_device_says_nothing_about_costs_but_a_lost_metric_counts(tmp_path):
    before, after = [row(ms=2.0)], [row(ms=9.0, device="gpu", device_name="Test GPU")]
    assert answer_of(tmp_path / "a", before, after, {"device": GPU}).answer is Overall.CANNOT_TELL
    after = [row(ms=9.0, device="gpu", device_name="Test GPU", metric=0.5)]
    assert answer_of(tmp_path / "b", before, after, {"device": GPU}).answer is Overall.WORSE


def test_the_largest_change_for_the_worse_comes_first(tmp_path):
    before = [row(ms=1.0, workload=name) for name in ("a", "b", "c")]
    after = [row(ms=ms, workload=name) for name, ms in (("a", 1.5), ("b", 0.2), ("c", 4.0))]
    changes = answer_of(tmp_path, before, after).changes
    assert [(change.row.pair.workload, change.is_worse) for change in changes] == [
        ("c", True), ("a", True), ("b", False),
    ]  # fmt: skip
    assert changes[0].size == pytest.approx(3.0, rel=1e-6)


def neighbours(tmp_path):
    return Neighbours([read_run(folder) for folder in sorted((tmp_path / "runs").iterdir())])


def test_a_run_is_compared_with_the_last_one_that_has_half_of_its_rows(tmp_path):
    full = [row(ms=2.0), row(STATIC, 1.0), row("mixed-dynamic", 1.0), row("mixed-bf16", 1.0)]
    names = [
        night(tmp_path, 1, *full).name,
        night(tmp_path, 2, full[0]).name,
        night(tmp_path, 3, *full, preset="full").name,
        night(tmp_path, 4, *[row(ms=2.0, device="gpu", device_name="Test GPU")], device=GPU).name,
        night(tmp_path, 5, *full).name,
        night(tmp_path, 6, row(ms=2.0, digest="sha256:other")).name,
    ]
    found = neighbours(tmp_path)
    assert [found.before(name) for name in names] == [None, names[0], None, None, names[0], None]


def test_the_floor_comes_from_runs_of_the_same_code_without_the_one_that_is_judged(tmp_path):
    days = range(1, 8)
    names = [night(tmp_path, day, row(ms=2.0 * (1 + day % 3 / 50)), commit="a" * 40).name for day in days]
    last = night(tmp_path, 8, row(ms=9.0), commit="b" * 40).name
    found = neighbours(tmp_path)
    assert found.floors(names[0], leave_out=names[3]).runs == (*names[:3], *names[4:])
    assert found.floors(last).runs == ()
    change = found.comparison(names[-1], last).rows[0].changes["step_time"]
    assert (change.floor_runs, str(change.verdict)) == (len(names), "slower")


def test_runs_that_cannot_be_compared_say_so_each_time(tmp_path):
    names = [night(tmp_path, day, row(digest=f"sha256:{day}")).name for day in (1, 2)]
    found = neighbours(tmp_path)
    for _ in range(2):
        with pytest.raises(RunError, match="was not measured as"):
            found.comparison(*names)
