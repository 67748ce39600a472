"""The findings of lint: as text and JSON, by exit code, in the report of a run, in its terminal and in the guide."""

import json
import re
from pathlib import Path

import pytest
from support.no_training import new_run, replace_trainings

from mpscale import cli
from mpscale.core.given import Given
from mpscale.core.lint import Check, Finding, Severity, merged, of_cell, to_cell
from mpscale.core.record import Record
from mpscale.core.runs import read_run
from mpscale.harness import supervisor
from mpscale.report.document import document, render
from mpscale.report.lint import News

ROOT = Path(__file__).parents[2]
PROBLEM, CAUTION, NOTE = Severity
OUTPUT = Finding(Check.HALF_OUTPUT, CAUTION, "the outputs are float16", "give it float32", ("dense_1",))
LOSS = Finding(Check.FIRST_LOSS, PROBLEM, "the loss is nan", "look at the inputs")
BATCH = Finding(Check.BATCH_SIZE, CAUTION, "a batch of 20", "choose 24")
PIXELS = Finding(Check.INTEGER_INPUTS, NOTE, "inputs are uint8", "cast them")


def test_the_guide_has_every_check_once():
    table = (ROOT / "docs" / "guides" / "lint.md").read_text(encoding="utf-8").partition("## The checks")[2]
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", table, re.M)) == sorted(Check)


def test_a_cell_keeps_findings_and_drops_what_is_none():
    findings = [OUTPUT, LOSS]
    assert of_cell(to_cell(findings)) == findings
    newer = {**OUTPUT.to_json(), "check": "from-the-future"}
    broken = [newer, 1, None, [], {}, {**LOSS.to_json(), "text": 5}, {**LOSS.to_json(), "layers": [1]}]
    assert of_cell(json.dumps([*broken, BATCH.to_json()])) == [BATCH]
    assert [of_cell(text) for text in (None, "", "{", "5", '"x"', "[" * 10000)] == [[]] * 6


