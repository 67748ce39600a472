"""An examination of this machine, and a short training on its GPU if requested."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpscale.core.case import Case, Settings
from mpscale.core.columns import COLUMNS, FAILED, Topic, measured_columns
from mpscale.core.device import NVIDIA, Device, NoSuchDevice, find_device, vendor_of
from mpscale.core.files.temporary import TemporaryFolder
from mpscale.core.invocation import GivenOption
from mpscale.core.reason import Code, Reason
from mpscale.core.record import Record
from mpscale.doctor import device as devices
from mpscale.doctor import software
from mpscale.doctor.finding import Caution, Finding
from mpscale.doctor.presets import Advice, advice
from mpscale.telemetry import host
from mpscale.telemetry.client import Driver, SilentDriver, open_driver

_TIMEOUT_S = 600.0
"""The driver compiles kernels for minutes when a GPU that is newer than TensorFlow's package is first used."""

_SETTINGS = Settings(train_steps=2, timing_s=0.3, timing_blocks=10, energy_s=0.0)

_GPU_PEAK = "gpu_memory_nvml_peak_mib"
_SHOWN = {"step_time_ms_median", "host_memory_peak_mib", *(name for name in COLUMNS if name.startswith("gpu_"))} - set(
    measured_columns(Topic.ENERGY)
)
"""Columns that depend on the device, except energy, which would take ten seconds of steps."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The result of the short training, with None for unknown values.

    Args:
        status: of its row.
        reason: why the status is not ``ok``.
        device_name: where it ran.
        step_time_ms: median over blocks.
        gpu_memory_mib: peak memory on the GPU in MiB.
        gpu_memory_method: how the peak was measured.
        gpu_allocator: TensorFlow's allocator.
        wall_time_s: seconds of the whole process.
        empty: reasons for empty columns, by column; without energy, which is not measured.
    """

    status: str
    reason: str | None
    device_name: str
    step_time_ms: float | None
    gpu_memory_mib: float | None
    gpu_memory_method: str | None
    gpu_allocator: str | None
    wall_time_s: float | None
    empty: dict[str, str]


