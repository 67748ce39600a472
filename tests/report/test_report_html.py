"""report.html in a real browser."""

from __future__ import annotations

import re

import pytest
from support.browser import asked_for, emulate
from support.runfolder import GPU, finished, record, write_run, write_steps
from support.svg import luminance

from mpscale.core.mode import MODES
from mpscale.core.runs import read_run
from mpscale.report.document import document
from mpscale.report.files import rebuild
from mpscale.report.sections import results
from mpscale.report.table import Table

HOSTILE = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


def example():
    """A run with something in most sections."""
    checked = {"attempted_steps": 40, "applied_steps": 38, "skipped_steps": 2, "overflow_steps": 2}
    for mode, ms, value, more in (
        ("fp32", 8.0, 0.90, {}),
        ("mixed-static", 5.0, 0.91, checked),
        ("mixed-dynamic", 5.5, 0.905, checked),
    ):
        for seed in (0, 1, 2):
            yield record(
                mode, seed, step_time_ms_median=ms + 0.1 * seed, metric_value=value + 0.001 * seed,
                metric_name="accuracy", metric_higher_is_better=True, metric_margin=0.01,
                gpu_memory_nvml_peak_mib=1000.0 * ms / 8, gpu_energy_j_per_step=ms / 20, **more,
            )  # fmt: skip
    yield record("mixed-bf16", 0, status="crashed", status_reason="signal 11", output_tail=f"last\n{HOSTILE}\n```\n")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = write_run(tmp_path_factory.mktemp("html"), finished(example()), device=GPU)
    for seed in (0, 1, 2):
        for mode in ("fp32", "mixed-static", "mixed-dynamic"):
            scale = "" if mode == "fp32" else 128
            rows = "".join(
                f"{i},{2 - i / 30 + seed / 10},{scale},{'' if mode == 'fp32' else int(i < 2)}\n" for i in range(40)
            )
            write_steps(path, f"toy--{mode}--s{seed}--r0", "step,loss,loss_scale,overflow\n" + rows)
    rebuild(path)
    return read_run(path)


@pytest.fixture
def page(browser, run):
    browser.get((run.path / "report.html").as_uri())
    return browser


def test_it_loads_nothing_else_and_logs_no_error(browser, run):
    browser.get_log("browser"), asked_for(browser)
    browser.get((run.path / "report.html").as_uri())
    assert browser.title == f"mpscale: {run.name}"
    assert asked_for(browser) == [(run.path / "report.html").as_uri()]
    assert browser.get_log("browser") == []


def wide_rows(page):
    """For each row of the wide table that is not a heading: its workload, its mode and the texts of its cells."""
    return page.execute_script(
        """return [...document.querySelectorAll('.by-mode tbody')].flatMap(body => {
            const [name, ...rows] = body.rows;
            return rows.map(row => [name.cells[0].textContent, ...[...row.cells].map(cell => cell.firstChild.data
                ?? cell.textContent)]);
        })"""
    )


def test_the_wide_table_begins_with_the_results_and_has_every_table_with_a_row_per_mode(page, run):
    shown, beside = wide_rows(page), [section for section in document(run).sections if section.group]
    expected = results(run)
    assert [row[: len(expected.headers)] for row in shown] == expected.rows
    joined = Table(expected.headers, expected.rows)
    for section in beside[1:]:
        joined = joined.beside(section.parts[0])
    assert shown == joined.rows
    groups = page.execute_script(
        "return [...document.querySelectorAll('.by-mode th[scope=colgroup]')].map(h => [h.textContent, h.colSpan])"
    )
    assert groups == [[section.group, len(section.parts[0].headers) - 2] for section in beside]
    assert {"Metric against fp32", "Overflow and loss scale", "Timing", "Memory", "GPU energy"} < {g for g, _ in groups}


def test_each_column_says_what_it_is_to_the_mouse_and_without_one(page):
    heads = page.execute_script(
        "return [...document.querySelectorAll('.by-mode thead tr + tr th')].map(h => [h.textContent, h.title])"
    )
    assert all(title and "`" not in title for _, title in heads)
    assert "In CSV: step_time_ms." in dict(heads)["step time"]
    listed = page.execute_script(
        "return [...document.querySelectorAll('.notes dt')].map(t => [t.textContent, t.nextSibling.textContent])"
    )
    assert listed == heads
    assert page.execute_script("return document.querySelector('.notes details').open") is False


@pytest.mark.parametrize("width", [420, 1400])
def test_mode_and_headings_stay_in_sight_while_the_table_scrolls(page, width):
    emulate(page, width)
    edges = """const box = document.querySelector('.by-mode'), at = box.getBoundingClientRect();
        box.scrollTo(arguments[0], arguments[1]);
        return ['thead tr + tr th', 'tbody th[scope=row]', '.workload b'].map(one => {
            const place = box.querySelector(one).getBoundingClientRect();
            return [place.left - at.left, place.top - at.top];
        }).concat([[box.scrollLeft, box.querySelector('tbody th[scope=row]').offsetWidth]])"""
    before, after = (page.execute_script(edges, x, 0) for x in (0, 300))
    page.execute_script(edges, 0, 0)
    assert after[3][0] == 300 and after[3][1] < 180
    assert [row[0] for row in after[1:3]] == [row[0] for row in before[1:3]]
    page.execute_script("document.querySelector('.by-mode').style.maxHeight = '120px'")
    lower = page.execute_script(edges, 0, 60)
    assert lower[0][1] == before[0][1] and lower[1][1] == before[1][1] - 60


