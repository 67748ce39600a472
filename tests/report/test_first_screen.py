"""The first screen of a report: the words, the code, and the page in a real browser."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import keras
import numpy as np
import pytest
from support.answers import case, compared, ended
from support.browser import emulate
from support.runfolder import GPU, finished, write_run
from support.svg import luminance

import mpscale
from mpscale.analysis.answer import answer_of
from mpscale.core.mode import MODES
from mpscale.core.runs import read_run
from mpscale.report.advice import code_of
from mpscale.report.document import document, render
from mpscale.report.files import rebuild, report_page
from mpscale.report.first_screen import QUESTION, first_screen, markdown, matrix

REFERENCE = Path(__file__).parents[2] / "results" / "reference" / "20261127T103907Z-amd-epyc-568d"
H200 = Path(__file__).parents[1] / "data" / "20261126T153730Z-nvidia-h200-1b51"
FAST = {"fp32": 8.0, "mixed-static": 4.4, "mixed-dynamic": 4.5, "mixed-bf16": 4.1}
SLOW = {"fp32": 8.0, "mixed-dynamic": 11.0, "mixed-bf16": 12.0}
HOSTILE = "<script>document.title='taken'</script>:a_name"


def trouble():
    """Two workloads on a GPU: a static scale that overflows always, a lost seed, and a control experiment."""
    for seed in range(3):
        for workload, factor in (("resnet", 1.0), (HOSTILE, 3.0)):
            for mode, ms in {**FAST, "article": 4.3}.items():
                values = {"workload": workload, "gpu_memory_nvml_peak_mib": 8000.0 * (1.0 if mode == "fp32" else 0.6)}
                if mode == "mixed-static" and workload == "resnet":
                    yield case(mode, seed, None, None, status="stalled", **{**values, "overflow_steps": 400})
                elif mode == "mixed-bf16" and workload == HOSTILE and seed == 0:
                    yield case(mode, seed, ms * factor, None, status="diverged", **values)
                else:
                    yield case(mode, seed, factor * ms * (1 + 0.02 * seed), 0.3 if mode == "article" else 0.9, **values)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of runs, each with its page."""
    folder = tmp_path_factory.mktemp("runs")
    written = {
        "trouble": finished(trouble()),
        "one process": finished(compared(FAST, seeds=1)),
        "gain": finished(compared(FAST)),
    }
    found = {name: write_run(folder / name, events, device=GPU) for name, events in written.items()}
    for path in found.values():
        rebuild(path)
    return found


def screen_of(path):
    return first_screen(read_run(path))


def test_the_reference_run_on_a_cpu_is_answered():
    screen = screen_of(REFERENCE)
    buys, costs, trust = screen.cards
    assert screen.headline == "No, not on this CPU."
    assert buys.answer == "0.42\N{EN DASH}0.96x"
    assert costs.answer == "accuracy, in 2 rows"
    assert "worse: mixed-static on beam-strain and diabetes-sum" in costs.details
    assert trust.is_warning
    assert any("emulated on a CPU" in detail for detail in trust.details)
    assert "scale with mixed-dynamic: as good as fp32 on 6 of 6 workloads" in screen.advice


def test_the_recorded_h200_is_answered():
    screen = screen_of(H200)
    assert screen.headline == "Cannot tell: one process a row."
    assert screen.cards[0].answer == "unknown"
    assert "--mp-steps-per-call" in screen.code


def test_a_run_with_trouble_is_answered(runs):
    screen = screen_of(runs["trouble"])
    assert re.fullmatch(
        r"Yes: 1\.\d\dx? ?.*x as fast with mixed-dynamic\.|Yes: .* with mixed-dynamic[.]", screen.headline
    )
    assert screen.cards[1].answer == "accuracy, in 2 rows"
    assert "mixed-static on resnet" in " ".join(screen.cards[1].details)
    assert "article" in " ".join(screen.cards[1].details)


def small(factor, **values):
    """Modes that need six tenths of the memory, and the time of fp32 by a factor."""
    for one in compared({"fp32": 8.0, "mixed-bf16": 8.0 * factor}, **values):
        one.update({"gpu_memory_nvml_peak_mib": 8000.0 if one["mode"] == "fp32" else 4800.0})
        yield one


