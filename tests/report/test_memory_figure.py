"""The picture of GPU memory over time, from files of samples as the monitor writes them."""

from __future__ import annotations

import gzip

import pytest
from support.runfolder import GPU, finished, record, write_run
from support.svg import SVG, groups, path_of, root_of, texts

from mpscale.core.run_folder import gpu_path
from mpscale.core.runs import read_run
from mpscale.report.memory_figure import memory_over_time
from mpscale.telemetry.samples import Sample, line_of

PHASES = ("idle", "context-ready", "compiled", "steps-synchronised", "steps-queued", "metric-tried", "trained",
          "evaluated", "timing-start", "timing-end", "energy-end", "profiled")  # fmt: skip


def samples(field="process_memory_mib", top=1000.0, phases=PHASES):
    """A sample every tenth of a second, and one at each phase, a second apart."""
    for tenth in range(10 * len(phases)):
        second, part = divmod(tenth, 10)
        memory = min(top, 100.0 * second)
        yield Sample(tenth / 10, phases[second] if part == 0 else "", **{field: memory})


def run_with(tmp_path, files, **records):
    """A run with a file of samples for some of its cases: by mode, seed and attempt."""
    cases = [record(mode, seed, attempts=attempt) for mode, seed, attempt in files]
    path = write_run(tmp_path, finished(cases), device=GPU)
    for (mode, seed, attempt), rows in files.items():
        file = gpu_path(path, f"toy--{mode}--s{seed}--r0", attempt)
        file.parent.mkdir(exist_ok=True)
        text = rows if isinstance(rows, bytes) else "".join(line_of(row.to_json()) for row in rows).encode()
        file.write_bytes(gzip.compress(text))
    return read_run(path)


def test_each_mode_has_the_memory_of_its_first_process_with_what_it_was_doing(tmp_path):
    run = run_with(
        tmp_path,
        {("fp32", 0, 1): samples(), ("fp32", 1, 1): samples(top=5000.0), ("mixed-bf16", 0, 2): samples(top=500.0)},
    )
    picture = memory_over_time(run)
    root = root_of(picture)
    assert {"toy", "fp32", "mixed-bf16", "peak 1,000 MiB", "peak 500 MiB", "in MiB", "seconds"} <= set(texts(root))
    names = ("first step, compiled", "synchronised steps", "queued steps", "evaluation", "training", "timed steps")
    assert {f"{number} {name}" for number, name in enumerate((*names, "profiler"), 1)} <= set(texts(root))
    high, low = (min(y for _, y in path_of(root, f"gpu-memory-1-{which}")) for which in (1, 2))
    assert high < low - 10
    assert "whole GPU" not in picture.caption


def test_a_line_rises_when_memory_did_and_is_thinned_out(tmp_path):
    rows = [
        Sample(step / 100, "idle" if step == 0 else "", device_memory_mib=float(step >= 5000)) for step in range(10_000)
    ]
    picture = memory_over_time(run_with(tmp_path, {("fp32", 0, 1): rows}))
    line = path_of(root_of(picture), "gpu-memory-1-1")
    assert len(line) == 4 or len(line) == 5
    assert line[1][0] - line[0][0] == pytest.approx((line[-1][0] - line[0][0]) / 2, rel=0.02)
    assert "Memory in use on the whole GPU" in picture.caption


def test_much_memory_is_in_gib(tmp_path):
    found = texts(root_of(memory_over_time(run_with(tmp_path, {("fp32", 0, 1): samples(top=4096.0 * 3)}))))
    assert "in GiB" not in found  # 1,100 MiB are not much
    rows = [Sample(0.0, "idle", process_memory_mib=0.0), Sample(1.0, process_memory_mib=3072.0)]
    found = texts(root_of(memory_over_time(run_with(tmp_path / "much", {("fp32", 0, 1): rows}))))
    assert {"in GiB", "peak 3.00 GiB"} <= set(found)


@pytest.mark.parametrize("text", [b"no samples\n", b'{"time_s": "x"}\n'])
def test_a_broken_file_is_counted_and_costs_only_its_line(tmp_path, text):
    picture = memory_over_time(run_with(tmp_path, {("fp32", 0, 1): samples(), ("tf32", 0, 1): text}))
    assert picture.caption.endswith("Not drawn: 1 process whose samples cannot be read.")
    assert not groups(root_of(picture), "gpu-memory-1-2")


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [Sample(0.0, "idle", device_memory_mib=0.0)],
        [Sample(0.0, power_w=1.0)],
        [Sample(0.0, device_memory_mib=float("nan")), Sample(float("inf"), device_memory_mib=1.0)],
    ],
)
def test_without_memory_in_the_samples_there_is_no_picture(tmp_path, rows):
    assert memory_over_time(run_with(tmp_path, {("fp32", 0, 1): rows})) is None


def test_a_late_or_unknown_phase_has_no_window(tmp_path):
    rows = samples(phases=("idle", "phase-of-tomorrow", "compiled", "timing-start", "timing-end"))
    root = root_of(memory_over_time(run_with(tmp_path, {("fp32", 0, 1): rows})))
    assert [text for text in texts(root) if text[0] in "123" and " " in text] == [
        "1 first step, compiled",
        "2 timed steps",
    ]
    assert len(list(root.iter(f"{SVG}title"))) == 1
