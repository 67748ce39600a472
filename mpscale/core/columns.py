"""The data dictionary: all columns of cases.csv and summary.csv, with unit, origin and when they are empty.

``docs/metrics.md`` is printed from here (``python -m mpscale.core.columns``), and a test keeps the two equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from mpscale.core.cause import Cause
from mpscale.core.mode import MODES

SCHEMA_VERSION = 1
"""Raise this when a column changes its name, unit or meaning."""

# Version 2: a step returns its loss, loss scale and overflow. Version 1 wrote them into a variable, which made the
#   smallest steps slower than in a hand-written loop.
# Version 3: a timed block waits for the tensor of its last step instead of a variable, and rarely follows a read of
#   what the steps returned.
# Version 4: a step returns only values that its mode has, and a timed block keeps none of it.
# Version 5: a step returns loss, loss scale and overflow separately, because packing them into one tensor slowed
#   convolutions with a loss scale; and it is compiled from a small function, which is cheaper to call.
# Version 6: the memory of a GPU is that of steps synchronised one by one, before anything is evaluated; queued steps and
#   evaluation have columns of their own. Seven steps are taken for that before a training is timed.
METHOD_VERSION = 6
"""Raise this when the way of measuring changes: figures of different versions are not compared."""

Status = Literal[
    "ok", "diverged", "stalled", "oom", "timeout", "crashed", "error", "unsupported", "invalid", "interrupted"
]
STATUSES: dict[str, str] = {
    "ok": "trained and measured",
    "diverged": "the weights, the loss or the final metric ended non-finite, or the metric beyond 1e100; a result if the mode tries out a loss scale, else a failure",
    "stalled": "at least 95 % of the steps were skipped and next to nothing was learned; judged like `diverged`",
    "oom": "the device or the host ran out of memory",
    "timeout": "did not finish within `--mp-timeout` seconds and was killed",
    "crashed": "the process was ended by a signal",
    "error": "the process ended with an exception",
    "unsupported": "this device, this way of compiling train steps or this model cannot run the mode; nothing was trained",
    "invalid": "ran, but its figures must not be used; `status_reason` says why",
    "interrupted": "stopped by the user before it finished",
}
FAILED = ("oom", "timeout", "crashed", "error", "invalid", "interrupted")
"""Statuses that fail the pytest test in any mode."""
LOST = ("diverged", "stalled")
"""Statuses of trainings that ran to the end without a usable result."""
MEASURED = ("ok", *LOST)
"""Statuses of cases that ran to the end."""

Kind = Literal["str", "int", "float", "bool", "json"]
DTYPES: dict[Kind, str] = {
    "str": "string",
    "int": "Int64",
    "float": "float64",
    "bool": "boolean",
    "json": "object",
}
"""The pandas dtype of each kind; all of them can hold missing values."""


LARGEST = 1e100
"""No number is larger: float32 and bfloat16 end at 3.4e38, and squares of this one can still be added."""
_LONG = 2**63 - 1
_RANGES: dict[str, tuple[float, float]] = {
    "ms": (0.0, 1e12),
    "s": (0.0, 1e10),
    "1/s": (0.0, 1e18),
    "steps": (0, _LONG),
    "step, from 0": (0, _LONG),
    "blocks": (0, _LONG),
    "examples": (0, _LONG),
    "FLOP": (0, _LONG),
    "TFLOP/s": (0.0, 1e12),
    "share": (-1e6, 1e6),
    "MHz": (0.0, 1e9),
    "MiB": (-1e12, 1e12),
    "J": (-1e15, 1e15),
    "W": (0.0, 1e9),
    "°C": (-274.0, 1e6),
    "%": (0.0, 1e6),
}
"""The smallest and the largest value of each unit. They are far from anything that can be measured: a file with a value
beyond them was changed or damaged, and its figures would be shown, averaged and compared as if they were real."""
_SMALLEST = {"": 1e-40}
"""The smallest value of columns that must be above 0, by unit; 1e-12 of others. A loss scale may be that small."""


class Passes(StrEnum):
    """What two passes over the first batches of a pipeline showed."""

    SAME = "same"
    RESHUFFLED = "reshuffled"
    """They differ, and the pipeline is one object that was only gone through twice, as a shuffle does on purpose."""
    ALLOWED = "allowed"
    """They were the same, and later ones may differ: the pipeline says deterministic=False."""
    DIFFER = "differ"
    """They differ, which the pipeline allows."""


MAY_DIFFER = (Passes.ALLOWED, Passes.DIFFER)
"""With these, modes may be trained on different batches."""


class Format(StrEnum):
    """How people are shown a value; :mod:`mpscale.report.table` has the formatter of each."""

    TEXT = "text"
    YES_NO = "yes-no"
    COUNT = "count"
    """A whole number, in full."""
    NUMBER = "number"
    """Three significant digits."""
    LARGE = "large"
    """Four significant digits: MiB and MHz."""
    SHARE = "share"
    """A share of 1, as percent."""
    FLOPS = "flops"
    """A number of operations: ``5.22 T``."""
    LOSS_SCALE = "loss-scale"
    """In full if it is a power of two, as it mostly is."""


_FORMATS = {"share": Format.SHARE, "MiB": Format.LARGE, "MHz": Format.LARGE, "FLOP": Format.FLOPS}
"""By unit. For units that are not here the kind of the column decides."""
_FORMATS_BY_KIND: dict[Kind, Format] = {
    "str": Format.TEXT,
    "int": Format.COUNT,
    "float": Format.NUMBER,
    "bool": Format.YES_NO,
    "json": Format.TEXT,
}


class Sheet(StrEnum):
    """Tables of the report with a row per workload and mode, and a column for each :class:`Cell`."""

    TIMING = "timing"
    ARITHMETIC = "arithmetic"
    MEMORY = "memory"
    MEMORY_PARTS = "memory-parts"
    ENERGY = "energy"
    GPU_STATE = "gpu-state"


class Over(StrEnum):
    """How the values of several processes become one."""

    MEDIAN = "median"
    MAX = "max"
    SUM = "sum"
    KNOWN = "known"
    """The number of processes that have a value."""
    EACH = "each"
    """Each distinct text once."""


_OVER = {
    Over.MEDIAN: "Here: the median over processes.",
    Over.MAX: "Here: the largest of any process.",
    Over.SUM: "Here: the sum over processes.",
    Over.KNOWN: "Here: how many processes have it.",
    Over.EACH: "Here: each value of any process, once.",
}
"""How a report explains a cell."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A place in the report for a column.

    Args:
        sheet: the table.
        place: orders the cells of a table.
        heading: with the unit.
        over: how the values of several processes become one; unused for summary.csv, which has only one.
        partial: whether to note that some processes have no value.
        flag: a yes-or-no column, and a note for the value if that is yes for most processes.
        apart: a column and a value of it. Processes with that value are counted and shown apart from the others.
        bar: whether a page draws a bar beside the number, which is not negative.
    """

    sheet: Sheet
    place: int
    heading: str
    over: Over = Over.MEDIAN
    partial: bool = False
    flag: tuple[str, str] | None = None
    apart: tuple[str, str] | None = None
    bar: bool = False


class Source(StrEnum):
    """The process that measures a column."""

    WORKER = "worker"
    MONITOR = "monitor"
    """From the GPU's driver."""
    SESSION = "session"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of cases.csv or summary.csv.

    Args:
        name: as in the header.
        kind: of its values.
        unit: of its values; empty if they have none.
        made: how a value is made.
        empty: when there is no value.
        measured: whether a row without a value must have the reason in the column ``unavailable``.
        positive: whether values must be above 0, because they are compared as ratios.
        special: its format, if unit and kind do not decide it; see :attr:`format`.
        warn_above: a value above it casts doubt on the other figures of the case.
        cells: where the report shows it.
        source: the process that measures it; None for the source of its section.
    """

    name: str
    kind: Kind
    unit: str
    made: str
    empty: str = "never"
    measured: bool = False
    positive: bool = False
    special: Format | None = None
    warn_above: float | None = None
    cells: tuple[Cell, ...] = ()
    source: Source | None = None

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest number that it can hold."""
        low, high = _RANGES.get(self.unit, (-_LONG - 1, _LONG) if self.kind == "int" else (-LARGEST, LARGEST))
        if not self.positive:
            return low, high
        return (1 if self.kind == "int" else _SMALLEST.get(self.unit, 1e-12)), high

    @property
    def format(self) -> Format:
        """How people are shown its values."""
        return self.special or _FORMATS.get(self.unit) or _FORMATS_BY_KIND[self.kind]

    def help(self, over: Over | None = None) -> str:
        """Return what the column is, in plain text, for people who point at it.

        Args:
            over: how a report makes one value of those of several processes, if it does.
        """
        unit = "" if self.unit in ("", "share") else f" Unit: {self.unit}."
        here = "" if over is None else f" {_OVER[over]}"
        made = f"{self.made[:1].upper()}{self.made[1:]}".replace("`", "")
        return f"{made}.{unit}{here} In CSV: {self.name}."