@dataclass(slots=True)
class Examination:
    """Everything that was found. Parts that the examination did not reach are empty.

    Args:
        device: properties of the device that a run would use; None if no run can begin.
        figures: whether a run can measure each figure.
        precision: which precisions are fast on the device.
        problems: what to change, each with a cure.
        cautions: what makes figures worse or doubtful, without making a run incomplete.
        notes: other things to know.
        presets: which preset fits; None if no run can begin.
        software: versions.
        options: that a run here would have, or refuse.
        about_options: where they were looked for, in sentences.
        trained: result of the short training, None without one.
    """

    device: dict[str, Any] | None = None
    figures: list[devices.Figure] = field(default_factory=list)
    precision: devices.Precision | None = None
    problems: list[Reason] = field(default_factory=list)
    cautions: list[Caution] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    presets: Advice | None = None
    software: dict[str, Any] = field(default_factory=dict)
    options: Sequence[GivenOption] = ()
    about_options: Sequence[str] = ()
    trained: Trained | None = None

    @property
    def verdict(self) -> int:
        """The exit code: 1 if something should be changed."""
        return 1 if self.problems else 0

    def add(self, findings: Iterable[Finding]) -> None:
        """Add what a check found."""
        for finding in findings:
            if isinstance(finding, Caution):
                self.cautions.append(finding)
            elif isinstance(finding, Reason):
                self.problems.append(finding)
            else:
                self.notes.append(finding)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values, the verdict first."""
        return {
            "verdict": self.verdict,
            "device": self.device,
            "measured": [figure.to_json() for figure in self.figures],
            "precision": self.precision and dataclasses.asdict(self.precision),
            "problems": [{"problem": each.text, "do": each.cure, "code": each.code} for each in self.problems],
            "cautions": [{"caution": each.text, "do": each.cure, "code": each.code} for each in self.cautions],
            "notes": self.notes,
            "presets": self.presets and self.presets.to_json(),
            "software": self.software,
            "options": [dataclasses.asdict(each) for each in self.options],
            "about_options": list(self.about_options),
            "trained": self.trained and dataclasses.asdict(self.trained),
        }


def examine(train: bool, options: Sequence[GivenOption] = (), about_options: Sequence[str] = ()) -> Examination:
    """Examine this machine.

    An unexpected exception becomes one of the problems, and what was found before is still shown.

    Args:
        train: whether to train on the GPU for a moment, too.
        options: that a run here would have.
        about_options: where they were looked for, in sentences.
    """
    found = Examination(options=options, about_options=about_options)
    for each in options:
        if each.problem is not None:
            text = f"{each.where} has {each.option}, which a run refuses: {each.problem}"
            found.add([Reason(Code.REFUSED_OPTION, text, "change it there, or leave it out")])
    driver = open_driver()
    try:
        _examine(found, driver, os.environ, train)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        found.add([Reason(Code.OTHER, f"this examination stopped early ({text})", "report this line to mpscale")])
    finally:
        driver.close()
    return found


def _examine(found: Examination, driver: Driver, environ: Mapping[str, str], train: bool) -> None:
    found.software = software.versions(driver)
    found.add(software.check_versions())
    why_no_gpu: Reason | None = None
    try:
        device: Device | None = find_device(driver.devices, environ, host.cpu())
    except NoSuchDevice as error:
        device, why_no_gpu = None, error.reason
        found.add([error.reason])
    if device is not None and device.kind != "gpu":
        why_no_gpu = devices.why_no_gpu(driver, environ)
        found.add(devices.check_absence(why_no_gpu, environ))
    found.add(software.check_variables(device, environ))
    found.add(filter(None, [host.busy_words()]))
    if device is not None:
        found.presets = advice(device, host.cpu_facts()["logical_cores"])
    if device is not None and device.kind == "gpu":
        _examine_gpu(found, device, driver, environ, train)
    elif device is not None:
        cpu = host.cpu_facts()
        found.device = {**device.to_json(), "cpu": cpu}
        found.figures = devices.figures_without_gpu(Reason(Code.NO_GPU, f"no GPU: {why_no_gpu}"))
        found.precision = devices.precision_of_cpu(cpu["flags"])
    if not train:
        return
    if device is None or device.kind != "gpu":
        text = f"--gpu found no GPU to train on: {why_no_gpu}"
        found.add([Reason(Code.NO_GPU, text, "omit --gpu to examine the CPU, or add a GPU")])
        return
    _train(found, device, driver)


def _examine_gpu(found: Examination, device: Device, driver: Driver, environ: Mapping[str, str], train: bool) -> None:
    """Add the findings about a GPU. If its driver stops answering, no figure of the GPU can be measured."""
    found.device = device.to_json()
    found.precision = devices.precision_of_gpu(device)
    if vendor_of([device]) is NVIDIA:
        found.add(software.check_cuda(device, driver.cuda_version))
        if not device.is_stand_in:
            found.add(software.check_ptxas(environ))
    try:
        answer = driver.facts(device)
        now = driver.look(device)
    except SilentDriver as error:
        found.figures = devices.figures_without_gpu(error.reason)
        found.add([error.reason.worded(f"the GPU cannot be watched: {error.reason}")])
        return
    found.device = {**answer["facts"], "now": {name: value for name, value in now.items() if name != "id"}}
    found.figures = devices.figures_of_gpu(answer["ways"], answer["reasons"])
    found.add(devices.check_figures(found.figures))
    found.add(devices.check_gpu(device, answer["facts"], now))
    found.add(devices.check_speed(answer["facts"], now))
    if not train:
        found.add(devices.check_namespace(now))


def _train(found: Examination, device: Device, driver: Driver) -> None:
    """Train for a moment, like any case of a run. Add the result, and a problem if it failed."""
    # Importing these takes longer than all the rest of doctor.
    from mpscale.harness.run import BenchmarkRun
    from mpscale.harness.supervisor import Options

    case = Case("mnist1d-mlp", "mixed-dynamic", 0, 0, 0, _SETTINGS)
    with TemporaryFolder("doctor") as folder:
        options = Options(folder, folder, "fresh", _TIMEOUT_S, asked={}, retries=0, gpu_retries=0)
        run = BenchmarkRun([case], device, driver, options, lambda case, event: None)
        try:
            record = run.run(case).record
        finally:
            run.finish(0)
    found.trained = trained = _trained(record, device)
    if trained.status in FAILED or trained.status == "unsupported":
        text = f"a short training on {device.name} ended as {trained.status}: {trained.reason}"
        found.add([Reason(Code.OTHER, text, _cure(trained.status, str(record["output_tail"] or "")))])
        return
    facts = found.device or {}
    found.add(devices.check_clock(record["gpu_sm_clock_mhz_median"], facts, "during the short training"))
    found.add(devices.check_listed(record["gpu_memory_method"], record.unavailable.get("gpu_memory_process_peak_mib")))
    if _GPU_PEAK in trained.empty:
        reason = trained.empty[_GPU_PEAK]
        found.add([f"the short training left peak GPU memory empty, and so would a run: {reason}"])


def _trained(record: Record, device: Device) -> Trained:
    return Trained(
        status=str(record["status"]),
        reason=record["status_reason"],
        device_name=record["device_name"] or device.name,
        step_time_ms=record["step_time_ms_median"],
        gpu_memory_mib=record[_GPU_PEAK],
        gpu_memory_method=record["gpu_memory_method"],
        gpu_allocator=record["gpu_allocator"],
        wall_time_s=record["case_wall_time_s"],
        empty={column: str(reason) for column, reason in record.unavailable.items() if column in _SHOWN},
    )


def _cure(status: str, output: str) -> str:
    if status == "invalid":
        return "change what the reason names, and try again"
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), None)
    said = f"; the last line of its output: {last}" if last else ""
    return f"see the reason; a run would end in the same way{said}"
