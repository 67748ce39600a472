"""What a run answers: worth, advice and what weakens it."""

from __future__ import annotations

import pytest
from support.answers import case, compared
from support.runfolder import GPU, finished, write_run

from mpscale.analysis.answer import Advice, Outcome, Weakness, Worth, answer_of
from mpscale.core.columns import METHOD_VERSION
from mpscale.core.runs import read_run

FAST = {"fp32": 8.0, "mixed-static": 4.4, "mixed-dynamic": 4.5, "mixed-bf16": 4.1}
SLOW = {"fp32": 8.0, "mixed-dynamic": 11.0, "mixed-bf16": 12.0}
IDLE = {"device_busy_share": 0.2}
BUSY = {"host_other_cpu_share": 0.8}


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
        Worth.NOT_SHOWN, Advice.STAY, None,
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
    ("share", "outcome"), [(0.6, Outcome.GOOD), (0.96, Outcome.BAD)], ids=["saves memory", "saves next to nothing"]
)
def test_a_slower_mode_that_saves_memory_is_neither_good_nor_bad(tmp_path, share, outcome):
    memory = {"fp32": 8000.0, "mixed-bf16": 8000.0 * share}
    times = {"as fast": 8.0, "slower": 12.0}
    for name, ms in times.items():
        records = [
            case(mode, seed, (8.0 if mode == "fp32" else ms) * (1 + 0.02 * ((seed + len(mode)) % 3)), workload=name,
                 gpu_memory_nvml_peak_mib=mib)
            for mode, mib in memory.items() for seed in range(3)
        ]  # fmt: skip
        cell = answer(tmp_path / name, *records).cells[name]["mixed-bf16"]
        expected = {"as fast": Outcome.GOOD, "slower": Outcome.UNKNOWN} if outcome is Outcome.GOOD else {
            "as fast": Outcome.UNKNOWN, "slower": Outcome.BAD
        }  # fmt: skip
        assert cell.outcome is expected[name]


@pytest.mark.parametrize("status", ["diverged", "stalled"])
def test_a_mode_that_loses_a_seed_is_bad_and_never_advised(tmp_path, status):
    records = [one for one in compared(FAST) if one["case_id"] != "toy--mixed-bf16--s1--r0"]
    lost = case("mixed-bf16", 1, 4.1, None, status=status)
    found = answer(tmp_path, *records, lost)
    assert found.cells["toy"]["mixed-bf16"].outcome is Outcome.BAD
    assert (found.advice, found.mode) == (Advice.USE, "mixed-static")


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
    Weakness.LOST_CASES: lambda: [*compared(FAST), case("mixed-logmax", 0, None, None, status="crashed")],
}


@pytest.mark.parametrize("weakness", WEAK)
def test_what_weakens_the_figures_is_found(tmp_path, weakness):
    assert weakness in answer(tmp_path, *WEAK[weakness]()).weaknesses
    sound = answer(tmp_path / "sound", *compared(FAST)).weaknesses
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