NO_METRIC = {"has_metric": False, "metric_value": None, "metric_name": None}
IDLE = {"device_busy_share": 0.1}
SAID = {
    "no accuracy": (
        lambda: compared(FAST, **NO_METRIC),
        "Yes: 1.95x as fast with mixed-bf16; accuracy not measured.",
        "unknown",
        "Train with mixed-bf16: its accuracy is not known.",
    ),
    "accuracy on one workload only": (
        lambda: [*compared(FAST), *compared(FAST, workload="other", **NO_METRIC)],
        "Yes: 1.95x as fast with mixed-bf16; accuracy not measured on 1 of 2 workloads.",
        "unknown, in 3 of 6 rows",
        "Train with mixed-bf16: as good as fp32 on 1 of 2 workloads, not compared on 1.",
    ),
    "a gain on one workload": (
        lambda: [*compared(FAST), *compared(SLOW, workload="other")],
        "Yes, on 1 of 2 workloads: 1.95x as fast with mixed-bf16.",
        "no accuracy",
        "Train with mixed-bf16 on toy: as good as fp32. Keep float32 elsewhere.",
    ),
    "no mode for all workloads": (
        lambda: [
            *compared({"fp32": 8.0, "mixed-dynamic": 4.0, "mixed-bf16": 9.0}),
            *compared({"fp32": 8.0, "mixed-dynamic": 9.0, "mixed-bf16": 4.0}, workload="other"),
        ],
        "Yes: 2.00x as fast with another mode on each workload.",
        "no accuracy",
        "Choose by workload: mixed-dynamic on toy; mixed-bf16 on other.",
    ),
    "faster without a margin": (
        lambda: compared(FAST, metric_margin=None),
        "Not shown yet: faster, but it is not known if it trains as well.",
        "unknown",
        "Measure again: state the margin and the direction of each metric.",
    ),
    "less memory, but slower": (
        lambda: small(1.5),
        "No for speed on this GPU, but 0.60x the memory.",
        "no accuracy",
        "Stay with float32 on this GPU, unless memory is short.",
    ),
    "less memory on an idle GPU": (
        lambda: small(1.0, **IDLE),
        "Yes: 0.60x the memory with mixed-bf16; its speed is not known.",
        "no accuracy",
        "Train with mixed-bf16: as good as fp32.",
    ),
    "slower on one workload, no claim about another": (
        lambda: [*compared(SLOW), *compared(FAST, workload="other", **IDLE)],
        "No, on 1 of 2 workloads; the other cannot be told.",
        "no accuracy",
        "Stay with float32 on this GPU. If float16 is needed all the same, scale with mixed-dynamic: "
        "as good as fp32 on 2 of 2 workloads.",
    ),
    "fp32 ran out of memory": (
        lambda: [*ended("oom", "fp32"), *compared({"mixed-bf16": 4.0})],
        "Cannot tell: fp32 ran out of memory, but mixed precision did not.",
        "unknown",
        "Measure again: take a smaller batch, at which fp32 fits into memory.",
    ),
    "fp32 crashed": (
        lambda: [*ended("crashed", "fp32"), *compared({"mixed-bf16": 4.0})],
        "Cannot tell: fp32 has no step time to compare with.",
        "unknown",
        "Measure again: make fp32 end well.",
    ),
    "all modes crashed": (
        lambda: [*compared({"fp32": 8.0}), *ended("crashed", "mixed-bf16")],
        "Cannot tell: no mixed mode has a step time.",
        "unknown",
        "Measure again: make all modes end well, and time them.",
    ),
    "all trainings diverged": (
        lambda: [*ended("diverged", "fp32"), *ended("diverged", "mixed-bf16")],
        "Cannot tell: no speed could be compared.",
        "unknown",
        "Measure again: make all seeds end well.",
    ),
    "no mode can run": (
        lambda: [*compared({"fp32": 8.0}), *ended("unsupported", "mixed-fp8")],
        "No answer: no mixed mode can run here.",
        "unknown",
        "Measure again, with fp32 and a mixed mode that runs here.",
    ),
    "a stand-in": (
        lambda: compared(FAST, device_name="mpscale stand-in H200"),
        "Yes: 1.95x as fast with mixed-bf16. But the GPU is a stand-in for tests, so the figures are invented.",
        "no accuracy",
        "Train with mixed-bf16: as good as fp32.",
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_headline_cost_and_advice_agree(tmp_path, name):
    records, *said = SAID[name]
    screen = screen_of(write_run(tmp_path, finished(records()), device=GPU))
    assert [screen.headline, screen.cards[1].answer, screen.advice] == said


def test_a_run_that_is_not_complete_says_so_in_the_headline(tmp_path):
    screen = screen_of(write_run(tmp_path, finished(compared(FAST)), device=GPU, finish=False))
    assert screen.headline.endswith("with mixed-bf16. But the run is not complete.")


def test_a_mode_that_cannot_run_is_called_unsupported_and_weakens_nothing(tmp_path):
    records = [*compared(FAST), *ended("unsupported", "mixed-fp8")]
    screen = screen_of(write_run(tmp_path, finished(records), device=GPU))
    assert matrix(screen.answer).rows[0][-1] == "unsupported"
    assert not screen.cards[2].is_warning


@pytest.mark.parametrize(("ms", "shown"), [(8000.0, "0.00100x"), (0.001, "8000x"), (4.0, "2.00x")])
def test_no_ratio_looks_like_zero(tmp_path, ms, shown):
    records = [case(mode, seed, time) for mode, time in {"fp32": 8.0, "mixed-bf16": ms}.items() for seed in range(3)]
    screen = screen_of(write_run(tmp_path, finished(records), device=GPU))
    assert screen.cards[0].answer == shown
    assert matrix(screen.answer).rows[0][1].startswith(shown)


@pytest.mark.parametrize("seeds", [1, 6])
def test_the_command_asks_for_more_seeds_than_there_were(tmp_path, seeds):
    records = list(compared(FAST, seeds=seeds, **IDLE))
    for one in records:
        one.update({"metric_value": 0.9 + 0.02 * ((one["seed"] + len(one["mode"])) % 3)})
    code, _ = code_of_run(write_run(tmp_path, finished(records), device=GPU))
    assert int(re.search(r"--mp-seeds (\d+)", code).group(1)) >= max(5, seeds + 1)


@pytest.mark.parametrize("calls", [1, 50])
def test_the_command_asks_for_more_steps_per_call_only_if_there_were_fewer(tmp_path, calls):
    run = write_run(tmp_path, finished(compared(FAST, **IDLE)), device=GPU, settings={"steps_per_call": calls})
    assert ("--mp-steps-per-call 20" in code_of_run(run)[0]) == (calls == 1)
    piped = compared(FAST, **IDLE, input_kind="tf.data")
    run = write_run(tmp_path / "piped", finished(piped), device=GPU, settings={"steps_per_call": calls})
    assert "--mp-steps-per-call" not in code_of_run(run)[0]


@pytest.mark.parametrize(
    ("program", "typed", "command"),
    [
        ("mpscale run", "my:net --mp-timing 1", "mpscale run my:net --mp-timing 1 --mp-steps-per-call 20"),
        ("mpscale run", "my:net --steps-per-call 2 -x", "mpscale run my:net -x --mp-steps-per-call 20"),
        ("pytest", "bench --mp-steps-per-call=2 -k net", "pytest bench -k net --mp-steps-per-call 20"),
        ("pytest", "--mp-name one --mp-resume=latest -- a", "pytest --mp-steps-per-call 20 -- a"),
        ("python3 -m pytest", "'a b'", "python3 -m pytest 'a b' --mp-steps-per-call 20"),
        ("rm -rf", "my:net", "mpscale run --mp-steps-per-call 20"),
        ("pytest", "a\x1bb", "mpscale run --mp-steps-per-call 20"),
        ("mpscale.compare", "", "mpscale.compare(..., steps_per_call=20)"),
    ],
)
def test_the_command_is_that_of_the_run_with_other_options(tmp_path, program, typed, command):
    invocation = {"program": program, "arguments": shlex.split(typed), "folder": ".", "options": {}}
    records = finished(compared(FAST, **IDLE))
    assert code_of_run(write_run(tmp_path, records, device=GPU, invocation=invocation))[0] == command


def code_of_run(path):
    run = read_run(path)
    return code_of(answer_of(run), run)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("mixed-dynamic", "mpscale.DynamicLossScale(initial=16777216, growth_interval=2500000, growth_factor=1.5)"),
        ("mixed-keras", "keras.optimizers.LossScaleOptimizer(\n    optimizer,\n    initial_scale=16777216, "
         "dynamic_growth_steps=2500000,\n)"),
        ("graph-rewrite", "mpscale.DynamicLossScale(initial=16777216, growth_interval=2500000, growth_factor=1.5)"),
    ],
)  # fmt: skip
def test_the_code_has_the_dynamic_scale_that_was_measured_on_the_workload(tmp_path, mode, expected):
    own = {"dynamic_scale": {"initial": 2.0**24, "growth_interval": 2500000, "growth_factor": 1.5}}
    settings = {"dynamic_scale": {}, "set_apart": {"toy": own}}
    records = list(compared({"fp32": 8.0, mode: 4.0}, jit=False))
    code, _ = code_of_run(write_run(tmp_path, finished(records), device=GPU, settings=settings))
    assert expected in code
    assert code.endswith("jit_compile=False)")
    others = [*records, *compared({"fp32": 8.0, mode: 4.0}, jit=False, workload="other")]
    code, _ = code_of_run(write_run(tmp_path / "two", finished(others), device=GPU, settings=settings))
    assert "# as measured on 'toy'; 1 other setting elsewhere\n" in code


