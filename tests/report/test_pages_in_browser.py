"""Every kind of page in a real browser: reports, comparisons, a history, a site, a fit and a probe."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
from support.browser import asked_for, emulate
from support.nightly import night, row
from support.runfolder import GPU
from test_fit_report import tried
from test_probe_report import probe

from mpscale.analysis.fit import Fit
from mpscale.cli import main
from mpscale.core.device import Device
from mpscale.core.runs import read_run
from mpscale.report.files import report_page
from mpscale.report.fit import write as write_fit
from mpscale.report.probe import write as write_probe

HOSTILE = "<img src=x onerror=\"document.title='taken'\">"
SITE_PAGES = ("index.html", "history.html", "comparisons/20260108T000000Z-test-cpu-0008.html")
WITH_HOSTILE = (*SITE_PAGES, "devices.html", "gates.html")
PAGES = (*WITH_HOSTILE, "run.html", "gpu.html", "fit.html", "probe.html")
REFERENCE = Path(__file__).parents[2] / "results" / "reference"

NOISY = (0.7, 1.0, 1.5, 0.8, 1.2)

CONTRAST = """
    const light = c => { const v = c.map(x => x / 255).map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
        return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
    const parse = text => text.match(/[\\d.]+/g).map(Number);
    const ground = one => { for (let e = one; e; e = e.parentElement) {
        const c = parse(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c.slice(0, 3); }
        return [255, 255, 255]; };
    return [...document.querySelectorAll('body *')].filter(one =>
        one.tagName !== 'title' && one.getClientRects().length &&
        [...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())
    ).map(one => { const style = getComputedStyle(one);
        const [a, b] = [light(parse(one.tagName === 'text' ? style.fill : style.color)), light(ground(one))];
        return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), one.textContent.slice(0, 40)];
    }).filter(([ratio]) => ratio < 4.5);"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A folder with a site, and comparisons across devices and with gates. The runs have a hostile workload."""
    root = tmp_path_factory.mktemp("pages")
    results, site = root / "results", root / "site"
    for day in range(1, 9):
        slow = 1.0 if day < 8 else 2.0
        rows = [
            row(ms=2.0 + day % 2 / 100),
            row("mixed-static", slow * (1.0 + day % 3 / 200)),
            row("mixed-dynamic", 1.0, spread=NOISY),
            row(ms=2.0, workload=HOSTILE),
            row("mixed-static", 3.0, workload=HOSTILE, metric=0.9 if day < 8 else 0.5),
        ]
        folder = night(results, day, *rows, commit="c" * 40 if day < 8 else "d" * 40)
        (folder / "report.html").write_text("<!DOCTYPE html><title>a report</title>")
    gpu = {"device": "gpu", "device_name": "Test GPU", "gpu_memory_nvml_peak_mib": 900.0}
    other = night(results, 9, row(ms=1.0, **gpu), row("mixed-static", 0.4, **gpu), device=GPU, finish=False)
    (other / "report.html").write_text("<!DOCTYPE html><title>a report</title>")
    (results / "runs" / HOSTILE.replace("/", "")).mkdir()
    assert main(["site", str(site), str(results), "--title", HOSTILE]) == 0
    before, after = sorted(str(folder) for folder in (results / "runs").iterdir() if folder.name[0] == "2")[6:8]
    compare = ["compare", "--results", str(results), "-o", str(root / "out.txt"), before, after]
    assert main([*compare, str(other), "--html", str(site / "devices.html")]) == 0
    assert main([*compare, "--html", str(site / "gates.html"), "--fail-on", "step_time>5%,metric,missing"]) == 1
    for name, run in (("run", "20261127T134739Z-amd-epyc-04e5"), ("gpu", "20261126T191258Z-nvidia-h200-fc37")):
        (site / f"{name}.html").write_text(report_page(read_run(REFERENCE / run)), encoding="utf-8")
    gpu_fit = Fit("toy", ["tf32"], Device("gpu", "Test GPU"), None, [tried("tf32", 8)], {"tf32": None})
    small = probe({("dense", "activations"): [1e-9, 0.0, 1e-3], ("dense", "weights"): [1e-5, 0.5]}, scale=2.0**20)
    for name, write in (("fit", partial(write_fit, fit=gpu_fit)), ("probe", partial(write_probe, probe=small))):
        (root / name).mkdir()
        write(root / name, about={name: "name", "finished": True})
        (root / name / "report.html").rename(site / f"{name}.html")
    return site


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_readable_on_every_screen_and_loads_nothing(browser, pages, name):
    browser.get_log("browser"), asked_for(browser)
    browser.get((pages / name).as_uri())
    for width in (1400, 420):
        for scheme in ("light", "dark"):
            emulate(browser, width, scheme)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            assert browser.execute_script(CONTRAST) == [], (width, scheme)
    assert browser.title != "taken"
    assert browser.execute_script("return document.querySelectorAll('script, img, iframe, link, object').length") == 0
    assert (HOSTILE in browser.execute_script("return document.body.textContent")) == (name in WITH_HOSTILE)
    assert asked_for(browser) == [(pages / name).as_uri()]
    assert browser.get_log("browser") == []


