"""A run records no variable that is not on the list, no path, and no secret that was printed."""

from __future__ import annotations

import json
import re

import pytest
from support.runfolder import CPU, finished, record, write_run

from mpscale.core.machines import environment_facts
from mpscale.core.runs import read_run
from mpscale.core.variables import VARIABLES, recorded, without_secrets
from mpscale.harness.conversation import one_line
from mpscale.report.document import document, render
from mpscale.report.files import report_page


@pytest.mark.parametrize(
    "name",
    ["MY_TF_TOKEN", "TF_CONFIG", "XLA_FLAGS_TOKEN", "TF_XLA_FLAGS2", "CI_JOB_TOKEN", "xla_flags", "HOME", "USER"],
)
def test_a_variable_is_allowed_by_its_whole_name(name):
    assert name not in VARIABLES
    assert recorded({name: "secret", "CI": "true"}) == {"CI": "true"}


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("--xla_gpu_autotune_level=0", "--xla_gpu_autotune_level=0"),
        ("--xla_dump_to=/home/me/dump --xla_cpu_max_isa=AVX2", "--xla_dump_to=<path> --xla_cpu_max_isa=AVX2"),
        ("--a=~/x --b=../y/z", "--a=<path> --b=<path>"),
        ("/etc/passwd", "<path>"),
        ("MIG-GPU-6d1f8a10/1/0,MIG-GPU-6d1f8a10/2/0", "MIG-GPU-6d1f8a10/1/0,MIG-GPU-6d1f8a10/2/0"),
    ],
)
def test_a_value_has_no_path(value, kept):
    found = recorded({"XLA_FLAGS": value})
    assert re.sub(r"<path-[0-9a-f]{8}>", "<path>", found["XLA_FLAGS"]) == kept
    assert recorded(found) == found


def test_two_paths_are_not_taken_for_equal():
    one, other = (recorded({"XLA_FLAGS": f"--xla_gpu_load_autotune_results_from=/home/me/{name}"}) for name in "ab")
    assert one != other


def test_long_values_are_cut_and_still_differ_if_they_differed_anywhere():
    one, other = (recorded({"XLA_FLAGS": "--xla_a=1 " * 100 + last}) for last in ("--xla_b=1", "--xla_b=2"))
    assert one["XLA_FLAGS"].startswith("--xla_a=1 --xla_a=1") and "1,009 characters" in one["XLA_FLAGS"]
    assert len(one["XLA_FLAGS"]) <= 500 and one != other
    assert recorded(one) == one


@pytest.mark.parametrize(
    "variables", [{"AWS_SECRET_KEY": "hidden-1234", "CI": 3}, "hidden-1234", ["hidden-1234"], None]
)
def test_no_report_shows_a_variable_that_somebody_else_recorded(tmp_path, variables):
    environment = {"device": dict(CPU), "variables": variables}
    path = write_run(tmp_path, finished([record(step_time_ms_median=1.0)]), environment=environment)
    run = read_run(path)
    assert run.environment["variables"] == {}
    made = render(document(run)) + report_page(run) + json.dumps(environment_facts(run))
    assert "hidden-1234" not in made and "AWS_SECRET_KEY" not in made


ENVIRON = {
    "GITHUB_TOKEN": "ghp_abcdefgh1234", "DB_PASSWORD": "correct horse", "OPENAI_API_KEY": "sk-12345678",
    "LONGER_SECRET": "ghp_abcdefgh1234-and-more", "SHORT_TOKEN": "1", "KEYBOARD": "de-latin1", "HOME": "/home/me",
}  # fmt: skip


@pytest.mark.parametrize(
    ("printed", "kept"),
    [
        ("curl -H ghp_abcdefgh1234", "curl -H <secret>"),
        ("ghp_abcdefgh1234-and-more", "<secret>"),
        ("password 'correct horse' is wrong", "password '<secret>' is wrong"),
        ("sk-12345678sk-12345678", "<secret><secret>"),
        ("1 of 1 in /home/me, de-latin1", "1 of 1 in /home/me, de-latin1"),
    ],
)
def test_errors_hold_no_secret_of_the_environment(monkeypatch, printed, kept):
    assert without_secrets(printed, ENVIRON) == kept
    for name, value in ENVIRON.items():
        monkeypatch.setenv(name, value)
    assert one_line(printed) == kept