def test_growth_intervals_that_follow_the_length_of_trainings_are_said_and_not_copied(tmp_path):
    own = {name: {"dynamic_scale": {"growth_interval": steps}} for name, steps in (("toy", 40), ("other", 200))}
    records = [
        *compared({"fp32": 8.0, "mixed-dynamic": 4.0}),
        *compared({"fp32": 8.0, "mixed-dynamic": 4.0}, workload="other"),
    ]
    code, _ = code_of_run(write_run(tmp_path, finished(records), device=GPU, settings={"set_apart": own}))
    assert "growth intervals here: 40, 200 steps" in code
    assert "DynamicLossScale()" in code


@pytest.mark.parametrize(
    "settings",
    [[1], {"dynamic_scale": {"initial": "x"}}, {"dynamic_scale": {"initial=1); import os; (": 1}},
     {"dynamic_scale": {"initial": float("inf")}}, {"set_apart": 3}, {}],
)  # fmt: skip
def test_settings_that_are_unknown_or_invalid_never_get_into_code(tmp_path, settings):
    records = compared({"fp32": 8.0, "mixed-dynamic": 4.0})
    code, _ = code_of_run(write_run(tmp_path, finished(records), device=GPU, settings=settings))
    assert code.startswith("# settings not known: these are defaults\n")
    assert "mpscale.DynamicLossScale()" in code


