"""What a run found, in plain words made from its numbers, and what those numbers do not say."""

from __future__ import annotations

from mpscale.analysis.runs import Run
from mpscale.analysis.summary import plain_rows
from mpscale.analysis.trainings import Row
from mpscale.modes import MODES
from mpscale.report import cells
from mpscale.report.tables import escape, metric_why
from mpscale.telemetry.device import STAND_IN


def findings(run: Run) -> str:
    """A paragraph on the run as a whole and, for each mixed mode of each workload, a line with its result."""
    rows = plain_rows(run.summary)
    lines = [f"- {_finding(row, rows)}" for row in rows if is_mixed(row["mode"])]
    return "\n\n".join([_overview(run, rows), *(["\n".join(lines)] if lines else [])])


def how_to_read(run: Run) -> str:
    """The limits of the figures, as a list."""
    notes = [
        "A step is one call of the compiled train step: one batch, one update. Step time is steady state, in ms; "
        "compilation and the first step are apart.",
        "One process gives one number, the median of its blocks. Intervals are 95 % t intervals over processes, on "
        "logarithms; a speed-up is the geometric mean of baseline time / mode time over processes of the same seed "
        "and repeat, which ran side by side.",
        "What a mode costs (step time, memory, energy) and its speed-up are of seeds that ended well. A seed that was "
        "lost (it diverged, stalled or ended without a finite metric) makes the metric worse. A seed that failed or "
        "was not started says neither good nor bad, so that nothing is ruled out without it.",
        "Brackets hold the interval. Without brackets there was one process, and nothing is known of its noise; with "
        "two or three the interval is wide, and a speed-up needs several processes (more seeds or repeats) to be "
        "told from none. An interval that holds 1.00 shows no difference.",
    ]
    if any(row["headline_baseline"] == "tf32" for row in plain_rows(run.summary)):
        notes.append(
            "This GPU has TF32, which TensorFlow uses by default: the baseline to look at is tf32. Over fp32, with "
            "TF32 off, a speed-up looks larger than a user would see."
        )
    notes += [
        "The metric is the mean over seeds, with smallest and largest; modes are compared seed by seed, from the same "
        "weights and the same order of the data. non-inferior: a loss of more than the workload's margin is ruled out "
        "(one-sided, 95 %), in all seeds. worse: there is one, or a seed was lost. inconclusive: the seeds that there "
        "are show neither.",
        "Overflow steps are those with a non-finite gradient. A dash means that the mode checks no gradient, so that "
        "overflow is unknown there, and not that there was none.",
    ]
    if device_kind(run) == "cpu":
        notes += [
            "This run is from a CPU. There float16 is emulated, by conversions that XLA compiles; without XLA it is "
            "slower still, on some CPUs many times. Step times of float16 modes here say nothing about the speed-up on "
            "a GPU.",
            "The same goes for bfloat16: XLA on a CPU can make it several times slower than float32, whatever a GPU "
            "does with it.",
            "Host memory is the resident memory of the process and measures TensorFlow and its compiler more than "
            "the model. It says nothing about what mixed precision saves on a GPU, so no ratio is given.",
            "What a CPU run does show is whether training works: overflow, loss scale and final metric.",
        ]
    else:
        notes.append(
            "GPU memory is what the driver reports for the process, context and libraries included, so the ratio is "
            "that of whole processes. Host memory is no substitute for it."
        )
    if any(row["gpu_energy_j_per_step"] is not None for row in plain_rows(run.summary)):
        notes.append(
            "Energy is that of the whole GPU and of nothing else in the machine; above idle is what it drew more than "
            "before the process came. Medians over processes."
        )
    if (device_name(run) or "").startswith(STAND_IN):
        notes.append(
            "The GPU is a stand-in of the tests: the CPU trained, and the GPU's figures are those of a script."
        )
    return "\n".join(f"- {note}" for note in notes)


def is_mixed(mode: str) -> bool:
    """Whether a mode computes in less than float32. One that is not known here is taken to."""
    return mode not in MODES or MODES[mode].is_mixed


def device_kind(run: Run) -> str | None:
    """``cpu`` or ``gpu``, None where neither run.json nor a record says."""
    return _of_device(run, "kind", "device")


def device_name(run: Run) -> str | None:
    """The device's own name, None where neither run.json nor a record says."""
    return _of_device(run, "name", "device_name")


def _of_device(run: Run, key: str, column: str) -> str | None:
    known = [run.device.get(key), *(record[column] for record in run.records)]
    return next((str(value) for value in known if value is not None), None)


