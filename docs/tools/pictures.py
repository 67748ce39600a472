"""Make README's pictures from a run: ``python docs/tools/pictures.py RUN``. Needs Chromium and its driver.

The first screen of the report, light and dark, and how training went on the three workloads that need a loss scale.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By

from mpscale.core.runs import Run, read_run, resolve_run
from mpscale.report.files import report_page
from mpscale.report.training_figure import training

IMAGES = Path(__file__).parents[1] / "images"
WORKLOADS = ("padded-gru", "beam-strain", "diabetes-sum")
WIDTH = 1400
"""Pixels: that of the page for which the first screen is designed."""


def photograph(run: Run) -> None:
    """Write report.png and report-dark.png."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "report.html")
        page.write_text(report_page(run), encoding="utf-8")
        browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            size = {"width": WIDTH, "height": 2000, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            for scheme, name in (("light", "report.png"), ("dark", "report-dark.png")):
                features = [{"name": "prefers-color-scheme", "value": scheme}]
                browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
                browser.get(page.as_uri())
                screen = browser.find_element(By.CLASS_NAME, "screen")
                browser.execute_script("arguments[0].style.padding = '0 16px 12px'", screen)
                screen.screenshot(str(IMAGES / name))
        finally:
            browser.quit()


def draw(run: Run) -> None:
    """Write loss-scale.svg, which has a ground of its own, because it may stand on any page."""
    picture = training(replace(run, records=[one for one in run.records if one["workload"] in WORKLOADS]))
    if picture is None:
        sys.exit(f"{run.name} has no steps of {', '.join(WORKLOADS)}")
    ground = "<style>svg { background: #ffffff } @media (prefers-color-scheme: dark) { svg { background: #0d1117 } }"
    head = picture.svg.index(">") + 1
    svg = f"{picture.svg[:head]}{ground}</style>{picture.svg[head:]}\n"
    (IMAGES / "loss-scale.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    run = read_run(resolve_run(sys.argv[1], "results"))
    photograph(run)
    draw(run)