def test_the_constant_scale_of_a_run_without_settings_is_that_of_the_training(tmp_path):
    records = compared({"fp32": 8.0, "mixed-static": 4.0}, loss_scale_final=64.0)
    code, _ = code_of_run(write_run(tmp_path, finished(records), device=GPU, settings={}))
    assert "mpscale.StaticLossScale(64)" in code
    assert "not known" not in code


@pytest.mark.parametrize("name", ["reference", "trouble", "one process", "gain"])
def test_the_markdown_begins_with_the_answer(runs, name):
    run = read_run(REFERENCE if name == "reference" else runs[name])
    screen = first_screen(run)
    lines = [line for line in render(document(run)).splitlines() if line]
    assert lines[1] == f"**{QUESTION} {screen.headline}**"
    assert [line.split("**")[0] for line in lines[2:5]] == [f"- {card.question} " for card in screen.cards]


@pytest.mark.parametrize("mode", [name for name, mode in MODES.items() if mode.is_mixed and not mode.is_control])
def test_the_code_trains_in_the_advised_mode(tmp_path, mode):
    device = {"jit": mode != "graph-rewrite"}
    run = read_run(write_run(tmp_path, finished(compared({"fp32": 8.0, mode: 4.0}, **device)), device=GPU))
    code, language = code_of(answer_of(run), run)
    assert (answer_of(run).mode, language) == (mode, "python")

    def build():
        return keras.Sequential([keras.Input((16,)), keras.layers.Dense(16), keras.layers.Dense(1, dtype="float32")])

    names = {"build": build, "optimizer": keras.optimizers.SGD(1e-3), "loss": "mse"}
    if mode == "graph-rewrite":
        assert "auto_mixed_precision" in code  # a setting of the whole process, so it is not run here
        return
    try:
        exec(code, names)
        names["model"].fit(np.ones((16, 16), "float32"), np.ones((16, 1), "float32"), verbose=0)
        first = names["model"].layers[0]
        assert first.compute_dtype == {"mixed_float16": "float16", "mixed_bfloat16": "bfloat16"}[MODES[mode].policy]
        assert (first.quantization_mode == "float8") == MODES[mode].float8
        scaling = MODES[mode].scaling
        wrapped = isinstance(names["model"].optimizer, mpscale.LossScaleOptimizer)
        assert wrapped == (scaling is not None and scaling.rule != "keras")
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("scale", [8.0, 3.5, 2.0**24])
def test_the_code_has_the_scale_that_was_measured(tmp_path, scale):
    times = {"fp32": 8.0, "mixed-static": 4.0}
    records = [*compared(times, swept_scale=None)]
    for one in records:
        if one["mode"] == "mixed-static":
            one.update({"swept_scale": scale})
    run = read_run(write_run(tmp_path, finished(records), device=GPU))
    code, _ = code_of(answer_of(run), run)
    assert eval(re.search(r"StaticLossScale\((.*)\)", code).group(1)) == scale


