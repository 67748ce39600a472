"""Pictures read back from their SVG, and how bright colours are."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from support.runfolder import finished, record, write_run, write_steps

from mpscale.core.runs import read_run

SVG = "{http://www.w3.org/2000/svg}"


def run_of(tmp_path, *records, steps=None, **options):
    """A run of these records; ``steps`` has rows of loss, scale and overflow by case."""
    path = write_run(tmp_path, finished(records), **options)
    for case_id, rows in (steps or {}).items():
        lines = "".join(f"{step},{loss},{scale},{overflow}\n" for step, (loss, scale, overflow) in enumerate(rows))
        write_steps(path, case_id, "step,loss,loss_scale,overflow\n" + lines)
    return read_run(path)


def timed(mode, ms, seed=0, **values):
    return record(mode, seed, step_time_ms_median=ms, **values)


def pair(mode, ms, **values):
    """Two processes: a single one shows no speed-up."""
    return [timed(mode, ms, seed, **values) for seed in (0, 1)]


def trained(mode, value, seed, higher=True, **values):
    metric = {"metric_value": value, "metric_name": "accuracy" if higher else "loss", "metric_margin": 0.01}
    return record(mode, seed, metric_higher_is_better=higher, **{**metric, **values})


def root_of(picture):
    return ET.fromstring(picture.svg)


def texts(root):
    return ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]


def groups(root, name):
    return [group for group in root.iter(f"{SVG}g") if group.get("id") == name]


def place_of(root, name, across="x"):
    """Where a point is."""
    (group,) = groups(root, name)
    return float(next(group.iter(f"{SVG}use")).get(across))


def path_of(root, name):
    """The numbers of a line or an area, as pairs of x and y; pieces one after the other."""
    (group,) = groups(root, name)
    numbers = [part for part in next(group.iter(f"{SVG}path")).get("d").split() if not part.isalpha()]
    return [(float(x), float(y)) for x, y in zip(numbers[::2], numbers[1::2], strict=True)]


def luminance(*channels):
    """Relative luminance of red, green and blue, each 0 to 255; WCAG 2.2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (c / 255 for c in channels)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(*colours):
    """Contrast of two colours as ``#rrggbb``; WCAG 2.2."""
    low, high = sorted(luminance(*bytes.fromhex(colour[1:])) for colour in colours)
    return (high + 0.05) / (low + 0.05)
