"""How long a GPU computes per step: reading XSpace protos, and profiling real steps."""

import gzip
import shutil
import tempfile
from pathlib import Path

import pytest
import tensorflow as tf
from tensorflow.tsl.profiler.protobuf.xplane_pb2 import XSpace

from mpscale.core.device import Device
from mpscale.core.reason import Code, Reason
from mpscale.worker.device_time import BusyTime, busy_time, first_gpu, profile_steps, read_profile, record

CPU = Device("cpu", "Some CPU")
GPU = Device("gpu", "NVIDIA H200", "GPU-1", (9, 0))
STAND_IN = Device("gpu", "mpscale stand-in A100", "GPU-1", (8, 0))

STATS = ("correlation_id", "kernel_details", "memcpy_details", "Memset_details", "cuda_graph_exec_id", "hlo_op")
KERNEL, COPY, FILL, GRAPH, OPERATION = ((1, 2), (1, 3), (1, 4), (1, 5), (6,))
"""Statistics of an event, as numbers that count from 1 in STATS."""

DERIVED = 0xDEADBEEF - 2**32
"""The id of the first line that repeats others; the id is signed."""


def xspace(*planes, **notes):
    """An XSpace of planes ``(name, lines)`` with lines ``(id, start, events)`` and events ``(start, length, stats)``.

    Times are in ms; an event starts so long after its line.
    """
    profile = XSpace(**notes)
    for name, lines in planes:
        plane = profile.planes.add(name=name)
        for number, stat in enumerate(STATS, 1):
            plane.stat_metadata[number].name = stat
        for line_id, start_ms, events in lines:
            line = plane.lines.add(id=line_id, name=f"Stream #{line_id}", timestamp_ns=round(start_ms * 10**6))
            for start, length, stats in events:
                event = line.events.add(offset_ps=round(start * 10**9), duration_ps=round(length * 10**9))
                for stat in stats:
                    event.stats.add(metadata_id=stat, int64_value=1)
    return profile


def gpu(*lines, number=0):
    return f"/device:GPU:{number}", lines


HOST = ("/host:CPU", [(7, 0, [(0, 100, OPERATION), (1, 98, KERNEL)])])


@pytest.mark.parametrize(
    ("lines", "kernels_ms", "copies_ms", "kernels"),
    [
        pytest.param([(1, 0, [(0, 2, KERNEL), (5, 1, KERNEL)])], 3, 0, 2, id="apart"),
        pytest.param([(1, 0, [(0, 2, KERNEL), (2, 1, KERNEL)])], 3, 0, 2, id="adjacent"),
        pytest.param(
            [(1, 0, [(0, 5, KERNEL), (1, 2, KERNEL), (4, 3, KERNEL)])], 7, 0, 3, id="nested, then overlapping"
        ),
        pytest.param([(1, 0, [(4, 2, KERNEL), (0, 1, KERNEL)])], 3, 0, 2, id="not in order"),
        pytest.param([(1, 0, [(0, 4, KERNEL)]), (2, 0, [(3, 4, KERNEL)])], 7, 0, 2, id="overlapping streams"),
        pytest.param([(1, 10, [(0, 4, KERNEL)]), (2, 13, [(0, 4, KERNEL)])], 7, 0, 2, id="lines that start apart"),
        pytest.param([(1, 0, [(1, 2, KERNEL), (2, 0, KERNEL), (9, 0, KERNEL)])], 2, 0, 3, id="without length"),
        pytest.param(
            [(1, 0, [(0, 2, KERNEL), (1, 3, COPY)]), (2, 0, [(3, 2, FILL), (9, 1, COPY)])],
            2,
            5,
            1,
            id="copies and fills",
        ),
        pytest.param([(1, 0, [(0, 4, GRAPH), (5, 1, KERNEL)])], 5, 0, 2, id="graph as a whole"),
        pytest.param([(1, 0, [(0, 4, GRAPH), (1, 1, KERNEL), (3, 2, KERNEL)])], 5, 0, 3, id="graph and its nodes"),
        pytest.param(
            [(1, 0, [(0, 1, KERNEL)]), *((DERIVED + n, 0, [(0, 50, KERNEL)]) for n in (0, 2, 5, 389))],
            1,
            0,
            1,
            id="derived lines",
        ),
        pytest.param([(1, 0, [(0, 1, KERNEL)]), (2, 0, [(0, 50, OPERATION), (0, 50, ())])], 1, 0, 1, id="neither kind"),
    ],
)
def test_kernels_of_a_gpu_are_united(lines, kernels_ms, copies_ms, kernels):
    assert busy_time(xspace(HOST, gpu(*lines))) == {0: BusyTime(kernels_ms, copies_ms, kernels)}


def test_times_are_exact_to_the_nanosecond_after_years():
    year_ms = 365 * 86400 * 1000
    profile = xspace(gpu((1, 50 * year_ms, [(0, 0.000001, KERNEL), (0.000003, 0.000002, KERNEL)])))
    assert busy_time(profile)[0].kernels_ms == 0.000003


