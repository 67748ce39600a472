"""The plug-in's options: which values they accept, and how they refuse others."""

import argparse
import os
import time

import pytest
from support.small_suite import SUITE, pytest_here, write

from mpscale.analysis.gates import parse_gates, parse_share
from mpscale.config import memory
from mpscale.pytest_plugin.options import add_options
from mpscale.scaling import DynamicLossScale, StaticLossScale


def parse(option, text):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser.add_argument)
    return getattr(parser.parse_args([f"{option}={text}"]), option.removeprefix("--").replace("-", "_"))


def refusal(option, text):
    with pytest.raises(argparse.ArgumentError) as caught:
        parse(option, text)
    return caught.value.message


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("hysteresis=2", {"hysteresis": 2}),
        ("initial=2**40, maximum=2**50", {"initial": 2.0**40, "maximum": 2.0**50}),
        ("initial=1,minimum=1,maximum=1", {"initial": 1.0, "minimum": 1.0, "maximum": 1.0}),
        ("growth_factor=1.001,backoff_factor=0.999", {"growth_factor": 1.001, "backoff_factor": 0.999}),
    ],
)
def test_dynamic_scale_is_read_from_keys_and_values(text, values):
    assert parse("--mp-dynamic-scale", text) == values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("initial=2**40", {"initial": 2.0**40}),
        ("maximum=2**14", {"maximum": 2.0**14}),
        ("growth_factor=1", {"growth_factor": 1.0}),
        ("backoff_factor=2", {"backoff_factor": 2.0}),
        ("initial=2**127", {"initial": 2.0**127}),
        ("minimum=0", {"minimum": 0.0}),
        ("hysteresis=0", {"hysteresis": 0}),
        ("hysteresis=1.5", {"hysteresis": 1.5}),
        ("growth_interval=inf", {"growth_interval": float("inf")}),
    ],
)
def test_dynamic_scale_is_refused_in_the_words_of_its_class(text, values):
    with pytest.raises(ValueError) as meant:
        DynamicLossScale(**values)
    assert refusal("--mp-dynamic-scale", text) == str(meant.value)


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("--mp-dynamic-scale", "hysteresis", "expected a number such as 1024 or 2**24"),
        ("--mp-dynamic-scale", "start=4", "'start' is not one of initial"),
        ("--mp-static-scale", "large", "expected a number such as 1024 or 2**24"),
        *[
            ("--mp-batch-size", text, "expected an integer of at least 1")
            for text in ["0", "64,", "8,0", "", "6.5", "a"]
        ],
        ("--mp-static-scale", "8,", "expected a number such as 1024 or 2**24"),
        ("--mp-static-scale", "8,0", "above 0"),
        ("--mp-seeds", "0", "expected an integer of at least 1"),
        ("--mp-repeats", "some", "expected an integer of at least 0"),
        ("--mp-timeout", "0", "expected a number of seconds above 0"),
        ("--mp-steps-per-call", "0", "expected an integer of at least 1 and at most 10000"),
        ("--mp-steps-per-call", "2.5", "expected an integer of at least 1"),
        ("--mp-timing", "nan", "expected a number of seconds above 0"),
        *[("--mp-energy", text, "of at least 10") for text in ["5", "9.9", "-1", "soon", "inf"]],
        ("--mp-workloads", " , ", "expected at least one name"),
        *[
            ("--mp-cores", text, "expected cores such as 0,2-3 out of")
            for text in ["0-99999", "99999", "1-0", "", "a", "0,,1", "-1", "0-"]
        ],
    ],
)
def test_invalid_value_is_refused(option, text, message):
    assert message in refusal(option, text)


@pytest.mark.parametrize("text", ["16", "16.0", "2**4", "2^4"])
def test_a_time_may_be_written_as_a_power(text):
    assert parse("--mp-timeout", text) == 16.0


def test_static_scale_has_the_limits_of_its_class():
    assert parse("--mp-static-scale", "2**24") == (2.0**24,)
    with pytest.raises(ValueError) as meant:
        StaticLossScale(2.0**127)
    assert refusal("--mp-static-scale", "2**127") == str(meant.value)


@pytest.mark.parametrize(
    ("option", "text", "values"),
    [
        ("--mp-batch-size", "64", (64,)),
        ("--mp-batch-size", "256, 64,1024", (64, 256, 1024)),
        ("--mp-batch-size", "64,64", (64,)),
        ("--mp-static-scale", "2**24,8,128", (8.0, 128.0, 2.0**24)),
        ("--mp-static-scale", "128,2**7", (128.0,)),
    ],
)
def test_several_values_are_rising_and_each_there_once(option, text, values):
    assert parse(option, text) == values


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system cannot tie processes to cores")
def test_cores_are_numbers_and_ranges():
    usable = sorted(os.sched_getaffinity(0))
    assert parse("--mp-cores", ",".join(map(str, usable))) == set(usable)
    assert parse("--mp-cores", f" {usable[0]}-{usable[0]} , {usable[0]}") == {usable[0]}


