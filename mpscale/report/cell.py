"""The words of a cell of the verdict matrix: what a mode does for a workload."""

from __future__ import annotations

from mpscale.analysis.answer import Answer, Cell
from mpscale.analysis.claim import Doubt, busy_share
from mpscale.analysis.quantities import Verdict
from mpscale.analysis.summary import Row
from mpscale.report.table import DASH, count, metric, metric_difference, number, plural, share
from mpscale.report.words import WORDS, metric_name


def baseline_line(row: Row | None) -> str:
    """Describe the row that a workload's modes are compared with."""
    if row is None:
        return "no baseline"
    parts = ["no time" if row["step_time_ms"] is None else f"{number(row['step_time_ms'])} ms"]
    if row["metric_mean"] is not None:
        parts.append(f"{metric_label(row)} {metric(row['metric_mean'], row['metric_name'])}")
    parts += [_endings(row)] if _did_not_all_end(row) else []
    return f"{row['mode']}: {', '.join(parts)}"


_SHORT = {
    "mean_absolute_error": "MAE",
    "mae": "MAE",
    "mean_squared_error": "MSE",
    "mse": "MSE",
    "root_mean_squared_error": "RMSE",
    "auc": "AUC",
}
"""Shorter names than those of tables, for the narrow cells of the matrix."""
_WORDS = WORDS | {
    Verdict.CANNOT_TELL: "unclear",
    Verdict.NON_INFERIOR: "as good",
    Verdict.WORSE: "worse",
}
"""Shorter words; the caption says what they refer to."""


def metric_label(row: Row) -> str:
    """The name of a metric as people write it."""
    name = row["metric_name"]
    return _SHORT.get(name) or metric_name(name)


def times(ratio: float) -> str:
    """Write a ratio with two decimals; a very small or large one with three digits, so that it is never 0.00x."""
    return f"{ratio:.2f}x" if 0.1 <= ratio < 1000 else f"{number(ratio)}x"


def ratio_text(cell: Cell) -> str:
    """Write the speed-up; in parentheses if it is no claim."""
    if cell.ratio is None:
        return DASH
    return f"({times(cell.ratio)})" if cell.doubts else times(cell.ratio)


def speed_word(cell: Cell) -> str:
    """Say in a word what the ratio shows."""
    if cell.unsupported:
        return "unsupported"
    if cell.lost and cell.ratio is None and not cell.row["ok"]:
        return "no training ended well"
    if cell.ratio is None:
        return "not compared"
    if cell.doubts:
        return "no claim"
    return "" if cell.speed is None else _WORDS[cell.speed]


def quality_line(cell: Cell) -> str:
    """Say how the metric compares with fp32's."""
    row = cell.row
    if cell.unsupported:
        return ""
    if row["has_metric"] is False and cell.quality is None:
        return "accuracy not measured"
    if row["metric_mean"] is None and cell.quality is None:
        return ""
    difference = metric_difference(row["metric_difference"], None, None, row["metric_name"]).replace("points", "pt")
    label = metric_label(row)
    if cell.quality is None:
        return f"{label} {metric(row['metric_mean'], row['metric_name'])}"
    if row["metric_difference"] is None and row["metric_mean"] is None:
        return f"{label} {'unknown' if cell.quality is Verdict.INCONCLUSIVE else _WORDS[cell.quality]}"
    told = metric(row["metric_mean"], row["metric_name"]) if row["metric_difference"] is None else difference
    return f"{label} {told}, {_WORDS[cell.quality]}"


def overflow_line(cell: Cell) -> str:
    """Count overflow steps, as far as the mode sees them."""
    steps, of = cell.row["overflow_steps"], cell.row["attempted_steps"]
    return "" if steps is None or of is None else f"overflow {count(steps)}/{count(of)}"


def memory_line(cell: Cell) -> str:
    """Compare the peak memory of the GPU with fp32's."""
    ratio = cell.row["gpu_memory_ratio"]
    return "" if ratio is None else f"memory {times(ratio)}"


def chips(cell: Cell) -> list[str]:
    """Name everything that weakens the figures of a cell, in two or three words each."""
    row, found = cell.row, []
    busiest, busy = row["host_other_cpu_share"], busy_share(row)
    told = {
        Doubt.IDLE: "GPU idle" if busy is None else f"GPU busy {share(busy)}",
        Doubt.DISPATCH: "dispatch-bound" if not row["dispatch_bound"] else f"dispatch {share(row['dispatch_share'])}",
        Doubt.BUSY: f"machine busy {share(busiest)}" if busiest else "machine busy",
        Doubt.ONE_PAIR: "one process",
    }
    found += [told[doubt] for doubt in cell.doubts]
    if _did_not_all_end(row) and not cell.unsupported:
        found.append(_endings(row))
    if cell.input_bound:
        found.append(f"waits for input {share(row['input_wait_share'])}")
    if row["two_level_processes"]:
        found.append(f"two levels in {plural(row['two_level_processes'], 'process')}")
    return found


def _did_not_all_end(row: Row) -> bool:
    return bool(row["ok"] != row["cases"] or row["not_started"])


def _endings(row: Row) -> str:
    waiting = f", not started {row['not_started']}" if row["not_started"] else ""
    return f"{row['statuses']}{waiting}"


def column_chips(answer: Answer, mode: str) -> list[str]:
    """Name what weakens all figures of a mode."""
    cells = [found[mode] for found in answer.cells.values() if mode in found]
    common = [chip for chip in chips(cells[0]) if all(chip in chips(cell) for cell in cells[1:])]
    kinds = ["emulated"] if all(cell.row["device"] == "cpu" for cell in cells) else []
    kinds += ["control"] if all(cell.is_control for cell in cells) else []
    return [*kinds, *(common if len(cells) > 1 else [])]
