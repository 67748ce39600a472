"""What to do after a run: lines of code that use the advised mode, or the command that measures better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpscale.analysis.answer import Answer, Weakness
from mpscale.core.case import scale_text
from mpscale.core.mode import MODES, Mode
from mpscale.core.runs import Run

_MEASURE = "pytest bench/ --benchmark-only"


def code_of(answer: Answer, run: Run) -> tuple[str, str]:
    """Return lines that follow the advice, and their language: ``python``, ``sh`` or nothing."""
    if answer.mode is None:
        options = list(_options(answer))
        return (" ".join([_MEASURE, *options]), "sh") if options else ("", "")
    row = next(cells[answer.mode].row for cells in answer.cells.values() if answer.mode in cells)
    mode = MODES.get(row["mode"])
    if mode is None:
        return "", ""
    return _python(mode, run.info.get("settings") or {}, row["swept_scale"], row["jit"]), "python"


def _python(mode: Mode, settings: Mapping[str, Any], scale: float | None, jit: bool | None) -> str:
    """Return the lines that train a Keras model in a mode.

    Args:
        mode: the mode.
        settings: of the run.
        scale: the constant loss scale of the row, in a sweep.
        jit: whether steps were compiled with XLA.
    """
    if mode.graph_rewrite:
        return 'tf.config.optimizer.set_experimental_options({"auto_mixed_precision": True})'
    lines = ["import keras", f'keras.config.set_dtype_policy("{mode.policy}")', "model = build()"]
    if mode.float8:
        lines += [
            "for layer in model.layers:",
            "    if isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense)):",
        ]
        lines += ['        layer.quantize("float8")']
    wrapped = _wrapped(mode, settings, scale)
    if wrapped is not None:
        lines.insert(1, "import mpscale")
        lines += ["optimizer = mpscale.LossScaleOptimizer(", f"    optimizer, {wrapped}", ")"]
    compiled = "" if jit is None else f", jit_compile={jit}"
    return "\n".join([*lines, f"model.compile(optimizer, loss{compiled})"])


def _wrapped(mode: Mode, settings: Mapping[str, Any], scale: float | None) -> str | None:
    """Return the loss scale of mpscale's optimizer; None for a mode that does not use it."""
    if mode.scaling is None:
        return None
    match mode.scaling.rule:
        case "static":
            constant = scale if scale is not None else settings.get("static_scale")
            return f"mpscale.StaticLossScale({'' if constant is None else scale_text(constant).replace('^', '**')})"
        case "dynamic":
            chosen = settings.get("dynamic_scale") or {}
            return f"mpscale.DynamicLossScale({', '.join(f'{name}={value:g}' for name, value in chosen.items())})"
        case "logmax":
            return "mpscale.scaling.LogMaxLossScale()"
    return None


def measure_again(answer: Answer) -> str:
    """Return what to change about the measurement, in a sentence or two."""
    cures = {
        Weakness.NO_BASELINE: "run fp32 beside the modes",
        Weakness.DISPATCH: "take a larger batch, or several steps per call",
        Weakness.IDLE: "take a larger batch, or several steps per call",
        Weakness.UNJUDGED: "train more seeds",
        Weakness.ONE_PROCESS: "run more processes",
        Weakness.BUSY: "wait until the machine is idle",
    }
    there = set(answer.weaknesses)
    if Weakness.UNJUDGED in there:
        there.discard(Weakness.ONE_PROCESS)  # more seeds are more processes
    found = list(dict.fromkeys(cure for weakness, cure in cures.items() if weakness in there))
    return (
        f"Measure again: {', and '.join(found)}."
        if found
        else "Measure again, with fp32 and a mixed mode that ends well."
    )


def _options(answer: Answer) -> list[str]:
    """Return pytest's options that remove weaknesses."""
    found = []
    if not answer.cells or Weakness.NO_BASELINE in answer.weaknesses:
        modes = {cell.row["mode"] for cell in answer.serious} or {"mixed-dynamic", "mixed-bf16"}
        found.append(f"--mp-modes {','.join(name for name in MODES if name in modes | {'fp32'})}")
    if answer.weaknesses.keys() & {Weakness.IDLE, Weakness.DISPATCH}:
        found.append("--mp-steps-per-call 20")
    if Weakness.UNJUDGED in answer.weaknesses:
        found.append("--mp-seeds 5")
    elif Weakness.ONE_PROCESS in answer.weaknesses:
        found.append("--mp-repeats 5")
    return found
