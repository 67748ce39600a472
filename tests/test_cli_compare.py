"""`mpscale compare` on runs with made-up figures."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest
from support.runfolder import CPU, GPU, finished, record, write_run

from mpscale.cli import main
from mpscale.core.case import CaseId, Settings, Variant, series_key
from mpscale.core.columns import METHOD_VERSION
from mpscale.core.mode import MODES
from mpscale.core.record import Record

BEFORE, AFTER = "20260101T000000Z-test-cpu-aaaa", "20260102T000000Z-test-cpu-bbbb"
QUIET = (0.998, 1.0, 1.002, 0.999, 1.001)
NOISY = (0.8, 1.0, 1.2, 0.9, 1.1)


def swept(cases, batch=None, scale=None):
    """The same rows as a sweep has them."""
    variant = Variant(batch, scale)
    return [
        Record({**one.to_json(), **variant.columns(), "case_id": str(CaseId(*one.place, *one.key, variant))})
        for one in cases
    ]


def key(mode="fp32", workload="toy", digest="sha256:1", method=METHOD_VERSION, batch=20, steps=30, **settings):
    found = series_key(MODES[mode], workload, digest, batch, steps, Settings(**settings))
    return found.replace(f"method={METHOD_VERSION}", f"method={method}")


def rows(mode="fp32", ms=2.0, spread=QUIET, workload="toy", status="ok", **values):
    """One record per process: two trainings, then repeats."""
    values = {"series_key": key(mode, workload), "method_version": METHOD_VERSION, "device_name": "Test CPU", **values}
    found = []
    for number, factor in enumerate(spread):
        trained = {"metric_value": 0.9, "metric_margin": 0.01, "metric_higher_is_better": True} if number < 2 else {}
        times = {"step_time_ms_median": ms * factor} if status == "ok" else {"status_reason": "it broke"}
        place = {"seed": number, "repeat": 0} if number < 2 else {"seed": 0, "repeat": number}
        found.append(record(mode, workload=workload, status=status, **{**trained, **times, **place, **values}))
    return found


@pytest.fixture
def compare(tmp_path, capsys, monkeypatch):
    """Run the command on two or more runs; return its exit code and output."""
    monkeypatch.chdir(tmp_path)

    def run(before, after, *arguments, device=CPU, **info):
        write_run(tmp_path / "results", finished(before), name=BEFORE)
        write_run(tmp_path / "results", finished(after), name=AFTER, device=device, **info)
        return command(BEFORE, AFTER, *arguments)

    def command(*arguments):
        code = main(["compare", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    run.command = command
    return run


SAME = [one for mode in ("fp32", "mixed-dynamic") for one in rows(mode)]
GATES = ("--fail-on", "step_time>5%,missing,metric")


@pytest.mark.parametrize(
    ("before", "after", "arguments", "code", "said"),
    [
        pytest.param(SAME, SAME, GATES, 0, ["same"], id="the same figures"),
        pytest.param(
            SAME,
            [*rows(ms=2.6), *rows("mixed-dynamic")],
            GATES,
            1,
            [
                "B against A: 2 rows; step time 1 slower, 1 the same; metric 2 as good",
                "step_time>5%",
                "fired",
                "toy fp32",
                "+30.0%",
                "2 to 2.6 ms",
                "5 and 5 processes",
            ],
            id="30 % slower",
        ),
        pytest.param(SAME, [*rows(ms=1.4), *rows("mixed-dynamic")], GATES, 0, ["faster"], id="faster"),
        pytest.param(rows(spread=NOISY), rows(spread=NOISY), GATES, 3, ["too noisy for 5%"], id="noise"),
        pytest.param(rows(spread=NOISY), rows(spread=NOISY), (*GATES, "--strict"), 1, ["cannot-tell"], id="strict"),
        pytest.param(rows(spread=NOISY), rows(spread=NOISY), (), 0, ["no difference shown"], id="noise without a gate"),
        pytest.param(SAME, rows(), GATES, 1, ["missing", "no such row"], id="a row is gone"),
        pytest.param(
            SAME, rows(), ("--fail-on", "step_time>5%"), 3, ["missing: no such row"], id="and only time asked"
        ),
        pytest.param(
            SAME,
            [*rows(), *rows("mixed-dynamic", workload="toi")],
            GATES,
            1,
            ["toi", "new", "missing"],
            id="a renamed workload",
        ),
        pytest.param(
            SAME, [*rows(), *rows("mixed-dynamic", status="crashed")], GATES, 1, ["crashed: it broke"], id="all crashed"
        ),
        pytest.param(
            SAME,
            [*rows(), *rows("mixed-dynamic")[1:], *rows("mixed-dynamic", status="timeout")[:1]],
            GATES,
            1,
            ["failed here but not in the baseline: toy--mixed-dynamic--s0--r0 timeout"],
            id="one crashed",
        ),
        pytest.param(
            SAME,
            [*rows(), *rows("mixed-dynamic", series_key=key("mixed-dynamic", steps=40))],
            GATES,
            1,
            ["not-comparable", "steps 30 against steps 40"],
            id="other settings in one row",
        ),
        pytest.param(
            SAME,
            [*rows(), *rows("mixed-dynamic", metric_value=0.8)],
            ("--fail-on", "metric"),
            1,
            ["worse: -0.1"],
            id="a worse metric",
        ),
        pytest.param(
            rows("mixed-static", overflow_steps=0, attempted_steps=100),
            rows("mixed-static", overflow_steps=2, attempted_steps=100),
            ("--fail-on", "overflow_rate>0.01"),
            1,
            ["0.02 of the steps overflowed, 0 in the baseline"],
            id="overflows",
        ),
        pytest.param(
            rows(host_memory_peak_mib=100.0),
            rows(host_memory_peak_mib=130.0),
            ("--fail-on", "host_memory>20%"),
            1,
            ["more", "+30.0%"],
            id="host memory without any spread",
        ),
        pytest.param(
            SAME, SAME, ("--fail-on", "gpu_memory>3%"), 3, ["no row of the baseline has gpu_memory"], id="no GPU"
        ),
        pytest.param(
            rows(spread=(1.0,)), rows(spread=(1.0,)), GATES, 3, ["one process gives no spread"], id="one each"
        ),
        pytest.param(
            SAME, [*rows(ms=2.1), *rows("mixed-dynamic")], ("--threshold", "20%"), 0, ["same"], id="a wider threshold"
        ),
    ],
)
def test_two_runs_get_verdicts_and_an_exit_code(compare, before, after, arguments, code, said):
    found, text = compare(before, after, *arguments)
    assert found == code, text
    for words in said:
        assert words in text


@pytest.mark.parametrize(
    ("after", "arguments", "message"),
    [
        pytest.param(
            rows(series_key=key(method=99)), (), f"method {METHOD_VERSION} against method 99; use --force", id="method"
        ),
        pytest.param(rows(series_key=key(batch=9)), (), "batch 20 against batch 9; use --compare-by name", id="batch"),
        pytest.param(rows(series_key=key(jit=False)), (), "jit on against jit off", id="jit"),
        pytest.param(
            rows(series_key=key(steps_per_call=20)),
            (),
            "steps_per_call 1 (the default) against steps_per_call 20",
            id="calls",
        ),
        pytest.param(
            rows(series_key=key("mixed-dynamic", dynamic_scale={"growth_interval": 200})),
            (),
            "growth_interval 2000 (the default) against growth_interval 200",
            id="growth",
        ),
        pytest.param(rows(series_key=key(timing_s=4.0)), (), "timing 2s/50 against timing 4s/50", id="timing"),
        pytest.param(rows(series_key="toy/x"), (), "digest sha256:1 against no digest", id="unreadable key"),
        pytest.param(
            rows(series_key=key(digest="sha256:2")),
            (),
            "the model, its training or its data differ: digest sha256:1 against digest sha256:2; use --compare-by "
            "name to judge versions of a model, or --force to compare them all the same",
            id="model",
        ),
        pytest.param(rows(), ("--fail-on", "speed"), "'speed' is not a gate", id="gate"),
        pytest.param(rows(), ("--fail-on", "step_tme>5%"), "did you mean step_time?", id="misspelt"),
        pytest.param(rows(), ("--fail-on", "step_time"), "lacks a threshold; write step_time>5%", id="no threshold"),
        pytest.param(
            rows(),
            ("--fail-on", "step_time>0.05"),
            "write step_time>5%, or 0.05% if you mean that",
            id="no percent sign",
        ),
        pytest.param(
            rows(), ("--fail-on", "metric>1%"), "a limit of a metric is in its own unit", id="percent of metric"
        ),
        pytest.param(rows(), ("--fail-on", "overflow_rate>7"), "a rate is at most 1", id="rate"),
        pytest.param(rows(), ("--fail-on", "step_time=5%"), "'step_time=5%' is not a gate", id="sign"),
        pytest.param(
            rows(), ("--threshold", "5"), "'5' has no unit: the threshold is a percentage; write 5%", id="no unit"
        ),
        pytest.param(rows(), ("--threshold", "0.05"), "write 5%, or 0.05% if you mean that", id="a share"),
        pytest.param(
            rows(),
            ("--threshold", "0"),
            "'0' is not a percentage above 0 and at most 10000%; write one such as 5%",
            id="threshold",
        ),
    ],
)
def test_wrong_use_is_refused(compare, after, arguments, message):
    code, text = compare(rows(), after, *arguments)
    assert code == 2
    assert message in text
    assert text.startswith("mpscale: error: ")
    assert len(text.splitlines()) == 1


def test_force_compares_what_was_measured_differently(compare):
    code, text = compare(rows(), rows(ms=3.0, series_key=key(method=99)), "--force")
    assert code == 0
    assert "slower" in text
    assert f"method {METHOD_VERSION} against method 99" in text


ON_GPU = {"device": "gpu", "device_name": "Test GPU"}


def test_different_devices_are_shown_side_by_side_ratios_first(compare):
    before = [*rows(), *rows("mixed-dynamic", ms=3.0)]
    after = [
        *rows(ms=0.5, gpu_memory_nvml_peak_mib=1000.0, **ON_GPU),
        *rows("mixed-dynamic", ms=0.2, gpu_memory_nvml_peak_mib=600.0, **ON_GPU),
    ]
    code, text = compare(before, after, device=GPU)
    assert code == 0
    places = [
        text.index(title) for title in ("Speed-up over fp32", "GPU memory over fp32", "Final metric", "Step time")
    ]
    assert places == sorted(places)
    assert "0.67x" in text
    assert "2.50x" in text
    assert "0.600" in text
    assert "verdict" not in text


def test_gates_are_refused_between_devices_unless_forced(compare):
    code, text = compare(rows(), rows(**ON_GPU), "--fail-on", "step_time>5%", device=GPU)
    assert code == 2
    assert "the runs are on different devices, so gates on a change cannot judge them" in text
    code, text = compare.command(BEFORE, AFTER, "--fail-on", "step_time>5%", "--force")
    assert code == 0, text


@pytest.mark.parametrize(("strict", "code"), [("false", 3), ("true", 1)])
def test_gates_of_the_project_are_not_judged_between_two_devices(compare, tmp_path, strict, code):
    (tmp_path / "pyproject.toml").write_text(f'[tool.mpscale]\nfail-on = ["step_time>5%"]\nstrict = {strict}\n')
    found, text = compare(rows(), rows(**ON_GPU), device=GPU)
    assert found == code
    assert "the runs are on different devices: no gate of [tool.mpscale] on a change was judged" in text


@pytest.mark.parametrize(("limit", "code"), [("step_time<=3ms", 0), ("step_time<=1ms", 1)])
def test_a_limit_is_judged_on_any_device(compare, limit, code):
    found, text = compare(rows(), rows(**ON_GPU), "--fail-on", limit, "--format=markdown", "-o", "out.md", device=GPU)
    assert found == code, text
    assert code == 0 or "fired: step_time<=1ms: toy fp32: 2 ms (5 processes, 95 % interval 1.996 to 2.004)" in text


def test_a_table_of_two_devices_is_refused(compare, tmp_path):
    from mpscale.core.record import to_csv

    path = tmp_path / "two.csv"
    path.write_text(to_csv([*rows(), *rows("mixed-dynamic", device_name="Another CPU")]))
    code, text = compare.command(path, path)
    assert code == 2
    assert "holds cases of Test CPU and of Another CPU; compare runs of one device each" in text


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"cpu": {"logical_cores": 1}, "variables": {}}, "1 core"),
        ({"cpu": {"logical_cores": 2}, "variables": {"ONEDNN_MAX_CPU_ISA": "AVX2"}}, "ONEDNN_MAX_CPU_ISA=AVX2"),
        (
            {"cpu": {"logical_cores": 2}, "variables": {"XLA_FLAGS": "--xla_a=1 --xla_cpu_max_isa=AVX2"}},
            "xla_cpu_max_isa=AVX2",
        ),
    ],
)
def test_a_cpu_with_fewer_cores_or_instructions_is_another_device(compare, tmp_path, facts, named):
    write_run(
        tmp_path / "results",
        finished(rows()),
        name="20260103T000000Z",
        environment={"device": CPU, "cpu": {"logical_cores": 2}, "variables": {}},
    )
    write_run(tmp_path / "results", finished(rows()), name="20260104T000000Z", environment={"device": CPU, **facts})
    code, text = compare.command("20260103", "20260104")
    assert code == 0
    assert named in text
    assert "Speed-up" not in text  # fp32 alone has none
    assert "Step time" in text
    assert "verdict" not in text


def test_a_fact_that_older_runs_lack_is_not_a_difference_of_the_environments(compare, tmp_path):
    for name, device in (("20260103T000000Z", CPU), ("20260104T000000Z", {**CPU, "vendor": None})):
        write_run(tmp_path / "results", finished(rows()), name=name, environment={"device": device, "os": name})
    _, text = compare.command("20260103", "20260104")
    assert "differences in the environment" in text
    assert "vendor" not in text


def test_three_runs_at_once(compare, tmp_path):
    compare(SAME, [*rows(ms=2.6), *rows("mixed-dynamic")])
    write_run(tmp_path / "results", finished(SAME), name="20260105T000000Z-third", device=GPU)
    code, text = compare.command(BEFORE, AFTER, "20260105", "--fail-on", "missing", "--force")
    assert code == 0, text
    assert "B against A: step time" in text
    assert "C against A: step time" in text
    assert "Speed-up over fp32, within each run" in text


def test_a_shift_of_all_rows_is_shown_as_their_median(compare):
    modes = ("fp32", "mixed-static", "mixed-dynamic", "mixed-bf16")
    before, after = ([one for mode in modes for one in rows(mode, ms=ms)] for ms in (2.0, 1.6))
    _, text = compare(before, after)
    assert "step time 4 faster; median change of all rows -20.0%" in text


def test_csv_holds_every_figure_and_its_verdict(compare):
    _, text = compare(SAME, [*rows(ms=2.6), *rows("mixed-dynamic", workload="toi")], "--format", "csv")
    found = list(csv.DictReader(text.splitlines()))
    first = next(row for row in found if row["quantity"] == "step_time")
    assert (first["run"], first["workload"], first["mode"], first["verdict"]) == (AFTER, "toy", "fp32", "slower")
    assert float(first["change"]) == pytest.approx(0.3)
    assert [(row["workload"], row["state"]) for row in found if not row["quantity"]] == [
        ("toy", "missing"),
        ("toi", "new"),
    ]


def test_json_holds_rows_and_gates(compare):
    code, text = compare(SAME, SAME, "--format", "json", *GATES)
    assert code == 0
    found = json.loads(text)
    (one,) = found["comparisons"]
    assert one["same_device"] is True
    assert [row["changes"]["step_time"]["verdict"] for row in one["rows"]] == ["same", "same"]
    assert {gate["outcome"] for gate in found["gates"]} == {"passed"}


def test_output_goes_to_a_file_and_what_fired_to_the_terminal(compare, tmp_path):
    after = [*rows(ms=2.6), *rows("mixed-dynamic")]
    code, text = compare(SAME, after, "--format", "markdown", "-o", tmp_path / "out.md", *GATES)
    assert code == 1
    assert text.startswith("mpscale: fired: step_time>5%: toy fp32: +30.0%")
    written = (tmp_path / "out.md").read_text()
    assert written.startswith("## Runs\n")
    assert "| toy" in written


def test_the_command_line_overrides_settings_of_the_project(compare, tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.mpscale]\nfail-on = ["step_time>5%"]\nstrict = true\n')
    assert compare(rows(spread=NOISY), rows(spread=NOISY))[0] == 1
    assert compare.command(BEFORE, AFTER, "--fail-on", "missing")[0] == 0
    (tmp_path / "pyproject.toml").write_text('[tool.mpscale]\nfail-on = "metric"\n')
    code, text = compare.command(BEFORE, AFTER)
    assert code == 2
    assert "fail-on of [tool.mpscale] must be a list of strings, not 'metric'" in text


def test_a_cases_csv_from_elsewhere_can_be_compared(compare, tmp_path):
    from mpscale.report.files import rebuild

    compare(SAME, SAME)
    path = tmp_path / "elsewhere.csv"
    path.write_bytes((rebuild(tmp_path / "results" / "runs" / AFTER).path / "cases.csv").read_bytes())
    code, text = compare.command(BEFORE, path, *GATES)
    assert code == 0, text
    assert "same" in text


HEADER = "case_id,workload,mode,seed,repeat,status,step_time_ms_median"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,mean\nx,1\n", "is not a cases.csv of mpscale: it has no column workload, mode"),
        ("", "is not a cases.csv of mpscale"),
        (HEADER + "\n", "holds no case"),
        (HEADER + "\na,toy,fp32,0,0,ok\n", "line 2: does not have as many cells as the header"),
        (HEADER + "\na,toy,fp32,0,0,ok,fast\n", "line 2: expected a number such as 1234.5, not 'fast'"),
        (HEADER + "\na,toy,fp32,0,0,ok,-1\n", "step_time_ms_median is -1.0; it must be above 0"),
        (HEADER + "\na,toy,fp32,0,0,fine,1\n", "'fine' is not a status of a case"),
        (HEADER + "\na,toy,fp32,0.5,0,ok,1\n", "expected a whole number, not '0.5'"),
        (HEADER + "\na,toy,fp32,,0,ok,1\n", "the record of a has no seed"),
        (HEADER + "\na,toy,fp32,0,0,ok,1\na,toy,fp32,0,0,ok,1\n", "holds a twice"),
        (HEADER + ",schema_version\na,toy,fp32,0,0,ok,1,99\n", "written with schema version 99"),
        (HEADER + ",jit\na,toy,fp32,0,0,ok,1,maybe\n", "expected True or False, not 'maybe'"),
        ('"a\n', "cannot be read as CSV"),
        ("\x00\xff", "cannot be read as CSV"),
    ],
)
def test_a_broken_or_foreign_csv_is_named_with_its_line(compare, tmp_path, text, message):
    path = tmp_path / "cases.csv"
    path.write_bytes(text.encode("latin-1"))
    code, said = compare.command(path, path)
    assert code == 2
    assert f"{path}" in said
    assert message in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one"], "one run has nothing to be compared with: name two or more, the baseline first, or judge this one"),
        (["one", "--fail-on=speedup>=1.5"], "there is no run in"),
        (["nowhere.csv", "nowhere.csv"], "nowhere.csv: no such file"),
        (["latest", "latest"], "there is no run in"),
    ],
)
def test_missing_runs_are_named(compare, arguments, message):
    code, text = compare.command(*arguments)
    assert code == 2
    assert message in text


def on(replicas, ms, strategy="mirrored", batch=20, **values):
    """A row under a strategy, each replica with a batch of its own."""
    facts = {"strategy": strategy, "replicas": replicas, "jit": False}
    found = {}
    for mode in ("fp32", "mixed-bf16"):
        of_key = key(mode, batch=batch * replicas, **facts)
        found[mode] = rows(mode, ms, series_key=of_key, replica_batch_size=batch, **facts, **values)
    return [case for cases in found.values() for case in cases]


@pytest.mark.parametrize(
    ("few", "many"), [(on(1, 2.0), on(2, 2.5)), (on(2, 2.5), on(1, 2.0)), (on(2, 2.0), on(8, 2.5))]
)
def test_runs_that_differ_in_replicas_alone_have_a_scaling_efficiency(compare, tmp_path, few, many):
    page = tmp_path / "page.html"
    code, text = compare(few, many, "--json", "--html", page)
    found = [row["scaling"] for row in json.loads(text)["comparisons"][0]["rows"]]
    assert (code, len(found)) == (0, 2)
    replicas = [cases[0]["replicas"] for cases in (few, many)]
    rates = [2e4 * cases[0]["replicas"] / cases[2]["step_time_ms_median"] for cases in (few, many)]
    for one in found:
        assert (one["replicas"], one["batch"], one["efficiency"]) == (replicas, 20, pytest.approx(0.8, rel=1e-3))
        assert 0.5 < one["low"] < 0.8 < one["high"] < 1.0
        assert one["examples_per_s"] == pytest.approx(rates, rel=5e-3)
    shown = page.read_text()
    assert "so only the scaling efficiency is shown" in shown and "scaling efficiency of toy fp32: 0.80" in shown
    assert "with 2 reservations" in shown and "nothing speaks against it" not in shown
    _, text = compare.command(BEFORE, AFTER)
    assert "B against A: scaling over replicas" in text and "0.800 [0." in text
    assert "share its cores" in text and "weak scaling" in text
    _, text = compare.command(BEFORE, AFTER, "--format=csv")
    lines = [row for row in csv.DictReader(text.splitlines()) if row["quantity"]]
    assert [(row["state"], row["quantity"]) for row in lines] == [("not-comparable", "scaling_efficiency")] * 2


def test_a_mode_that_no_replicas_support_changes_nothing_about_gates(compare, tmp_path):
    fp8 = rows("mixed-fp8", status="unsupported")
    (tmp_path / "pyproject.toml").write_text('[tool.mpscale]\nfail-on = ["missing"]\n')
    page = tmp_path / "page.html"
    code, text = compare([*on(1, 2.0), *fp8], [*on(2, 2.5), *fp8], "--html", page)
    assert code == 3 and "the runs differ in the number of replicas: no gate" in text
    assert "so only the scaling efficiency is shown" in page.read_text()


def test_a_table_alone_passes_no_limit_since_cases_may_be_missing(compare, tmp_path):
    from mpscale.report.files import rebuild

    path = rebuild(write_run(tmp_path / "results", finished(ONE), name=AFTER)).path / "cases.csv"
    elsewhere = tmp_path / "cases.csv"
    elsewhere.write_bytes(path.read_bytes())
    code, text = compare.command(elsewhere, "--fail-on", "speedup>=1.5")
    assert (code, "does not show which cases were planned" in text) == (3, True)
    assert compare.command(elsewhere, "--fail-on", "speedup>=3")[0] == 1


def test_gates_on_a_change_do_not_judge_runs_with_other_replicas(compare, tmp_path):
    code, text = compare(on(1, 2.0), on(2, 2.5), "--fail-on", "step_time>5%")
    assert (code, "the runs differ in the number of replicas, so gates on a change cannot" in text) == (2, True)
    assert compare.command(BEFORE, AFTER, "--fail-on", "step_time<=3ms")[0] == 0
    (tmp_path / "pyproject.toml").write_text('[tool.mpscale]\nfail-on = ["missing"]\n')
    code, text = compare.command(BEFORE, AFTER)
    assert (code, "no gate of [tool.mpscale] on a change was judged" in text) == (3, True)


@pytest.mark.parametrize(
    ("other", "device", "message"),
    [
        (on(4, 2.5, batch=40), CPU, "no scaling efficiency: batch per replica 20 against 40"),
        (on(4, 2.5, strategy="multiworker"), CPU, "no scaling efficiency: strategy mirrored against multiworker"),
        (
            rows(series_key=key(batch=40, jit=False)),
            CPU,
            "mirrored against none; run also --mp-strategy with --mp-replicas 1)",
        ),
        (on(4, 2.5, device="gpu", device_name="Test GPU"), GPU, "no scaling efficiency: another device"),
        ([*on(4, 2.5)[:4], *on(2, 9.0)[5:]], CPU, None),
    ],
)
def test_no_scaling_efficiency_of_runs_that_differ_in_more(compare, other, device, message):
    code, text = compare(on(2, 2.0), other, device=device)
    assert (code, message or "scaling over replicas") == (2 if message else 0, message or "scaling over replicas")
    assert (message or "0.800 [") in text


ONE = [*rows(), *rows("mixed-bf16", ms=1.0)]


@pytest.mark.parametrize(
    ("cases", "gates", "code", "said"),
    [
        pytest.param(ONE, "speedup[mixed-*]>=1.5,accuracy>=0.5", 0, "passed", id="within its limits"),
        pytest.param(ONE, "speedup>=3", 1, "toy mixed-bf16  2x (5 pairs, 95 % interval", id="beyond one"),
        pytest.param(ONE[:5], "speedup>=1.5", 3, "no row of the run has such a figure", id="nothing to judge"),
        pytest.param([*ONE[:5], *ONE[5:9], rows("mixed-bf16", status="oom")[4]], "speedup>=1.5", 3, "oom", id="failed"),
    ],
)
def test_a_run_alone_is_judged_by_limits(compare, cases, gates, code, said, tmp_path):
    cases = [Record({**case.to_json(), "metric_name": "accuracy"}) for case in cases]
    write_run(tmp_path / "results", finished(cases), name=AFTER)
    found, text = compare.command("latest", "--fail-on", gates)
    assert found == code, text
    assert said in text and "Test CPU" in text and "baseline" not in text
    found, text = compare.command("latest", "--fail-on", gates, "--json", "--html", tmp_path / "page.html")
    printed, _, messages = text.partition("\n}\n")
    table = json.loads(printed + "}")
    assert (found, table["baseline"], table["comparisons"]) == (code, None, [])
    assert {gate["run"] for gate in table["gates"]} == {AFTER}
    assert (code == 0) == (messages == "")
    answer = {0: "Yes: all 3 checks passed", 1: "No: 1 of 1 check fired", 3: "Cannot tell: 1 of 1 check cannot"}[code]
    assert answer in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fail-on=speedup>=1.5,step_time>5%,metric"], "--fail-on: step_time>5%, metric needs a baseline: name it"),
        (["--fail-on=speedup>=1.5", "--force"], "--force needs a baseline"),
        (["--fail-on=speedup>=1.5", "--threshold=3%"], "--threshold needs a baseline"),
        (["--fail-on=speedup>=1.5", "--compare-by=name"], "--compare-by needs a baseline"),
        (["--fail-on=speedup>=1.5", "--format=csv"], "for limits, use json or markdown"),
        (["--fail-on=speedup>=fast"], "is not a gate"),
        (["--strict"], "one run has nothing to be compared with"),
    ],
)
def test_what_takes_two_runs_is_refused_for_one(compare, tmp_path, arguments, message):
    write_run(tmp_path / "results", finished(ONE), name=AFTER)
    code, text = compare.command(AFTER, *arguments)
    assert (code, len(text.splitlines())) == (2, 1)
    assert message in text


@pytest.mark.parametrize(("strict", "limit", "code"), [("false", 1, 3), ("true", 1, 1), ("false", 3, 1)])
def test_gates_of_the_project_that_need_a_baseline_are_not_judged_in_one_run(compare, tmp_path, strict, limit, code):
    write_run(tmp_path / "results", finished(ONE), name=AFTER)
    table = f'[tool.mpscale]\nfail-on = ["missing", "speedup>={limit}"]\nstrict = {strict}\n'
    (tmp_path / "pyproject.toml").write_text(table)
    found, text = compare.command(AFTER)
    assert found == code
    assert "without a baseline, missing was not judged" in text


def test_exit_codes_reach_the_shell(tmp_path):
    write_run(tmp_path / "results", finished(rows()), name=BEFORE)
    write_run(tmp_path / "results", finished(rows(ms=2.6)), name=AFTER)
    command = [sys.executable, "-m", "mpscale.cli", "compare", BEFORE, AFTER]
    for arguments, code in ([], 0), (["--fail-on", "step_time>5%"], 1), (["--fail-on", "no"], 2), (["--unknown"], 2):
        done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr


def test_by_name_versions_of_a_model_are_compared_and_followed(compare, tmp_path):
    newer = rows(ms=3.0, series_key=key(digest="sha256:2", batch=40), parameters=2000, batch_size=40)
    before = rows(parameters=1000, batch_size=20)
    assert compare(before, newer)[0] == 2
    code, text = compare.command(BEFORE, AFTER, "--compare-by", "name", "--fail-on", "step_time>5%")
    assert code == 1, text
    said = " ".join(text.split())
    assert "toy all parameters 1000 2000 toy all batch 20 40" in said
    assert "5 and 5 processes" in said and "; the model changed" in said
    (tmp_path / "pyproject.toml").write_text('[tool.mpscale]\ncompare-by = "name"\n')
    assert compare.command(BEFORE, AFTER)[0] == 0
    for command in (["history"], ["site", "public"]):
        assert main(command) == 0
    assert (
        "toy: the model changed: parameters 1000 to 2000"
        in (tmp_path / "public" / "comparisons" / f"{AFTER}.html").read_text()
    )
    assert "another version of the model: parameters 1000 to 2000" in (tmp_path / "public" / "history.html").read_text()
    assert compare.command(BEFORE, AFTER, "--compare-by", "model")[0] == 2
    (tmp_path / "pyproject.toml").write_text('[tool.mpscale]\ncompare-by = "series"\n')
    assert 'compare-by of [tool.mpscale] must be "model" or "name", not' in compare.command(BEFORE, AFTER)[1]


def of_batches(*batches, ms=2.0, mode="fp32"):
    return [one for batch in batches for one in swept(rows(mode, ms, series_key=key(mode, batch=batch)), batch)]


SLOWER = ("--fail-on", "step_time>5%")


def test_rows_of_two_sweeps_are_compared_batch_by_batch(compare):
    before = [*of_batches(20), *of_batches(80, ms=4.0)]
    code, text = compare(before, [*of_batches(20), *of_batches(80, ms=6.0)], *SLOWER)
    assert code == 1, text
    assert "2 rows; step time 1 slower, 1 the same" in text
    assert "step_time>5% fired B toy @80 fp32 +50.0%" in " ".join(text.split())


def test_rows_of_two_sweeps_are_compared_scale_by_scale(compare):
    def run(*scales, ms):
        return [
            one
            for scale in scales
            for one in swept(rows("mixed-static", ms, series_key=key("mixed-static", static_scale=scale)), scale=scale)
        ]

    code, text = compare(run(8.0, 128.0, ms=2.0), run(128.0, 2.0**24, ms=2.0), "--format", "csv")
    assert code == 0, text
    found = {line["mode"]: line["state"] for line in csv.DictReader(text.splitlines())}
    assert found == {"mixed-static @8": "missing", "mixed-static @128": "paired", "mixed-static @2^24": "new"}


@pytest.mark.parametrize("sweep_first", [True, False])
@pytest.mark.parametrize(("batch", "state"), [(80, "paired"), (50, "missing")])
def test_a_row_of_a_sweep_is_compared_with_a_run_of_that_batch_alone(compare, sweep_first, batch, state):
    sweep, alone = of_batches(20, 80), rows(ms=3.0, series_key=key(batch=batch))
    before, after = (sweep, alone) if sweep_first else (alone, sweep)
    code, text = compare(before, after, "--format", "csv")
    assert code == 0, text
    lines = [line for line in csv.DictReader(text.splitlines()) if line["quantity"] in ("step_time", "")]
    places = {line["workload"]: line["state"] for line in lines}
    if state == "paired":
        named = "toy" if sweep_first else "toy @80"
        assert places[named] == "paired"
        assert float(next(line["change"] for line in lines if line["workload"] == named)) == pytest.approx(
            0.5 if sweep_first else -1 / 3
        )
        assert len(places) == 2
    else:
        assert set(places) == {"toy", "toy @20", "toy @80"}
        assert "paired" not in places.values()