class Topic(StrEnum):
    """What a column is about."""

    CASE = "case"
    ENDING = "ending"
    SETTINGS = "settings"
    SAME_TRAINING = "same-training"
    TRAINING = "training"
    RESULT = "result"
    STEP_TIME = "step-time"
    ARITHMETIC = "arithmetic"
    HOST_NOISE = "host-noise"
    MEMORY = "memory"
    ENERGY = "energy"
    GPU_STATE = "gpu-state"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Section:
    """Columns that belong together, under the heading that docs/metrics.md gives them."""

    topic: Topic
    title: str
    columns: tuple[Column, ...]
    source: Source = Source.WORKER


def _known(name: str, kind: Kind, unit: str, made: str, empty: str = "never", *cells: Cell, **more: Any) -> Column:
    return Column(name, kind, unit, made, empty, cells=cells, **more)


def _measured(name: str, kind: Kind, unit: str, made: str, empty: str, *cells: Cell, **more: Any) -> Column:
    return Column(name, kind, unit, made, empty, cells=cells, measured=True, **more)


# fmt: off
_SWEPT_BATCH = "examples per step and replica that were asked for, in a run with several batch sizes; with `workload`, `mode` and `swept_scale` it says to which row of the tables the case belongs"
_ONE_BATCH = "the run has one batch size for the workload"
_SWEPT_SCALE = "the constant loss scale, in a run with several of them"
_ONE_SCALE = "the run has one, or the mode has no constant loss scale"
_SWEPT_REPLICAS = "number of replicas, in a run with several such numbers"
_ONE_NUMBER = "the run has one, or no strategy"
_REUSED = ("autotuning", "reused")
_NOT_REACHED = "the case ended before that"
_NO_METRIC = "the workload has no metric (`has_metric`)"
_NO_TRAINING = "timing-only process (`repeat` above 0), or the case ended before that"
_NO_TIMING = "timing was off (`--benchmark-disable`), or the case ended before that"
_NO_PIPELINE = "the data is arrays, or the case ended before that"
_NO_INPUT = "the data is arrays, too many batches had shapes that would have been compiled while they were timed, timing was off (`--benchmark-disable`), or the case ended before that"
_NO_PROFILE = "no GPU, replicas (`--mp-strategy`), the profiler recorded none of its kernels or is in use by the workload (the reason says which), timing was off, or the case ended before that"
_NO_FLOPS = "`flops_per_step` is empty, timing was off, or the case ended before that; on a CPU also in modes below float32, which most CPUs emulate"
_NO_PEAK = "no GPU, a MIG instance, or mpscale knows no peak of the GPU in this precision"
_UNCHECKED = ", ".join(mode.name for mode in MODES.values() if not mode.sees_overflow)
_NO_CHECK = f"the mode checks no gradient ({_UNCHECKED}), or the case ended before that"
_NO_SCALE = "the mode has no loss scale, or the case ended before that"
_NO_DRIVER = "no GPU, no driver, or the driver does not report it or stopped doing so during the case; the reason says which"
_NO_ENERGY = "no GPU, the driver reports neither energy nor power or stopped doing so during the case, energy was off (`--mp-energy 0`, or by the preset), or the window was shorter than 10 s"

