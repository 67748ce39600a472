"""What a gate can say, and what is refused before hours of training."""

import pytest

from mpscale.analysis.gates import parse_gates


@pytest.mark.parametrize(
    ("text", "written", "needs_baseline", "number"),
    [
        ("step_time>5%", "step_time>5%", True, 0.05),
        ("step_time <= 5 %", "step_time<=5%", True, 0.05),
        ("step_time<=12ms", "step_time<=12ms", False, 12.0),
        ("step_time<=0.012s", "step_time<=0.012s", False, 12.0),
        ("device_time<900us", "device_time<900us", False, 0.9),
        ("gpu_memory<=8gib", "gpu_memory<=8GiB", False, 8192.0),
        ("host_memory>81920.5MiB", "host_memory>81920.5MiB", False, 81920.5),
        ("energy<=2500mJ", "energy<=2500mJ", False, 2.5),
        ("compile_time<=2min", "compile_time<=2min", False, 120.0),
        ("compile_time>20%", "compile_time>20%", True, 0.2),
        ("speedup>=1.5x", "speedup>=1.5x", False, 1.5),
        ("accuracy>=95%", "accuracy>=95%", False, 0.95),
        ("metric>=-1e-3", "metric>=-0.001", False, -0.001),
        ("overflow_rate>1%", "overflow_rate>1%", False, 0.01),
        ("overflow_rate<=0", "overflow_rate<=0", False, 0.0),
        ("metric", "metric", True, None),
        ("missing[ signs/mixed-* ]", "missing[signs/mixed-*]", True, None),
    ],
)
def test_what_a_gate_says_and_whether_it_needs_a_baseline(text, written, needs_baseline, number):
    (gate,) = parse_gates([text])
    assert (str(gate), gate.needs_baseline) == (written, needs_baseline)
    if number is not None:
        assert (gate.threshold if needs_baseline else gate.limit) == pytest.approx(number)
    assert parse_gates([written]) == [gate]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step_time", "lacks a threshold; write step_time>5%"),
        ("speedup", "lacks a threshold; write speedup>=1.5"),
        (
            "step_time<12",
            "has no unit: for a percentage of the baseline, write step_time>12%; for a limit, write one in",
        ),
        ("gpu_memory<=8GB", "'GB' is no unit of it; write %, MiB or GiB, such as gpu_memory<=8000MiB"),
        ("gpu_memory<=8ms", "'ms' is no unit of it"),
        ("step_time<=0ms", "a limit is above 0, such as step_time<=12ms"),
        ("speedup>5%", "a speed-up is a ratio; write speedup>=1.5"),
        ("speedup>=0", "would never fire; write speedup>=1.5"),
        ("accuracy>=95", "an accuracy is at most 1; write accuracy>=95%"),
        ("metric>1%", "a limit of a metric is in its own unit, and metric alone compares with the baseline"),
        ("metric>=1e999", "the number is too large"),
        ("overflow_rate>-1", "would never fire"),
        ("missing>3", "missing takes no threshold; write missing"),
        ("step_time==5ms", "A limit has one of > >= < <="),
        ("step_time=>5ms", "is not a gate"),
        ("first_step<=5s", "'first_step' is not a gate"),
        ("compiletime<=5s", "'compiletime' is not a gate; did you mean compile_time?"),
        ("Metric", "did you mean metric?"),
        ("step_time[]>5%", "between [ and ] goes a workload, a mode, or workload/mode"),
        ("step_time[/fp32]>5%", "between [ and ] goes"),
        ("metric[signs/mixed-bf61]", "no mode is called 'mixed-bf61'; did you mean mixed-bf16?"),
        ("metric[signs", "is not a gate"),
        ("metric[a[b]]", "is not a gate"),
        ("step_t\u0131me>5%", "is not a gate"),
        ("accuracy>=0,95", "an accuracy is at most 1|such a gate would never fire"),
    ],
)
def test_what_is_no_gate_is_refused_with_what_is_one(text, message):
    with pytest.raises(ValueError) as caught:
        parse_gates([text])
    assert any(part in str(caught.value) for part in message.split("|"))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("rows", "covered"),
    [
        ("", "all"),
        ("[*]", "all"),
        ("[signs]", "signs fp32, signs mixed-bf16, signs @64 fp32"),
        ("[signs @64]", "signs @64 fp32"),
        ("[mixed-*]", "signs mixed-bf16, mine:w mixed-static @8"),
        ("[mine:*/mixed-static]", "mine:w mixed-static @8"),
        ("[mixed-static @8]", "mine:w mixed-static @8"),
        ("[*/fp32]", "signs fp32, signs @64 fp32, fp32 fp32"),
        ("[fp32/*]", "fp32 fp32"),
        ("[other]", ""),
    ],
)
def test_which_rows_a_gate_covers(rows, covered):
    places = [
        ("signs", "fp32"), ("signs", "mixed-bf16"), ("signs @64", "fp32"), ("mine:w", "mixed-static @8"),
        ("fp32", "fp32"),
    ]  # fmt: skip
    (gate,) = parse_gates([f"metric{rows}"])
    found = [" ".join(place) for place in places if gate.covers(place)]
    assert found == (
        [" ".join(place) for place in places] if covered == "all" else covered.split(", ") if covered else []
    )


@pytest.mark.parametrize(
    ("text", "higher", "good"),
    [
        # The limit of a cost is the same gate from both sides; at the limit itself the operator decides.
        ("step_time<=12ms", False, (True, True, False)),
        ("step_time>12ms", False, (True, True, False)),
        ("step_time<12ms", False, (True, False, False)),
        ("step_time>=12ms", False, (True, False, False)),
        ("metric>=12", True, (False, True, True)),
        ("metric<12", True, (False, True, True)),
        ("metric>12", True, (False, False, True)),
        ("metric<=12", True, (False, False, True)),
        ("metric<=12", False, (True, True, False)),
        ("metric>12", False, (True, True, False)),
    ],
)
def test_a_limit_can_be_written_from_either_side(text, higher, good):
    (gate,) = parse_gates([text])
    assert tuple(gate.holds(value, higher) for value in (11.9, 12.0, 12.1)) == good