NUMBERS = {
    "--mp-seeds": "at most 1000",
    "--mp-repeats": "at most 1000",
    "--mp-steps": "at most 10000000, since each step of a training is recorded",
    "--mp-batch-size": "at most 2147483647, since TensorFlow counts examples in 32 bits",
    "--mp-static-scale": "",
    "--mp-dynamic-scale": "",
    "--mp-steps-per-call": "at most 10000, whose data must fit into memory together",
    "--mp-gpu-retries": "at most 100",
    "--mp-timing": "at most 86400, a day",
    "--mp-energy": "at most 86400, a day",
    "--mp-timeout": "at most 604800, a week",
    "--mp-cool-down": "at most 604800, a week",
    "--mp-cores": "cores such as 0,2-3",
}
"""Options that take numbers, and the limit that a refusal names."""
WITHIN_THE_BOUNDS = {("--mp-static-scale", text) for text in ("99999999999", "1e30")}
ARABIC = "\N{ARABIC-INDIC DIGIT ONE}\N{ARABIC-INDIC DIGIT TWO}"


@pytest.mark.parametrize("option", NUMBERS)
@pytest.mark.parametrize(
    "text",
    ["99999999999", "1e30", "1e300", "nan", "inf", "-inf", "-1", "0x10", ARABIC, "1_000_000_000_000", "10**400",
     "9" * 5000, "1" + "0" * 10_000_000, "²", "1 2", "0-99999999999", "," * 1_000_000,
     ",".join(map(str, range(1, 100_000)))],
    ids=lambda text: text if len(text) < 20 else f"{text[:5]}-{len(text)}",
)  # fmt: skip
def test_a_number_out_of_bounds_is_refused_at_once_with_its_limit(option, text):
    begin = time.monotonic()
    given = f"initial={text}" if option == "--mp-dynamic-scale" else text
    if (option, text) in WITHIN_THE_BOUNDS:
        assert parse(option, given)
        return
    message = refusal(option, given)
    assert len(message) < 500
    several = option in ("--mp-batch-size", "--mp-static-scale") and text.count(",") >= 100
    assert ("at most 100 values, since every workload runs at each" if several else NUMBERS[option]) in message
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [("--mp-repeats", "-0", 0), ("--mp-seeds", " +7 ", 7), ("--mp-energy", "-0", 0.0), ("--mp-timeout", "6e5", 6e5)],
)
def test_unusual_numbers_within_the_bounds_are_taken(option, text, value):
    assert parse(option, text) == value


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("--mp-workloads", "w" * 10_000_000, "at most 1000 names"),
        ("--mp-workloads", "w" * 151, "a name has at most 150 bytes, since files are named after it"),
        ("--mp-modes", "m" * 1000, "a name has at most 150 bytes"),
        ("--mp-modes", ",".join(["fp32"] * 100_000), "at most 1000 names"),
        ("--mp-results", "r" * 10_000_000, "no folder can have this name"),
        ("--mp-results", "a\0b", "no folder can have this name"),
        ("--mp-dynamic-scale", "k" * 10_000_000, "is not one of initial"),
    ],
    ids=lambda text: text[:20],
)
def test_a_name_that_is_too_long_is_refused_with_its_beginning(option, text, message):
    found = refusal(option, text)
    assert message in found
    assert len(found) < 500


@pytest.mark.parametrize(
    "text",
    ["step_time>" + "9" * 400 + "%", "step_time>10001%", "step_time>1e300%", "step_time>nan%", f"step_time>{ARABIC}%",
     "energy>-5%", "x" * 1_000_000, ",".join(["metric"] * 100_000)],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_gates_out_of_bounds_are_refused(text):
    with pytest.raises(ValueError) as caught:
        parse_gates([text])
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text", ["9" * 400 + "%", "1000001%", "1e300%", "inf%", "nan", f"{ARABIC}%", "-0%", "9" * 10_000_000]
)
def test_thresholds_out_of_bounds_are_refused(text):
    with pytest.raises(ValueError, match="is not a percentage above 0 and at most 10000%") as caught:
        parse_share(text)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["0G", "1025T", "9" * 400 + "G", f"{ARABIC}G", "1e9G", "infG", "nanG", "-1G"])
def test_amounts_of_memory_out_of_bounds_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="at most 1024TiB") as caught:
        memory(text)
    assert len(str(caught.value)) < 500


def test_more_cases_than_a_run_may_have_are_refused_at_once(tmp_path):
    write(tmp_path, test_it=SUITE)
    code, output = pytest_here(
        tmp_path, tmp_path, "--mp-seeds=1000", "--mp-repeats=1000", "--mp-workloads=mnist1d-mlp",
        "--mp-modes=fp32,mixed-static", f"--mp-static-scale={','.join(map(str, range(1, 90)))}",
        f"--rootdir={tmp_path}",
    )  # fmt: skip
    assert code == 4
    assert "more than 20,000 cases, which take more than a day; ask for fewer seeds" in output
