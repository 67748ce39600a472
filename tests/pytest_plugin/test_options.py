"""The options of the plug-in that repeat what another side of the process boundary decides."""

import argparse
import dataclasses
import os

import pytest

from mpscale.core.case import DYNAMIC_DEFAULTS
from mpscale.pytest_plugin.options import _cores, _dynamic_scale
from mpscale.scaling import DynamicLossScale


def test_arguments_of_the_dynamic_scale_and_their_defaults_are_its_own():
    fields = dataclasses.fields(DynamicLossScale)
    assert {field.name: field.default for field in fields} == DYNAMIC_DEFAULTS
    assert all(type(field.default) is type(DYNAMIC_DEFAULTS[field.name]) for field in fields)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("hysteresis=2", {"hysteresis": 2}),
        ("initial=2**40, maximum=2**50", {"initial": 2.0**40, "maximum": 2.0**50}),
        ("initial=1,minimum=1,maximum=1", {"initial": 1.0, "minimum": 1.0, "maximum": 1.0}),
        ("minimum=2**15", {"minimum": 2.0**15}),
        ("maximum=2**126", {"maximum": 2.0**126}),
        ("growth_factor=1.001,backoff_factor=0.999", {"growth_factor": 1.001, "backoff_factor": 0.999}),
    ],
)
def test_dynamic_scale_on_the_command_line_is_one_that_can_be_made(text, values):
    found = _dynamic_scale(text)
    assert found == values
    DynamicLossScale(**found)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("initial=2**40", {"initial": 2.0**40}),
        ("initial=0.5", {"initial": 0.5}),
        ("minimum=2**16", {"minimum": 2.0**16}),
        ("maximum=2**14", {"maximum": 2.0**14}),
        ("minimum=8,initial=4,maximum=16", {"minimum": 8.0, "initial": 4.0, "maximum": 16.0}),
        ("growth_factor=1", {"growth_factor": 1.0}),
        ("growth_factor=0.5", {"growth_factor": 0.5}),
        ("backoff_factor=1", {"backoff_factor": 1.0}),
        ("backoff_factor=2", {"backoff_factor": 2.0}),
    ],
)
def test_contradiction_is_refused_in_the_words_of_the_loss_scale(text, values):
    with pytest.raises(argparse.ArgumentTypeError) as told:
        _dynamic_scale(text)
    with pytest.raises(ValueError) as meant:
        DynamicLossScale(**values)
    assert str(told.value) == str(meant.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("initial=2**127", "at most 2\\*\\*126"),
        ("minimum=0", "above 0"),
        ("hysteresis=0", "above 0"),
        ("hysteresis=1.5", "hysteresis has to be an integer"),
        ("growth_interval=inf", "above 0"),
        ("hysteresis", "expected a number"),
        ("start=4", "'start' is none of initial"),
    ],
)
def test_value_out_of_its_range_is_refused(text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        _dynamic_scale(text)


@pytest.mark.parametrize("text", ["0-99999", "99999", "1-0", "", "a", "0,,1", "-1", "0-"])
def test_cores_that_are_not_there_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected cores such as 0,2-3 out of"):
        _cores(text)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system cannot tie processes to cores")
def test_cores_are_numbers_and_ranges():
    usable = sorted(os.sched_getaffinity(0))
    assert _cores(",".join(map(str, usable))) == set(usable)
    assert _cores(f" {usable[0]}-{usable[0]} , {usable[0]}") == {usable[0]}
