"""The plug-in's options, all under ``--mp-``. Each group is followed by the functions that read it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mpscale.config import OptionType, Written, add_results_option, batch_size, integer, seconds, training_steps
from mpscale.core.case import Settings
from mpscale.core.cluster import Address, Cluster
from mpscale.core.device import Device, NoSuchDevice, find_device, find_replicas
from mpscale.core.invocation import SCRIPT
from mpscale.core.loss_scale import RULES
from mpscale.core.mode import DEFAULT_MODES, MODES, SETTABLE, Mode, Scaling, default_modes, select_modes
from mpscale.core.naming import NAME, NOTE, note_of, run_name
from mpscale.core.shard import Shard, Share
from mpscale.presets import DEFAULT_PRESET, GPU_PRESET, GPU_PRESET_GB, PRESETS, Apart, Preset, preset_for
from mpscale.pytest_plugin import machines, origin
from mpscale.pytest_plugin import option_types as types
from mpscale.terminal.streams import as_typed

if TYPE_CHECKING:
    from mpscale.harness.supervisor import Machines, Options

_MOST_PROCESSES = 1000
"""Of a workload and mode; intervals then have 3 % of the width that one process alone would have."""
_MOST_PER_CALL = 10_000
Add = Callable[..., Any]


def add_options(add: Add) -> None:
    """Add the options of a run; those of the comparison at its end are in ``baseline``."""
    _add_selection(add)
    _add_settings(add)
    _add_run_options(add)


def _add_selection(add: Add) -> None:
    add(
        "--mp-preset",
        choices=tuple(PRESETS),
        help=f"what to run unless other options say so (default: {GPU_PRESET} on a GPU of {GPU_PRESET_GB} GB or more, "
        f"else {DEFAULT_PRESET}). " + "; ".join(f"{name}: {preset.summary}" for name, preset in PRESETS.items()),
    )
    add(
        "--mp-workloads",
        type=types.names,
        metavar="A,B",
        help="workloads to train (default: those of the preset); `mpscale workloads` lists them, module:attribute "
        "names one of your own",
    )
    add(
        "--mp-modes",
        type=types.names,
        metavar="A,B",
        help=f"modes to train in, out of {', '.join(MODES)}; comparisons need fp32 among them (default: "
        f"{', '.join(DEFAULT_MODES)}, and tf32 on devices that have it)",
    )
    add(
        "--mp-seeds",
        type=integer(1, _MOST_PROCESSES),
        metavar="N",
        help="train each workload in each mode from seeds 0 to N-1 (default: as the preset says)",
    )
    add(
        "--mp-repeats",
        type=integer(0, _MOST_PROCESSES),
        metavar="N",
        help="for each workload and mode, add N processes that only measure step times, for narrower intervals "
        f"(default: 0; 1 for the large workloads of the preset {GPU_PRESET})",
    )
    add(
        "--mp-shard",
        type=types.checked(Shard.parse),
        metavar="I/N",
        help="run only part I of N of the cases, such as 2/3, so that several machines share them: sessions with the "
        "same options and each I from 1 to N run every case once, with all modes of a workload and seed on one "
        "machine; `mpscale merge` makes one run of theirs (default: all cases)",
    )


_SWEEPABLE = ("batch_size", "static_scale", "replicas")
"""Settings of which a run may have several values; see :func:`swept`."""
_CHOSEN = pytest.StashKey[tuple[str, str]]()
_REPLICAS = pytest.StashKey[tuple[int, ...]]()
_CLUSTER = pytest.StashKey[Cluster | None]()
_MOST_REPLICAS = 64


def choose_device(config: pytest.Config, devices: Sequence[Device], cpu: Device) -> Device:
    """Choose the device, and on how many of its kind cases train, once and for the whole session.

    Args:
        config: of the session.
        devices: the GPUs that the driver lists.
        cpu: this machine's processor.

    Raises:
        NoSuchDevice: the environment selects no usable GPU, or too few.
        pytest.UsageError: options that do not go together.
    """
    strategy, wanted = config.getoption("mp_strategy"), config.getoption("mp_replicas")
    config.stash[_REPLICAS] = (1,)
    config.stash[_CLUSTER] = found = machines.cluster_of(config)
    if strategy == "none":
        if wanted is not None:
            raise pytest.UsageError(f"{origin.of(config, '--mp-replicas')}: replicas need --mp-strategy")
        return find_device(devices, os.environ, cpu)
    if config.getoption("mp_jit") == "on":
        raise pytest.UsageError(
            f"{origin.of(config, '--mp-jit')}: XLA cannot compile the steps of --mp-strategy {strategy}, since "
            "TensorFlow joins its replicas by merge_call; leave --mp-jit on out"
        )
    workers = 1 if found is None else len(found.workers)
    if found is not None and wanted is not None and (len(wanted) > 1 or wanted[0] % workers):
        raise pytest.UsageError(
            f"{origin.of(config, '--mp-replicas')}: TF_CONFIG names {workers} workers, with as many replicas each: "
            f"give one number, a multiple of {workers}, or leave the option out"
        )
    own = None if wanted is None else wanted[-1] // workers
    if own is None and found is not None and find_device(devices, os.environ, cpu).kind == "cpu":
        own = 1
    try:
        device, number = find_replicas(devices, os.environ, cpu, own)
    except NoSuchDevice as error:
        raise pytest.UsageError(f"--mp-strategy {strategy}, --mp-replicas: {error}") from error
    config.stash[_REPLICAS] = wanted or (number * workers,)
    return device


def cluster(config: pytest.Config) -> Cluster | None:
    """Return the workers of the run on several machines; None if it is on one. The device has been chosen."""
    return config.stash.get(_CLUSTER, None)


def choose_preset(config: pytest.Config, device: Device) -> tuple[str, str]:
    """Choose the preset for a device, once and for the whole session; return its name and why it is that one."""
    config.stash[_CHOSEN] = chosen = preset_for(device, config.getoption("mp_preset"))
    return chosen


def preset(config: pytest.Config) -> Preset:
    """Return the preset of the run, which has been chosen."""
    return PRESETS[config.stash[_CHOSEN][0]]


def apart(config: pytest.Config, workload: str) -> Apart:
    """Return what the preset does otherwise with a workload."""
    return preset(config).apart.get(workload, Apart())


def seeds(config: pytest.Config, workload: str) -> int:
    """Return the number of trainings of a workload in each mode."""
    return int(config.getoption("mp_seeds") or apart(config, workload).seeds or preset(config).seeds)


def repeats(config: pytest.Config, workload: str) -> int:
    """Return the number of processes that only time a workload in each mode."""
    asked = config.getoption("mp_repeats")
    return apart(config, workload).repeats if asked is None else int(asked)


def modes(config: pytest.Config, workload: str, device: Device) -> tuple[Mode, ...]:
    """Return the modes of a workload: those that the user named, else those of the preset that the device has."""
    return named_modes(config) or default_modes(device, apart(config, workload).modes)


def why_left_out(config: pytest.Config, workload: str, device: Device) -> str | None:
    """Return why a workload of the preset does not fit the device, and what to do; None if it does."""
    own = apart(config, workload)
    if not own.batches or config.getoption("mp_batch_size") or own.batch(device.memory_mib) is not None:
        return None
    gb, batch = own.batches[0]
    return (
        f"{workload} is left out: a batch of {batch} takes {gb} GB of memory, and {device.name} has "
        f"{(device.memory_mib or 0.0) / 1024:.1f} GiB; --mp-batch-size sets a smaller one"
    )


def named_modes(config: pytest.Config) -> tuple[Mode, ...] | None:
    """Return the modes that the user named, or None."""
    names = config.getoption("mp_modes")
    try:
        return select_modes(names) if names else None
    except ValueError as error:
        raise pytest.UsageError(f"{origin.of(config, '--mp-modes')}: {error}") from error


def workloads(config: pytest.Config) -> list[str]:
    """Return the names of the workloads. The user's own are looked up later, when the suite's folders are known."""
    from mpscale.workloads import registry

    names = list(dict.fromkeys(config.getoption("mp_workloads") or preset(config).workloads))
    check_workloads(config, [name for name in names if not registry.is_own(name)])
    return names


def check_workloads(config: pytest.Config, names: Iterable[str], folders: Iterable[Path] = ()) -> None:
    """Import workloads.

    Raises:
        pytest.UsageError: there is no such workload, or it cannot be imported.
    """
    from mpscale.workloads import registry

    try:
        with registry.without_gpus():
            for name in names:
                registry.get(name, list(folders))
    except registry.UnknownWorkload as error:
        raise pytest.UsageError(f"{origin.of(config, '--mp-workloads')}: {error}") from error


def _add_settings(add: Add) -> None:
    add("--mp-steps", type=training_steps, metavar="N", help="steps per training (default: the workload's own)")
    add(
        "--mp-batch-size",
        type=types.several(batch_size),
        metavar="N,...",
        help="examples per step, and per replica (default: the workload's own). With several, such as 64,256,1024, "
        "every workload runs in every mode at each, and a mode is compared with fp32 of the same batch",
    )
    for scaling in SETTABLE:
        _add_scale_option(add, scaling)
    add(
        "--mp-jit",
        choices=("auto", "on", "off"),
        default="auto",
        help="compile train steps and evaluation with XLA; auto: if XLA cannot compile those of a workload in one of "
        "its modes, all its modes run without; on: such a case fails (default: auto)",
    )
    add(
        "--mp-strategy",
        choices=("none", "mirrored", "multiworker"),
        default="none",
        help="mirrored: every step is taken on several GPUs at once, by tf.distribute.MirroredStrategy and without "
        "XLA, each with a batch of its own; multiworker: the same in several processes, by "
        "MultiWorkerMirroredStrategy: one for each GPU, or if TF_CONFIG names workers, one on each of their machines, "
        "where the same command has to be started (default: none)",
    )
    add(
        "--mp-replicas",
        type=types.several(integer(1, _MOST_REPLICAS)),
        metavar="N,...",
        help="with --mp-strategy: on how many GPUs; on a CPU, on how many logical devices or processes that share it. "
        "With several, such as 1,2, every workload runs at each, and the report shows the scaling efficiency (default: "
        "all GPUs that CUDA_VISIBLE_DEVICES leaves)",
    )
    add(
        "--mp-coordinator",
        type=types.checked(Address.parse),
        metavar="HOST:PORT",
        help="with --mp-strategy multiworker and TF_CONFIG: where the session of the first worker waits for those of "
        "the other machines (default: the host of that worker, and the port after its own)",
    )
    add(
        "--mp-autotune",
        choices=("fresh", "shared"),
        help="fresh: on a GPU, XLA tunes its kernels in each process, for up to a minute; shared: the processes of a "
        "workload and mode share what the first one found, and so all run the same kernels "
        f"(default: fresh; shared for the large workloads of the preset {GPU_PRESET})",
    )
    add(
        "--mp-steps-per-call",
        type=integer(1, _MOST_PER_CALL, "whose data must fit into memory together"),
        default=1,
        metavar="K",
        help="steps that one call of the compiled program takes, like Keras' steps_per_execution, so that small steps "
        "do not wait for Python (default: 1). Everything is still recorded per step. Results are the same to the last "
        "bit on a CPU, except for convolutions under XLA, whose steps also become 2 to 3 times as slow there; "
        "comparisons need the same K",
    )
    add(
        "--mp-timing",
        type=types.measuring,
        metavar="SECONDS",
        help="how long each case measures steady-state step times (default: as the preset says)",
    )
    add(
        "--mp-energy",
        type=types.energy,
        metavar="SECONDS",
        help="how long each case measures the energy of a GPU: at least 10, or 0 to leave it out (default: as the "
        "preset says)",
    )


def settings(config: pytest.Config, workload: str | None = None, memory_mib: float | None = None) -> Settings:
    """Return what all cases of a workload have in common; without one, what those of the run do.

    Of several batch sizes, static scales and replicas they have none in common: :func:`swept` returns those.

    Args:
        config: of the session.
        workload: name of the workload.
        memory_mib: memory of the device, for the batch; None if unknown.
    """
    option, ours = config.getoption, preset(config)
    own = Apart() if workload is None else apart(config, workload)
    given = option("mp_batch_size")
    if given:
        batch = given[0] if len(given) == 1 else None
    else:
        batch = own.batch(memory_mib) if own.batches else None
    energy_s = ours.energy_s if own.energy_s is None else own.energy_s
    # --benchmark-disable asks to test what would be benchmarked: everything but the timing.
    timed = not option("benchmark_disable", False) or option("benchmark_enable", False)
    replicas = config.stash.get(_REPLICAS, (1,))
    return Settings(
        jit=option("mp_jit") != "off" and option("mp_strategy") == "none",
        strategy=option("mp_strategy"),
        replicas=replicas[0] if len(replicas) == 1 else 1,
        machines=1 if (workers := cluster(config)) is None else len(workers.workers),
        train_steps=option("mp_steps") or own.train_steps or ours.train_steps,
        batch_size=batch,
        steps_per_call=option("mp_steps_per_call"),
        **{
            str(scaling.setting): value if scaling.argument is None else value[0]
            for scaling in SETTABLE
            for value in [option(f"mp_{scaling.setting}")]
        },
        autotune=option("mp_autotune") or own.autotune,
        timing_s=(option("mp_timing") or ours.timing_s) if timed else 0.0,
        timing_blocks=own.timing_blocks or ours.timing_blocks,
        energy_s=energy_s if option("mp_energy") is None else option("mp_energy"),
    )


def swept(config: pytest.Config) -> tuple[Sequence[int], Sequence[float], Sequence[int]]:
    """Return batch sizes, static scales and numbers of replicas that every workload runs at; none if there is one."""
    batches, scales = config.getoption("mp_batch_size") or (), config.getoption("mp_static_scale")
    replicas = config.stash.get(_REPLICAS, (1,))
    return (
        batches if len(batches) > 1 else (),
        scales if len(scales) > 1 else (),
        replicas if len(replicas) > 1 else (),
    )


def _add_run_options(add: Add) -> None:
    add_results_option(add, "mp-")
    add(
        "--mp-name",
        type=types.checked(run_name),
        metavar="NAME",
        help="name the run, so that `mpscale compare before after` finds it: letters, digits and . _ + - (default: "
        "none; `mpscale name` gives one later)",
    )
    add(
        "--mp-note",
        type=types.checked(lambda text: note_of(as_typed(text))),
        metavar="TEXT",
        help="a note on the run, which its report shows",
    )
    add(
        "--mp-cores",
        type=types.cores,
        metavar="0,2-3",
        help="use only these processor cores (default: all that this process may use)",
    )
    add(
        "--mp-start-method",
        choices=("auto", "fork", "fresh"),
        default="auto",
        help="how the process of a case starts: fork is quick, it copies a process that has imported TensorFlow; fresh "
        "is a new interpreter (default: auto, which is fork, unless that process has touched the GPU)",
    )
    add("--mp-timeout", type=seconds, default=900.0, metavar="SECONDS", help="time limit for each case (default: 900)")
    add(
        "--mp-gpu-allocator",
        choices=("auto", "cuda_malloc_async", "bfc"),
        default="auto",
        help="TensorFlow's GPU memory allocator (default: auto, which is cuda_malloc_async, or bfc if that fails)",
    )
    add(
        "--mp-retries",
        type=integer(0, 100),
        default=1,
        metavar="N",
        help="how many times to retry a case that failed for a cause that may pass, such as a kill or a full disk; "
        "the state of the GPU has its own option, --mp-gpu-retries (default: 1)",
    )
    add(
        "--mp-gpu-retries",
        type=integer(0, 100),
        default=2,
        metavar="N",
        help="how many times to retry a case if the GPU was throttled or was used by other processes (default: 2)",
    )
    add(
        "--mp-cool-down",
        type=seconds,
        default=60.0,
        metavar="SECONDS",
        help="how long to wait at most, before a retry for the state of the GPU, until it is cool and idle (default: "
        "60)",
    )
    add(
        "--mp-keep-suspect",
        action=argparse.BooleanOptionalAction,
        help="keep the status of a case whose GPU was throttled or was used by other processes, rather than marking it "
        "invalid; its column gpu_suspicion has the reason",
    )
    add(
        "--mp-benchmark-table",
        action=argparse.BooleanOptionalAction,
        help="also show pytest-benchmark's table of the step times, some 225 columns wide; it is always shown with "
        "those of its options that are about it, such as --benchmark-compare and --benchmark-histogram",
    )


def run_options(
    config: pytest.Config,
    results: Path,
    selected: Mapping[str, Any],
    interleaved: Mapping[str, Any] | None,
    invocation: Mapping[str, Any] | None = None,
    share: Share | None = None,
    others: Machines | None = None,
) -> Options:
    """Return how the run is made.

    Args:
        config: of the session.
        results: the results folder.
        selected: workloads, modes, seeds and repeats; for run.json.
        interleaved: with which run it is interleaved, if with any; for run.json.
        invocation: how the session was started; for run.json.
        share: the part of a plan that it has, if there are several; for run.json.
        others: the machines that train the same cases.
    """
    from mpscale.harness.supervisor import Options

    option = config.getoption
    method = option("mp_start_method")
    if method == "auto":
        method = "fork"
    name, why = config.stash[_CHOSEN]
    project = config.stash.get(origin.PROJECT, None)
    by_file = {} if project is None else dict.fromkeys(project.texts, project.path.name)
    started = invocation or {}
    by_user = dict.fromkeys(started.get("options", ()), SCRIPT if started.get("program") == SCRIPT else "command line")
    by_user.pop("--mp-shard", None)  # all parts of a run have the same settings
    return Options(
        results=results,
        project=config.rootpath,
        start_method=method,
        timeout_s=option("mp_timeout"),
        asked={
            "preset": name,
            "preset_reason": why,
            **selected,
            "start_method": method,
            "timeout_s": option("mp_timeout"),
            **settings(config).to_json(),
            **{name: list(several) for name, several in zip(_SWEEPABLE, swept(config), strict=True) if several},
            "gpu_allocator": option("mp_gpu_allocator"),
            "cores": sorted(option("mp_cores") or ()) or None,
            "given_by": {**by_user, **by_file} or None,
        },
        gpu_allocator=option("mp_gpu_allocator"),
        retries=option("mp_retries"),
        gpu_retries=option("mp_gpu_retries"),
        cool_down_s=option("mp_cool_down"),
        keep_suspect=bool(option("mp_keep_suspect")),
        interleaved=interleaved,
        invocation=invocation,
        named={key: text for key in (NAME, NOTE) if (text := option(f"mp_{key}"))},
        shard=None if share is None else share.to_json(),
        jit_fallback=option("mp_jit") == "auto",
        strategy=option("mp_strategy"),
        machines=others,
    )


_OVERHEAD_S = 600.0
"""Time per turn for everything but the case: importing TensorFlow, writing reports, running other tests."""


def longest_turn_s(config: pytest.Config) -> float:
    """Return how long a session may be silent while it has the turn."""
    option = config.getoption
    attempts = option("mp_gpu_retries") + option("mp_retries") + 3  # one of them for a case that XLA refuses
    return float(attempts * (option("mp_timeout") + option("mp_cool_down")) + _OVERHEAD_S)


def _add_scale_option(add: Add, scaling: Scaling) -> None:
    """Add the option by which the user sets the arguments of a loss scale."""
    rule = RULES[scaling.rule]
    option = f"--mp-{scaling.setting}".replace("_", "-")
    modes = " and ".join(mode.name for mode in MODES.values() if mode.scaling == scaling)
    if scaling.argument is None:
        defaults = ", ".join(f"{name}={value:.10g}" for name, value in rule.defaults().items())
        others = "".join(
            f"; {mode.name} takes {' and '.join(mode.scaling.takes)}"
            for mode in MODES.values()
            if mode.scaling is not None and mode.scaling.setting == scaling.setting and mode.scaling.takes
        )
        text = (
            f"arguments for the loss scale of {modes}{others}; by default {defaults}, and a growth_interval of the "
            "workload if it has one"
        )
        table = Written('a table such as { initial = 1024 }, or a string such as "initial=1024"', (), table=True)
        add(option, type=OptionType(types.checked(rule.parse), table), default={}, metavar="KEY=VALUE,...", help=text)
    else:
        default = rule.defaults()[scaling.argument]
        text = (
            f"loss scale of {modes}, such as 1024 or 2**24 (default: {default:g}). With several, such as 8,128,2**24, "
            "it runs at each, and each is compared with the same fp32"
        )

        def parse(given: str) -> float:
            return float(rule.parse(f"{scaling.argument}={given}")[str(scaling.argument)])

        add(option, type=types.several(types.checked(parse)), default=(default,), metavar="S,...", help=text)