def test_each_gpu_has_its_own_time_and_idle_ones_are_left_out():
    profile = xspace(
        gpu((1, 0, [(0, 1, KERNEL)]), number=1),
        gpu((1, 0, [(0, 3, KERNEL), (0, 9, COPY)]), number=0),
        gpu((1, 0, [(0, 5, COPY)]), number=10),
        gpu(number=2),
        ("/device:GPU:0/more", [(1, 0, [(0, 50, KERNEL)])]),
        ("/device:CUSTOM:GPU:0", [(1, 0, [(0, 50, KERNEL)])]),
    )
    assert busy_time(profile, steps=2) == {1: BusyTime(1, 0, 1, 2), 0: BusyTime(3, 9, 1, 2)}
    assert first_gpu(profile, 2) == BusyTime(3, 9, 1, 2)


@pytest.mark.parametrize(
    "profile",
    [
        pytest.param(XSpace(), id="nothing"),
        pytest.param(xspace(HOST), id="no GPU"),
        pytest.param(xspace(HOST, gpu()), id="no stream"),
        pytest.param(xspace(HOST, gpu((1, 0, [(0, 1, COPY), (2, 1, FILL)]))), id="copies only"),
        pytest.param(xspace(HOST, gpu((1, 0, [(3, 0, KERNEL)]))), id="no time"),
        pytest.param(xspace(HOST, gpu((1, 0, [(0, 1, KERNEL)]), number=1)), id="another GPU"),
        pytest.param(xspace(HOST, errors=["no root access"]), id="CUPTI not allowed"),
    ],
)
def test_gpu_without_kernels_has_a_reason_with_a_cure(profile):
    reason = first_gpu(profile, 3)
    assert reason.code == Code.PROFILER_SILENT
    assert "NVreg_RestrictProfilingToAdminUsers" in reason.cure
    assert all(error in reason.text for error in profile.errors)


@pytest.mark.parametrize("notes", [{"errors": ["it failed"]}, {"warnings": ["5 events dropped"]}])
def test_incomplete_profile_has_a_reason_that_quotes_the_profiler(notes):
    reason = first_gpu(xspace(gpu((1, 0, [(0, 1, KERNEL)])), **notes), 3)
    assert reason.code == Code.PROFILER_SILENT
    assert next(iter(notes.values()))[0] in reason.text


@pytest.mark.parametrize(("step_ms", "share"), [(8, 0.25), (2, 1), (1.95, 1), (1.8, Code.IMPLAUSIBLE)])
def test_share_is_of_the_step_that_was_timed(step_ms, share):
    found = BusyTime(kernels_ms=6, copies_ms=3, kernels=30, steps=3)
    assert (found.kernels_ms_per_step, found.copies_ms_per_step) == (2, 1)
    got = found.share(step_ms)
    assert (got.code if isinstance(got, Reason) else got) == share


RECORDED = {
    # Painted nanosecond by nanosecond, with kernels told by their names: (kernels, ns of them, ns of copies and fills)
    "gpu_workloads_convnet--mixed-dynamic--jit-off--3": (2616, 88015458, 228471),
    "gpu_workloads_convnet--mixed-dynamic--jit-on--3": (444, 11302953, 147398),
    "gpu_workloads_convnet--tf32--jit-off--3": (2316, 181274326, 57119),
    "gpu_workloads_convnet--tf32--jit-on--3": (375, 21476625, 78624),
    "mnist1d-cnn--mixed-dynamic--jit-off--3": (927, 1597189, 130175),
    "mnist1d-cnn--mixed-dynamic--jit-on--3": (162, 396700, 43810),
    "mnist1d-cnn--tf32--jit-off--3": (726, 1213323, 36417),
}


def recorded(name):
    path = Path(__file__).parents[1] / "data" / "xspace" / f"{name}.xplane.pb.gz"
    return gzip.decompress(path.read_bytes())


@pytest.mark.parametrize(("name", "expected"), RECORDED.items(), ids=RECORDED.keys())
def test_profiles_of_an_h200(name, expected):
    kernels, kernel_ns, copy_ns = expected
    profile = XSpace.FromString(recorded(name))
    assert busy_time(profile, 3) == {0: BusyTime(kernel_ns / 1e6, copy_ns / 1e6, kernels, 3)}
    # Each step starts the same kernels.
    assert kernels % 3 == 0
    # No longer than the session, which the profiler notes in nanoseconds of its own.
    (session,) = [plane for plane in profile.planes if plane.name == "Task Environment"]
    stats = {session.stat_metadata[stat.metadata_id].name: stat.uint64_value for stat in session.stats}
    assert kernel_ns < stats["profile_stop_time"] - stats["profile_start_time"]


CONTENT = recorded("mnist1d-cnn--mixed-dynamic--jit-on--3")


