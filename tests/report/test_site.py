"""`mpscale site`: which files it writes, replaces and removes, and what it leaves alone."""

from __future__ import annotations

import json
import os
import re

import pytest
from support.nightly import night, row

from mpscale.cli import main
from mpscale.report import site as site_module
from mpscale.report.page import shell
from mpscale.report.site_folder import MANIFEST


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "site"


def make(results, day, *rows, report=True, **how):
    path = night(results, day, *(rows or [row(ms=2.0), row("mixed-static", 1.0)]), **how)
    if report:
        (path / "report.html").write_text(shell("mpscale", f"report of day {day}"))
    return path


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def slug(day):
    return f"202601{day:02d}T000000Z-test-cpu-{day:04x}.html"


def test_it_writes_a_page_for_each_run_and_comparison(results, folder, capsys):
    for day in (1, 2):
        make(results, day)
    assert main(["site", str(folder), "--title", "Our <runs>"]) == 0
    assert capsys.readouterr().out == f"{folder / 'index.html'}: 2 runs\n"
    made = files_in(folder)
    assert sorted(made) == sorted(
        [".nojekyll", MANIFEST, "index.html", "history.html", f"runs/{slug(1)}", f"runs/{slug(2)}",
         f"comparisons/{slug(2)}"]
    )  # fmt: skip
    assert "report of day 1" in made[f"runs/{slug(1)}"]
    assert "<h1>Our &lt;runs&gt;</h1>" in made["index.html"]
    index = re.sub(r"<[^>]+>", " ", made["index.html"])
    assert index.index("2026-01-02 00:00") < index.index("2026-01-01 00:00")


def test_it_is_brought_up_to_date_and_old_pages_go(results, folder, capsys):
    first, second = make(results, 1), make(results, 2)
    assert main(["site", str(folder)]) == 0
    (folder / "CNAME").write_text("runs.example.org")
    (folder / "runs" / "notes.html").write_text("by somebody else")
    (second / "report.html").write_text(shell("mpscale", "a newer report"))
    for path in first.iterdir():
        path.unlink()
    first.rmdir()
    make(results, 3)
    assert main(["site", str(folder)]) == 0
    assert capsys.readouterr().out.endswith("index.html: 2 runs, 2 old pages removed\n")
    made = files_in(folder)
    assert f"runs/{slug(1)}" not in made and f"comparisons/{slug(2)}" not in made
    assert "a newer report" in made[f"runs/{slug(2)}"]
    assert (made["CNAME"], made["runs/notes.html"]) == ("runs.example.org", "by somebody else")
    assert "2026-01-01 00:00" not in made["index.html"]


def foreign(folder):
    folder.mkdir()
    (folder / "thesis.tex").write_text("irreplaceable")


def a_file(folder):
    folder.write_text("not a folder")


def broken_manifest(folder):
    folder.mkdir()
    (folder / MANIFEST).write_text('{"files": [1]}')


def page_of_somebody(folder):
    folder.mkdir()
    (folder / MANIFEST).write_text('{"files": ["index.html"]}')
    (folder / "runs").mkdir()
    (folder / "runs" / slug(1)).write_text("by somebody else")


def link_to_elsewhere(folder):
    folder.mkdir()
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (folder / MANIFEST).write_text('{"files": []}')
    (folder / "runs").symlink_to(elsewhere)


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (foreign, "holds thesis.tex and no site of mpscale, and is left as it is"),
        (a_file, "is not a folder"),
        (broken_manifest, "cannot be read (files should be names), so what may be replaced is unknown"),
        (page_of_somebody, "mpscale has not made this file and does not replace it"),
        (link_to_elsewhere, "is a link, and mpscale writes only into the folder itself"),
    ],
)
def test_a_folder_that_holds_something_else_is_refused_and_left_as_it_is(results, folder, capsys, prepare, said):
    make(results, 1)
    prepare(folder)
    before = files_in(folder.parent)
    assert main(["site", str(folder)]) == 2
    assert said in capsys.readouterr().err
    assert files_in(folder.parent) == before


def test_a_manifest_cannot_have_files_elsewhere_removed(results, folder):
    make(results, 1)
    folder.mkdir()
    outside = folder.parent / "outside.html"
    outside.write_text("keep")
    names = ["../outside.html", str(outside), "runs/../../outside.html", "index.html", "thesis.tex"]
    (folder / MANIFEST).write_text(json.dumps({"files": names}))
    (folder / "thesis.tex").write_text("keep")
    assert main(["site", str(folder)]) == 0
    assert (outside.read_text(), (folder / "thesis.tex").read_text()) == ("keep", "keep")


def test_the_branch_of_a_repository_may_be_the_folder(results, folder):
    make(results, 1)
    (folder / ".git").mkdir(parents=True)
    assert main(["site", str(folder)]) == 0