def _overview(run: Run, rows: list[Row]) -> str:
    kind, name = device_kind(run), device_name(run)
    where = f" on {escape(name)}" if name else ""
    if kind:
        where += f" ({kind.upper()})"
    if not rows:
        return f"No case was started{where}, so there is nothing to report."
    workloads = list(dict.fromkeys(escape(row["workload"]) for row in rows))
    modes = list(dict.fromkeys(escape(row["mode"]) for row in rows))
    ok, cases = sum(row["ok"] for row in rows), len(run.records)
    sentences = [f"{_and(workloads)} {'was' if len(workloads) == 1 else 'were'} run in {_and(modes)}{where}."]
    started = "" if run.finished and not run.not_started else " that was started"
    sentences.append(
        f"Every case{started} ended well." if ok == cases else f"{cases - ok} of {cases} cases did not end well."
    )
    if run.not_started:
        left = len(run.not_started)
        sentences.append(f"{left} planned case{' was' if left == 1 else 's were'} not started.")
    if not run.finished:
        sentences.append("The run was stopped or is still going on: this is what there is so far.")
    if kind == "cpu":
        sentences.append("These are figures of a CPU: the speeds below say nothing about a GPU.")
    return " ".join(sentences)


def _finding(row: Row, rows: list[Row]) -> str:
    parts = [part for part in (_speed(row, rows), _quality(row), _overflow(row), _memory(row)) if part]
    # The metric has its own word for seeds that are in no pair.
    if row["left_out"] and row["metric_verdict"] is None:
        parts.append(escape(row["left_out"]))
    if row["ok"] != row["cases"] or row["not_started"]:
        parts.append(f"cases: {cells.statuses(row)}")
    return f"{escape(row['workload'])}, **{escape(row['mode'])}**: {'; '.join(parts) or 'nothing was measured'}."


def _speed(row: Row, rows: list[Row]) -> str | None:
    if row["step_time_ms"] is None:
        # Lost seeds may have been timed.
        return "no training ended well, so no step time counts" if row["seeds"] and not row["ok"] else None
    baseline = row["headline_baseline"]
    ratio, low, high = (row[f"speedup_{baseline}{end}"] for end in ("", "_low", "_high"))
    if ratio is None:
        beside = any((other["workload"], other["mode"]) == (row["workload"], baseline) for other in rows)
        why = f"with no {baseline}{' that ended well' if beside else ''} beside it to compare with"
        return f"{cells.number(row['step_time_ms'])} ms a step, {why}"
    of_some = cells.of_processes(row[f"speedup_{baseline}_pairs"], row)
    text = f"{ratio:.2f} times the speed of {baseline}{of_some}"
    if low is None or high is None:
        return f"{text} (one pair of processes, so no interval)"
    verdict = ", so no difference is shown" if low <= 1.0 <= high else ""
    return f"{text} (95 % interval {low:.2f} to {high:.2f}{verdict})"


def _quality(row: Row) -> str | None:
    name = row["metric_name"]
    if row["metric_mean"] is None:
        if row["metric_verdict"] is None:
            return None
        return f"no {escape(name or 'metric')}, {row['metric_verdict']}: {escape(metric_why(row))}"
    text = f"{escape(name or 'metric')} {cells.metric(row['metric_mean'], name)}"
    if row["metric_seeds"] < row["seeds_planned"]:
        text += f" over {row['metric_seeds']} of {row['seeds_planned']} seeds"
    if row["metric_difference"] is None:
        return text + (f", {row['metric_verdict']}{_because(row)}" if row["metric_verdict"] else "")
    seeds = f"{row['metric_pairs']} seed{'' if row['metric_pairs'] == 1 else 's'}"
    verdict = f", {row['metric_verdict']}{_because(row)}" if row["metric_verdict"] else ""
    return f"{text}, {cells.metric_change(row['metric_difference'], name)} fp32 ({seeds}{verdict})"


def _because(row: Row) -> str:
    """What seeds that were lost or left out have to do with the verdict; empty where all are in it."""
    if not row["left_out"] and not row["metric_left_out"]:
        return ""
    return f": {escape(metric_why(row))}"


def _overflow(row: Row) -> str | None:
    if row["overflow_steps"] is None or row["attempted_steps"] is None:
        return None
    text = f"{row['overflow_steps'] or 'none'} of {row['attempted_steps']} steps overflowed"
    return text + cells.of_seeds(row["overflow_seeds"], row)


def _memory(row: Row) -> str | None:
    ratio = row["gpu_memory_ratio"]
    if ratio is None:
        return None
    return f"peak GPU memory {ratio:.2f} times fp32's{cells.of_processes(row['gpu_memory_processes'], row)}"


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
