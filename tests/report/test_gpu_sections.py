"""The sections of a report about the GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.runfolder import GPU, record
from test_report_markdown import rendered, table

from mpscale.core.columns import COLUMNS, Cell, Over, Sheet

FULL = {
    "device": "gpu",
    "step_time_ms_median": 2.0,
    "gpu_memory_nvml_peak_mib": 1800.0,
    "gpu_memory_method": "process",
    "gpu_memory_context_mib": 400.0,
    "gpu_memory_allocator_peak_mib": 1200.0,
    "gpu_memory_unexplained_mib": 200.0,
    "gpu_memory_unexplained_cause": "queued-steps",
    "gpu_memory_queued_peak_mib": 1800.0,
    "gpu_memory_process_peak_mib": 2000.0,
    "gpu_energy_j_per_step": 0.5,
    "gpu_energy_net_j_per_step": 0.4,
    "gpu_energy_method": "counter",
    "gpu_power_w_mean": 250.0,
    "gpu_sm_clock_mhz_median": 1410.0,
    "gpu_temperature_c_max": 61.0,
    "gpu_power_capped_share": 0.25,
    "gpu_event_reasons": "software power cap",
}


def rows(text, title):
    return [list(row.values()) for row in table(text, title)]


def test_parts_energy_and_state_have_their_tables(tmp_path):
    half = {**FULL, "gpu_energy_j_per_step": 0.25, "gpu_memory_nvml_peak_mib": 1000.0}
    text = rendered(tmp_path, record("fp32", **FULL), record("mixed-dynamic", **half), device=GPU)
    parts = rows(text, "GPU memory by part (MiB)")
    assert parts[0][2:] == ["400.0", "1200", "200.0", "queued-steps", "process"]
    row, _ = table(text, "Memory")
    assert list(row.values())[2:6] == ["1800", "1.00", "1800", "2000"]
    first, second = rows(text, "GPU energy")
    assert first[2:] == ["0.500", "1.00", "0.400", "250", "counter"]
    assert second[2:4] == ["0.250", "0.500"]
    state = rows(text, "GPU state while steps were timed")
    assert state[0][2:] == ["1410", "61.0", "25 %", "software power cap"]


def test_what_the_first_step_alone_took_is_told(tmp_path):
    """Figures of ResNet-50 on an H200, if its allocator's peak fell into the first step as the driver's did."""
    peaks = {"gpu_memory_nvml_peak_mib": 16586.0, "gpu_memory_allocator_synchronised_peak_mib": 15816.9}
    searched = {**FULL, **peaks, "gpu_memory_allocator_timed_peak_mib": 11190.6}
    said = "The first step took more from TensorFlow's allocator than later steps: 4626 MiB for toy fp32."
    assert said in rendered(tmp_path, record("fp32", **searched), record("tf32", **FULL), device=GPU)


@pytest.mark.parametrize("old", [True, False])
def test_a_peak_of_an_older_version_is_told_to_be_of_the_whole_process(tmp_path, old):
    values = {name: value for name, value in FULL.items() if name != "gpu_memory_queued_peak_mib"} if old else FULL
    text = rendered(tmp_path, record("fp32", **values), device=GPU)
    assert ("measured by an older mpscale" in text) == old


def test_the_data_dictionary_decides_which_columns_a_table_has(tmp_path, monkeypatch):
    cell = Cell(Sheet.GPU_STATE, 4, "power by", Over.EACH)
    monkeypatch.setitem(COLUMNS, "gpu_power_source", replace(COLUMNS["gpu_power_source"], cells=(cell,)))
    text = rendered(tmp_path, record("fp32", **FULL, gpu_power_source="instant"), device=GPU)
    (row,) = table(text, "GPU state while steps were timed")
    headers = list(row)
    assert abs(headers.index("power by") - headers.index("hottest (°C)")) == 1
    assert row["power by"] == "instant"


def test_a_refused_ratio_is_explained(tmp_path):
    full = {**FULL, "gpu_allocator": "cuda_malloc_async"}
    other = {**full, "gpu_allocator": "bfc", "gpu_energy_method": "power"}
    records = [record("fp32", **full), record("tf32", **full), record("mixed-dynamic", **other)]
    text = rendered(tmp_path, *records, device=GPU)
    said = [line for line in text.splitlines() if line.startswith("No ratio is given for")]
    assert [line.partition(":")[0] for line in said] == ["No ratio is given for toy mixed-dynamic"] * 2
    assert "`gpu_allocator`" in said[0] and "`gpu_energy_method`" in said[1]


def test_a_stand_in_gpu_is_called_one(tmp_path):
    text = rendered(tmp_path, record("fp32", **FULL), device={**GPU, "name": "mpscale stand-in A100"})
    assert "the CPU trained, and a script" in text


RATES = {"flops_per_step": 5_224_693_497_856, "tflops": 535.4, "tflops_while_busy": 560.0}
SHARES = {"tflops_peak": 989.5, "peak_share": 0.541, "peak_share_while_busy": 0.566}


def test_the_arithmetic_of_a_step_has_its_table(tmp_path):
    text = rendered(tmp_path, record("mixed-dynamic", **FULL, **RATES, **SHARES), device=GPU)
    assert rows(text, "Arithmetic") == [
        ["toy", "mixed-dynamic", "5.22 T", "535", "560", "990", "54 %", "57 %"],
    ]
    assert "Peaks are NVIDIA's" in text


def test_columns_of_the_peak_are_left_out_where_no_row_has_one(tmp_path):
    fp32 = {"flops_per_step": 4160, "tflops": 0.00025}
    text = rendered(tmp_path, record("fp32", **fp32), record("mixed-bf16", flops_per_step=4160))
    assert list(table(text, "Arithmetic")[0]) == ["workload", "mode", "FLOPs per step", "TFLOP/s"]
    assert rows(text, "Arithmetic")[0][2:] == ["4.16 k", "0.000250"]
    assert "most CPUs emulate float16" in text
    assert "## Arithmetic" not in rendered(tmp_path / "older", record("fp32", step_time_ms_median=1.0))