def test_modes_share_findings_and_the_worst_come_first():
    found = merged({"fp32": [BATCH, LOSS], "mixed-dynamic": [PIXELS, LOSS, OUTPUT, BATCH]})
    assert [(each.finding.check, each.modes) for each in found] == [
        (Check.FIRST_LOSS, ("fp32",)),
        (Check.BATCH_SIZE, ("fp32", "mixed-dynamic")),
        (Check.HALF_OUTPUT, ("mixed-dynamic",)),
        (Check.INTEGER_INPUTS, ("mixed-dynamic",)),
    ]
    (alone,) = merged({"fp32": [], "mixed-dynamic": [LOSS]})
    assert alone.modes == ("mixed-dynamic",)


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run the command; each mode ends as told: its findings, its status."""

    def run(ends, *arguments):
        class Supervisor:
            def __init__(self, *_):
                pass

            def run(self, case, steps_path, gpu_path, outcome, attempt=1):
                assert (case.trains, case.settings.lint, case.settings.timing_s) == (False, True, 0.0)
                findings, status = ends[case.mode]
                if status == "interrupt":
                    raise KeyboardInterrupt
                outcome.record.update({"lint": to_cell(findings), "status": status, "status_reason": "why"})

            def close(self):
                pass

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(supervisor, "Supervisor", Supervisor)
        code = cli.main(["lint", "article-mlp", *arguments])
        return code, capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("fp32", "mixed", "code"),
    [
        (([], "ok"), ([], "ok"), 0),
        (([PIXELS], "ok"), ([PIXELS, OUTPUT], "ok"), 0),
        (([], "ok"), ([LOSS], "ok"), 1),
        (([LOSS], "error"), ([], "ok"), 2),
        (([], "ok"), ([], "unsupported"), 2),
        (([LOSS], "ok"), ([], "interrupt"), 130),
    ],
)
def test_the_exit_code_says_what_there_is(command, fp32, mixed, code):
    ends = {"fp32": fp32, "mixed-dynamic": mixed}
    found, out = command(ends, "--json")
    assert found == code
    answer = json.loads(out)
    assert answer["workload"] == "article-mlp"
    checks = {each["check"] for each in answer["findings"]}
    assert checks == {finding.check for findings, status in ends.values() for finding in findings}
    assert set(answer["failed"]) == {mode for mode, (_, status) in ends.items() if status != "ok"}


def test_the_text_names_layer_mode_and_cure(command):
    ends = {"fp32": ([], "ok"), "mixed-bf16": ([OUTPUT], "ok"), "mixed-fp8": ([OUTPUT], "unsupported")}
    code, out = command(ends, "--mode", "mixed-bf16", "--mode", "mixed-fp8")
    assert code == 2
    assert out.startswith("article-mlp in fp32, mixed-bf16 and mixed-fp8 on ")
    assert ": 1 caution\n" in out
    assert "caution half-output: dense_1, in mixed-bf16 and mixed-fp8" in out
    assert "do: give it float32" in out
    assert "mixed-fp8 could not be looked at to the end: unsupported: why" in out
    for form in ("markdown", "csv"):
        shown = command(ends, "--mode", "mixed-bf16", "--mode", "mixed-fp8", "--format", form)[1]
        assert all(text in shown for text in ("half-output", "dense_1", "give it float32"))
    both = {"fp32": ([], "error"), "mixed-dynamic": ([], "error")}
    out = command(both)[1]
    assert "nothing found" not in out
    assert "fp32 and mixed-dynamic could not be looked at to the end: error: why" in out
    assert "nothing found" in command({"fp32": ([], "ok"), "mixed-dynamic": ([], "ok")})[1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("no-such",), "no-such"),
        (("article-mlp", "--mode", "fp31"), "fp31"),
        (("article-mlp", "--batch-size", "0"), "0"),
    ],
)
def test_wrong_use_is_refused(capsys, arguments, named):
    try:
        code = cli.main(["lint", *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert named in capsys.readouterr().err


def found_by(case):
    hostile = Finding(Check.DIMENSION, CAUTION, "<b>|x", "[y](http://z)", ("a|b<i>",))
    by_mode = {"fp32": [PIXELS], "mixed-dynamic": [PIXELS, OUTPUT, hostile]}
    return {"lint": to_cell(by_mode[case.mode])} if case.seed == 0 else {}


def test_the_report_of_a_run_has_a_section_and_a_sentence(monkeypatch, tmp_path):
    replace_trainings(monkeypatch, found_by)
    run = read_run(new_run(tmp_path / "results"))
    made = document(run)
    table, _ = made.parts_of("Lint")
    assert [(row[0], row[1], row[2], row[4]) for row in table.rows] == [
        ("toy", "caution", "half-output", "mixed-dynamic"),
        ("toy", "caution", "dimension", "mixed-dynamic"),
        ("toy", "note", "integer-inputs", "fp32, mixed-dynamic"),
    ]
    assert "toy has 2 cautions (half-output, dimension; see Lint)" in made.findings
    text = render(made)
    assert "<b>" not in text
    assert "<i>" not in text


def test_a_run_without_findings_has_no_section(monkeypatch, tmp_path):
    replace_trainings(monkeypatch, lambda case: {"lint": "[]"} if case.seed == 0 else {})
    made = document(read_run(new_run(tmp_path / "results")))
    assert made.parts_of("Lint") == ()
    assert "see Lint" not in made.findings


def test_the_terminal_tells_each_check_of_a_workload_once(monkeypatch):
    news = News()

    def told(workload, *findings):
        return news.of(Record({"workload": workload, "lint": to_cell(findings)}))

    assert told("toy") is None
    assert told("toy", PIXELS) is None
    assert told("toy", BATCH, PIXELS).startswith("toy has 1 caution: batch-size; ")
    assert told("toy", BATCH, OUTPUT).startswith("toy has 1 caution: half-output; ")
    assert told("toy", BATCH, OUTPUT) is None
    assert told("another", BATCH) is not None
    assert news.of(Record({"workload": "toy"})) is None
    assert told("third", BATCH).endswith("; `mpscale lint third` or the report says what to do")
    # A function's data is not known to that command, nor is what a script has sent.
    monkeypatch.setattr("mpscale.report.lint.given", lambda: Given(train="data"))
    assert told("models:build", BATCH).endswith("; the report says what to do")