def test_no_name_acts_as_html_in_markdown(runs):
    screen = screen_of(runs["trouble"])
    assert any(HOSTILE in detail for card in screen.cards for detail in card.details)
    assert "<script" not in markdown(screen)


@pytest.fixture
def page(browser, runs, request, tmp_path_factory):
    """The page of a run, by name."""

    def opened(name, width=1400, scheme="light"):
        emulate(browser, width, scheme)
        path = runs.get(name)
        if path is None:
            runs[name] = path = tmp_path_factory.mktemp("reference")
            (path / "report.html").write_text(report_page(read_run(REFERENCE)), encoding="utf-8")
        browser.get((path / "report.html").as_uri())
        return browser

    return opened


@pytest.mark.parametrize("name", ["reference", "trouble", "one process", "gain"])
def test_the_first_screen_is_above_the_fold(page, name):
    bottom = page(name).execute_script("return document.querySelector('.screen').getBoundingClientRect().bottom")
    assert bottom < 950


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["reference", "trouble", "one process"])
def test_on_a_phone_it_is_cards_and_nothing_scrolls_sideways(page, name, scheme):
    browser = page(name, 420, scheme)
    found = browser.execute_script(
        """const box = one => one.getBoundingClientRect();
        const beyond = [...document.querySelectorAll('.screen *')]
            .filter(one => box(one).right > 421 || box(one).left < -1);
        const seen = one => box(one).width > 0 && box(one).right <= 420;
        return [document.documentElement.scrollWidth, beyond.map(one => one.outerHTML.slice(0, 80)),
            [...document.querySelectorAll('.matrix b')].every(seen)];"""
    )
    width, *others = found
    assert width <= 420
    assert others == [[], True]


@pytest.mark.parametrize("name", ["reference", "trouble"])
def test_it_fits_the_width_of_a_printed_sheet_in_light_colours(page, name):
    browser = page(name, 718, "dark")
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": features})
    try:
        right, ground = browser.execute_script(
            """const cells = [...document.querySelectorAll('.screen .card, .matrix td, .tradeoff svg')];
            return [Math.max(...cells.map(one => one.getBoundingClientRect().right)),
                getComputedStyle(document.body).backgroundColor];"""
        )
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert right <= 718
    assert ground == "rgb(255, 255, 255)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["reference", "trouble", "one process"])
def test_every_text_of_it_stands_out_from_its_ground(page, name, scheme):
    pairs = page(name, 1400, scheme).execute_script(
        """const ground = one => { for (let at = one; at; at = at.parentElement) {
            const colour = getComputedStyle(at).backgroundColor; if (!/, 0\\)$/.test(colour)) return colour; } };
        return [...document.querySelectorAll('.screen *')]
            .filter(one => [...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()))
            .filter(one => !one.closest('svg'))
            .map(one => [one.textContent.slice(0, 40), getComputedStyle(one).color, ground(one)]);"""
    )
    assert len(pairs) > 20
    for text, *colours in pairs:
        front, back = (luminance(*map(float, re.findall(r"[\d.]+", colour)[:3])) for colour in colours)
        # WCAG 2.2, contrast ratio of level AA
        assert (max(front, back) + 0.05) / (min(front, back) + 0.05) >= 4.5, (text, colours)


def test_verdicts_are_words_and_signs_as_well_as_colours(page):
    cells = page("trouble").execute_script(
        "return [...document.querySelectorAll('.matrix td[data-mode]')].map(td => [td.className, td.textContent])"
    )
    assert {kind for kind, _ in cells} == {"good", "bad"}
    for kind, text in cells:
        assert ("✓" in text and "▲" in text) if kind == "good" else ("✗" in text)


def test_names_of_users_stay_text(page):
    browser = page("trouble")
    assert browser.title != "taken"
    assert HOSTILE in browser.execute_script("return document.querySelector('.matrix').textContent")
