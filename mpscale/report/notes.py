"""How to read the report of a run: what its figures mean, and what they do not show."""

from __future__ import annotations

from mpscale.analysis.quantities import Verdict
from mpscale.analysis.summary import summary_of
from mpscale.core.device import Device
from mpscale.core.mode import MODES
from mpscale.core.runs import Run
from mpscale.report import sweep
from mpscale.report.about import device_kind, device_name
from mpscale.report.words import WORDS

_NOTES = (
    "A step is one call of the compiled train step: one batch, one update. Step time is steady state, in ms; "
    "compilation and the first step are listed separately.",
    "Each process gives one number, the median of its blocks. Intervals are 95 % t intervals over processes, on "
    "logarithms. A speed-up is the geometric mean of baseline time / mode time over processes of the same seed "
    "and repeat, which ran side by side.",
    "What a mode costs (step time, memory, energy) and its speed-up cover seeds that ended well. A seed that was "
    "lost (it diverged, stalled or ended without a finite metric) makes the metric worse. A seed that failed or "
    "was not started is unknown, so no loss can be ruled out.",
    "Brackets hold the interval. Without brackets there was one process, and its noise is unknown. With two or three "
    "processes the interval is wide; it takes more of them (seeds or repeats) to show a speed-up. "
    "An interval that contains 1.00 shows no difference.",
)
_NOTE_ON_TF32 = (
    "This GPU has TF32, which TensorFlow uses by default, so tf32 is the baseline to look at. Over fp32, with TF32 "
    "off, a speed-up looks larger than what a user would see."
)
_NOTES_ON_METRIC = (
    "The metric is the mean over seeds, with minimum and maximum. Modes are compared seed by seed, from the same "
    f"weights and with the same order of the data. {WORDS[Verdict.NON_INFERIOR]}: a loss of more than the workload's "
    f"margin is ruled out (one-sided, 95 %), in all seeds. {WORDS[Verdict.WORSE]}: there is such a loss, or a seed was "
    f"lost. {WORDS[Verdict.INCONCLUSIVE]}: these seeds show neither.",
    "Overflow steps have a non-finite gradient. A dash means that the mode does not check gradients: its overflow is "
    "unknown, not zero.",
)
_NOTE_ON_NO_METRIC = (
    "A workload without a metric shows speed, memory, energy and overflow, and whether its training diverges. It shows "
    "nothing about the accuracy of a mode. Synthetic inputs are drawn at random, so loss scaling is not tested by them "
    "as it is by real ones."
)
_NOTE_ON_SWEEP = (
    "@ after a workload is the batch of a sweep, @x its number of replicas, and @ after a mode its constant loss "
    "scale. fp32 and tf32, with which a mode is compared, are always those of the same batch and number."
)
_NOTES_ON_CPU = (
    "This run is from a CPU, which emulates float16 by conversions that XLA compiles; without XLA it is slower still, "
    "on some CPUs many times. Step times of float16 modes say nothing about the speed-up on a GPU.",
    "The same goes for bfloat16: XLA on a CPU can make it several times slower than float32, whatever a GPU does with "
    "it.",
    "Host memory is the resident memory of the process and measures TensorFlow and its compiler more than the model. "
    "It says nothing about what mixed precision saves on a GPU, so no ratio is given.",
    "What a CPU run does show is whether training works: overflow, loss scale and final metric.",
)
_NOTE_ON_FLOAT8 = (
    "mixed-fp8 rounds to float8 what Dense and EinsumDense layers multiply. XLA decides for each product if the GPU "
    "multiplies in float8 or converts back to bfloat16 first: only the step time shows it."
)
_NOTE_ON_FLOAT8_ON_CPU = (
    "A CPU does not multiply in float8: mixed-fp8 rounds to float8 and multiplies in bfloat16. Training and metric are "
    "those of float8, and the step time says nothing about it."
)
_NOTE_ON_GPU_MEMORY = (
    "GPU memory is what the driver reports for the process, including context and libraries, so the ratio is that of "
    "whole processes. To compare modes, use the figure for training: steps were awaited one by one. To choose a GPU, "
    "use the largest figure of the row: a usual training loop queues steps, and evaluates. A process keeps what it "
    "took, so later figures contain earlier ones. Host memory is no substitute for any of them."
)
_NOTE_ON_ENERGY = (
    "Energy is that of the whole GPU and of nothing else in the machine; above idle is what it drew beyond its "
    "power before the process started. Values are medians over processes."
)
_NOTE_ON_STAND_IN = "The GPU is a stand-in for tests: the CPU trained, and a script supplied the GPU's figures."


def how_to_read(run: Run) -> str:
    """List what the figures mean and what they do not show."""
    rows = summary_of(run)
    notes = list(_NOTES)
    if sweep.sentence(rows):
        notes.append(_NOTE_ON_SWEEP)
    if any(row["headline_baseline"] == "tf32" for row in rows):
        notes.append(_NOTE_ON_TF32)
    metrics = [row["has_metric"] is not False for row in rows]
    notes += _NOTES_ON_METRIC if any(metrics) or not rows else _NOTES_ON_METRIC[1:]
    if not all(metrics):
        notes.append(_NOTE_ON_NO_METRIC)
    notes += _NOTES_ON_CPU if device_kind(run) == "cpu" else (_NOTE_ON_GPU_MEMORY,)
    if any(row["mode"] in MODES and MODES[row["mode"]].float8 for row in rows):
        notes.append(_NOTE_ON_FLOAT8_ON_CPU if device_kind(run) == "cpu" else _NOTE_ON_FLOAT8)
    if any(row["gpu_energy_j_per_step"] is not None for row in rows):
        notes.append(_NOTE_ON_ENERGY)
    if Device("gpu", device_name(run) or "").is_stand_in:
        notes.append(_NOTE_ON_STAND_IN)
    return "\n".join(f"- {note}" for note in notes)
