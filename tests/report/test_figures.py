"""The style of all pictures: colours on light and on dark, and the axes that they share."""

from __future__ import annotations

import io
import re

import pytest
from support.browser import emulate
from support.runfolder import GPU, record
from support.svg import contrast, pair, run_of

from mpscale.core.mode import MODES
from mpscale.report.figures import TINTS, as_text, empty_figure, fitting, house_style, looks, save, text_width
from mpscale.report.gains_figure import gains
from mpscale.report.page import shell
from mpscale.report.panels import Known, power_ticks, ratio_limits, ratio_text, ratio_ticks, scale_label
from mpscale.report.tradeoff_figure import tradeoff
from mpscale.report.training_figure import training

GROUND = r'id="patch_1">\s*<path [^>]*fill: #ffffff'
WHITE, DARK = "#ffffff", "#0d1117"


def test_no_two_modes_look_alike_and_each_stands_out_from_both_pages():
    found = looks([*MODES, "mode-of-tomorrow", "and-another"])
    assert len({look.colour for name, look in found.items() if name in MODES}) == len(MODES)
    assert len({mode.on_dark for mode in MODES.values()}) == len(MODES)
    assert len({look.marker for look in found.values()}) == len(found)
    # WCAG 2.2 requires 3 for graphical objects.
    for look in found.values():
        assert contrast(look.colour, WHITE) >= 3, look
    for mode in MODES.values():
        assert contrast(mode.on_dark, DARK) >= 3, mode.name


@pytest.mark.parametrize("tint", TINTS)
def test_lines_and_remarks_stand_out_from_tinted_areas(tint):
    light, dark = TINTS[tint]
    assert contrast("#555555", light) >= 4.5
    assert contrast("#9aa4af", dark) >= 4.5


def drawn():
    """A figure with a line of one mode, a hollow point of another and a text."""
    figure = empty_figure(1)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=MODES["mixed-static"].colour)
    axes.plot([0.5], [0.5], marker="o", color=MODES["fp32"].colour, markerfacecolor="white")
    axes.set_title("0.123456")
    return figure


def test_a_picture_in_a_page_has_no_ground_of_its_own_and_takes_dark_colours_from_the_page():
    with house_style("x"):
        svg = as_text(drawn(), "what <it> shows")
    assert "<title>what &lt;it&gt; shows</title>" in svg
    assert ">0.123456<" in svg  # only the numbers of places are shortened
    assert not re.search(GROUND, svg)
    (style,) = re.findall(r"<style>.*?prefers-color-scheme: dark\) \{(.*)\}</style>", svg)
    assert '[style*="stroke: #d55e00"] { stroke: #ff8a3d !important }' in style
    for colour, name in (("#1b1f24", "text"), ("#555555", "soft"), ("#ffffff", "page")):
        assert re.search(rf'fill: {colour}"\] {{ fill: var\(--{name}, ', style) or colour == "#555555"


def test_a_file_of_its_own_brings_its_ground(tmp_path):
    with house_style("x"):
        save(drawn(), tmp_path / "x.svg", "svg")
    svg = (tmp_path / "x.svg").read_text(encoding="utf-8")
    assert re.search(GROUND, svg)
    assert 'fill: #ffffff"] { fill: var(--page, #0d1117)' in svg


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_lines_markers_and_hollow_points_in_the_colours_of_the_scheme(browser, tmp_path, scheme):
    from matplotlib.image import imread

    run = run_of(tmp_path, *pair("fp32", 8.0), *pair("mixed-static", 4.0), *pair("mixed-keras", 5.0))
    picture = gains(run)
    (tmp_path / "page.html").write_text(shell("x", f"<figure>{picture.svg}</figure>"), encoding="utf-8")
    emulate(browser, 1280, scheme)
    browser.get((tmp_path / "page.html").as_uri())
    pixels = imread(io.BytesIO(browser.get_screenshot_as_png()), format="png")[..., :3]
    seen = set(((pixels * 255).round().astype(int) @ [65536, 256, 1]).ravel().tolist())
    for mode in (MODES["mixed-static"], MODES["mixed-keras"]):
        shown = {
            where: int(colour[1:], 16) in seen for where, colour in (("light", mode.colour), ("dark", mode.on_dark))
        }
        assert shown == {"light": scheme == "light", "dark": scheme == "dark"}
    assert (int(WHITE[1:], 16) in seen) == (scheme == "light")