SECTIONS: tuple[Section, ...] = (
    Section(
        Topic.CASE,
        "Which case",
        (
            _known("case_id", "str", "", "`<workload>--<mode>--s<seed>--r<repeat>`; in a sweep those of `--batch<size>`, `--scale<scale>` and `--replicas<number>` that vary follow the mode; unique in a run"),
            _known("workload", "str", "", "what was trained"),
            _known("mode", "str", "", "how it was trained"),
            _known("swept_batch", "int", "", _SWEPT_BATCH, _ONE_BATCH, positive=True),
            _known("swept_scale", "float", "", _SWEPT_SCALE, _ONE_SCALE, special=Format.LOSS_SCALE, positive=True),
            _known("swept_replicas", "int", "", _SWEPT_REPLICAS, _ONE_NUMBER, positive=True),
            _known("seed", "int", "", "seed of the initial weights and of the order of the data"),
            _known("repeat", "int", "", "0: trained to the end, then timed; above 0: a process that only times"),
            _known("order", "int", "", "place in the run, from 0, or in the part of a merged run; modes of a seed run next to each other, in shuffled order"),
            _known("attempts", "int", "", "how often the case was started; the row is of the last attempt"),
            _measured("series_key", "str", "", "workload, its digest, mode, settings and method version: rows of different runs can be compared if it is equal", "the workload was never built"),
            _measured("series", "str", "", "the workload's `series`: rows with the same one are compared although digest or batch differ, and what differs is told", "the workload names none, a run of an older mpscale, or the workload was never built"),
            _measured("workload_digest", "str", "", "SHA-256 over the configs of model and optimizer, the name of the loss, the parameter count and `data_digest`, first 16 hex digits; of a compiled model also over loss weights, metrics, callbacks and the code of its own `train_step` and `call`; without names and dtypes, so that it is the same in every mode", _NOT_REACHED),
            _known("schema_version", "int", "", "version of this table"),
            _known("method_version", "int", "", "version of the way of measuring"),
        ),
    ),
    Section(
        Topic.ENDING,
        "How it ended",
        (
            _known("status", "str", "", "one of the statuses below"),
            _known("status_reason", "str", "", "why the status is not `ok`, in one line", "status is `ok`"),
            _known("cause", "str", "", "the kind of event that ended the case without a usable result, one of the causes below", "status is `ok`, `unsupported`, `diverged` or `stalled`, or an older mpscale made the run"),
            _known("note", "str", "", "what else to know: how earlier attempts failed, which files of the case could not be kept, and why, and what a compiled model asked for that its case does otherwise", "there is nothing"),
            _known("lint", "str", "", "what `mpscale lint` finds without taking a step, as a JSON list of {`check`, `severity`, `text`, `cure`, `layers`}; `[]` if nothing", "only the first training of a workload and mode (seed 0) is looked at, it could not be, the case ended before that, or an older mpscale made the run"),
            _known("output_tail", "str", "", "the last lines the process wrote, without secrets of the environment", "the case did not fail"),
            _known("case_wall_time_s", "float", "s", "from the start of the process to its end, measured by the supervising process", "nothing was started"),
        ),
    ),
    Section(
        Topic.SETTINGS,
        "Settings",
        (
            _known("device", "str", "", "where the train step ran: `cpu` or `gpu`"),
            _known("device_name", "str", "", "the device's own name"),
            _known("start_method", "str", "", "`fork`: child of a process that has imported TensorFlow and touched no device; `fresh`: an interpreter of its own", "nothing was started"),
            _known("jit", "bool", "", "whether the train step is compiled by XLA; the same for all modes of a workload in a run"),
            _known("xla_refused", "str", "", "what XLA cannot compile: operations and their layers. With `--mp-jit auto` all modes of the workload then run without XLA, and have `jit` false; with `--mp-jit on` it is why the case failed", "XLA refused nothing of the workload, or was off for another reason"),
            _known("steps_per_call", "int", "steps", "steps that one call of the compiled program takes (`--mp-steps-per-call`); the same for all modes of a run", "a run of an older mpscale, which always took 1"),
            _known("policy", "str", "", "Keras dtype policy; float32 for graph-rewrite, which TensorFlow rewrites to float16 below Keras; mixed_bfloat16 for mixed-fp8, some of whose layers Keras then quantizes"),
            _measured("layer_dtypes", "str", "", "layers by the dtype that they compute in (`float16 2, float32 1`; `float8` if they round what they multiply to it), without inputs and layers that only hold others; checked against the mode", "the model has no layers, or the case ended before that"),
            _measured("product_dtypes", "str", "", "matrix products, convolutions and recurrent kernels of the traced train step by the dtype of the factors, including gradients, loss and optimizer; `float8` if both factors are rounded to it (E4M3, gradients to E5M2), whatever multiplies them; checked against the mode. Before TensorFlow's rewrite (graph-rewrite) and before XLA", "the train step multiplies no matrices, or the case ended before that"),
            _measured("process_settings", "str", "", "settings that affect figures but do not belong to the mode: deterministic operations, XLA's flags; `none` if nothing is set; checked equal over the modes of a seed", _NOT_REACHED),
            _measured("tf32", "bool", "", "whether float32 products may be rounded to TF32, read back from TensorFlow", "the device has no TF32"),
            _measured("gpu_allocator", "str", "", "TensorFlow's allocator: `cuda_malloc_async`, or `bfc` (with growth) if that does not work or was requested", "on a CPU", Cell(Sheet.MEMORY_PARTS, 9, "allocator", Over.EACH)),
            _measured("autotuning", "str", "", "`tuned`: XLA timed candidates for its kernels in this process; `reused`: it was given the results of an earlier one (`--mp-autotune shared`) and timed only what they lack", "on a CPU, without XLA (`--mp-jit off`), if `XLA_FLAGS` turns autotuning off, or the case ended before the first step"),
            _measured("batch_size", "int", "examples", "examples per step, over all replicas; of a pipeline, in its first batch", _NOT_REACHED),
            _known("strategy", "str", "", "of tf.distribute (`--mp-strategy`): `mirrored`, in one process; `multiworker`, in several; `none` for one device", "a run of an older mpscale, which always used one device"),
            _known("replicas", "int", "", "devices that take each step together: GPUs, or on a CPU logical devices, which share its cores", "as `strategy`", positive=True),
            _known("machines", "int", "", "machines that train each case together: the workers that TF_CONFIG names; 1 if one session has started all workers", "a run of an older mpscale, which always used one", positive=True),
            _measured("replica_batch_size", "int", "examples", "examples per step of one replica: `batch_size` divided by `replicas`", "a run of an older mpscale, or the case ended before that"),
            _measured("input_kind", "str", "", "`arrays`, which lie on the device; `tf.data` or `PyDataset`: a pipeline", _NOT_REACHED),
            _measured("input_passes", "str", "", "two passes over the first batches of a pipeline, made anew with the same seed: `same`; `reshuffled`: they differ, but the pipeline is one object that was only gone through twice; `allowed`: the same, and later ones may differ (deterministic=False); `differ`: they differ, which deterministic=False allows", _NO_PIPELINE),
            _measured("input_shapes", "int", "", "shapes of the batches of the training; XLA compiles a program for each, the first in `first_step_s`, others in `train_wall_time_s`", _NOT_REACHED),
            _measured("input_batches", "str", "", "the shapes of a pipeline's batches and how often each came, the four most frequent by name: the smaller last batch of an epoch is trained, as in fit", _NO_PIPELINE),
            _measured("optimizer", "str", "", "class of the wrapped Keras optimizer", _NOT_REACHED),
            _measured("loss_name", "str", "", "name of the workload's loss", "a run of an older mpscale, or the case ended before that"),
            _measured("parameters", "int", "", "trainable parameters of the model", _NOT_REACHED),
            _measured("layers", "str", "", "layers by class (`Conv2D 3, Dense 2`), without inputs and layers that only hold others", "the model has no layers, a run of an older mpscale, or the case ended before that"),
            _measured("synthetic_inputs", "bool", "", "whether inputs and labels are drawn at random, so that there is nothing to learn and no accuracy; throughput, memory, overflow and loss are as real as any", _NOT_REACHED),
            _measured("has_metric", "bool", "", "whether the workload has a metric; without one nothing is evaluated, and there is no verdict on the result", "a run of an older mpscale, whose workloads always have one, or the case ended before that"),
        ),
    ),
    Section(
        Topic.SAME_TRAINING,
        "Same training in every mode?",
        (
            _measured("initial_weights_digest", "str", "", "SHA-256 over the initial weights, first 16 hex digits; checked equal over the modes of a seed", _NOT_REACHED),
            _measured("data_order_digest", "str", "", "SHA-256 over the order of the examples, first 16 hex digits; of a pipeline, over all batches of the training and those of the final evaluation (structure, dtypes, shapes, bytes); checked equal over the modes of a seed unless the pipeline says deterministic=False", "the training of a pipeline ended before its last step, or " + _NOT_REACHED),
            _measured("first_batches_digest", "str", "", "the same over the first batches of a pipeline (8, or fewer beyond 256 MiB), before the training; checked likewise", _NO_PIPELINE),
            _measured("data_digest", "str", "", "SHA-256 over all examples and labels, first 16 hex digits; of a pipeline, over structure, dtypes, shapes and number of its batches, which do not depend on the seed; checked equal over the modes of a seed", _NOT_REACHED),
            _measured("model_digest", "str", "", "SHA-256 over the configs of the model and of its layers at any depth, without names and dtypes, and the shapes of its weights, first 16 hex digits; checked equal over the modes of a seed", _NOT_REACHED),
            _measured("optimizer_config", "str", "", "class, settings and learning rate of the optimizer as JSON, for a schedule the rates at some steps; of several optimizers, by the attribute of the model; checked equal over the modes of a seed", _NOT_REACHED),
            _measured("loss_inputs", "str", "", "dtype and shape of a batch of labels and shape of a batch of outputs; of a compiled model, of inputs, labels and weights; checked equal over the modes of a seed", _NOT_REACHED),
            _measured("loss_probe", "float", "", "the loss for the first batch's labels and outputs that are the same in every mode (multiples of 1/64 between 0 and 1, drawn with seed 17), on the CPU; checked equal to 1e-4 over the modes of a seed; of a compiled model the sum over what its step calls of keras.losses.Loss, without loss weights, sample weights and masks, for each loss with the next seed", "it was not finite, a compiled model computes its loss without keras.losses.Loss or compares outputs with other things than the data, or the loss uses random numbers, changes variables, computes in less than float32 or does not run by itself; or the case ended before that"),
            _measured("random_draws", "str", "", "SHA-256 over the random numbers that the operations of the train step draw from one seed, compiled as the step is: which of them are above the median, first 16 hex digits. If two modes differ in it, so do their dropout masks or noise; reported, not refused", "the train step draws none, or with operations whose numbers depend on more than a seed; or the case ended before that"),
            _measured("step_operations", "str", "", "products, activations, poolings and draws of random numbers of the traced train step by kind; checked equal over the modes of a seed", "there are none, or the case ended before that"),
        ),
    ),
    Section(
        Topic.TRAINING,
        "Training",
        (
            _measured("attempted_steps", "int", "steps", "train steps started in training, without timing", _NO_TRAINING),
            _measured("applied_steps", "int", "steps", "train steps whose update reached the weights", "the mode checks no gradient, so the number is unknown; or " + _NO_TRAINING),
            _measured("skipped_steps", "int", "steps", "train steps that changed nothing because a gradient was not finite", _NO_CHECK + "; or timing-only"),
            _measured("overflow_steps", "int", "steps", "train steps with a non-finite gradient; for mixed-keras, steps that its inner optimizer did not count", _NO_CHECK + "; or timing-only"),
            _measured("longest_skip_run", "int", "steps", "most skipped steps in a row", _NO_CHECK + "; or timing-only"),
            _measured("first_overflow_step", "int", "step, from 0", "first step with a non-finite gradient", "there was none; " + _NO_CHECK + "; or timing-only"),
            _measured("last_overflow_step", "int", "step, from 0", "last step with a non-finite gradient", "there was none; " + _NO_CHECK + "; or timing-only"),
            _measured("nonfinite_loss_steps", "int", "steps", "train steps whose loss was not finite; known in every mode", _NO_TRAINING),
            _measured("growth_interval", "int", "steps", "steps without overflow after which the loss scale doubles: that of `--mp-dynamic-scale`, else of the workload, else 2,000", "the mode's loss scale does not follow overflow, or " + _NO_TRAINING),
            _measured("loss_scale_initial", "float", "", "loss scale of the first step", _NO_SCALE + "; or timing-only", special=Format.LOSS_SCALE),
            _measured("loss_scale_final", "float", "", "loss scale of the last step", _NO_SCALE + "; or timing-only", special=Format.LOSS_SCALE),
            _measured("loss_scale_min", "float", "", "smallest loss scale of any step", _NO_SCALE + "; or timing-only", special=Format.LOSS_SCALE),
            _measured("loss_scale_max", "float", "", "largest loss scale of any step", _NO_SCALE + "; or timing-only", special=Format.LOSS_SCALE),
            _measured("float8_tensors", "str", "", "JSON object {path of a layer: {`inputs`, `kernel` and `outputs_grad` (the gradient of its outputs): {`amax`, `scale`}}} after the last step of the training. `amax`: largest magnitude of the last 1,024 steps. `scale`: what the tensor is divided by before it is rounded to float8. Six digits; `inf` and `nan` as text", "the mode does not compute in float8, or " + _NO_TRAINING),
            _measured("train_loss_first", "float", "", "loss of the first step, unscaled", "it was not finite; " + _NO_TRAINING),
            _measured("train_loss_final", "float", "", "mean loss of the last 100 steps, unscaled", "one of them was not finite; " + _NO_TRAINING),
            _measured("train_wall_time_s", "float", "s", "time in train steps and in reading their log, without evaluations, the first step and the first call of several steps", _NO_TRAINING),
            _measured("steps_to_target", "int", "steps", "steps after which the metric on the progress set first reached the workload's target", "the target was not reached, the workload has none, or " + _NO_TRAINING),
            _measured("time_to_target_s", "float", "s", "`train_wall_time_s` up to that step", "as `steps_to_target`"),
        ),
    ),
    Section(
        Topic.RESULT,
        "Result of the training",
        (
            _measured("final_accuracy", "float", "share", "accuracy on the test set after the last step", "the workload has another metric; " + _NO_METRIC + "; " + _NO_TRAINING),
            _measured("metric_name", "str", "", "the workload's metric", _NO_METRIC + ", or " + _NOT_REACHED),
            _measured("metric_value", "float", "", "that metric on the test set after the last step", "it was not finite; " + _NO_METRIC + "; " + _NO_TRAINING),
            _measured("metric_higher_is_better", "bool", "", "whether higher is better", _NO_METRIC + ", or " + _NOT_REACHED),
            _measured("metric_target", "float", "", "value of the metric at which the workload counts as trained", "the workload has none, or the case ended before that"),
            _measured("metric_margin", "float", "", "how much worse than the baseline still counts as equal, in units of the metric", "the workload has none, or " + _NOT_REACHED),
            _measured("test_examples", "int", "examples", "size of the test set", _NO_METRIC + ", or " + _NOT_REACHED),
            _measured("published_metric_value", "float", "", "the metric on the test set of the data's publication, if that is a different one (mnist1d: its 1,000 examples)", "there is no such set, or " + _NO_TRAINING),
        ),
    ),
    Section(
        Topic.STEP_TIME,
        "Step time",
        (
            _measured("step_time_ms_median", "float", "ms", "median over the blocks of (time of a block / its steps), in steady state; the one number of this process", _NO_TIMING, Cell(Sheet.TIMING, 1, "processes", Over.KNOWN), Cell(Sheet.TIMING, 8, "ms per step"), positive=True),
            _measured("step_time_ms_one_per_call", "float", "ms", "`step_time_ms_median` of a quarter as many blocks, timed after them in the same process, with one step per call instead of `steps_per_call`: the difference is what starting single steps costs", "every call took one step; " + _NO_TIMING, Cell(Sheet.TIMING, 9, "ms with one step per call"), positive=True),
            _measured("step_time_ms_with_input", "float", "ms", "time of all blocks over their steps, so a mean, with batches from the pipeline: after the timing, in the same process, for as long again. `step_time_ms_median` shows the first batches in turn, which lie on the device", _NO_INPUT, positive=True),
            _measured("input_wait_share", "float", "share", "1 - `step_time_ms_median` / `step_time_ms_with_input`: the share of a step in which the device waits for its batch; 0 if the step with input was not longer", _NO_INPUT),
            _measured("step_time_ms_p10", "float", "ms", "10th percentile over the blocks", _NO_TIMING),
            _measured("step_time_ms_p90", "float", "ms", "90th percentile over the blocks", _NO_TIMING),
            _measured("step_time_ms_per_applied", "float", "ms", "time of all blocks over the steps applied in them, so a mean, and slow blocks count in full; `step_time_ms_median` is a median, which they hardly move. A skipped step is cheaper and gains nothing", "the mode checks no gradient, no step was applied, or timing was off", Cell(Sheet.TIMING, 3, "mean ms per applied step")),
            _measured("examples_per_s", "float", "1/s", "examples per timed step (`batch_size`; of a pipeline, of its larger batches) / `step_time_ms_median`", _NO_TIMING, positive=True),
            _measured("timed_blocks", "int", "blocks", "blocks timed, one synchronisation each", _NO_TIMING, Cell(Sheet.TIMING, 2, "blocks", Over.SUM)),
            _measured("timed_steps", "int", "steps", "steps in them", _NO_TIMING),
            _measured("timed_overflow_steps", "int", "steps", "steps with a non-finite gradient in them; not in `overflow_steps`", _NO_CHECK + "; or timing was off"),
            _measured("dispatch_share", "float", "share", "time per call of a step with the same variables that does no work, over `steps_per_call` times `step_time_ms_median`", _NO_TIMING, Cell(Sheet.TIMING, 4, "dispatch share", flag=("dispatch_bound", "bound"))),
            _measured("dispatch_bound", "bool", "", "whether `dispatch_share` is above 0.5: the step time then says more about Python and TensorFlow than about the device", _NO_TIMING),
            _measured("step_time_ms_faster_blocks", "float", "ms", "median of the faster group of blocks, if they fall into two: groups of a tenth or more whose medians differ by a factor of 1.3 or more, and which explain 90 % of the variance of the logarithms", "the blocks form one group, or fewer than 10 were timed; " + _NO_TIMING),
            _measured("step_time_ms_slower_blocks", "float", "ms", "median of the slower group", "as above"),
            _measured("device_busy_ms_per_step", "float", "ms", "time per step in which at least one kernel ran on the GPU, from TensorFlow's profile of 3 to 50 steps (about 0.2 s) after everything that is timed", _NO_PROFILE, Cell(Sheet.TIMING, 8, "GPU ms per step"), positive=True),
            _measured("device_busy_share", "float", "share", "`device_busy_ms_per_step` / `step_time_ms_median`, which was measured without the profiler", "kernels ran for over 1.05 times the step time while profiled; " + _NO_PROFILE, Cell(Sheet.TIMING, 9, "GPU busy")),
            _measured("build_time_s", "float", "s", "building model and optimizer, including the weights", _NOT_REACHED),
            _measured("trace_time_s", "float", "s", "tracing a single train step into a graph, also with several steps per call", _NOT_REACHED, Cell(Sheet.TIMING, 6, "trace s", apart=_REUSED)),
            _measured("first_step_s", "float", "s", "first call of the traced single step, including compilation, also with several steps per call", _NOT_REACHED, Cell(Sheet.TIMING, 7, "first step s", apart=_REUSED), positive=True),
            _measured("first_call_s", "float", "s", "first call of `steps_per_call` steps, including tracing, compilation and these steps", "every call took one step, no call of several was made, or the case ended before that"),
        ),
    ),
    Section(
        Topic.ARITHMETIC,
        "Arithmetic of a step",
        (
            _measured("flops_per_step", "int", "FLOP", "floating-point operations of the products (matrix products, Einsum, convolutions, recurrent kernels) of one step, forward and backward, of all replicas, two for each multiply-add; counted in the traced graph, the same in every mode", "the step multiplies no matrices, or has an operation, a loop or a branch whose FLOPs do not follow from the graph (the reason names it); or the case ended before that", positive=True),
            _measured("tflops", "float", "TFLOP/s", "`flops_per_step` / `step_time_ms_median`", _NO_FLOPS, positive=True),
            _measured("tflops_while_busy", "float", "TFLOP/s", "`flops_per_step` / `device_busy_ms_per_step`: without the time in which the GPU waits for the host", "`device_busy_ms_per_step` is empty; " + _NO_FLOPS, positive=True),
            _measured("tflops_peak", "float", "TFLOP/s", "peak of the GPU, or of all GPUs of the case together, for dense products in the precision that the mode is about, from NVIDIA's documents (`mpscale/worker/peaks.py`)", _NO_PEAK, positive=True),
            _measured("peak_share", "float", "share", "`tflops` / `tflops_peak`, called MFU (model FLOPs utilisation) in the literature", "above 1, which cannot be; `tflops` or `tflops_peak` is empty", positive=True),
            _measured("peak_share_while_busy", "float", "share", "`tflops_while_busy` / `tflops_peak`: what the kernels reach", "above 1, which cannot be; `tflops_while_busy` or `tflops_peak` is empty", positive=True),
        ),
    ),
    Section(
        Topic.HOST_NOISE,
        "Noise of the machine",
        (
            _measured("host_load", "float", "", "load average over a minute at the start of the case: processes that ran or waited to run", "the system has none"),
            _measured("host_other_cpu_share", "float", "share", "share of all processors' time that other processes used while steps were timed; above 0.1 the machine was busy", _NO_TIMING + "; timed for less than 0.2 s; no `/proc`", Cell(Sheet.TIMING, 5, "other processes' CPU, max", Over.MAX), warn_above=0.1),
            _measured("host_steal_share", "float", "share", "share of all processors' time that the hypervisor gave to other machines in that time", "as above"),
            _measured("host_clock_mhz", "float", "MHz", "mean clock of the processors at the end of the timing; a snapshot", _NO_TIMING + "; or the host does not report it"),
        ),
        Source.SESSION,
    ),
    Section(
        Topic.MEMORY,
        "Memory",
        (
            _measured("gpu_memory_nvml_peak_mib", "float", "MiB", "the headline, for comparing modes: largest memory up to the end of the steps that are synchronised one by one (the first and up to three more), before anything is queued or evaluated; of the process if that is known, else the rise of the GPU's if nobody else used it; `gpu_memory_method` says which; of several GPUs, memory is that of the one with the largest peak", "the case ended before that; " + _NO_DRIVER, Cell(Sheet.MEMORY, 1, "GPU, training (MiB)", Over.MAX, partial=True), positive=True),
            _measured("gpu_memory_queued_peak_mib", "float", "MiB", "largest memory while steps were queued without waiting, as in a usual training loop, by the headline's method; the process keeps what it took before", "as above", Cell(Sheet.MEMORY, 3, "GPU, steps queued (MiB)", Over.MAX)),
            _measured("gpu_memory_evaluation_peak_mib", "float", "MiB", "largest memory while the model was evaluated, if that needed more than the steps before it had taken, by the headline's method", "it needed no more; the process evaluated nothing; or as above", Cell(Sheet.MEMORY, 4, "GPU, evaluation if more (MiB)", Over.MAX)),
            _measured("gpu_memory_method", "str", "", "`process` or `device-minus-idle`: where the headline comes from", _NO_DRIVER, Cell(Sheet.MEMORY_PARTS, 8, "peak is of", Over.EACH)),
            _measured("gpu_memory_process_peak_mib", "float", "MiB", "largest memory of the process and its descendants that the driver listed, in the whole case but for the profiled steps; sampled every 10 ms and at every phase, and every 500 ms while steps are timed", "as above, or the driver lists the process without its memory, or not at all", Cell(Sheet.MEMORY, 5, "GPU, whole process (MiB)", Over.MAX)),
            _measured("gpu_memory_device_rise_mib", "float", "MiB", "largest memory in use on the whole GPU in the same time minus `gpu_memory_idle_mib`", "it did not rise; " + _NO_DRIVER),
            _measured("gpu_memory_idle_mib", "float", "MiB", "memory in use on the whole GPU before the process touched it", _NO_DRIVER, Cell(Sheet.MEMORY_PARTS, 6, "in use before the case", Over.MAX)),
            _measured("gpu_memory_context_mib", "float", "MiB", "memory that the process held when it had CUDA's context and nothing else, by the headline's method", _NO_DRIVER, Cell(Sheet.MEMORY_PARTS, 1, "context", Over.MAX)),
            _measured("gpu_memory_reserved_mib", "float", "MiB", "memory that the driver keeps for itself; not included in the others", "the driver does not report it separately; " + _NO_DRIVER, Cell(Sheet.MEMORY_PARTS, 7, "reserved", Over.MAX)),
            _measured("gpu_memory_allocator_peak_mib", "float", "MiB", "peak of TensorFlow's allocator in the process; of several GPUs, the largest, and of several workers, that of the first", "on a CPU, where TensorFlow returns zeros, or not reached", Cell(Sheet.MEMORY, 6, "GPU, allocator (MiB)", Over.MAX), Cell(Sheet.MEMORY_PARTS, 2, "in tensors", Over.MAX), source=Source.WORKER),
            _measured("gpu_memory_allocator_synchronised_peak_mib", "float", "MiB", "peak of TensorFlow's allocator up to the end of the steps that are synchronised one by one; far above the next column if the search for the fastest kernels in the first step took more than the steps", "as above", source=Source.WORKER),
            _measured("gpu_memory_allocator_timed_peak_mib", "float", "MiB", "peak of TensorFlow's allocator while steps were timed", "as above, or timing was off", Cell(Sheet.MEMORY_PARTS, 3, "of that, while timed", Over.MAX), source=Source.WORKER),
            _measured("gpu_memory_unexplained_mib", "float", "MiB", "largest memory in the whole case minus context minus the allocator's peak: pools that hold more than is used, libraries, compiled programs; may be negative, because the peaks need not coincide", "one of the three is unknown", Cell(Sheet.MEMORY_PARTS, 4, "unexplained", Over.MAX)),
            _measured("gpu_memory_unexplained_cause", "str", "", "likely cause of most of that: `queued-steps` if it came when steps were queued; `first-step` if it was there after the first step (scratch of autotuning, libraries, compiled programs); `pool` if the allocator is `bfc`, whose pool holds more than is in use; else `unclear`", "a tenth of the largest memory or less is unexplained; or as above", Cell(Sheet.MEMORY_PARTS, 5, "likely cause", Over.EACH)),
            _measured("gpu_sample_interval_ms", "float", "ms", "mean time between two samples of the GPU's memory outside the timed blocks", _NO_DRIVER),
            _measured("gpu_sample_gap_ms", "float", "ms", "longest time between two samples outside the timed blocks (in them it is 500 ms); a shorter peak may have been missed", _NO_DRIVER),
            _measured("host_memory_peak_mib", "float", "MiB", "largest resident memory of the process (VmHWM), including the compiler; of several workers (`--mp-strategy multiworker`), the sum over those of this machine; on a CPU it is more about the compiler than about the model", "the process ended too early to be read", Cell(Sheet.MEMORY, 7, "host (MiB)", Over.MAX), positive=True, source=Source.SESSION),
        ),
        Source.MONITOR,
    ),
    Section(
        Topic.ENERGY,
        "Energy",
        (
            _measured("gpu_energy_j_per_step", "float", "J", "the headline: energy of the whole GPU over the timed steps, from its counter if it has one, else from its power, divided by the steps; of several GPUs (`--mp-strategy`), energy and power are sums", _NO_ENERGY, Cell(Sheet.ENERGY, 1, "J per step", partial=True, bar=True), positive=True),
            _measured("gpu_energy_method", "str", "", "`counter` or `power`: where the headline comes from", _NO_ENERGY, Cell(Sheet.ENERGY, 7, "by", Over.EACH)),
            _measured("gpu_energy_j_per_applied_step", "float", "J", "the same divided by the steps that were not skipped", "the mode checks no gradient, no step was applied; " + _NO_ENERGY, Cell(Sheet.ENERGY, 3, "J per applied step")),
            _measured("gpu_energy_net_j_per_step", "float", "J", "the headline minus `gpu_idle_power_w` times the window: what training added", "the GPU drew no more than before, or its idle power is unknown; " + _NO_ENERGY, Cell(Sheet.ENERGY, 4, "J per step above idle")),
            _measured("gpu_energy_counter_j", "float", "J", "increase of the GPU's energy counter in the window", "before Volta, or a counter that does not move; " + _NO_ENERGY),
            _measured("gpu_energy_power_j", "float", "J", "integral of the power readings over the window, trapezoidal rule", _NO_ENERGY),
            _measured("gpu_energy_window_s", "float", "s", "from the start of the timing until steps were taken for at least `--mp-energy` seconds", "no GPU, or timing or energy was off"),
            _measured("gpu_energy_steps", "int", "steps", "steps in the window: the timed ones and those that were added", "as above"),
            _measured("gpu_power_w_mean", "float", "W", "energy over window", _NO_ENERGY, Cell(Sheet.ENERGY, 5, "power (W)")),
            _measured("gpu_power_source", "str", "", "`instant`, or `mean of up to a second`: what the driver's power readings mean", _NO_DRIVER),
            _measured("gpu_idle_power_w", "float", "W", "mean power in the last 2 s before the process touched the GPU", _NO_DRIVER, Cell(Sheet.ENERGY, 6, "idle (W)")),
        ),
        Source.MONITOR,
    ),
    Section(
        Topic.GPU_STATE,
        "State of the GPU",
        (
            _measured("gpu_temperature_c_max", "float", "°C", "highest temperature of the GPU in the case; of several GPUs, the hottest; clocks and utilization are then those of the lowest", _NO_DRIVER, Cell(Sheet.GPU_STATE, 4, "hottest (°C)", Over.MAX)),
            _measured("gpu_sm_clock_mhz_median", "float", "MHz", "clock of the multiprocessors, median over the timed window", "timing was off; " + _NO_DRIVER, Cell(Sheet.GPU_STATE, 1, "SM clock (MHz)")),
            _measured("gpu_memory_clock_mhz_median", "float", "MHz", "clock of the memory, median over the timed window", "timing was off; " + _NO_DRIVER, Cell(Sheet.GPU_STATE, 2, "memory clock (MHz)")),
            _measured("gpu_utilization_median", "float", "%", "share of time in which a kernel ran, median over the timed window; it does not say how much of the GPU the kernel used", "timing was off; " + _NO_DRIVER, Cell(Sheet.GPU_STATE, 3, "utilisation (%)")),
            _measured("gpu_event_reasons", "str", "", "all reasons for lower clocks that the driver gave in the timed window", "timing was off; " + _NO_DRIVER, Cell(Sheet.GPU_STATE, 7, "event reasons", Over.EACH)),
            _measured("gpu_throttled_share", "float", "share", "share of the timed window in which heat or a power brake held the clocks down", "timing was off; " + _NO_DRIVER, Cell(Sheet.GPU_STATE, 5, "throttled", Over.MAX)),
            _measured("gpu_power_capped_share", "float", "share", "share of the timed window at the power limit: normal under full load", "timing was off; " + _NO_DRIVER, Cell(Sheet.GPU_STATE, 6, "at the power limit", Over.MAX)),
            _measured("gpu_other_processes", "int", "", "other processes that computed on the GPU during the case", _NO_DRIVER),
            _measured("gpu_graphics_processes", "int", "", "other processes that used it for graphics", _NO_DRIVER),
            _known("gpu_suspicion", "str", "", "why the figures of this case must not be used: throttled, hot, a falling clock, other processes, another run, changed settings. The status is `invalid` unless `--mp-keep-suspect` is given", "they can be used, or no GPU"),
        ),
        Source.MONITOR,
    ),
    Section(
        Topic.MISSING,
        "What is missing",
        (
            _known("unavailable", "json", "", "JSON object {column: reason}: why each empty cell is empty", "no cell is empty"),
        ),
    ),
)
# fmt: on

