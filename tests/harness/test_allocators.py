"""When a worker's failure is blamed on TensorFlow's allocator, and another one is tried."""

from __future__ import annotations

import pytest

from mpscale.core.cause import Cause
from mpscale.core.device import STAND_IN, Device
from mpscale.core.reason import Code, Reason
from mpscale.core.record import Record
from mpscale.harness.supervisor import Options, Outcome, Supervisor
from mpscale.telemetry.client import NoDriver

GPU = Device("gpu", f"{STAND_IN} A100", "GPU-0", (8, 0), 40_960.0)


@pytest.fixture
def supervisor(tmp_path, monkeypatch):
    """Make supervisors that never start a process."""
    made = []
    monkeypatch.delenv("TF_GPU_ALLOCATOR", raising=False)

    def make(allocator="auto"):
        options = Options(tmp_path, tmp_path, "fresh", 1.0, asked={}, gpu_allocator=allocator)
        made.append(Supervisor(GPU, NoDriver(Reason(Code.NO_GPU, "no driver")), options, lambda *_: None))
        return made[-1]

    yield make
    for each in made:
        each.close()


def ended(status="crashed", cause=None, phase="idle"):
    record = Record({"workload": "toy", "mode": "fp32", "seed": 0, "repeat": 0})
    record.end(status, "it failed", cause)
    phases = {"idle": 1.0} if phase == "idle" else {"idle": 1.0, phase: 2.0} if phase else {}
    return Outcome(record, phases=phases)


def judged(supervisor, *outcomes):
    """For cases that end like this: why each is tried again, if it is, and the allocator after it."""
    found = []
    for outcome in outcomes:
        supervisor._judge_allocator(outcome)
        found.append((outcome.again, supervisor.allocator))
    return found


KEPT = (None, "cuda_malloc_async")


@pytest.mark.parametrize(
    "outcome",
    [
        pytest.param(ended("oom", Cause.OOM_KILLER), id="the kernel's out-of-memory killer"),
        pytest.param(ended(cause=Cause.KILLED), id="a batch system, or a person at the terminal"),
        pytest.param(ended(cause=Cause.LIMIT), id="a CPU time limit"),
        pytest.param(ended("oom", Cause.OUT_OF_MEMORY), id="memory held by others"),
        pytest.param(ended("timeout", Cause.TIMEOUT), id="the clock"),
        pytest.param(ended("interrupted", Cause.STOPPED), id="the user's interrupt"),
        pytest.param(ended(cause=Cause.GPU_LOST), id="a lost GPU"),
        pytest.param(ended("error", Cause.GARBLED), id="junk on its connection"),
        pytest.param(ended("error", Cause.EXCEPTION, phase=None), id="before touching the GPU"),
        pytest.param(ended("error", Cause.EXCEPTION, phase="context-ready"), id="after touching the GPU"),
    ],
)
def test_failures_that_are_not_blamed_on_the_allocator(supervisor, outcome):
    assert judged(supervisor(), outcome, outcome, outcome) == [KEPT] * 3


@pytest.mark.parametrize(
    "outcome",
    [
        {"status": "error", "cause": Cause.EXCEPTION},
        {"status": "error", "cause": Cause.EXITED},
        {"cause": Cause.FATAL_SIGNAL},
    ],
    ids=["an exception", "an exit code", "a signal of its own"],
)
def test_own_failure_is_retried_with_the_same_allocator_and_then_with_the_next(supervisor, outcome):
    found = judged(supervisor(), *(ended(**outcome) for _ in range(3)), ended("ok"))
    assert found[:2] == [("touched", "cuda_malloc_async"), ("allocator", "bfc")]
    # It fails with the last one too: no allocator was to blame, and the next case begins with the first.
    assert found[2:] == [KEPT, KEPT]


def test_an_allocator_that_has_worked_is_kept(supervisor):
    worked, failed = ended("ok", phase="context-ready"), [ended("error", Cause.EXCEPTION) for _ in range(3)]
    assert judged(supervisor(), worked, *failed) == [KEPT] * 4
    own = [ended("error", Cause.EXCEPTION) for _ in range(2)]
    later = judged(supervisor(), *own, worked, *failed)
    assert later[2:] == [(None, "bfc")] * 4


def test_a_requested_allocator_is_kept(supervisor):
    assert judged(supervisor("cuda_malloc_async"), *(ended("error", Cause.EXCEPTION) for _ in range(3))) == [KEPT] * 3
