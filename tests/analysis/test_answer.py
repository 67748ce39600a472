"""What a run answers: worth, advice and what weakens it."""

from __future__ import annotations

import pytest
from support.answers import case, compared, ended
from support.runfolder import GPU, finished, write_run

from mpscale.analysis.answer import Advice, Effect, Weakness, Worth, answer_of
from mpscale.core.columns import METHOD_VERSION
from mpscale.core.runs import read_run

FAST = {"fp32": 8.0, "mixed-static": 4.4, "mixed-dynamic": 4.5, "mixed-bf16": 4.1}
SLOW = {"fp32": 8.0, "mixed-dynamic": 11.0, "mixed-bf16": 12.0}
IDLE = {"device_busy_share": 0.2}
BUSY = {"host_other_cpu_share": 0.8}


NO_METRIC = {"has_metric": False, "metric_name": None}
CRASH = {("mixed-bf16", 0, "crashed"), ("mixed-bf16", 1, "crashed"), ("mixed-bf16", 2, "ok")}
"""What to leave out of complete and of crashed cases, so that one of three crashed."""


def answer(tmp_path, *records, **written):
    return answer_of(read_run(write_run(tmp_path, finished(records), device=GPU, **written)))


SCENARIOS = {
    "faster and as good": (lambda: compared(FAST), Worth.YES, Advice.USE, "mixed-bf16"),
    "faster, the fastest is worse": (
        lambda: compared(FAST, accuracy={"mixed-bf16": 0.5}), Worth.YES, Advice.USE, "mixed-static",
    ),
    "faster on one workload of two": (
        lambda: [*compared(FAST), *compared(SLOW, workload="other")], Worth.PARTLY, Advice.USE, "mixed-bf16",
    ),
    "slower, and as good": (lambda: compared(SLOW), Worth.NO, Advice.STAY, "mixed-dynamic"),
    "slower, and worse": (
        lambda: compared(SLOW, accuracy={"mixed-dynamic": 0.1, "mixed-bf16": 0.1}), Worth.NO, Advice.STAY, None,
    ),
    "faster, but all are worse": (
        lambda: compared(FAST, accuracy=dict.fromkeys(("mixed-static", "mixed-dynamic", "mixed-bf16"), 0.1)),
        Worth.NO, Advice.STAY, None,
    ),
    "perhaps faster": (
        lambda: (case(mode, seed, ms) for mode, three in {"fp32": (8, 9, 7), "mixed-bf16": (6, 7, 8)}.items()
                 for seed, ms in enumerate(map(float, three))),
        Worth.NOT_SHOWN, Advice.MEASURE, None,
    ),
    "as fast, but an interval reaches twice the speed": (
        lambda: (case(mode, seed, ms) for mode, three in {"fp32": (4, 8, 16), "mixed-bf16": (8, 8, 8)}.items()
                 for seed, ms in enumerate(map(float, three))),
        Worth.NOT_SHOWN, Advice.MEASURE, None,
    ),
    "faster, but the workload has no margin": (
        lambda: compared(FAST, metric_margin=None), Worth.NOT_SHOWN, Advice.MEASURE, None,
    ),
    "no mode can run": (
        lambda: [*compared({"fp32": 8.0}), *ended("unsupported", "mixed-fp8")], Worth.NOTHING, Advice.MEASURE, None,
    ),
    "a mode that cannot run beside one that is faster": (
        lambda: [*compared({"fp32": 8.0, "mixed-bf16": 4.1}), *ended("unsupported", "mixed-fp8", workload="other"),
                 *compared({"fp32": 8.0, "mixed-bf16": 4.1}, workload="other")],
        Worth.YES, Advice.USE, "mixed-bf16",
    ),
    "a workload of control experiments alone counts for nothing": (
        lambda: [*compared(FAST), *compared({"fp32": 8.0, "article": 9.0}, workload="other")],
        Worth.YES, Advice.USE, "mixed-bf16",
    ),
    "each mode is good on one workload and worse on the other": (
        lambda: [*compared(FAST, accuracy={"mixed-static": 0.2, "mixed-dynamic": 0.2}),
                 *compared(FAST, accuracy={"mixed-bf16": 0.2}, workload="other")],
        Worth.YES, Advice.USE, None,
    ),
    "faster without a metric, but a process crashed": (
        lambda: [one for one in [*compared(FAST | {"mixed-static": 9.0, "mixed-dynamic": 9.0}, **NO_METRIC),
                                 *ended("crashed", "mixed-bf16", **NO_METRIC)]
                 if (one["mode"], one["seed"], one["status"]) not in CRASH],
        Worth.NOT_SHOWN, Advice.MEASURE, None,
    ),
    "one process": (lambda: compared(FAST, seeds=1), Worth.CANNOT_TELL, Advice.MEASURE, None),
    "an idle GPU": (lambda: compared(FAST, **IDLE), Worth.CANNOT_TELL, Advice.MEASURE, None),
    "no fp32": (lambda: compared({"mixed-bf16": 4.0}), Worth.NOTHING, Advice.MEASURE, None),
    "fp32 alone": (lambda: compared({"fp32": 4.0}), Worth.NOTHING, Advice.MEASURE, None),
    "no case": (lambda: [], Worth.NOTHING, Advice.MEASURE, None),
    "faster without a metric": (
        lambda: compared(FAST, has_metric=False, metric_value=None), Worth.YES, Advice.USE, "mixed-bf16",
    ),
    "a control experiment that is fast": (
        lambda: compared({"fp32": 8.0, "mixed-unscaled": 4.0}), Worth.NOTHING, Advice.MEASURE, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_answer(tmp_path, name):
    records, worth, advice, mode = SCENARIOS[name]
    found = answer(tmp_path, *records())
    assert (found.worth, found.advice, found.mode) == (worth, advice, mode)


@pytest.mark.parametrize(
    ("share", "effect"), [(0.6, Effect.GOOD), (0.96, Effect.BAD)], ids=["saves memory", "saves next to nothing"]
)
def test_a_slower_mode_that_saves_memory_is_neither_good_nor_bad(tmp_path, share, effect):
    memory = {"fp32": 8000.0, "mixed-bf16": 8000.0 * share}
    times = {"as fast": 8.0, "slower": 12.0}
    for name, ms in times.items():
        records = [
            case(mode, seed, (8.0 if mode == "fp32" else ms) * (1 + 0.02 * ((seed + len(mode)) % 3)), workload=name,
                 gpu_memory_nvml_peak_mib=mib)
            for mode, mib in memory.items() for seed in range(3)
        ]  # fmt: skip
        cell = answer(tmp_path / name, *records).cells[name]["mixed-bf16"]
        expected = {"as fast": Effect.GOOD, "slower": Effect.UNKNOWN} if effect is Effect.GOOD else {
            "as fast": Effect.UNKNOWN, "slower": Effect.BAD
        }  # fmt: skip
        assert cell.effect is expected[name]


@pytest.mark.parametrize("status", ["diverged", "stalled"])
def test_a_mode_that_loses_a_seed_is_bad_and_never_advised(tmp_path, status):
    records = [one for one in compared(FAST) if one["case_id"] != "toy--mixed-bf16--s1--r0"]
    lost = case("mixed-bf16", 1, 4.1, None, status=status)
    found = answer(tmp_path, *records, lost)
    assert found.cells["toy"]["mixed-bf16"].effect is Effect.BAD
    assert (found.advice, found.mode) == (Advice.USE, "mixed-static")


def test_each_workload_has_its_own_mode_if_none_is_good_on_all(tmp_path):
    records, *_ = SCENARIOS["each mode is good on one workload and worse on the other"]
    assert answer(tmp_path, *records()).choices == {"toy": "mixed-bf16", "other": "mixed-static"}


def test_a_training_that_fp32_lost_too_is_no_fault_of_a_mode(tmp_path):
    found = answer(tmp_path, *(case(mode, seed, 8.0, None, status="diverged") for mode in FAST for seed in range(3)))
    assert not any(cell.is_worse for cell in found.serious)
    alone = answer(tmp_path / "alone", *ended("diverged", "mixed-bf16"))
    assert all(cell.is_worse for cell in alone.serious)


WEAK = {
    Weakness.EMULATED: lambda: compared(FAST, device="cpu"),
    Weakness.ONE_PROCESS: lambda: compared(FAST, seeds=1),
    Weakness.IDLE: lambda: compared(FAST, **IDLE),
    Weakness.BUSY: lambda: compared(FAST, **BUSY),
    Weakness.DISPATCH: lambda: compared(FAST, dispatch_bound=True, dispatch_share=0.7),
    Weakness.WITHOUT_XLA: lambda: compared(FAST, jit=False),
    Weakness.UNJUDGED: lambda: compared(FAST, seeds=1),
    Weakness.NO_METRIC: lambda: compared(FAST, has_metric=False, metric_value=None),
    Weakness.NO_BASELINE: lambda: compared({"mixed-bf16": 4.0}),
    Weakness.BASELINE_FAILED: lambda: [*ended("crashed", "fp32"), *compared({"mixed-bf16": 4.0})],
    Weakness.BASELINE_OOM: lambda: [*ended("oom", "fp32"), *compared({"mixed-bf16": 4.0})],
    Weakness.BASELINE_LOST: lambda: [*ended("diverged", "fp32"), *compared({"mixed-bf16": 4.0})],
    Weakness.UNTIMED: lambda: [*compared(FAST), *ended("crashed", "mixed-logmax")],
    Weakness.INCOMPLETE: lambda: [*compared(FAST), *ended("timeout", "mixed-logmax")],
    Weakness.UNCLEAR_METRIC: lambda: compared(FAST, metric_higher_is_better=None),
    Weakness.UNKNOWN_DEVICE: lambda: compared(FAST, device=None),
    Weakness.UNCOMPARED: lambda: compared({"tf32": 8.0, "mixed-bf16": 4.0}),
    Weakness.LOST_CASES: lambda: [*compared(FAST), case("mixed-logmax", 0, None, None, status="crashed")],
}


@pytest.mark.parametrize("weakness", WEAK)
def test_what_weakens_the_figures_is_found(tmp_path, weakness):
    assert weakness in answer(tmp_path, *WEAK[weakness]()).weaknesses
    sound = answer(tmp_path / "sound", *compared(FAST), *ended("unsupported", "mixed-fp8")).weaknesses
    assert weakness not in sound


@pytest.mark.parametrize(
    ("written", "weakness"),
    [
        ({"finish": False}, Weakness.UNFINISHED),
        ({"planned": ["toy--fp32--s7--r0"]}, Weakness.NOT_STARTED),
        ({"torn": b"{oops\n"}, Weakness.UNREADABLE),
        ({"method_version": METHOD_VERSION - 1}, Weakness.OLDER_METHOD),
    ],
)
def test_what_weakens_the_whole_run_is_found(tmp_path, written, weakness):
    assert weakness in answer(tmp_path, *compared(FAST), **written).weaknesses


def test_tf32_is_the_baseline_where_it_was_timed_and_memory_is_compared_with_it(tmp_path):
    memory = {"tf32": 8000.0, "mixed-bf16": 4800.0}
    records = [
        case(mode, seed, ms * (1 + 0.01 * seed), gpu_memory_nvml_peak_mib=memory[mode])
        for mode, ms in {"tf32": 8.0, "mixed-bf16": 5.0}.items() for seed in range(3)
    ]  # fmt: skip
    found = answer(tmp_path, *records)
    assert found.baselines["toy"]["mode"] == "tf32"
    assert found.cells["toy"]["mixed-bf16"].row["gpu_memory_ratio"] == pytest.approx(0.6)


def test_control_experiments_come_last_and_count_for_nothing(tmp_path):
    found = answer(tmp_path, *compared({"fp32": 8.0, "mixed-unscaled": 4.0, "mixed-logmax": 5.0}))
    assert found.modes == ("mixed-logmax", "mixed-unscaled")
    assert [cell.row["mode"] for cell in found.serious] == ["mixed-logmax"]
    assert found.mode == "mixed-logmax"