def test_what_is_there_after_an_interruption_is_whole_and_the_next_call_goes_on(results, folder, monkeypatch):
    for day in (1, 2, 3):
        make(results, day)
    assert main(["site", str(folder)]) == 0
    before = files_in(folder)
    made, page = [], site_module.comparison_page

    def interrupted(*arguments, **how):
        made.append(arguments)
        if len(made) == 2:
            raise KeyboardInterrupt
        return page(*arguments, **how)

    make(results, 4)
    monkeypatch.setattr(site_module, "comparison_page", interrupted)
    assert main(["site", str(folder)]) == 130
    there = files_in(folder)
    same = set(before) - {MANIFEST, "history.html"}
    assert {name: there[name] for name in same} == {name: before[name] for name in same}
    assert there["history.html"].endswith("</html>\n") and slug(4) in there["history.html"]
    assert "report of day 4" in there[f"runs/{slug(4)}"]
    (folder / "runs" / f".{slug(4)}.{0:016x}.mpscale-partial").write_text("left by a process that was killed")
    monkeypatch.undo()
    assert main(["site", str(folder), str(results)]) == 0
    after = files_in(folder)
    assert f"comparisons/{slug(4)}" in after and not [name for name in after if "partial" in name]


def test_broken_runs_are_named_on_the_index_and_cost_nothing_else(results, folder, capsys, monkeypatch):
    make(results, 1)
    (results / "runs" / "empty").mkdir()
    mixed = [row(ms=2.0), row("mixed-static", 1.0, device_name="Another CPU")]
    make(results, 2, *mixed)
    os.utime(make(results, 3) / "report.html", (1, 1))

    def fails(run):
        raise OSError("no font")

    monkeypatch.setattr(site_module, "report_page", fails)
    assert main(["site", str(folder)]) == 0
    told = capsys.readouterr()
    assert told.out.endswith("index.html: 1 run\n")
    for words in (
        "empty/run.json: no such file",
        "holds cases of Test CPU and of Another CPU",
        "cannot be made: no font",
    ):
        assert words in told.err and words in files_in(folder)["index.html"]


def test_an_index_of_nothing_but_broken_runs(results, folder):
    (results / "runs" / "empty").mkdir(parents=True)
    assert main(["site", str(folder)]) == 0
    made = files_in(folder)
    assert "No run can be shown" in made["index.html"] and "history.html" not in made


def test_no_run_at_all_is_an_error(results, folder, capsys):
    assert main(["site", str(folder)]) == 2
    assert "there is no run in" in capsys.readouterr().err
    assert not folder.exists()


def test_a_report_is_made_if_there_is_none_or_it_is_older_than_the_journal_and_then_kept(results, folder, monkeypatch):
    made = []
    monkeypatch.setattr(site_module, "report_page", lambda run: made.append(run.name) or f"made for {run.name}")
    make(results, 1, report=False)
    old = make(results, 2)
    os.utime(old / "report.html", (1, 1))
    for _ in range(2):
        assert main(["site", str(folder)]) == 0
        assert [name[:8] for name in made] == ["20260101", "20260102"]
    assert files_in(folder)[f"runs/{slug(2)}"].startswith("made for 20260102")
    assert not (results / "runs" / slug(1).removesuffix(".html") / "report.html").exists()


def test_a_report_that_is_made_is_that_of_the_run(results, folder):
    make(results, 1, row(ms=2.0), report=False)
    assert main(["site", str(folder)]) == 0
    assert "<title>mpscale: 20260101T000000Z-test-cpu-0001</title>" in files_in(folder)[f"runs/{slug(1)}"]


def test_names_of_runs_become_names_of_files(results, folder):
    names = ["../../outside", "a/b", "A-b", "...", "é"]
    for day, name in enumerate(names, 1):
        path = night(results, day, row(ms=2.0), name=f"run-{day}")
        info = json.loads((path / "run.json").read_text())
        (path / "run.json").write_text(json.dumps(info | {"run": name}))
        (path / "report.html").write_text(shell("mpscale", f"[{name}]"))
    assert main(["site", str(folder)]) == 0
    pages = {
        name: re.findall(r"^\[(.*)\]$", text, re.M)
        for name, text in files_in(folder).items()
        if name.startswith("runs/")
    }
    assert pages == {
        "runs/outside.html": ["../../outside"], "runs/a-b.html": ["a/b"], "runs/A-b-2.html": ["A-b"],
        "runs/run.html": ["..."], "runs/run-2.html": ["é"],
    }  # fmt: skip


def beyond_our_pages(path):
    path.write_text(path.read_text().replace("<main>", '<meta HTTP-EQUIV="refresh" content="0; url=//example.org">'))


def without_our_policy(path):
    path.write_text("<script>alert(1)</script>" + path.read_text())


def link_to_a_secret(path):
    secret = path.parents[3] / "secret"
    path.rename(secret)
    path.symlink_to(secret)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("change", [beyond_our_pages, without_our_policy, link_to_a_secret, pipe])
def test_a_report_that_may_be_anything_is_not_published_but_made(results, folder, monkeypatch, change):
    monkeypatch.setattr(site_module, "report_page", lambda run: "made")
    change(make(results, 1) / "report.html")
    assert main(["site", str(folder)]) == 0
    assert files_in(folder)[f"runs/{slug(1)}"] == "made"


def test_several_results_folders_count_a_run_of_both_once(results, folder, tmp_path, capsys):
    other = tmp_path / "other"
    make(results, 1), make(other, 1), make(other, 2)
    assert main(["site", str(folder), str(results), str(other)]) == 0
    assert capsys.readouterr().out.endswith("index.html: 2 runs\n")
