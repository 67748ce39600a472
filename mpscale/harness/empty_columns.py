"""Why a column of a finished case is empty."""

from __future__ import annotations

from mpscale.core.case import Case
from mpscale.core.columns import Topic, measured_columns
from mpscale.core.mode import MODES
from mpscale.core.reason import Code, Reason
from mpscale.core.record import Record

_TRAINING = (*measured_columns(Topic.TRAINING), "metric_value", "final_accuracy", "published_metric_value")
_UNTIMED = ("build_time_s", "trace_time_s", "first_step_s", "first_call_s")
_FROM_TIMES = ("tflops", "tflops_while_busy", "peak_share", "peak_share_while_busy")
_TIMING = (*(name for name in measured_columns(Topic.STEP_TIME) if name not in _UNTIMED), *_FROM_TIMES)
_LOSS_SCALE = tuple(name for name in _TRAINING if name.startswith("loss_scale_"))
_OVERFLOW = (
    "applied_steps",
    "skipped_steps",
    "overflow_steps",
    "longest_skip_run",
    "first_overflow_step",
    "last_overflow_step",
    "timed_overflow_steps",
    "step_time_ms_per_applied",
)
_MAY_BE_INFINITE = ("train_loss_first", "train_loss_final", "loss_scale_final", "loss_scale_max")


def explain(record: Record, case: Case) -> None:
    """Give every empty measured column of a finished case a reason; that need not be a failure."""
    mode = MODES[case.mode]
    if record["status"] == "unsupported":
        record.complete(Reason(Code.UNSUPPORTED, str(record["status_reason"])))
        return
    if not case.trains:
        record.miss(_TRAINING, Reason(Code.NOT_ASKED_FOR, "timing-only process"))
    if case.settings.timing_s == 0:
        record.miss(_TIMING, Reason(Code.NOT_ASKED_FOR, "timing was off"))
    if not mode.float8:
        record.miss("float8_tensors", Reason(Code.NOT_IN_MODE, f"{mode.name} does not compute in float8"))
    if mode.scaling is None:
        record.miss(_LOSS_SCALE, Reason(Code.NOT_IN_MODE, f"{mode.name} has no loss scale"))
    if mode.growth_interval(case.settings) is None:
        why = Reason(Code.NOT_IN_MODE, f"{mode.name} has no loss scale that grows after some steps without overflow")
        record.miss(("growth_interval",), why)
    if not mode.sees_overflow:
        record.miss(_OVERFLOW, Reason(Code.NOT_IN_MODE, f"{mode.name} checks no gradient"))
    elif record["overflow_steps"] == 0:
        never = Reason(Code.NEVER_HAPPENED, "no step overflowed")
        record.miss(("first_overflow_step", "last_overflow_step"), never)
    if record["attempted_steps"] is not None:
        record.miss(_MAY_BE_INFINITE, Reason(Code.NOT_FINITE, "not finite"))
    if record["timed_steps"] is not None:
        record.miss("step_time_ms_per_applied", Reason(Code.NEVER_HAPPENED, "no timed step was applied"))
    record.complete(Reason(Code.NOT_REACHED, f"the case ended before that ({record['status']})"))