def test_no_text_touches_another_with_long_names_and_eight_modes(browser, tmp_path):
    metric = {"metric_name": "accuracy", "metric_higher_is_better": True, "metric_margin": 0.01}
    records = [
        record(mode, seed, workload=name, step_time_ms_median=8.0 / (1 + place / 5), gpu_memory_nvml_peak_mib=1e3,
               gpu_energy_j_per_step=1.0, metric_value=0.9 + place / 2000, **metric)
        for name in ("somebody.package:" + "a_long_name_" * 5, "toy", "c", "d", "e")
        for place, mode in enumerate([*MODES][:8])
        for seed in (0, 1)
    ]  # fmt: skip
    lost = {"step_time_ms_median": 90.0, "metric_value": 0.1, **metric}
    records += [record("article", seed, workload="toy", **lost) for seed in (0, 1)]
    steps = {
        one["case_id"]: [(1.0 + one["seed"], 2.0 ** (number // 4), 0) for number in range(60)]
        for one in records
        if len(one["workload"]) == 3
    }
    run = run_of(tmp_path, *records, steps=steps, device=GPU)
    page = "".join(f"<figure>{draw(run).svg}</figure>" for draw in (gains, training, tradeoff))
    (tmp_path / "page.html").write_text(shell("x", page), encoding="utf-8")
    emulate(browser, 1280)
    browser.get((tmp_path / "page.html").as_uri())
    boxes = browser.execute_script(
        """return [...document.querySelectorAll('svg')].map(svg => [...svg.querySelectorAll('text')].map(text => {
            const box = text.getBoundingClientRect();
            return [text.textContent, box.left + 1, box.right - 1, box.top + 1.5, box.bottom - 1.5]; }))"""
    )
    assert [len(texts) > 20 for texts in boxes] == [True] * 3
    for texts in boxes:
        for place, (text, left, right, top, bottom) in enumerate(texts):
            for other, *box in texts[:place]:
                assert not (left < box[1] and box[0] < right and top < box[3] and box[2] < bottom), (text, other)


def test_it_is_printed_in_the_colours_of_paper(browser, tmp_path):
    with house_style("x"):
        svg = as_text(drawn(), "x")
    (tmp_path / "page.html").write_text(svg, encoding="utf-8")
    browser.get((tmp_path / "page.html").as_uri())
    shown = {}
    for media in ("print", "screen"):
        dark = {"name": "prefers-color-scheme", "value": "dark"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [dark]})
        shown[media] = browser.execute_script("return getComputedStyle(document.querySelector('svg text')).fill")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert shown == {"print": "rgb(27, 31, 36)", "screen": "rgb(230, 237, 243)"}


@pytest.mark.parametrize(
    ("low", "high", "most", "ticks"),
    [
        (0.4, 2.5, 8, [0.5, 0.7, 1, 1.4, 2]),
        (0.4, 2.5, 3, [0.5, 1, 2]),
        (0.95, 1.06, 8, [0.96, 0.98, 1, 1.02, 1.04, 1.06]),
        (0.1, 70, 4, [0.25, 1, 4, 16, 64]),
        (0.1, 70, 3, [0.0625, 1, 16]),
    ],
)
def test_ratios_have_round_ticks(low, high, most, ticks):
    found = ratio_ticks(low, high, most)
    assert len(found) <= most
    assert 1 in found
    if len(ticks) <= most and ticks[0] >= low:
        assert found == ticks


def test_an_axis_of_ratios_is_symmetrical_unless_one_side_is_much_longer():
    low, high = ratio_limits([Known(1.5, 1.2, 1.9)])
    assert low * high == pytest.approx(1)
    low, high = ratio_limits([Known(0.1)])
    assert low < 0.1 and 1 < high < 2
    low, high = ratio_limits([Known(2.0, 1e-300, 1e300)])
    assert low > 0.1 and high < 10
    assert ratio_limits([]) == pytest.approx((1 / 1.1, 1.1), rel=0.02)


@pytest.mark.parametrize(
    ("value", "text"), [(1, "1"), (128, "128"), (2.0**15, "2^15"), (1000, "1000"), (2e-6, "2e-06")]
)
def test_a_scale_that_is_a_large_power_of_two_is_written_as_one(value, text):
    assert scale_label(value) == text


def test_powers_of_two_are_evenly_spaced():
    assert power_ticks(1, 2**15, 3) == [1, 2**6, 2**12]
    assert power_ticks(0.6, 70, 9) == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("ratio", [1.0, 0.7, 1e-9, 2.0**40])
def test_any_ratio_can_be_written(ratio):
    assert ratio_text(ratio).endswith("x") and "e" not in ratio_text(ratio)


@pytest.mark.parametrize("pixels", [-5, 3, 60, 10_000])
def test_a_name_is_shortened_to_its_end_until_it_fits(pixels):
    figure, name = empty_figure(), "package.of.somebody:" + "workload" * 20
    text = fitting(figure, name, pixels)
    assert name.endswith(text.removeprefix("…"))
    assert pixels < 10 or text_width(figure, [text]) <= pixels