@pytest.mark.parametrize(
    "files",
    [
        pytest.param({}, id="none"),
        pytest.param({"vm.xplane.pb": b""}, id="empty"),
        pytest.param({"vm.xplane.pb": CONTENT[: len(CONTENT) // 2]}, id="truncated"),
        pytest.param({"vm.xplane.pb": CONTENT[:-1]}, id="one byte short"),
        pytest.param({"vm.xplane.pb": b"Permission denied"}, id="no XSpace"),
        pytest.param({"a.xplane.pb": CONTENT, "b.xplane.pb": CONTENT}, id="two"),
    ],
)
def test_file_that_cannot_be_read_is_a_reason(tmp_path, files):
    for name, content in files.items():
        (tmp_path / "plugins").mkdir(exist_ok=True)
        (tmp_path / "plugins" / name).write_bytes(content)
    assert read_profile(tmp_path).code == Code.PROFILER_SILENT


def test_file_is_found_below_the_folder(tmp_path):
    folder = tmp_path / "plugins" / "profile" / "2026_11_26"
    folder.mkdir(parents=True)
    (folder / "vm.xplane.pb").write_bytes(CONTENT)
    (folder / "vm.trace.json.gz").write_bytes(b"")
    assert first_gpu(read_profile(tmp_path), 3).kernels == 162


# Real profiles, on the CPU of this machine.


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder of temporary files. Afterwards it is empty, and the profiler free."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert list(tmp_path.iterdir()) == []
    tf.profiler.experimental.start("")
    tf.profiler.experimental.stop(save=False)


@pytest.fixture
def run_steps():
    """Take three real steps; ``run_steps.calls`` counts the calls."""
    weights = tf.Variable(tf.ones((64, 64)))

    @tf.function(autograph=False)  # it would write a temporary file
    def step():
        weights.assign(weights @ weights / 64.0)

    def run():
        run.calls += 1
        for _ in range(3):
            step()

    run.calls = 0
    return run


@pytest.mark.parametrize("device", [CPU, STAND_IN], ids=["CPU", "stand-in"])
def test_nothing_runs_without_a_gpu(temporary, run_steps, device):
    assert profile_steps(run_steps, 3, device).code == Code.NO_GPU
    assert run_steps.calls == 0


def test_steps_run_once_and_are_recorded(temporary, run_steps):
    profile = record(run_steps)
    assert run_steps.calls == 1
    assert "/host:CPU" in [plane.name for plane in profile.planes]
    assert busy_time(profile) == {}


@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="has CUPTI, perhaps")
def test_gpu_that_cupti_does_not_see_has_a_reason(temporary, run_steps):
    reason = profile_steps(run_steps, 3, GPU)
    assert run_steps.calls == 1
    assert (reason.code, bool(reason.cure)) == (Code.PROFILER_SILENT, True)


def test_profile_of_a_gpu_is_that_of_the_steps(temporary, run_steps, monkeypatch):
    """The profiler runs; what it writes is replaced by a profile of an H200, which no machine of the tests can make."""
    export = tf.profiler.experimental.stop

    def stop(save=True):
        export(save)
        (written,) = temporary.rglob("*.xplane.pb")
        written.write_bytes(CONTENT)

    monkeypatch.setattr(tf.profiler.experimental, "stop", stop)
    found = profile_steps(run_steps, 3, GPU)
    monkeypatch.undo()
    assert found == BusyTime(0.3967, 0.04381, 162, 3)


def test_profile_of_the_user_goes_on(temporary, run_steps, tmp_path_factory):
    folder = tmp_path_factory.mktemp("users")
    tf.profiler.experimental.start(str(folder))
    reason = profile_steps(run_steps, 3, GPU)
    tf.profiler.experimental.stop()
    assert (reason.code, run_steps.calls) == (Code.PROFILER_SILENT, 0)
    assert len(list(folder.rglob("*.xplane.pb"))) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_a_step_raises_is_passed_on(temporary, error):
    def run_steps():
        raise error("from the step")

    with pytest.raises(error, match="from the step"):
        profile_steps(run_steps, 3, GPU)


def test_steps_that_stop_the_profiler_cost_the_figure_only(temporary):
    assert profile_steps(lambda: tf.profiler.experimental.stop(save=False), 3, GPU).code == Code.PROFILER_SILENT


def test_profiler_that_does_not_start_is_a_reason(temporary, run_steps, monkeypatch):
    def start(logdir, options=None):
        raise tf.errors.InternalError(None, None, "no CUPTI")

    with monkeypatch.context() as patch:
        patch.setattr(tf.profiler.experimental, "start", start)
        reason = profile_steps(run_steps, 3, GPU)
    assert (reason.code, run_steps.calls) == (Code.PROFILER_SILENT, 0)
    assert "no CUPTI" in reason.text


def test_no_place_for_the_file_is_a_reason(run_steps, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert profile_steps(run_steps, 3, GPU).code == Code.PROFILER_SILENT


def test_folder_that_vanishes_is_a_reason(temporary, run_steps):
    def run():
        run_steps()
        for folder in temporary.iterdir():
            shutil.rmtree(folder)
            folder.write_text("in the way")

    reason = profile_steps(run, 3, GPU)
    for left in temporary.iterdir():
        left.unlink()
    assert reason.code == Code.PROFILER_SILENT
