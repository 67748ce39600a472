"""An examination as a page for the terminal, or as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mpscale.doctor.device import Figure, Precision
from mpscale.doctor.examine import Examination, Trained
from mpscale.doctor.presets import Advice
from mpscale.report.table import DASH, Table, count, interval, large, number, plural

_WIDTH = 110


def render(found: Examination, as_json: bool) -> str:
    """Return the page, or the same facts as a JSON object."""
    if as_json:
        return json.dumps(found.to_json(), indent=2, ensure_ascii=False, default=str) + "\n"
    parts = [
        _headline(found),
        _section("device", _device(found.device)),
        _section("software", _software(found.software)),
        _section("what is measured", _figures(found.figures)),
        _section("mixed precision", _precision(found.precision)),
        _section("short training", _trained(found.trained)),
        _section("what to run", _presets(found.presets)),
        _section("cautions", _with_cures((each.text, each.cure) for each in found.cautions)),
        _section("notes", [line for note in found.notes for line in _wrap(note, "- ")]),
        _section(
            "to do",
            _with_cures((each.text, each.cure or "see what the driver's own tools say") for each in found.problems),
        ),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _headline(found: Examination) -> str:
    if found.problems:
        return f"mpscale doctor: {plural(len(found.problems), 'thing')} to do, listed at the end"
    kind = str((found.device or {}).get("kind", "")).upper()
    return f"mpscale doctor: a run here is complete for a {kind}"


def _section(title: str, lines: Iterable[str]) -> str:
    body = "\n".join(lines)
    return f"{title}\n{'-' * len(title)}\n{body}" if body else ""


def _device(device: Mapping[str, Any] | None) -> list[str]:
    if device is None:
        return ["none: no run can begin"]
    memory = device.get("memory_mib")
    size = f", {memory:.0f} MiB" if memory else ""
    if device["kind"] == "cpu":
        cpu = device["cpu"]
        flags = ", ".join(cpu["flags"] or ()) or "none known"
        return [
            f"{device['name']} (CPU), {cpu['logical_cores']} usable cores{size}",
            *_wrap(f"instructions that matter here: {flags}"),
        ]
    capability = ".".join(map(str, device["compute_capability"] or ())) or "unknown"
    lines = [f"{device['name']} (GPU), compute capability {capability}{size}"]
    if "now" in device:
        switches = [f"{name} {_switch(device[key])}" for name, key in (("ECC", "ecc"), ("persistence", "persistence"))]
        limit, default = device["power_limit_w"], device.get("power_limit_default_w")
        power = f"power limit {count(limit)} W (default {count(default)} W)"
        lines.append(", ".join([*switches, power, f"{count(device['now']['temperature_c'])} °C now"]))
    return lines


def _software(software: Mapping[str, Any]) -> list[str]:
    if not software:
        return []
    versions = [f"{name} {version or 'not installed'}" for name, version in software["packages"].items()]
    lines = _wrap(f"Python {software['python']}, {', '.join(versions)}")
    cuda = software["cuda_libraries"]
    lines.append(f"CUDA libraries of pip: {f'{len(cuda)} packages' if cuda else 'none'}")
    if software["nvidia_driver"]:
        lines.append(f"NVIDIA driver {software['nvidia_driver']}, for CUDA up to {software['cuda_driver']}")
    else:
        lines += _wrap(f"NVIDIA driver: {software['nvml']}")
    return lines


def _figures(figures: Sequence[Figure]) -> list[str]:
    rows, last = [], ""
    for figure in figures:
        reason = str(figure.reason or "")
        shown = "as above" if reason and reason == last else reason
        way, why = ("\n".join(_wrap(text, width=width)) for text, width in ((figure.way or "", 36), (shown, 60)))
        rows.append([figure.name, figure.answer, way, why])
        last = reason
    return [Table(["figure", "measured", "how", "why not"], rows).text()] if rows else []


def _precision(precision: Precision | None) -> list[str]:
    if precision is None:
        return []
    answers = {"float16": precision.float16, "bfloat16": precision.bfloat16, "TF32": "yes" if precision.tf32 else "no"}
    answers["float8"] = precision.float8
    fast = ", ".join(f"{name}: {answer or 'unknown'}" for name, answer in answers.items())
    return [f"fast here? {fast}", *(line for words in precision.words for line in _wrap(words))]


def _trained(trained: Trained | None) -> list[str]:
    if trained is None:
        return []
    reason = f": {trained.reason}" if trained.reason else ""
    memory = large(trained.gpu_memory_mib, "MiB")
    method = f" ({trained.gpu_memory_method})" if trained.gpu_memory_method else ""
    lines = [
        *_wrap(f"{trained.status}{reason}"),
        f"on {trained.device_name}, {number(trained.wall_time_s)} s in all",
        f"step time {interval(trained.step_time_ms, None, None, ' ms')}, peak GPU memory {memory}{method}, "
        f"allocator {trained.gpu_allocator or DASH}",
    ]
    by_reason: dict[str, list[str]] = {}
    for column, why in trained.empty.items():
        by_reason.setdefault(why, []).append(column)
    for why, columns in by_reason.items():
        lines += _wrap(f"empty: {', '.join(columns)}: {why}")
    return lines


def _presets(advice: Advice | None) -> list[str]:
    if advice is None:
        return []
    times = "; ".join(map(str, advice.durations))
    return [
        *_wrap(f"--mp-preset {advice.preset} fits. {' '.join(advice.words)}"),
        *_wrap(f"Rough times with the modes that run by default: {times}."),
    ]


def _with_cures(found: Iterable[tuple[str, str | None]]) -> list[str]:
    lines = []
    for place, (text, cure) in enumerate(found, 1):
        lines += _wrap(text, f"{place}. ")
        lines += _wrap(cure, "   do: ") if cure else []
    return lines


def _switch(value: bool | None) -> str:
    return "unknown" if value is None else "on" if value else "off"


def _wrap(text: str, mark: str = "", width: int = _WIDTH) -> list[str]:
    indent = " " * len(mark)
    wrapper = textwrap.TextWrapper(width, mark, indent, break_long_words=False, break_on_hyphens=False)
    return wrapper.wrap(text)
