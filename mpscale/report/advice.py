"""What to do after a run: lines of code that use the advised mode, or the command that measures better."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mpscale.analysis.answer import Advice, Answer, Weakness, Worth
from mpscale.analysis.summary import Row
from mpscale.core.case import scale_text
from mpscale.core.invocation import SCRIPT, Invocation, command_with, for_reader
from mpscale.core.loss_scale import DynamicLossScale
from mpscale.core.mode import MODES, Mode
from mpscale.core.record import place_of
from mpscale.core.runs import Run
from mpscale.report.table import plural

_MEASURE = "mpscale run"
_LARGER = "take a larger batch or several steps per call"
_STEPS_PER_CALL, _MORE = 20, 5
"""What to measure with: steps per call of the compiled program, and seeds or processes if there were fewer."""

_NOT_BY_MORE = {Weakness.INCOMPLETE, Weakness.UNCLEAR_METRIC, Weakness.UNCOMPARED}
"""What more processes do not mend."""


def code_of(answer: Answer, run: Run) -> tuple[str, str]:
    """Return lines that follow the advice, and their language: ``python``, ``sh`` or nothing."""
    if answer.mode is None:
        options = list(_options(answer, run)) if answer.advice is Advice.MEASURE else []
        if not options:
            return "", ""
        started = Invocation.of(run.info)
        if started is not None and started.program == SCRIPT:
            return f"{SCRIPT}(..., {', '.join(for_reader(option, run.info) for option in options)})", "python"
        words = " ".join(options).split()
        return command_with(run, words) or " ".join([_MEASURE, *words]), "sh"
    rows = [cells[answer.mode].row for cells in answer.cells.values() if answer.mode in cells]
    rows = [row for row in rows if not answer.choices or place_of(row)[0] in answer.choices]
    mode = MODES.get(rows[0]["mode"])
    if mode is None:
        return "", ""
    jits = {row["jit"] for row in rows}
    settings = [_settings(run, row) for row in rows]
    intervals = sorted({_interval(each) for each in settings} - {None}, key=int) if mode.scaling else []
    if len(intervals) > 1:
        # They follow the lengths of these trainings, so none of them is right for another.
        settings = [{**each, "dynamic_scale": _without_interval(each["dynamic_scale"])} for each in settings]
    found = {
        _wrapped(mode, each, row["swept_scale"]): row["workload"] for each, row in zip(settings, rows, strict=True)
    }
    lines = _python(mode, next(iter(found)), jits.pop() if len(jits) == 1 else None)
    if len(intervals) > 1:
        each = ", ".join(f"{interval:g}" for interval in intervals)
        lines = f"# growth intervals here: {each} steps;\n# 2000 is usual for long trainings\n{lines}"
    if len(found) > 1:
        # The code would be wrong for the others if it did not say so.
        shown, *others = found.values()
        lines = f"# as measured on {shown!r}; {plural(len(others), 'other setting')} elsewhere\n{lines}"
    if any(_unknown(mode, _settings(run, row), row["swept_scale"]) for row in rows):
        lines = f"# settings not known: these are defaults\n{lines}"
    return lines, "python"


def _settings(run: Run, row: Row) -> dict[str, Any]:
    """The loss scales of a workload: those of the run and what is set apart for it, as far as they are valid.

    Anything else in a run.json of unknown origin would be copied into code that people run.
    """
    own = _mapping(_mapping(_of_run(run).get("set_apart")).get(row["workload"]))
    settings = {**_of_run(run), **own}
    known: dict[str, Any] = {}
    # A constant scale is known from the training, too.
    for constant in (settings.get("static_scale"), row["loss_scale_final"]):
        if _is_number(constant):
            known.setdefault("static_scale", constant)
    dynamic, names = settings.get("dynamic_scale"), DynamicLossScale.__dataclass_fields__
    if isinstance(dynamic, Mapping) and all(name in names and _is_number(value) for name, value in dynamic.items()):
        known["dynamic_scale"] = dynamic
    return known


def _of_run(run: Run) -> Mapping[str, Any]:
    return _mapping(run.info.get("settings"))


def _interval(settings: Mapping[str, Any]) -> Any:
    return _mapping(settings.get("dynamic_scale")).get("growth_interval")


def _without_interval(chosen: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in chosen.items() if name != "growth_interval"}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _unknown(mode: Mode, settings: Mapping[str, Any], scale: float | None) -> bool:
    setting = mode.scaling.setting if mode.scaling is not None else None
    return setting is not None and setting not in settings and scale is None


def _python(mode: Mode, wrapped: str | None, jit: bool | None) -> str:
    """Return the lines that train a Keras model in a mode.

    Args:
        mode: the mode.
        wrapped: the optimizer with its loss scale; None for the bare optimizer.
        jit: whether steps were compiled with XLA; None if that is unknown or differs.
    """
    lines = ["import keras", f'keras.config.set_dtype_policy("{mode.policy}")', "model = build()"]
    if mode.graph_rewrite:
        lines[:2] = [
            "import tensorflow as tf",
            'tf.config.optimizer.set_experimental_options({"auto_mixed_precision": True})',
        ]
    if mode.float8:
        lines += [
            "kinds = (keras.layers.Dense, keras.layers.EinsumDense)",
            "for layer in model.layers:",
            "    if isinstance(layer, kinds):",
            '        layer.quantize("float8")',
        ]
    if wrapped is not None:
        lines[1:1] = ["import mpscale"] if wrapped.startswith("mpscale") else []
        lines.append(f"optimizer = {wrapped}")
    compiled = "" if jit is None else f", jit_compile={jit}"
    return "\n".join([*lines, f"model.compile(optimizer, loss{compiled})"])


def _wrapped(mode: Mode, settings: Mapping[str, Any], scale: float | None) -> str | None:
    """Return the optimizer with its loss scale; None for the bare one, which Keras wraps in float16 by itself.

    Args:
        mode: the mode.
        settings: of the workload.
        scale: the constant loss scale of the row, in a sweep.
    """
    if mode.scaling is None:
        return None
    chosen = settings.get("dynamic_scale") or {}
    match mode.scaling.rule:
        case "static":
            constant = scale if scale is not None else settings.get("static_scale")
            rule = f"StaticLossScale({'' if constant is None else scale_text(constant).replace('^', '**')})"
        case "dynamic":
            rule = f"DynamicLossScale({_arguments(chosen)})"
        case "logmax":
            rule = "scaling.LogMaxLossScale()"
        case "keras":
            names = {"initial": "initial_scale", "growth_interval": "dynamic_growth_steps"}
            taken = _arguments({names[name]: chosen[name] for name in names if name in chosen})
            return f"keras.optimizers.LossScaleOptimizer(\n    optimizer,\n    {taken},\n)" if taken else None
        case _:
            return None
    return f"mpscale.LossScaleOptimizer(\n    optimizer,\n    mpscale.{rule},\n)"


def _arguments(chosen: Mapping[str, float]) -> str:
    """Write numbers in full: rounded ones would be another setting, and a whole number may have to be an int."""
    return ", ".join(f"{name}={int(value) if value == int(value) else value!r}" for name, value in chosen.items())


def measure_again(answer: Answer) -> str:
    """Return what to change about the measurement, in a sentence."""
    cures = {
        Weakness.NO_BASELINE: "run fp32 beside the modes",
        Weakness.UNCOMPARED: "train with a metric, in fp32 too",
        Weakness.BASELINE_OOM: "take a smaller batch, at which fp32 fits into memory",
        Weakness.BASELINE_FAILED: "make fp32 end well",
        Weakness.UNTIMED: "make all modes end well, and time them",
        Weakness.DISPATCH: _LARGER,
        Weakness.IDLE: _LARGER,
        Weakness.INCOMPLETE: "make all seeds end well",
        Weakness.UNCLEAR_METRIC: "state the margin and the direction of each metric",
        Weakness.UNJUDGED: "train more seeds",
        Weakness.ONE_PROCESS: "run more processes",
        Weakness.BUSY: "wait until the machine is idle",
    }
    there = set(answer.weaknesses)
    if Weakness.UNJUDGED in there:
        there.discard(Weakness.ONE_PROCESS)  # more seeds are more processes
    if there & {Weakness.BASELINE_OOM, Weakness.BASELINE_FAILED, Weakness.UNTIMED}:
        there.discard(Weakness.INCOMPLETE)  # the same seeds
    if Weakness.BASELINE_OOM in there:
        there -= {Weakness.DISPATCH, Weakness.IDLE}  # a larger batch is no cure
    if not answer.serious:
        return "Measure again, with fp32 and a mixed mode that runs here."
    found = list(dict.fromkeys(cure for weakness, cure in cures.items() if weakness in there))
    if answer.worth is Worth.NOT_SHOWN and not found:
        found.append("run more processes, which makes the intervals narrower")
    return (
        f"Measure again: {'; '.join(found)}." if found else "Measure again, with fp32 and a mixed mode that ends well."
    )


def _options(answer: Answer, run: Run) -> Iterator[str]:
    """Yield pytest's options that remove weaknesses."""
    there, rows = answer.weaknesses.keys(), [cell.row for cell in answer.serious]
    baselines = {row["mode"] for row in answer.baselines.values() if row is not None}
    if not rows or Weakness.NO_BASELINE in there or (Weakness.UNCOMPARED in there and "fp32" not in baselines):
        modes = ({row["mode"] for row in rows} or {"mixed-dynamic", "mixed-bf16"}) | baselines
        yield f"--mp-modes {','.join(name for name in MODES if name in modes | {'fp32'})}"
    calls = _of_run(run).get("steps_per_call")
    few = not (isinstance(calls, int) and calls >= _STEPS_PER_CALL)
    # A step of a pipeline takes one batch.
    piped = any(record["input_kind"] not in (None, "arrays") for record in run.records)
    if there & {Weakness.IDLE, Weakness.DISPATCH} and few and not piped:
        yield f"--mp-steps-per-call {_STEPS_PER_CALL}"
    if Weakness.UNJUDGED in there:
        seeds = max(row["seeds_planned"] for row in rows)
        needed = max((row["metric_seeds_needed"] or 0 for row in rows), default=0)
        yield f"--mp-seeds {max(_MORE, needed) if seeds < max(_MORE, needed) else 2 * seeds}"
    elif Weakness.ONE_PROCESS in there or (answer.worth is Worth.NOT_SHOWN and not there & _NOT_BY_MORE):
        processes = max((row["processes"] for row in rows), default=0)
        yield f"--mp-repeats {_MORE if processes < _MORE else 2 * processes}"