COLUMNS: dict[str, Column] = {column.name: column for section in SECTIONS for column in section.columns}


def measured_columns(topic: Topic | None = None, source: Source | None = None) -> tuple[str, ...]:
    """The names of the measured columns of a topic and a source; None for all."""
    return tuple(
        column.name
        for section in SECTIONS
        if topic in (None, section.topic)
        for column in section.columns
        if column.measured and source in (None, column.source or section.source)
    )


# fmt: off
_PROCESSES = "over processes; 95 % t interval on logarithms"
_NO_BASELINE = "no process of the baseline with the same seed and repeat was timed"
SUMMARY: tuple[Column, ...] = (
    _known("workload", "str", "", "what was trained"),
    _known("mode", "str", "", "how it was trained"),
    _known("swept_batch", "int", "", "examples per step, in a run with several batch sizes; `fp32` and `tf32` below are those of the same batch", _ONE_BATCH),
    _known("swept_scale", "float", "", _SWEPT_SCALE, _ONE_SCALE, special=Format.LOSS_SCALE),
    _known("swept_replicas", "int", "", _SWEPT_REPLICAS + "; `fp32` and `tf32` below are those of the same number", _ONE_NUMBER),
    _known("device", "str", "", "`cpu` or `gpu`"),
    _known("jit", "bool", "", "whether train steps were compiled by XLA"),
    _known("processes", "int", "", "processes that gave a step time, of seeds that ended well"),
    _known("seeds", "int", "", "processes that trained to the end"),
    _known("seeds_planned", "int", "", "seeds that should have been trained, as far as is known: more than `seeds` if some failed or were not started"),
    _known("left_out", "str", "", "seeds that were lost (diverged, stalled) or failed or were not started, with the status", "all ended well"),
    _known("step_time_ms", "float", "ms", f"geometric mean of `step_time_ms_median` {_PROCESSES}; of seeds that ended well, like everything that a mode costs", "nothing was timed, or no seed ended well"),
    _known("step_time_ms_low", "float", "ms", "lower end of its interval", "one process"),
    _known("step_time_ms_high", "float", "ms", "upper end of its interval", "one process"),
    _known("speedup_fp32", "float", "", "geometric mean of fp32's step time / the mode's, paired by seed and repeat, of seeds that ended well", _NO_BASELINE),
    _known("speedup_fp32_low", "float", "", "lower end of its paired interval", "one pair, or fp32 itself"),
    _known("speedup_fp32_high", "float", "", "upper end of its paired interval", "one pair, or fp32 itself"),
    _known("speedup_fp32_pairs", "int", "", "the number of pairs; for fp32 itself, of processes"),
    _known("speedup_tf32", "float", "", "geometric mean of tf32's step time / the mode's, in the same way", _NO_BASELINE),
    _known("speedup_tf32_low", "float", "", "lower end of its paired interval", "one pair, or tf32 itself"),
    _known("speedup_tf32_high", "float", "", "upper end of its paired interval", "one pair, or tf32 itself"),
    _known("speedup_tf32_pairs", "int", "", "the number of pairs; for tf32 itself, of processes"),
    _known("speedup_fp32_doubts", "str", "", "why the ratio to fp32 is no claim about speed, separated by blanks: `device-idle` (the GPU computed for less than half of a step), `dispatch-bound`, `busy-machine` (others used over 10 % of the processors' time) in either mode, `one-pair`", "it may be claimed, there is no ratio, or fp32 itself"),
    _known("speedup_tf32_doubts", "str", "", "the same for the ratio to tf32", "as above, or tf32 itself"),
    _known("speedup_device_fp32", "float", "", "geometric mean of fp32's `device_busy_ms_per_step` / the mode's, paired by seed and repeat, of seeds that ended well", "no pair of processes was profiled on a GPU", Cell(Sheet.TIMING, 10, "GPU time: fp32 / mode")),
    _known("speedup_device_fp32_low", "float", "", "lower end of its paired interval", "one pair, or fp32 itself"),
    _known("speedup_device_fp32_high", "float", "", "upper end of its paired interval", "one pair, or fp32 itself"),
    _known("speedup_device_fp32_pairs", "int", "", "the number of pairs; for fp32 itself, of processes"),
    _known("speedup_device_tf32", "float", "", "the same for tf32", "no pair of processes was profiled on a GPU", Cell(Sheet.TIMING, 11, "GPU time: tf32 / mode")),
    _known("speedup_device_tf32_low", "float", "", "lower end of its paired interval", "one pair, or tf32 itself"),
    _known("speedup_device_tf32_high", "float", "", "upper end of its paired interval", "one pair, or tf32 itself"),
    _known("speedup_device_tf32_pairs", "int", "", "the number of pairs; for tf32 itself, of processes"),
    _known("step_time_ms_with_input", "float", "ms", "geometric mean over processes of seeds that ended well", "the data is arrays, or no process has it"),
    _known("input_wait_share", "float", "share", "median over processes", "as above"),
    _known("speedup_with_input_fp32", "float", "", "geometric mean of fp32's `step_time_ms_with_input` / the mode's, paired by seed and repeat, of seeds that ended well: what a training gains that takes its batches from the pipeline", "as above, or in no pair of processes"),
    _known("speedup_with_input_fp32_low", "float", "", "lower end of its paired interval", "one pair, or fp32 itself"),
    _known("speedup_with_input_fp32_high", "float", "", "upper end of its paired interval", "one pair, or fp32 itself"),
    _known("speedup_with_input_fp32_pairs", "int", "", "the number of pairs; for fp32 itself, of processes"),
    _known("speedup_with_input_tf32", "float", "", "the same for tf32", "as above, or in no pair of processes"),
    _known("speedup_with_input_tf32_low", "float", "", "lower end of its paired interval", "one pair, or tf32 itself"),
    _known("speedup_with_input_tf32_high", "float", "", "upper end of its paired interval", "one pair, or tf32 itself"),
    _known("speedup_with_input_tf32_pairs", "int", "", "the number of pairs; for tf32 itself, of processes"),
    _known("headline_baseline", "str", "", "what a user would have had by default: tf32 if it was timed, else fp32"),
    _known("gpu_memory_mib", "float", "MiB", "largest `gpu_memory_nvml_peak_mib` of any process of a seed that ended well", "no process has it"),
    _known("gpu_memory_processes", "int", "", "processes that have it"),
    _known("gpu_memory_ratio", "float", "", "ratio to fp32's, or to tf32's in a run without fp32: both keep float32 in memory", "either has none, a process of either ran out of memory (it needed more than any figure here), or the processes differ in `gpu_allocator` or `gpu_memory_method`", Cell(Sheet.MEMORY, 2, "over float32")),
    _known("gpu_energy_j_per_step", "float", "J", "geometric mean of the processes of seeds that ended well", "no process has it"),
    _known("gpu_energy_processes", "int", "", "processes that have it"),
    _known("gpu_energy_ratio", "float", "", "ratio to fp32's", "either has none, or the processes differ in `gpu_energy_method`", Cell(Sheet.ENERGY, 2, "over fp32")),
    _known("host_memory_mib", "float", "MiB", "largest `host_memory_peak_mib` of any process of a seed that ended well", "no process has it"),
    _known("overflow_steps", "int", "steps", "sum over the trainings that have it", "the mode checks no gradient"),
    _known("attempted_steps", "int", "steps", "sum over the same trainings; over all if none has `overflow_steps`", "nothing was trained"),
    _known("skipped_steps", "int", "steps", "sum over the same trainings", "the mode checks no gradient"),
    _known("overflow_rate", "float", "share", "`overflow_steps` / `attempted_steps`", "the mode checks no gradient"),
    _known("overflow_seeds", "int", "", "trainings that have `overflow_steps`: fewer than `seeds_planned` if some do not"),
    _known("synthetic_inputs", "bool", "", "whether inputs and labels are drawn at random", "no case got that far"),
    _known("has_metric", "bool", "", "whether the workload has a metric; if not, all columns about one are empty, except for the verdict on a seed that was lost", "no case got that far, or a run of an older mpscale"),
    _known("metric_name", "str", "", "the workload's metric", "it has none, or nothing was trained"),
    _known("metric_seeds", "int", "", "trainings with a finite metric: fewer than `seeds_planned` if some were lost or failed"),
    _known("metric_mean", "float", "", "mean of `metric_value` over seeds", "no seed has it"),
    _known("metric_min", "float", "", "smallest of any seed", "no seed has it"),
    _known("metric_max", "float", "", "largest of any seed", "no seed has it"),
    _known("metric_difference", "float", "", "mean over seeds of the metric minus fp32's", "no seed has both"),
    _known("metric_difference_low", "float", "", "lower end of its 90 % t interval, which is one-sided at 95 %", "one seed, or fp32 itself"),
    _known("metric_difference_high", "float", "", "upper end of its 90 % t interval", "one seed, or fp32 itself"),
    _known("metric_pairs", "int", "", "seeds with a metric under this mode and fp32, none of them lost in fp32"),
    _known("metric_margin", "float", "", "how much worse than fp32 still counts as equal", "fp32 itself, or no fp32 was trained"),
    _known("metric_higher_is_better", "bool", "", "whether higher is better", "fp32 itself, or it is not known"),
    _known("metric_verdict", "str", "", "`non-inferior`: a loss of the workload's margin is ruled out, in all seeds; `worse`: a loss beyond it is shown, or a seed was lost (diverged, stalled, no finite metric) that was not in fp32; else `inconclusive`", "fp32 itself, no fp32 was to be trained, or the workload has no metric and no seed was lost"),
    _known("metric_reason", "str", "", "the reason of the verdict, if the numbers do not show it", "they show it"),
    _known("metric_left_out", "str", "", "seeds of this mode or fp32 that are not in a pair, with the reason", "all are in one"),
    _known("same_draws", "bool", "", "whether the train steps draw the same random numbers as those of fp32 (tf32 in a run without it), by `random_draws`, in all seeds", "they draw none, it is not known, or fp32 itself"),
    _known("same_batches", "bool", "", "whether the trainings saw the same batches of a pipeline as those of fp32 (tf32 in a run without it), by `data_order_digest`, in all seeds", "the data is arrays, a training ended early, or fp32 itself"),
    _known("metric_seeds_needed", "int", "", "seeds needed for a verdict if mean and spread stay the same", "there is a verdict, or a single seed gives no spread"),
    _known("target_reached", "int", "", "seeds that reached the workload's target and ended well", "it has none"),
    _known("steps_to_target", "float", "steps", "median over the seeds that reached it", "none did"),
    _known("loss_scale_final", "float", "", "median over seeds", "the mode has no loss scale", special=Format.LOSS_SCALE),
    _known("dispatch_share", "float", "share", "median over processes", "nothing was timed"),
    _known("dispatch_bound", "bool", "", "whether most processes were dispatch-bound", "nothing was timed"),
    _known("device_busy_ms_per_step", "float", "ms", "median over processes", "no process was profiled on a GPU"),
    _known("device_busy_share", "float", "share", "median over processes", "no process was profiled on a GPU"),
    _known("gpu_utilization", "float", "%", "median of `gpu_utilization_median` over processes; stands in for `device_busy_share` where that is empty", "nothing was timed on a GPU, or the driver does not report it"),
    _known("flops_per_step", "int", "FLOP", "that of its processes", "no process has it, or they differ", Cell(Sheet.ARITHMETIC, 1, "FLOPs per step")),
    _known("tflops", "float", "TFLOP/s", "geometric mean over processes of seeds that ended well", "no process has it", Cell(Sheet.ARITHMETIC, 2, "TFLOP/s")),
    _known("tflops_peak", "float", "TFLOP/s", "peak of the GPU in the precision of the mode", "no process has it, or they differ", Cell(Sheet.ARITHMETIC, 4, "peak TFLOP/s")),
    _known("peak_share", "float", "share", "`tflops` / `tflops_peak`", "no process has it", Cell(Sheet.ARITHMETIC, 5, "share of peak")),
    _known("tflops_while_busy", "float", "TFLOP/s", "geometric mean over processes of seeds that ended well", "no process was profiled on a GPU", Cell(Sheet.ARITHMETIC, 3, "TFLOP/s while busy")),
    _known("peak_share_while_busy", "float", "share", "`tflops_while_busy` / `tflops_peak`", "no process has it", Cell(Sheet.ARITHMETIC, 6, "share while busy")),
    _known("host_other_cpu_share", "float", "share", "median over processes", "nothing was timed, or it is unknown"),
    _known("two_level_processes", "int", "", "processes whose timed blocks fall into two groups"),
    _known("not_started", "int", "", "cases that were planned but not started, as far as is known"),
    _known("cases", "int", "", "cases that were started"),
    _known("ok", "int", "", "how many of them ended well"),
    _known("statuses", "str", "", "how many cases have each status"),
)
"""The columns of summary.csv, one row per workload and mode. Only figures of cases that ran to the end count."""
# fmt: on


