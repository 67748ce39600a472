"""Why a column is empty although nothing went wrong: the mode has no such thing, or it was not asked for."""

from __future__ import annotations

from mpscale.columns import SECTIONS
from mpscale.harness.case import Case
from mpscale.modes import MODES
from mpscale.records import Record

_BY_TITLE = {section.title: tuple(c.name for c in section.columns if c.measured) for section in SECTIONS}
_TRAINING = (*_BY_TITLE["Training"], "metric_value", "final_accuracy", "published_metric_value")
_TIMING = tuple(name for name in _BY_TITLE["Step time"] if name not in ("build_time_s", "trace_time_s", "first_step_s"))
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


def explain(record: Record, case: Case) -> None:
    """Gives every empty measured column of a finished case its reason."""
    mode = MODES[case.mode]
    if record["status"] == "unsupported":
        record.complete(str(record["status_reason"]))
        return
    if not case.trains:
        record.miss(_TRAINING, "timing-only process")
    if case.settings.timing_s == 0:
        record.miss(_TIMING, "timing was off")
    if mode.scaling == "none":
        record.miss(_LOSS_SCALE, f"{mode.name} has no loss scale")
    if not mode.sees_overflow:
        record.miss(_OVERFLOW, f"{mode.name} checks no gradient")
    elif record["overflow_steps"] == 0:
        record.miss(("first_overflow_step", "last_overflow_step"), "no step overflowed")
    if record["attempted_steps"] is not None:
        record.miss(("train_loss_first", "train_loss_final", "loss_scale_final", "loss_scale_max"), "not finite")
    if record["timed_steps"] is not None:
        record.miss("step_time_ms_per_applied", "no timed step was applied")
    record.complete(f"the case ended before that ({record['status']})")
