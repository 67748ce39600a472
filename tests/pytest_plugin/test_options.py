"""The plug-in's options: which values they accept, and how they refuse others."""

import argparse
import os

import pytest

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
        ("--mp-steps-per-call", "0", "expected an integer of at least 1, not '0'"),
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