def data_dictionary() -> str:
    """The content of docs/metrics.md, as markdown."""
    headers = ("column", "type", "unit", "how it is made", "when it is empty")

    def table(columns: tuple[Column, ...]) -> str:
        return _markdown(headers, [(f"`{c.name}`", c.kind, c.unit, c.made, c.empty) for c in columns])

    return "\n".join(
        [
            "# Data dictionary\n",
            "Printed from `mpscale/core/columns.py` by `make docs`: first cases.csv, one row per case, then summary.csv.\n"
            "[method.md](method.md) says how each number is made. An empty cell is unknown, never 0, and the column\n"
            "`unavailable` says why it is empty. A text that a spreadsheet would take for a formula, because it begins with\n"
            "`=`, `+`, `-`, `@`, a tab or a line end, has an apostrophe before it, in every CSV file that mpscale writes; so has\n"
            "one that begins with apostrophes and then one of these. mpscale takes one off when it reads the file. Numbers stay\n"
            "numbers.\n"
            f"This is schema version {SCHEMA_VERSION}, method version {METHOD_VERSION}.\n",
            *(f"## {section.title}\n\n{table(section.columns)}" for section in SECTIONS),
            "## summary.csv\n",
            "One row per workload and mode. Only figures of cases that ran to the end count; what a mode costs (times,\n"
            "memory, energy) comes from seeds that ended well.\n",
            table(SUMMARY),
            "## Statuses\n",
            _markdown(("status", "meaning"), [(f"`{status}`", meaning) for status, meaning in STATUSES.items()]),
            "## Causes\n",
            _markdown(
                ("cause", "meaning", "another attempt may succeed"),
                [(f"`{each}`", each.meaning, "yes" if each.transient else "no") for each in Cause],
            ),
        ]
    )


def _markdown(headers: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table. Written here because core imports only the standard library."""
    widths = [max(map(len, cells)) for cells in zip(headers, *rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [headers, *rows]]
    lines.insert(1, "-|-".join("-" * width for width in widths))
    return "".join(f"|-{line}-|\n" if line.startswith("-") else f"| {line} |\n" for line in lines)


if __name__ == "__main__":
    print(data_dictionary(), end="")
