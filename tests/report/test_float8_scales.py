"""The report's table of float8 scales."""

import json

import pytest
from support.runfolder import finished, record, write_run

from mpscale.core.runs import read_run
from mpscale.report.document import document, render


def layer(amax, scale):
    return {tensor: {"amax": amax, "scale": scale} for tensor in ("inputs", "kernel", "outputs_grad")}


def report(tmp_path, *records):
    return render(document(read_run(write_run(tmp_path, finished(records)))))


def test_scales_are_shown_over_layers_and_seeds(tmp_path):
    written = report(
        tmp_path,
        record("fp32"),
        record("mixed-fp8", 0, float8_tensors=json.dumps({"a": layer(4.0, 0.5), "b": layer(2.0, 0.25)})),
        record("mixed-fp8", 2, float8_tensors="edited by hand"),
        record("mixed-fp8", 1, float8_tensors=json.dumps({"a": layer("inf", 8.0), "b": layer(3.0, 0.125)})),
    )
    row = next(line for line in written.splitlines() if "| kernels" in line)
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "toy", "mixed-fp8", "kernels", "2", "2.00 to inf", "0.125 to 8.00"
    ]  # fmt: skip


@pytest.mark.parametrize(("mode", "shown"), [("mixed-bf16", False), ("mixed-fp8", True)])
def test_a_report_of_a_cpu_says_that_it_does_not_multiply_in_float8(tmp_path, mode, shown):
    written = report(tmp_path, record("fp32"), record(mode))
    assert ("A CPU does not multiply in float8" in written) is shown
    assert "Scales of float8" not in written
