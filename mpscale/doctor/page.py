"""An examination as a page for the terminal, or as JSON."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mpscale.core.invocation import GivenOption
from mpscale.doctor.device import Figure, Precision
from mpscale.doctor.examine import Examination, Trained
from mpscale.doctor.presets import Advice
from mpscale.report.table import DASH, Cell, Look, Table, count, interval, json_document, large, number, plural
from mpscale.terminal.streams import PIPE, Surface, visible

_WIDTH = 110
_MARK = re.compile(r"- |\d+\. |   do: ")
_LOOKS: dict[str, Look] = {"yes": "good", "in part": "weak", "no": "unknown"}


def render(found: Examination, as_json: bool, surface: Surface = PIPE) -> str:
    """Return the page for a surface, or the same facts as a JSON object."""
    if as_json:
        return json_document("doctor", found.to_json())
    parts = [
        surface.paint(_headline(found), "bold red" if found.problems else "bold green"),
        _section("device", _device(found.device), surface),
        _section("software", _software(found.software), surface),
        _section("what is measured", (), surface, _figures(found.figures, surface)),
        _section("mixed precision", _precision(found.precision), surface),
        _section("short training", _trained(found.trained), surface),
        _section("options", found.about_options, surface, _options(found.options, surface)),
        _section("what to run", _presets(found.presets), surface),
        _section("cautions", _with_cures((each.text, each.cure) for each in found.cautions), surface),
        _section("notes", [f"- {note}" for note in found.notes], surface),
        _section(
            "to do",
            _with_cures((each.text, each.cure or "see what the driver's own tools say") for each in found.problems),
            surface,
        ),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _headline(found: Examination) -> str:
    if found.problems:
        return f"mpscale doctor: {plural(len(found.problems), 'thing')} to do, listed at the end"
    kind = str((found.device or {}).get("kind", "")).upper()
    return f"mpscale doctor: a run here is complete for a {kind}"


def _section(title: str, lines: Iterable[str], surface: Surface, table: str = "") -> str:
    """Return a section of lines, which are wrapped, and a table."""
    width = min(surface.columns or _WIDTH, _WIDTH)
    body = [*(wrapped for line in lines for wrapped in _wrap(line, width)), *([table] if table else [])]
    return "\n".join([surface.paint(title, "bold"), "-" * len(title), *body]) if body else ""


def _wrap(line: str, width: int) -> list[str]:
    """Break a line between words. What follows is below its first word, not below the mark of a list."""
    mark = _MARK.match(line)
    indent = " " * (mark.end() if mark else 0)
    return textwrap.wrap(visible(line), width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


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
            f"instructions that matter here: {flags}",
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
    lines = [f"Python {software['python']}, {', '.join(versions)}"]
    cuda = software["cuda_libraries"]
    lines.append(f"CUDA libraries of pip: {f'{len(cuda)} packages' if cuda else 'none'}")
    if software["nvidia_driver"]:
        lines.append(f"NVIDIA driver {software['nvidia_driver']}, for CUDA up to {software['cuda_driver']}")
    else:
        lines.append(f"NVIDIA driver: {software['nvml']}")
    return lines


def _figures(figures: Sequence[Figure], surface: Surface) -> str:
    rows, last = [], ""
    for figure in figures:
        reason = str(figure.reason or "")
        shown = "as above" if reason and reason == last else reason
        way, why = ("\n".join(textwrap.wrap(text, width)) for text, width in ((figure.way or "", 36), (shown, 60)))
        rows.append([figure.name, Cell(figure.answer, _LOOKS[figure.answer]), way, why])
        last = reason
    return Table(["figure", "measured", "how", "why not"], rows).text(surface)


def _precision(precision: Precision | None) -> list[str]:
    if precision is None:
        return []
    answers = {"float16": precision.float16, "bfloat16": precision.bfloat16, "TF32": "yes" if precision.tf32 else "no"}
    answers["float8"] = precision.float8
    fast = ", ".join(f"{name}: {answer or 'unknown'}" for name, answer in answers.items())
    return [f"fast here? {fast}", *precision.words]


def _trained(trained: Trained | None) -> list[str]:
    if trained is None:
        return []
    reason = f": {trained.reason}" if trained.reason else ""
    memory = large(trained.gpu_memory_mib, "MiB")
    method = f" ({trained.gpu_memory_method})" if trained.gpu_memory_method else ""
    lines = [
        f"{trained.status}{reason}",
        f"on {trained.device_name}, {number(trained.wall_time_s)} s in all",
        f"step time {interval(trained.step_time_ms, None, None, ' ms')}, peak GPU memory {memory}{method}, "
        f"allocator {trained.gpu_allocator or DASH}",
    ]
    by_reason: dict[str, list[str]] = {}
    for column, why in trained.empty.items():
        by_reason.setdefault(why, []).append(column)
    lines += [f"empty: {', '.join(columns)}: {why}" for why, columns in by_reason.items()]
    return lines


def _options(options: Sequence[GivenOption], surface: Surface) -> str:
    rows = []
    for each in options:
        if each.problem is not None:
            outcome = Cell("refused, see below", "bad")
        else:
            outcome = Cell(f"overridden by {each.overridden_by}" if each.overridden_by else "used")
        rows.append([each.option, each.value, each.where, outcome])
    return Table(["option", "value", "given in", "outcome"], rows).text(surface) if rows else ""


def _presets(advice: Advice | None) -> list[str]:
    if advice is None:
        return []
    times = "; ".join(map(str, advice.durations))
    return [
        f"--mp-preset {advice.preset} fits. {' '.join(advice.words)}",
        f"Rough times with the modes that run by default: {times}.",
    ]


def _with_cures(found: Iterable[tuple[str, str | None]]) -> list[str]:
    lines = []
    for place, (text, cure) in enumerate(found, 1):
        lines.append(f"{place}. {text}")
        lines += [f"   do: {cure}"] if cure else []
    return lines


def _switch(value: bool | None) -> str:
    return "unknown" if value is None else "on" if value else "off"
