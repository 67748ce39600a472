"""What a case reports of its time: in the steady state, with the input pipeline, and under the profiler."""

from __future__ import annotations

import time

from mpscale.core.blocks import group_columns
from mpscale.core.device import Device
from mpscale.core.processes.events import Channel, Phase
from mpscale.core.reason import Code, Reason
from mpscale.core.record import Findings
from mpscale.worker.built import Built
from mpscale.worker.cluster import replicas_here
from mpscale.worker.device import AllocatorPeak
from mpscale.worker.device_time import profile_steps
from mpscale.worker.feed import Feed, InputFailed
from mpscale.worker.findings import put, report
from mpscale.worker.step import TrainStep
from mpscale.worker.timing import keep_going, time_empty_call, time_one_per_call, time_steps, time_with_input, warm_up

_LEAST_MORE_S = 0.5
"""Shortest time to go on after the timing, to measure energy: during it the counter is read too rarely to end there."""
_PROFILED_S, _FEWEST_PROFILED, _MOST_PROFILED = 0.2, 3, 50
"""About how long to profile, and the fewest and most steps of it: the profile grows with every kernel."""
_WITH_INPUT_SHARE = 4
"""Steps with input are timed for as long as those without, in at least this part of the blocks."""
_SHAPES = "pad batches to one shape, or to a few (bucket_by_sequence_length)"
_ONE_PER_CALL_SHARE = 4
"""With several steps per call, steps of one call each are timed for this part of the time and of the blocks."""


def steady_state(built: Built, energy_s: float, peak: AllocatorPeak, channel: Channel) -> float:
    """Time steps in the steady state, and count energy over these and more steps. Return the median step time in ms."""
    step, settings = built.step, built.case.settings
    if built.feed is not None:
        built.feed.hold()
    if step.first_call(step.steps_per_call):
        step.read_log()
    about_s = warm_up(step)
    channel.phase(Phase.WARM)
    peak.begin_window()
    channel.phase(Phase.TIMING_START)
    start = time.perf_counter()
    timing = time_steps(step, about_s, settings.timing_s, settings.timing_blocks)
    channel.phase(Phase.TIMING_END)
    steps, overflows = timing.steps, timing.overflow_steps
    if energy_s > 0:
        left_s = energy_s - (time.perf_counter() - start)
        more, more_overflows = keep_going(step, timing.steps_per_block, max(left_s, _LEAST_MORE_S))
        channel.phase(Phase.ENERGY_END)
        steps += more
        overflows = None if overflows is None or more_overflows is None else overflows + more_overflows
    channel.energy(steps, overflows)
    examples = built.batch if built.feed is None else built.feed.examples
    values, step_s = timing.values(examples, time_empty_call(step)), timing.step_s.tolist()
    channel.values(values)
    channel.blocks(step_s)
    report(channel, group_columns(step_s))
    return float(values["step_time_ms_median"])


def profiled(step: TrainStep, step_ms: float, device: Device, gpus: int, channel: Channel) -> float | Reason:
    """Take a few more steps under the profiler. Return the ms per step in which the GPU computes, or why unknown.

    ``step_ms`` was timed.
    """
    steps = min(max(round(_PROFILED_S * 1e3 / step_ms), _FEWEST_PROFILED), _MOST_PROFILED)
    steps = int(step.agreed(step.whole_calls(steps)))
    found = Findings()
    if gpus == 1:
        busy = profile_steps(lambda: step.block(steps), steps, device)
    else:
        # Kernels of several GPUs overlap, and their sum is the time of none.
        busy = Reason(Code.NOT_COMPARABLE, "replicas compute at the same time on several devices")
    if isinstance(busy, Reason):
        found.miss(("device_busy_ms_per_step", "device_busy_share"), busy)
    else:
        found.put("device_busy_ms_per_step", busy.kernels_ms_per_step)
        found.put("device_busy_share", busy.share(step_ms))
    report(channel, found)
    channel.phase(Phase.PROFILED)
    return busy if isinstance(busy, Reason) else busy.kernels_ms_per_step


def with_input(feed: Feed, built: Built, step_ms: float) -> Findings:
    """The step time with the pipeline, and the share of it in which the device waits for a batch.

    ``step_ms`` was timed with batches that are held on the device.
    """
    settings, found = built.case.settings, Findings()
    feed.stream()
    columns = ("step_time_ms_with_input", "input_wait_share")
    try:
        blocks = max(settings.timing_blocks // _WITH_INPUT_SHARE, 1)
        with_input_ms = time_with_input(built.step, settings.timing_s, blocks)
    except InputFailed as error:
        if replicas_here(settings) < settings.replicas:
            raise  # the other workers wait for this one's step
        # The training is done, and its figures do not need this one.
        found.miss(columns, Reason(Code.NOT_REACHED, f"the pipeline failed while it was timed: {error}"))
        feed.hold()
        return found
    if feed.too_many_left_out:
        why = "most batches had shapes for which a step would have been compiled while it was timed"
        found.miss(columns, Reason(Code.NOT_COMPARABLE, why, _SHAPES))
    else:
        found.put("step_time_ms_with_input", with_input_ms)
        # Noise may make the step with input the shorter one.
        found.put("input_wait_share", max(1 - step_ms / with_input_ms, 0.0))
    feed.hold()
    return found


def several_per_call(built: Built) -> Findings:
    """What only calls of several steps have. Of the case's timed steps, those of one call each come last."""
    step, settings, found = built.step, built.case.settings, Findings()
    if step.steps_per_call == 1:
        why = Reason(Code.NOT_ASKED_FOR, "every call took one step", "use --mp-steps-per-call")
        found.miss(["first_call_s", "step_time_ms_one_per_call"], why)
        return found
    short = f"no {step.steps_per_call} steps came between two evaluations, and timing was off"
    put(found, "first_call_s", step.first_call_s, Reason(Code.NEVER_HAPPENED, short))
    if settings.timing_s > 0:
        seconds, blocks = settings.timing_s / _ONE_PER_CALL_SHARE, max(settings.timing_blocks // _ONE_PER_CALL_SHARE, 1)
        found.put("step_time_ms_one_per_call", time_one_per_call(step, seconds, blocks))
    return found