def text_of(browser, pages, name, selector):
    browser.get((pages / name).as_uri())
    emulate(browser, 1400)
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(one => one.innerText.replace(/\\s+/g, ' '))", selector
    )


def test_a_comparison_answers_in_words(browser, pages):
    (title,) = text_of(browser, pages, SITE_PAGES[2], "h1")
    assert title == "Is B as good as A? ✗ No: worse in 2 of 5 rows"
    cells = text_of(browser, pages, SITE_PAGES[2], ".changes tbody tr:first-child td")
    assert [re.sub(r" host.*", "", cell) for cell in cells] == [
        "✓ the same -0.5%", "✗ slower +101.0%", "✓ the same +0.0%",
    ]  # fmt: skip
    assert text_of(browser, pages, SITE_PAGES[2], ".changes tbody tr:last-child td")[1].endswith(
        "✗ accuracy -40.00 points, worse overflow 2.50%"
    )
    changed, trust = text_of(browser, pages, SITE_PAGES[2], ".box")
    assert changed.startswith("What changed 2 changes beyond noise") and "toy mixed-static: step time ✗ +101" in changed
    assert "✓ noise floor known from 7 runs" in trust and "! 1 difference in the environment: git commit ccccccc →" in (
        trust
    )


def test_gates_that_fired_are_on_the_first_screen(browser, pages):
    gates = text_of(browser, pages, "gates.html", ".box")[2]
    assert gates.startswith("Gates 2 of 15 checks fired ✗ fired: step_time>5%, toy mixed-static")


def test_runs_of_other_devices_show_ratios_within_each(browser, pages):
    answers = text_of(browser, pages, "devices.html", ".answers li")
    assert answers[0] == "B ✗ No: worse in 2 of 5 rows"
    assert answers[1].startswith("C ? Cannot tell: another device")
    cell = text_of(browser, pages, "devices.html", "h2 + .wide .changes tbody td")[0]
    assert re.fullmatch(r"A 2\.\d+x ✓ faster B 0\.99x ✗ slower C 2\.50x ✓ faster", cell)


def test_a_history_shows_what_the_last_run_changed(browser, pages):
    answers = text_of(browser, pages, "history.html", ".answers li")
    assert (
        answers[0] == "Step time: ✗ The last run of each machine is worse in 1 of 5 rows: toy mixed-static (Test CPU)"
    )
    assert answers[2].startswith("Final metric: ✗ The last run of each machine is worse in 1 of 5 rows: <img")
    panels = text_of(browser, pages, "history.html", ".panel.bad")
    assert [re.search(r"since the run before: (.*?)(?: worst| noise|$)", panel)[1] for panel in panels] == [
        "✗ slower", "✗ worse",
    ]  # fmt: skip
    assert "noise floor 1" in panels[0] and "from 7 runs" in panels[0]
    said = browser.execute_script("return document.querySelector('.panel.bad .step title').textContent")
    assert said.startswith("2026-01-08 00:00 · 20260108T000000Z-test-cpu-0008 · ddddddd · 2.0") and "slower" in said


def test_the_index_has_the_newest_run_first_with_its_answer(browser, pages):
    first, second, *others = text_of(browser, pages, "index.html", "tbody tr")
    assert first.startswith(
        "2026-01-09 00:00 ! not finished ✓ Yes: 2.50x as fast with mixed-static. But the run is not complete "
        "toy mixed-static: 2.50x faster"
    )
    answer = "✓ Yes, on 1 of 2 workloads: 2.00x as fast with mixed-dynamic"
    assert second.startswith(f"2026-01-08 00:00 {answer}") and "✗ worse Test CPU" in second
    assert len(others) == 7
    assert HOSTILE.replace("/", "") in text_of(browser, pages, "index.html", "h2 + ul li")[0]


def test_every_link_of_a_site_is_relative_and_leads_to_a_page(pages):
    for page in pages.rglob("*.html"):
        for link in re.findall(r'(?:href|src)="([^"#]+)', page.read_text(encoding="utf-8")):
            assert not re.match(r"[a-z]+:|/", link), (page, link)
            assert (page.parent / link).is_file(), (page, link)
