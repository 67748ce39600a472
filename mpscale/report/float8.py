"""The scales of float8 layers at the end of the training, as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable

from mpscale.core.files.reading import parse_json
from mpscale.core.record import values_of
from mpscale.core.runs import Run
from mpscale.report.sections import measured
from mpscale.report.table import Table, count, number, span

_TENSORS = {"inputs": "inputs", "kernel": "kernels", "outputs_grad": "gradients of the outputs"}
_NOTE = (
    "At the end of the training, from smallest to largest over layers and seeds. amax: largest magnitude in the last "
    "1,024 steps. A tensor is divided by its scale and rounded to float8, which ends at 448 for inputs and kernels and "
    "at 57,344 for gradients; what is larger becomes that. cases.csv has each layer (`float8_tensors`)."
)


def float8(run: Run) -> list[Table | str]:
    """Show amax and scale of each kind of tensor, over the layers and seeds of each mode that computes in float8."""
    rows = []
    for workload, mode, records in measured(run, trained=True):
        known = [layers for text in values_of(records, "float8_tensors") if (layers := _layers(text))]
        for tensor, title in _TENSORS.items() if known else ():
            spans = [_span(layer[tensor][place] for layers in known for layer in layers) for place in (0, 1)]
            rows.append([workload, mode, title, count(len(known[0])), *spans])
    return [Table(["workload", "mode", "tensors", "layers", "amax", "scale"], rows), _NOTE] if rows else []


def _layers(text: str) -> list[dict[str, tuple[float, float]]]:
    """{tensor: (amax, scale)} of each layer; none if the cell holds something else, as in a table edited by hand."""
    try:
        found = parse_json(text).values()
        return [{name: (float(one[name]["amax"]), float(one[name]["scale"])) for name in _TENSORS} for one in found]
    except (AttributeError, KeyError, TypeError, ValueError):
        return []


def _span(values: Iterable[float]) -> str:
    """The smallest and the largest value; NaN counts as larger than any."""
    ordered = sorted(values, key=lambda value: (math.isnan(value), value))
    return span([number(ordered[0]), number(ordered[-1])])
