"""What a report says about workloads that take their batches from a pipeline, and about random draws."""

from __future__ import annotations

import pytest
from support.runfolder import GPU, finished, record, write_run

from mpscale.analysis.answer import Weakness, answer_of
from mpscale.analysis.quantities import COSTS
from mpscale.analysis.summary import summarise
from mpscale.core.runs import read_run
from mpscale.report.document import document
from mpscale.report.findings import findings
from mpscale.report.first_screen import first_screen
from mpscale.report.table import Table

WELL = {"device": "gpu", "device_busy_share": 0.95, "host_other_cpu_share": 0.02, "has_metric": True}
METRIC = {"metric_name": "accuracy", "metric_margin": 0.01, "metric_higher_is_better": True}
FED = {"input_kind": "tf.data", "input_passes": "same", "input_shapes": 1}


def cases(with_input, fp32=None, mode=None, seeds=4):
    """fp32 takes 2 ms and mixed-dynamic 1 ms on the device; ``with_input``: ms of both with the pipeline, or None."""
    found = []
    for name, ms, input_ms, own in (("fp32", 2.0, with_input[0], fp32), ("mixed-dynamic", 1.0, with_input[1], mode)):
        for seed in range(seeds):
            noise = 1 + 0.001 * ((3 * seed + len(name)) % 5)
            fed = (
                {}
                if input_ms is None
                else {
                    **FED,
                    "step_time_ms_with_input": input_ms * noise,
                    "input_wait_share": max(1 - ms / input_ms, 0.0),
                }
            )
            values = {"step_time_ms_median": ms * noise, "metric_value": 0.9 + 0.001 * (seed % 3), **fed, **(own or {})}
            found.append(record(name, seed, **{**WELL, **METRIC, **values}))
    return found


def run_of(tmp_path, *given, **options):
    return read_run(write_run(tmp_path, finished(cases(*given, **options)), device=GPU))


def text_of(run, title):
    return " ".join(part for part in document(run).parts_of(title) if isinstance(part, str))


def test_the_two_step_times_stand_side_by_side(tmp_path):
    run = run_of(tmp_path, (4.0, 2.0))
    table = next(part for part in document(run).parts_of("Input pipelines") if isinstance(part, Table))
    row = dict(zip(table.headers, table.rows[1], strict=True))
    assert row["waits for input"] == "50 %"
    assert [row[f"speed-up {what}"][:5] for what in ("on the device", "with input")] == ["2.00x", "2.00x"]
    assert Weakness.INPUT_BOUND not in answer_of(run).weaknesses
    screen = first_screen(run)
    assert screen.headline == "Yes: 2.00x as fast with mixed-dynamic (2.00x with the input pipeline)."
    assert "with that wait, training in mixed-dynamic is 2.00 times as fast as in fp32" in findings(run)


@pytest.mark.parametrize("with_input", [(4.0, 4.0), (4.0, 4.4)], ids=["the same", "slower"])
def test_a_mode_that_only_waits_longer_gains_nothing(tmp_path, with_input):
    run = run_of(tmp_path, with_input)
    answer, screen = answer_of(run), first_screen(run)
    assert (answer.weaknesses[Weakness.INPUT_BOUND], answer.choices) == (1, {})
    assert screen.headline == "No, not with this input pipeline: training waits for its batches."
    assert "Make the input pipeline faster first: on the device alone, a step is 2.00x as fast." in screen.advice
    assert "mixed-dynamic is input-bound: mixed precision cannot help" in findings(run)
    assert "Input-bound: toy mixed-dynamic." in text_of(run, "Input pipelines")


def test_a_short_wait_is_not_why_there_is_no_gain(tmp_path):
    """Its share is within the noise of both timings, so the speed on the device stands."""
    run = run_of(tmp_path, (2.02, 1.05))
    assert Weakness.INPUT_BOUND not in answer_of(run).weaknesses


def test_arrays_have_nothing_of_it(tmp_path):
    run = run_of(tmp_path, (None, None))
    assert document(run).parts_of("Input pipelines") == ()
    assert "input" not in findings(run)
    row = summarise(run.records)[1]
    names = ("step_time_ms_with_input", "input_wait_share", "speedup_with_input_fp32", "same_draws", "same_batches")
    assert {row[name] for name in names} == {None}


def test_no_claim_with_input_where_there_is_none_without(tmp_path):
    run = run_of(tmp_path, (4.0, 4.0), fp32={"host_other_cpu_share": 0.5})
    table = next(part for part in document(run).parts_of("Input pipelines") if isinstance(part, Table))
    assert table.rows[1][-1].startswith("(1.00x")
    assert Weakness.INPUT_BOUND not in answer_of(run).weaknesses
    assert "with that wait" not in findings(run)


@pytest.mark.parametrize(
    ("fp32", "mode", "same", "said"),
    [
        ("sha256:a", "sha256:b", False, True),
        ("sha256:a", "sha256:a", True, False),
        (None, "sha256:a", None, False),
        (None, None, None, False),
    ],
)
def test_masks_that_differ_are_noise_in_a_metric(tmp_path, fp32, mode, same, said):
    run = run_of(tmp_path, (None, None), fp32={"random_draws": fp32}, mode={"random_draws": mode})
    assert summarise(run.records)[1]["same_draws"] is same
    assert ("Dropout masks or other random draws in mixed-dynamic are not those" in findings(run)) is said


def test_batches_that_may_differ_are_said_to(tmp_path):
    sides = [{"input_passes": "differ", "data_order_digest": f"sha256:{side}"} for side in "ab"]
    run = run_of(tmp_path, (2.0, 1.0), fp32=sides[0], mode=sides[1])
    assert "The batches seen in mixed-dynamic are not those of the baseline" in findings(run)
    assert "two passes over the first batches differed" in text_of(run, "Input pipelines")


def test_batches_of_many_shapes_are_counted(tmp_path):
    run = run_of(tmp_path, (2.0, 1.0), mode={"input_shapes": 31})
    assert "toy (31 shapes)" in text_of(run, "Input pipelines")
    assert "Pad variable lengths" in text_of(run, "Input pipelines")


def test_the_step_time_with_input_can_be_compared_and_gated():
    cost = COSTS["step_time_with_input"]
    records = cases((4.0, 3.0))
    assert sorted(cost.sample(records[:4])) == pytest.approx([4.0, 4.0, 4.0, 4.0], rel=0.01)
    assert cost.kinds(records) == {("tf.data",)}