def test_bars_say_what_their_axis_is_and_lie_within_their_picture(page):
    found = page.execute_script(
        """return [...document.querySelectorAll('.by-mode svg')].map(svg => {
            const all = svg.getBoundingClientRect();
            const inside = [...svg.querySelectorAll('rect, path')].map(one => one.getBoundingClientRect())
                .every(one => one.left >= all.left - 1 && one.right <= all.right + 1);
            return [svg.querySelector('title').textContent, inside];
        })"""
    )
    assert all(inside for _, inside in found)
    kinds = {says.split(",")[0].split(" is ")[0] for says, _ in found}
    assert kinds == {"A full bar", "Logarithmic", "Worse than fp32 to the left"}


def test_it_has_every_section_of_the_markdown(page, run):
    sections = [section.title for section in document(run).sections]
    text = (run.path / "report.md").read_text(encoding="utf-8")
    assert [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")] == sections
    alone = [section.title for section in document(run).sections if not section.group]
    assert page.execute_script("return [...document.querySelectorAll('h2:not([class])')].map(h => h.textContent)") == [
        "Results", *alone
    ]  # fmt: skip
    links = page.execute_script(
        "return [...document.querySelectorAll('nav a, .by-mode a')].map(a => a.getAttribute('href').slice(1))"
    )
    assert len(links) > len(alone)
    assert page.execute_script("return arguments[0].filter(id => document.getElementById(id) === null)", links) == []


def test_foreign_text_stays_text(page):
    assert page.title != "taken"
    assert page.execute_script("return document.querySelectorAll('script, img, iframe, link').length") == 0
    assert HOSTILE in page.execute_script("return document.querySelector('section[id] pre').textContent")


@pytest.mark.parametrize("width", [400, 800, 1600])
def test_only_tables_and_pictures_scroll_sideways(page, width):
    emulate(page, width)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_link_unfolds_its_section(page):
    is_open = "return document.getElementById('environment').closest('details').open"
    assert page.execute_script(is_open) is False
    page.find_element("link text", "Environment").click()
    assert page.execute_script(is_open) is True


def drawn_pictures(browser):
    """For each picture: its title, whether it shows something, and the texts that extend beyond it."""
    return browser.execute_script(
        """return [...document.querySelectorAll('figure:not(.tradeoff)')].map(figure => {
            const svg = figure.querySelector('svg').getBoundingClientRect();
            const texts = [...figure.querySelectorAll('svg text')].map(
                text => [text.textContent, text.getBoundingClientRect()]);
            const beyond = texts.filter(([, box]) => box.left < svg.left - 1 || box.right > svg.right + 1
                || box.top < svg.top - 1 || box.bottom > svg.bottom + 1).map(([text]) => text);
            const drawn = svg.width > 600 && svg.height > 100 && texts.length > 8;
            return [figure.querySelector('h3').textContent, drawn, beyond];
        })"""
    )


def test_pictures_are_drawn_completely(page):
    emulate(page, 1280)
    assert drawn_pictures(page) == [["What each mode buys and costs", True, []], ["How training went", True, []]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_page_in_light_and_in_dark(page, scheme):
    emulate(page, 1280, scheme)
    colours = page.execute_script(
        "const style = getComputedStyle(document.body); return [style.color, style.backgroundColor]"
    )
    text, ground = (luminance(*map(int, re.findall(r"\d+", colour))) for colour in colours)
    assert (ground > text) == (scheme == "light")
    # WCAG 2.2, contrast ratio of level AAA
    assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) > 7


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_cells_of_every_look_stand_out_from_the_page(page, scheme):
    emulate(page, 1280, scheme)
    ground, found = page.execute_script(
        """const looks = ['good', 'bad', 'weak', 'unknown'], cell = document.querySelector('.by-mode td');
        const of = look => { cell.className = 'look-' + look; return getComputedStyle(cell).color; };
        return [getComputedStyle(document.body).backgroundColor, looks.map(of)];"""
    )
    ground, *found = (luminance(*map(int, re.findall(r"\d+", colour))) for colour in [ground, *found])
    # WCAG 2.2, contrast ratio of level AA
    assert all((max(one, ground) + 0.05) / (min(one, ground) + 0.05) > 4.5 for one in found)


def test_long_names_do_not_make_the_page_scroll(browser, tmp_path):
    name = "a.package.of.somebody:" + "a_workload_with_a_long_name_" * 4
    path = write_run(tmp_path, finished([record(mode, workload=name) for mode in ("fp32", "mixed-static")]))
    rebuild(path)
    browser.get((path / "report.html").as_uri())
    emulate(browser, 420)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 420


@pytest.mark.parametrize(
    ("workload", "modes"),
    [
        ("a.package.of.somebody:" + "a_workload_with_a_long_name_" * 4, ["fp32", "mixed-static"]),
        ("toy", [*MODES, "mode-of-tomorrow"]),
    ],
)
def test_pictures_have_room_for_long_names_and_all_modes(browser, tmp_path, workload, modes):
    records = [record(mode, seed, workload=workload, step_time_ms_median=1.0) for mode in modes for seed in (0, 1)]
    path = write_run(tmp_path, finished(records))
    for one in records:
        write_steps(path, one["case_id"], "step,loss,loss_scale,overflow\n0,1.0,8,0\n1,0.5,8,0\n")
    rebuild(path)
    browser.get((path / "report.html").as_uri())
    assert [beyond for _, _, beyond in drawn_pictures(browser)] == [[], []]


def test_a_run_without_cases_has_a_page(browser, tmp_path):
    path = write_run(tmp_path, planned=["toy--fp32--s0--r0"])
    rebuild(path)
    browser.get((path / "report.html").as_uri())
    assert "No case was started" in browser.execute_script("return document.body.textContent")
    assert browser.execute_script("return document.querySelectorAll('figure').length") == 0
