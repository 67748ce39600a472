"""What a notebook shows of a comparison, in a real browser: the page of the report, in a frame."""

from __future__ import annotations

from pathlib import Path

import mpscale

RUN = next(iter(sorted((Path(__file__).parents[2] / "results" / "reference").glob("*-nvidia-*/"))))
NOTEBOOK = "<!doctype html><meta charset=utf-8><title>notebook</title><style>h2 {{ color: red }}</style>{}<h2>next</h2>"


def test_the_page_is_shown_whole_and_apart_from_the_notebook(browser, tmp_path):
    comparison = mpscale.Comparison(RUN, 0)
    cell = comparison._repr_html_()
    (tmp_path / "notebook.html").write_text(NOTEBOOK.format(cell))
    browser.get_log("browser")
    browser.get(f"file://{tmp_path / 'notebook.html'}")
    assert browser.find_element("css selector", "p code").text == str(comparison.report)
    frame = browser.find_element("css selector", "iframe")
    assert frame.size["height"] > 400
    browser.switch_to.frame(frame)
    assert "Is mixed precision worth it here?" in browser.find_element("css selector", "body").text
    assert browser.find_element("css selector", "figure svg").size["width"] > 200
    assert browser.find_element("css selector", "h2").value_of_css_property("color") != "rgba(255, 0, 0, 1)"
    link = browser.find_element("css selector", "nav a")
    target = browser.find_element("id", link.get_attribute("href").partition("#")[2])
    link.click()
    assert browser.current_url.endswith("notebook.html")
    assert browser.execute_script("return Math.abs(arguments[0].getBoundingClientRect().top) < 200", target)
    browser.switch_to.default_content()
    assert browser.title == "notebook"
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_page_that_somebody_has_changed_is_made_again(tmp_path):
    for name in ("run.json", "journal.jsonl"):
        (tmp_path / name).write_bytes((RUN / name).read_bytes())
    (tmp_path / "report.html").write_text("<script>alert(1)</script>")
    cell = mpscale.Comparison(tmp_path, 0)._repr_html_()
    assert "alert(1)" not in cell
    assert "Is mixed precision worth it here?" in cell
