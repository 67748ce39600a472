"""The search for the largest batch, with devices that are functions; and what the end of a case says of its batch."""

from __future__ import annotations

import contextlib

import pytest
from support.runfolder import record

from mpscale.analysis.fit import Fit, Verdict, figures
from mpscale.core.cause import Cause
from mpscale.core.device import Device
from mpscale.core.reason import Code, Reason
from mpscale.harness.fit import Fitter, Question, judge, search
from mpscale.harness.supervisor import Outcome
from mpscale.report.document import render as as_markdown
from mpscale.report.fit import document

FULL = Verdict.OUT_OF_MEMORY, Reason(Code.OUT_OF_MEMORY, "full")
BROKEN = Verdict.FAILED, Reason(Code.OTHER, "broken")
GOOD = Verdict.FITS, None


def device(limit, broken=(), full=()):
    def tries(batch):
        if batch in broken:
            return BROKEN
        return FULL if batch > limit or batch in full else GOOD

    return tries


@pytest.mark.parametrize(
    ("tries", "start", "most", "expected", "end"),
    [
        (device(1000), 100, 2**20, [64, 128, 256, 512, 1024, 768, 896, 960], None),
        (device(1024), 64, 2**20, [64, 128, 256, 512, 1024, 2048, 1536, 1280, 1152], None),
        (device(5), 64, 2**20, [64, 32, 16, 8, 4, 6, 5], None),
        (device(1), 4, 2**20, [4, 2, 1], None),
        (device(0), 4, 2**20, [4, 2, 1], Code.OUT_OF_MEMORY),
        (device(10**9), 64, 300, [64, 128, 256, 300], Code.NOT_ASKED_FOR),
        (device(10**9), 64, 48, [32, 48], Code.NOT_ASKED_FOR),
        (device(1450), 1024, 1500, [1024, 1500, 1152, 1280, 1408], None),
        (device(10**9, broken=[256]), 64, 2**20, [64, 128, 256], Code.OTHER),
        (device(1000, broken=[768]), 512, 2**20, [512, 1024, 768], Code.OTHER),
        (device(1000, broken=[64]), 64, 2**20, [64], Code.OTHER),
        # Not monotone: 128 runs out, though 256 would fit.
        (device(1000, full=[128]), 64, 2**20, [64, 128, 96, 112, 120], None),
    ],
)
def test_powers_of_two_come_first_and_then_eighths(tries, start, most, expected, end):
    tried = []

    def noted(batch):
        tried.append(batch)
        return tries(batch)

    why = search(noted, start, most)
    assert tried == expected
    assert (why and why.code) == end


@pytest.mark.parametrize(
    ("status", "reason", "tail", "trained", "verdict"),
    [
        ("ok", None, None, False, Verdict.FITS),
        ("oom", "ResourceExhaustedError: OOM", None, False, Verdict.OUT_OF_MEMORY),
        ("crashed", "killed by SIGKILL", None, False, Verdict.FAILED),
        ("crashed", "killed by SIGABRT", "terminate: std::bad_alloc", False, Verdict.OUT_OF_MEMORY),
        ("crashed", "killed by SIGSEGV", "CUDA_ERROR_OUT_OF_MEMORY", False, Verdict.OUT_OF_MEMORY),
        ("error", "InternalError: CUBLAS_STATUS_NOT_INITIALIZED", None, True, Verdict.OUT_OF_MEMORY),
        ("error", "InternalError: CUBLAS_STATUS_NOT_INITIALIZED", None, False, Verdict.FAILED),
        ("crashed", "killed by SIGSEGV", "Segmentation fault", True, Verdict.FAILED),
        ("timeout", "not finished after 9 s", "out of memory", True, Verdict.FAILED),
        ("unsupported", "needs a GPU", None, False, Verdict.FAILED),
    ],
)
def test_the_end_of_a_case_tells_lack_of_memory_from_other_failures(status, reason, tail, trained, verdict):
    outcome = Outcome(record(status=status, status_reason=reason, output_tail=tail))
    assert judge(outcome, trained)[0] is verdict


