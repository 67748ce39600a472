"""The profile at the end of a case, and what a case reports about its timed blocks."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from support.one_case import blobs, dense, split, train, workload
from tensorflow.tsl.profiler.protobuf.xplane_pb2 import XSpace

from mpscale.core.blocks import FASTER, SLOWER
from mpscale.core.reason import Code, Reason
from mpscale.worker import times
from mpscale.worker.device_time import first_gpu
from mpscale.worker.timing import Timing

PROFILE = Path(__file__).parents[1] / "data" / "xspace" / "mnist1d-cnn--mixed-dynamic--jit-on--3.xplane.pb.gz"
KERNELS_MS = 0.3967
BUSY = ("device_busy_ms_per_step", "device_busy_share")


def timed(timing_s=0.05):
    return train(workload(dense(), lambda: split(*blobs())), "mixed-dynamic", timing_s=timing_s, timing_blocks=10)


@pytest.fixture
def on_an_h200(monkeypatch):
    """Profiles are those of an H200; real steps run meanwhile, and their numbers are listed."""

    def profile_steps(run_steps, steps, device):
        found.append(steps)
        run_steps()
        return first_gpu(XSpace.FromString(gzip.decompress(PROFILE.read_bytes())), steps)

    found: list[int] = []
    monkeypatch.setattr(times, "profile_steps", profile_steps)
    return found


def test_steps_are_profiled_after_everything_that_is_timed(on_an_h200):
    found = timed()
    (steps,) = on_an_h200
    step_ms = found.row["step_time_ms_median"]
    assert steps == min(max(round(200 / step_ms), 3), 50)
    assert found.row["device_busy_ms_per_step"] == pytest.approx(KERNELS_MS / steps)
    assert found.row["device_busy_share"] == pytest.approx(KERNELS_MS / steps / step_ms)
    assert found.phases[found.phases.index("timing-end") :] == ["timing-end", "profiled", "done"]


def test_a_share_that_cannot_be_leaves_the_time(on_an_h200, monkeypatch):
    in_a_microsecond = Timing(np.full(10, 1e-6), 1, 0)
    monkeypatch.setattr(times, "time_steps", lambda *_: in_a_microsecond)
    found = timed()
    assert on_an_h200 == [50]
    assert found.row["device_busy_ms_per_step"] == pytest.approx(KERNELS_MS / 50)
    assert found.missed["device_busy_share"].code is Code.IMPLAUSIBLE


def test_the_profiler_may_fail(monkeypatch):
    silent = Reason(Code.PROFILER_SILENT, "no CUPTI")
    monkeypatch.setattr(times, "profile_steps", lambda *_: silent)
    found = timed()
    assert (found.status, [found.missed[name] for name in BUSY]) == ("ok", [silent, silent])


def test_a_cpu_has_reasons_and_takes_no_more_steps():
    found = timed()
    assert {found.missed[name].code for name in BUSY} == {Code.NO_GPU}
    # Ten or more blocks: either there are two groups of them, or there is a reason.
    assert all((name in found.row) != (name in found.missed) for name in (FASTER, SLOWER))


def test_nothing_is_profiled_without_timing(on_an_h200):
    assert "profiled" not in timed(timing_s=0.0).phases
    assert on_an_h200 == []


def test_a_case_knows_its_flops_and_how_fast_they_are_computed(on_an_h200):
    found = train(workload(dense(), lambda: split(*blobs())), "fp32", timing_s=0.05, timing_blocks=10)
    (steps,) = on_an_h200
    # 2 to 8 to 3, 20 examples; nothing needs the gradient of the first layer's inputs.
    flops = 2 * 20 * (2 * 2 * 8 + 3 * 8 * 3)
    assert found.row["flops_per_step"] == flops
    assert found.row["tflops"] == pytest.approx(flops / found.row["step_time_ms_median"] / 1e9)
    assert found.row["tflops_while_busy"] == pytest.approx(flops / (KERNELS_MS / steps) / 1e9)
    assert {found.missed[name].code for name in ("tflops_peak", "peak_share")} == {Code.NO_GPU}
