"""The summary of a run for GitHub: what it shows, and that it always fits."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runfolder import CPU, GPU, NAME, finished, record, write_run
from test_report_markdown import record_lists, table, two_seeds

from mpscale.core.record import to_csv
from mpscale.core.runs import read_run
from mpscale.report.github_summary import LIMIT, artifacts_page
from mpscale.report.github_summary import github_summary as render


def summary(tmp_path, *records, limit=LIMIT, artifacts=None, **options):
    return render(read_run(write_run(tmp_path, finished(records), **options)), limit, artifacts)


def bad(seed, **values):
    return record("mixed-static", seed, **{"status": "crashed", "status_reason": "signal 11", **values})


def test_title_findings_results_time_and_files_in_this_order(tmp_path):
    fp32 = two_seeds("fp32", (8.0, 8.0), (0.9, 0.9), case_wall_time_s=30.0)
    mixed = two_seeds("mixed-bf16", (4.0, 4.0), (0.9, 0.9), case_wall_time_s=35.0)
    text = summary(tmp_path, *fp32, *mixed, device=GPU)
    assert text.startswith("# mpscale: Test GPU (GPU)\n\n**Is mixed precision worth it here? ")
    places = [
        text.index(part)
        for part in (
            "- What does it buy? ",
            "toy was run in fp32 and mixed-bf16 on Test GPU (GPU).",
            "- **toy**: mixed-bf16 is faster than fp32 (2.00 times the speed)",
            "## Results\n",
            "4 cases took 2 min 10 s, one after the other.",
            f"The run is {NAME}: `run.json`, `journal.jsonl`.",
        )
    ]
    assert places == sorted(places)
    assert [row["mode"] for row in table(text, "Results")] == ["fp32", "mixed-bf16"]
    assert "did not end well\n" not in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.4, "59.4 s"), (59.6, "1 min 0 s"), (3599.4, "59 min 59 s"), (7384.0, "2 h 3 min")],
)
def test_the_time_is_the_sum_over_the_cases(tmp_path, seconds, text):
    assert f"\n\n1 case took {text}, one" in summary(tmp_path, record(case_wall_time_s=seconds), record(seed=1))


def test_an_unknown_time_is_left_out(tmp_path):
    assert "took" not in summary(tmp_path, record())


def test_a_failed_case_is_shown_with_its_output_folded(tmp_path):
    text = summary(tmp_path, record(), bad(0, output_tail="\x1b[31mred\x1b[0m\n</details>\n```\nend"))
    assert table(text, "Cases that did not end well") == [
        {"case": "toy--mixed-static--s0--r0", "status": "crashed", "reason": "signal 11"}
    ]
    # The fence cannot be ended from inside, and markdown needs the blank line before it.
    assert (
        "<details>\n<summary>The last lines of toy--mixed-static--s0--r0</summary>\n\n"
        "````text\nred\n</details>\n```\nend\n````\n\n</details>\n"
    ) in text


def test_the_files_are_linked_if_there_is_a_page_of_them(tmp_path):
    environ = {"GITHUB_SERVER_URL": "https://github.test", "GITHUB_REPOSITORY": "a/b", "GITHUB_RUN_ID": "7"}
    page = artifacts_page(environ)
    assert page == "https://github.test/a/b/actions/runs/7#artifacts"
    assert f"([files]({page}))" in summary(tmp_path, record(), artifacts=page)
    for name in environ:
        assert artifacts_page({**environ, name: ""}) is None


def test_a_cases_csv_by_itself_has_a_summary(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_text(to_csv([record(step_time_ms_median=2.0, device_name="Test GPU", device="gpu")]))
    text = render(read_run(path))
    assert text.startswith("# mpscale: Test GPU (GPU)\n")
    assert "Made from cases.csv by itself" in text


def test_a_long_output_keeps_its_end(tmp_path):
    text = summary(tmp_path, bad(0, output_tail="x" * 30_000 + "end of 0"), bad(1, output_tail="short"))
    assert len(text) < 10_000
    assert "```text\n[the beginning is in the report]\nxxx" in text
    assert "end of 0\n```" in text
    assert "```text\nshort\n```" in text


def test_a_section_with_many_rows_leaves_room_for_the_next(tmp_path):
    cases = [bad(0, workload=f"w{number:03}") for number in range(700)]
    text = summary(tmp_path, *cases)
    # Each table has two lines of headers, and more precedes the matrix and the list of findings.
    assert re.findall(r"^\*(\d+) more lines: see the report\.\*$", text, re.M) == ["210", *["202"] * 3]
    assert len(table(text, "Results")) == len(table(text, "Cases that did not end well")) == 498


def test_one_note_replaces_what_does_not_fit(tmp_path):
    limit = 20_000
    cases = [bad(seed, workload=f"w{seed:03}", output_tail="o" * 3000) for seed in range(20)]
    text = summary(tmp_path, *cases, limit=limit)
    assert limit / 2 < len(text.encode()) <= limit
    assert len(table(text, "Results")) == len(table(text, "Cases that did not end well")) == 20
    assert 0 < text.count("<details>") == text.count("</details>") < 20
    assert text.count("*The rest did not fit here; the report has all of it.*") == 1
    assert "\n\nThe run is " in text


@settings(max_examples=60, deadline=None)
@given(
    records=record_lists(),
    texts=st.lists(st.text("`x\N{EURO SIGN}\n<", max_size=30), max_size=6),
    times=st.integers(1, 2000),
    device=st.sampled_from([CPU, GPU, {}]),
)
def test_the_summary_of_any_run_fits(records, texts, times, device):
    limit = 10_000
    for one, text in zip(records, texts, strict=False):
        one.update({"output_tail": text * times, "status_reason": text * times, "device_name": text * times})
    with tempfile.TemporaryDirectory() as folder:
        text = render(read_run(write_run(Path(folder), finished(records), device=device)), limit)
    assert len(text.encode()) <= limit
    assert text.startswith("# mpscale: ")
    assert text.endswith("\n")