class Machine:
    """Runs cases without processes. ``limits`` is the largest batch of each mode, ``refused`` the mode that XLA is."""

    def __init__(self, limits, stop_at=None, refused=None):
        self._limits, self._stop_at, self._refused, self.closed = limits, stop_at, refused, False

    def run(self, case, steps_path, gpu_path, outcome, attempt=1):
        batch = case.settings.batch_size
        if (case.mode, batch) == self._stop_at:
            raise KeyboardInterrupt
        assert case.settings.repeat_data
        if case.settings.jit and case.mode == self._refused:
            outcome.record.end("error", "XLA cannot compile Lu", Cause.XLA_REFUSED)
            outcome.record.update({"xla_refused": "Lu"})
            return
        outcome.record.update({"jit": case.settings.jit})
        fits = batch <= self._limits[case.mode]
        outcome.record.update({"status": "ok" if fits else "oom", "status_reason": None if fits else "full"})
        if fits:
            ms = batch / (200.0 if case.mode == "fp32" else 300.0)
            outcome.record.update({"step_time_ms_median": ms, "examples_per_s": batch / ms * 1e3})
            outcome.record.update({"host_memory_peak_mib": 500.0 + batch})

    def close(self):
        self.closed = True


def run(machine, modes):
    fit, lines = Fit("toy", modes, Device("cpu", "Test CPU"), 2000.0), []
    with contextlib.suppress(KeyboardInterrupt):
        Fitter(fit, Question(64, 2**20), machine, lines.append).run()
    assert machine.closed
    assert lines == fit.tries
    return fit


def test_a_mode_begins_where_the_one_before_it_ended():
    fit = run(Machine({"fp32": 1000, "mixed-bf16": 2000}), ["fp32", "mixed-bf16"])
    assert [each.batch for each in fit.tries if each.mode == "mixed-bf16"] == [512, 1024, 2048, 1536, 1792, 1920]
    assert figures(fit, "fp32").values == {
        "largest_batch": 960, "ran_out_at": 1024, "step_time_ms": 4.8, "examples_per_s": pytest.approx(200e3),
        "peak_memory_mib": 1460.0, "batch_ratio": 1.0, "examples_per_s_ratio": 1.0,
    }  # fmt: skip
    bf16 = figures(fit, "mixed-bf16").values
    assert (bf16["batch_ratio"], bf16["examples_per_s_ratio"]) == (2.0, pytest.approx(1.5))


def test_an_interrupted_search_keeps_what_it_has():
    machine = Machine({"fp32": 1000, "mixed-bf16": 2000}, stop_at=("mixed-bf16", 2048))
    fit = run(machine, ["fp32", "mixed-bf16", "mixed-static"])
    assert figures(fit, "fp32").values["largest_batch"] == 960
    stopped = figures(fit, "mixed-bf16")
    assert stopped.values["largest_batch"] == 1024
    assert {stopped.unavailable[name].code for name in ("ran_out_at", "batch_ratio")} == {Code.NOT_REACHED}
    assert figures(fit, "mixed-static").values == {}


@pytest.mark.parametrize("refused", ["fp32", "mixed-bf16"])
def test_if_xla_refuses_one_mode_all_are_searched_without_it(refused):
    fit, said = Fit("toy", ["fp32", "mixed-bf16"], Device("cpu", "Test CPU"), 2000.0), []
    machine = Machine({"fp32": 1000, "mixed-bf16": 2000}, refused=refused)
    Fitter(fit, Question(64, 2**20), machine, lambda each: None, said.append).run()
    assert (machine.closed, said, fit.xla_refused) == (True, ["Lu"], "Lu")
    assert {each.record["jit"] for each in fit.tries} == {False}
    assert {each.record["xla_refused"] for each in fit.tries} == {"Lu"}
    assert [fit.largest(mode).batch for mode in fit.modes] == [960, 1920]
    assert "because it cannot compile Lu" in as_markdown(document(fit, {}))


def test_with_xla_demanded_a_refusal_is_the_end_of_its_mode():
    fit = run(Machine({"fp32": 1000, "mixed-bf16": 2000}, refused="mixed-bf16"), ["fp32", "mixed-bf16"])
    assert fit.largest("fp32").batch == 960
    assert "--jit auto" in str(fit.why_open("mixed-bf16"))
