"""Memory by stage of a case: synchronised steps, queued steps, evaluation; and what explains it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.gpu_case import ENERGY_OFF, kept_samples

from mpscale.core.processes.events import Phase
from mpscale.core.reason import Code
from mpscale.telemetry.gpu_memory import AllocatorFacts, memory_columns
from mpscale.telemetry.samples import Sample, Samples
from mpscale.telemetry.watch import WorkerFacts

DATA = Path(__file__).parent / "data"
PROCESS, UNEXPLAINED = "gpu_memory_process_peak_mib", "gpu_memory_unexplained_mib"
SYNCHRONISED, QUEUED = "gpu_memory_nvml_peak_mib", "gpu_memory_queued_peak_mib"
EVALUATION, CAUSE = "gpu_memory_evaluation_peak_mib", "gpu_memory_unexplained_cause"
STAGES = {
    "idle": 0.0,
    "context-ready": 500.0,
    "compiled": 1000.0,
    "steps-synchronised": 1000.0,
    "steps-queued": 1000.0,
    "metric-tried": 1000.0,
    "trained": 1000.0,
    "evaluated": 1000.0,
    "timing-start": 1000.0,
    "timing-end": 1000.0,
    "done": 1000.0,
}


def case(late=(), without=(), listed=True, **used):
    """A case that has the memory of ``STAGES`` when it reaches these phases, or more from the phases in ``used`` on."""
    rows, most = [], 0.0
    for n, (phase, mib) in enumerate(STAGES.items()):
        most = max(most, mib, used.get(phase.replace("-", "_"), 0.0))
        if phase not in without:
            own = most if listed and most else None
            rows.append(Sample(float(n), phase, 10, 0.01, own is not None, own, 3.0 + most, 600.0, int(most > 0), ()))
    return Samples(rows, late=tuple(late))


@pytest.mark.parametrize("listed", [True, False], ids=["by the process", "by the device"])
@pytest.mark.parametrize(
    ("used", "synchronised", "queued", "evaluation"),
    [
        pytest.param({}, 1000.0, 1000.0, None, id="nothing needs more than the first step"),
        pytest.param({"steps_synchronised": 1200.0}, 1200.0, 1200.0, None, id="a later step does"),
        pytest.param({"steps_queued": 1900.0}, 1000.0, 1900.0, None, id="queued steps do"),
        pytest.param({"metric_tried": 1500.0}, 1000.0, 1000.0, 1500.0, id="so does evaluation, when tried out"),
        pytest.param({"evaluated": 1500.0}, 1000.0, 1000.0, 1500.0, id="so does the final evaluation"),
        pytest.param({"trained": 1500.0}, 1000.0, 1500.0, None, id="steps queue up in training"),
        pytest.param({"metric_tried": 1500.0, "timing_end": 1900.0}, 1000.0, 1900.0, 1500.0, id="or when timed"),
        pytest.param({"steps_queued": 1900.0, "evaluated": 2000.0}, 1000.0, 1900.0, 2000.0, id="all need more"),
        pytest.param({"done": 3000.0}, 1000.0, 1000.0, None, id="only what comes last does"),
    ],
)
def test_each_stage_has_its_own_peak(used, synchronised, queued, evaluation, listed):
    found = memory_columns(case(listed=listed, **used))
    assert found.values["gpu_memory_method"] == ("process" if listed else "device-minus-idle")
    assert (found.values[SYNCHRONISED], found.values[QUEUED]) == (synchronised, queued)
    assert found.values.get(EVALUATION) == evaluation
    if evaluation is None:
        assert found.unavailable[EVALUATION].code is Code.NEVER_HAPPENED
        assert f"{used.get('steps_queued', synchronised):.0f} MiB" in found.unavailable[EVALUATION].text
    assert found.values[PROCESS if listed else "gpu_memory_device_rise_mib"] == max([1000.0, *used.values()])


TRAINING = ("metric-tried", "trained", "evaluated")
TIMING = ("timing-start", "timing-end")
STEPS = ("steps-synchronised", "steps-queued")


@pytest.mark.parametrize(
    ("samples", "codes"),
    [
        pytest.param(case(without=TRAINING), {EVALUATION: Code.NOT_ASKED_FOR}, id="it only times"),
        pytest.param(case(without=TIMING), {EVALUATION: Code.NEVER_HAPPENED}, id="it only trains"),
        pytest.param(case(without=("metric-tried", "evaluated")), {EVALUATION: Code.NOT_ASKED_FOR}, id="no metric"),
        pytest.param(
            case(without=(*STEPS, *TRAINING, *TIMING, "done")),
            dict.fromkeys((SYNCHRONISED, QUEUED, EVALUATION), Code.NOT_REACHED),
            id="it died in its first steps",
        ),
        pytest.param(
            case(without=("evaluated", *TIMING, "done")), {EVALUATION: Code.NOT_REACHED}, id="it died in evaluation"
        ),
        pytest.param(
            case(late=["steps-synchronised"], steps_synchronised=1200.0),
            {SYNCHRONISED: Code.DRIVER_SILENT, QUEUED: Code.DRIVER_SILENT, EVALUATION: Code.NEVER_HAPPENED},
            id="the driver was late",
        ),
        pytest.param(
            case(without=(*STEPS, "metric-tried", "evaluated")),
            dict.fromkeys((SYNCHRONISED, QUEUED, EVALUATION), Code.NOT_REACHED),
            id="it is older than these phases",
        ),
    ],
)
def test_a_peak_without_its_phases_has_a_reason(samples, codes):
    found = memory_columns(samples)
    assert {
        name: found.unavailable[name].code for name in (SYNCHRONISED, QUEUED, EVALUATION) if name not in found.values
    } == codes
    assert found.values[PROCESS] == max(row.process_memory_mib or 0.0 for row in samples.rows)


def test_a_late_sample_between_equal_ones_is_as_good_as_one_in_time():
    found = memory_columns(case(late=["steps-synchronised", "trained"], steps_queued=1900.0))
    assert (found.values[SYNCHRONISED], found.values[QUEUED]) == (1000.0, 1900.0)


@pytest.mark.parametrize(
    ("used", "allocator", "cause"),
    [
        pytest.param({}, AllocatorFacts(450.0, 450.0, "cuda_malloc_async"), Code.NEVER_HAPPENED, id="all but 5 %"),
        pytest.param({}, AllocatorFacts(300.0, 300.0, "cuda_malloc_async"), "first-step", id="the first step's"),
        pytest.param({}, AllocatorFacts(300.0, 300.0, "bfc"), "pool", id="a pool's"),
        pytest.param(
            {"steps_queued": 2000.0}, AllocatorFacts(450.0, 450.0, "cuda_malloc_async"), "queued-steps", id="a queue's"
        ),
        pytest.param(
            {"steps_queued": 2000.0}, AllocatorFacts(1450.0, 450.0, "cuda_malloc_async"), Code.NEVER_HAPPENED,
            id="a queue that the allocator sees",
        ),
        pytest.param(
            {"steps_synchronised": 1500.0}, AllocatorFacts(450.0, 450.0, "cuda_malloc_async"), "unclear", id="nobody's"
        ),
        pytest.param({}, AllocatorFacts(), Code.NOT_TOLD, id="unknown"),
    ],
)  # fmt: skip
def test_memory_that_nothing_explains_has_a_likely_cause(used, allocator, cause):
    found = memory_columns(case(**used), allocator)
    assert found.values.get(CAUSE) or found.unavailable[CAUSE].code == cause
    assert CAUSE in found.unavailable or found.values[CAUSE] == cause


def test_the_profiler_is_not_part_of_the_whole():
    taken = case(done=3000.0)
    taken.rows.insert(-1, replace(taken.rows[-1], phase="profiled", time_s=9.5))
    assert memory_columns(taken).values[PROCESS] == 1000.0


def test_the_stand_in_driver_fills_every_stage(gpu_case):
    gpu = gpu_case()
    worker = WorkerFacts(AllocatorFacts(500.0, 500.0, "cuda_malloc_async"), energy_off=ENERGY_OFF)
    steps = {
        Phase.COMPILED: lambda: gpu.uses(900),
        Phase.STEPS_SYNCHRONISED: lambda: gpu.uses(1000),
        Phase.STEPS_QUEUED: lambda: gpu.uses(1800),
        Phase.METRIC_TRIED: lambda: gpu.uses(2500),
    }
    found = gpu.run(lambda: gpu.uses(400), steps=steps, worker=worker).findings.values
    assert [found[name] for name in (SYNCHRONISED, QUEUED, EVALUATION, PROCESS)] == [1000.0, 1800.0, 2500.0, 2500.0]
    assert (found[UNEXPLAINED], found[CAUSE]) == (1600.0, "queued-steps")


def recorded(name, **phases):
    """Samples of an NVIDIA H200, driver 580.159.04, thinned out, with phases set to the sample at a time.

    They are older than these phases, which stand where the power and utilisation of the GPU show that they would have
    been reached. All values are as they were recorded.
    """
    taken = kept_samples(DATA / f"h200-{name}.jsonl.gz")
    at = {time_s: phase.replace("_", "-") for phase, time_s in phases.items()}
    rows = [replace(row, phase=at.get(row.time_s, row.phase)) for row in taken.rows]
    assert set(at.values()) <= {row.phase for row in rows}
    return replace(taken, rows=rows)


def test_queued_steps_of_an_encoder_are_told_apart():
    """Encoder of 6 layers, batch 64, fp32, XLA: the second step was queued before the first had returned its buffer."""
    marks = {"steps_synchronised": 29.942, "steps_queued": 29.952, "metric_tried": 30.358, "trained": 50.77}
    taken = recorded("encoder-fp32", **marks, evaluated=55.105)
    found = memory_columns(taken, AllocatorFacts(10378.164, 10378.164, "cuda_malloc_async"))
    assert [found.values[name] for name in (SYNCHRONISED, QUEUED, PROCESS)] == [12356.0, 20580.0, 20580.0]
    assert found.unavailable[EVALUATION].code is Code.NEVER_HAPPENED
    assert found.values[UNEXPLAINED] == pytest.approx(9649.8, abs=0.1)
    assert found.values[CAUSE] == "queued-steps"


def test_evaluation_of_a_resnet_is_told_apart():
    """ResNet-50, batch 128, tf32, without XLA, evaluated in batches of 256.

    The search for the fastest convolutions in the first step had taken 16,586 MiB, and evaluation needed 8 more.
    """
    marks = {"steps_synchronised": 30.192, "steps_queued": 30.811, "metric_tried": 31.122, "trained": 32.372}
    taken = recorded("resnet50-tf32", **marks, evaluated=34.615)
    found = memory_columns(taken, AllocatorFacts(15816.886, 15816.886, "cuda_malloc_async"))
    assert [found.values[name] for name in (SYNCHRONISED, QUEUED, EVALUATION)] == [16586.0, 16586.0, 16594.0]
    assert found.values["gpu_memory_context_mib"] == 552.0
    assert found.unavailable[CAUSE].code is Code.NEVER_HAPPENED
