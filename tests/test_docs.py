"""The code in docs/ and README.md runs as printed; links lead somewhere, names exist, and sentences are short."""

import contextlib
import importlib.util
import io
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.one_case import train

import mpscale
from mpscale import cli
from mpscale.analysis.claim import Doubt
from mpscale.core.columns import STATUSES
from mpscale.core.mode import MODES
from mpscale.report.words import WORDS
from mpscale.scaling import DynamicLossScale, NoLossScale, StaticLossScale
from mpscale.workloads import registry

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
ALL_PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", *PAGES]
X, Y = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32), np.arange(200) % 3


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page):
    return re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL)


GUIDE = blocks("docs/scaling.md")
FROM_KERAS, LOOP, FROM_TORCH = blocks("docs/guides/faq.md")
PROGRAMS = {
    f"{module}:{attribute}": code
    for code, module, attribute in re.findall(
        r"```python\n((?:(?!```).)*)```\n\n(?:and run it:\n\n)?    (?:python|mpscale run) (\w+)[.:](\w+)",
        text_of("docs/your-model.md"),
        re.DOTALL | re.MULTILINE,
    )
}
"""Those of one's own models, by module and workload as the command below each names them."""


@pytest.fixture
def names(tmp_path):
    loss_function = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    given = {"x": X, "y": Y, "loss_function": loss_function, "folder": tmp_path, "batches": [(X, Y)] * 2}
    yield {"tf": tf, "keras": keras, "mpscale": mpscale} | given
    keras.config.set_dtype_policy("float32")


def test_guide_to_loss_scaling_runs_from_top_to_bottom(names):
    fit, loop, two_functions, testing = GUIDE
    exec(fit, names)
    optimizer = names["optimizer"]
    assert optimizer.counters()["applied"] == 7
    exec(loop, names)
    assert np.isfinite(names["step"](X, Y))
    assert optimizer.counters()["applied"] == 8
    exec(two_functions, names)
    assert optimizer.counters()["applied"] == 10
    exec(testing, names)
    assert optimizer.counters()["overflow"] == 1


def test_what_users_of_keras_write_runs_as_printed(names):
    names["model"] = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    exec(FROM_KERAS, names | {"y": X[:, :3]})
    optimizer = names["model"].optimizer
    assert isinstance(optimizer, mpscale.LossScaleOptimizer)
    assert optimizer.counters()["applied"] == 7
    assert optimizer.learning_rate == optimizer.inner_optimizer.learning_rate


def test_users_of_pytorch_get_the_loop_of_the_guide(names):
    setup, loop = FROM_TORCH.split("\n\n\n")
    assert loop == GUIDE[1]
    exec(setup, names)
    assert float(names["optimizer"].loss_scale_value) == 2.0**16
    assert names["model"].compute_dtype == "float16"


def test_defaults_are_those_that_the_tables_of_equivalents_name():
    ours = mpscale.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    theirs = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    assert float(ours.loss_scale_value) == theirs.initial_scale == 2.0**15
    assert DynamicLossScale().growth_interval == theirs.dynamic_growth_steps == 2000
    # torch.amp.GradScaler: growth_factor=2.0, backoff_factor=0.5, growth_interval=2000
    rule = DynamicLossScale(initial=2.0**16)
    assert (rule.growth_factor, rule.backoff_factor, rule.growth_interval) == (2.0, 0.5, 2000)
    assert rule.maximum == 2.0**24
    assert not NoLossScale().scales
    assert float(mpscale.LossScaleOptimizer(keras.optimizers.SGD(0.1), StaticLossScale(64)).loss_scale_value) == 64


def test_the_loop_with_replicas_runs_as_printed(names):
    (loop,) = blocks("docs/guides/scale-out.md")
    exec(loop, names | {"y": X[:, :3]})


def one_function(names, block):
    exec(block, names)
    return names["step"]


def two_functions(names, block):
    exec(block.split("checkpoint =")[0], names)
    return lambda x, y: names["update"](names["gradients"](x, y))


@pytest.mark.parametrize(
    ("block", "loop"),
    [
        pytest.param(GUIDE[1], one_function, id="the guide's loop"),
        pytest.param(GUIDE[2], two_functions, id="the guide's two functions"),
        pytest.param(LOOP, one_function, id="the loop of Keras' users"),
    ],
)
def test_a_printed_loop_continues_correctly_after_an_overflow(names, block, loop):
    """Expect the weights of the same loop with an optimizer that does not scale."""

    def weights(optimizer, batches):
        keras.utils.set_random_seed(0)
        names["model"] = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
        names["optimizer"] = optimizer
        step = loop(names, block)
        for batch in batches:
            step(batch, Y)
        return names["model"].get_weights()

    class Plain(keras.optimizers.SGD):
        """An optimizer without scaling, with the methods that the loop calls."""

        def unscale(self, grads):
            return grads, None

        def apply(self, grads, variables=None, finite=None):
            super().apply(grads, variables)

    expected = weights(Plain(0.1), [X, X])
    optimizer = mpscale.LossScaleOptimizer(keras.optimizers.SGD(0.1), DynamicLossScale(2.0**10))
    for ours, right in zip(weights(optimizer, [X, X * np.inf, X]), expected, strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-7)
    assert optimizer.counters()["skipped"] == 1


def test_the_printed_checkpoint_restores_the_scale(names):
    def optimizer():
        return mpscale.LossScaleOptimizer(keras.optimizers.SGD(0.1), DynamicLossScale(2.0**10))

    names["model"], names["optimizer"] = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)]), optimizer()
    names["batches"] = [(X * np.inf, Y), (X, Y)]
    exec(GUIDE[2], names)
    names["model"], names["optimizer"] = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)]), optimizer()
    names["batches"] = [(X, Y)]
    exec(GUIDE[2], names)
    assert float(names["optimizer"].loss_scale_value) == 2.0**9
    assert names["optimizer"].counters()["attempted"] == 3


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """The programs as a reader saves them, in a folder from which they can be imported."""
    modules = {program.partition(":")[0]: code for program, code in PROGRAMS.items()}
    for module, code in modules.items():
        (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for module in modules:
        sys.modules.pop(module, None)


OWN_MODELS = [
    ("my_signs:signs", "mixed-bf16", 200, "accuracy", 0.85),
    ("my_houses:prices", "mixed-dynamic", 400, "heating_accuracy", 0.7),
    ("my_reviews:moods", "mixed-dynamic", 300, "accuracy", 0.95),
    ("my_step:signs", "mixed-dynamic", 300, "accuracy", 0.8),
    ("my_vae:codes", "mixed-dynamic", 300, "val_loss", 0.15),
    ("my_gan:circles", "mixed-dynamic", 300, None, None),
    ("my_workloads:signs", "fp32", 1500, "accuracy", 0.9),
    ("my_product:product", "fp32", 1500, "mae", 0.3),
]


@pytest.mark.parametrize(("program", "mode", "steps", "metric", "good"), OWN_MODELS)
def test_the_printed_models_train(saved, program, mode, steps, metric, good):
    outcome = train(program, mode)
    assert (outcome.status, outcome.row["attempted_steps"], outcome.row.get("metric_name")) == ("ok", steps, metric)
    if metric is None:
        assert outcome.row["train_loss_final"] < outcome.row["train_loss_first"]
        return
    found = outcome.row["metric_value"]
    assert found > good if metric.endswith("accuracy") else found < good


def test_the_printed_model_of_images_fits_its_pipelines(saved):
    """MobileNetV2 with augmentation, F1, AdamW with cosine decay and class weights; the next test trains it."""
    workload = registry.get("my_images:images")
    model, data = workload.model(), workload.data()
    for pipeline in (data.train, data.test):
        (images, labels) = pipeline().element_spec
        assert (images.shape[1:], labels.shape[1:]) == (model.input_shape[1:], model.output_shape[1:])
    assert isinstance(model.optimizer, keras.optimizers.AdamW)


@pytest.mark.slow
def test_every_printed_program_runs_by_its_command(saved):
    """All at once: the commands differ in the name of the workload only."""
    programs = [program for program in PROGRAMS if program != "my_project:py"]
    assert {*programs} == {"my_images:images", *(row[0] for row in OWN_MODELS)}
    options = ["--modes", "fp32,mixed-dynamic", "--seeds", "1", "--steps", "24", "--mp-timing=0.05", "--mp-jit=off"]
    done = subprocess.run(
        [sys.executable, "-m", "mpscale", "run", *programs, *options],
        cwd=saved,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout
    (path,) = (saved / "results" / "runs").iterdir()
    records = mpscale.read_run(path).records
    assert [record["status"] for record in records] == ["ok"] * 2 * len(programs)
    images = [record for record in records if record["workload"] == "my_images:images"]
    assert len({record["data_order_digest"] for record in images}) == 1
    assert {record["metric_name"] for record in images} == {"f1"}
    assert all(0 <= record["metric_value"] <= 1 and np.isfinite(record["train_loss_final"]) for record in images)


def without_code(page):
    return re.sub(r"^ *```.*?^ *```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", ALL_PAGES)
def test_no_line_of_prose_is_longer_than_120_characters(page):
    prose = [line for line in without_code(page).splitlines() if not line.startswith(("|", "    "))]
    assert [line for line in prose if len(line) > 120] == []


def sentences(page):
    """The sentences of a page, without code, tables, headings and what is printed by mkdocstrings."""
    paragraphs, current, in_code = [], [], False
    for line in [*without_code(page).splitlines(), ""]:
        item = re.match(r"\s*(?:[-*]|\d+\.) +", line)
        in_code = line.startswith("    ") and not item and (in_code or not current)
        ends = not line.strip() or item or in_code or line.startswith(("|", "#", ":::", "<!--"))
        if ends and current:
            paragraphs.append(" ".join(current))
            current = []
        if item or not ends:
            current.append(line[item.end() if item else 0 :].strip())
    # A link counts by its text, and code as one word.
    plain = (re.sub(r"`[^`]*`", "Code", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)) for text in paragraphs)
    return [part for text in plain for part in re.split(r"(?<=[.!?:])[)*\"]*\s+(?=[^a-z\s])", text) if part.strip(" .")]


def test_sentences_are_told_apart(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading\n\nOne two. `a.b c` three\nfour [five six](x.md#y):\n\n    code here\n\n| a | table |\n\n"
        "- first item\n- second item, e.g. this\n  and that. Third!\n\n```text\nmore code. And more.\n```\n"
    )
    assert sentences(page) == [
        "One two.",
        "Code three four five six:",
        "first item",
        "second item, e.g. this and that.",
        "Third!",
    ]


@pytest.mark.parametrize("page", ALL_PAGES)
def test_sentences_have_fewer_than_25_words_on_average(page):
    lengths = [len(sentence.split()) for sentence in sentences(page)]
    assert statistics.mean(lengths) < 25


def anchors(page):
    headings = re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading.replace("`", "").strip().lower()) for heading in headings)
    return {re.sub(r"\s", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", ALL_PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", re.sub(r"`[^`]*`", "", without_code(page))):
        if ":" in link:
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]+(/[^\s)]*)?", link), link
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_named_results_exist(page):
    runs = {path.name for path in (ROOT / "results" / "reference").iterdir()}
    for run in re.findall(r"\b20\d{6}T\d{6}Z(?:-[\w-]+-[0-9a-f]{4})?\b", text_of(page)):
        assert any(name.startswith(run) for name in runs) or "my-gpu" in run, run


def test_every_report_of_a_reference_run_is_an_example():
    page = text_of("docs/reports.md")
    reports = (ROOT / "results" / "reference").glob("*/report.html")
    assert [path.parent.name for path in reports if f"/{path.parent.name}/report.html" not in page] == []


def commands():
    """The options of each command of mpscale, as its help has them."""
    page = site_hooks().command_reference()
    names = re.findall(r"^## mpscale (\S+)$", page, re.MULTILINE)
    printed = page.split("\n## mpscale ")[1:]
    return {
        name: set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", help)) for name, help in zip(names, printed, strict=True)
    }


def site_hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "tools" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_options_that_the_pages_name_exist(pytestconfig):
    for page in ["README.md", *PAGES]:
        for option in set(re.findall(r"--mp-[a-z]+(?:-[a-z]+)*", text_of(page))):
            pytestconfig.getoption(option)  # raises an error that names it


def test_commands_that_the_pages_print_exist(pytestconfig):
    known = commands()
    assert {"compare", "doctor", "probe"} <= known.keys()
    for page in ["README.md", *PAGES]:
        printed = re.findall(r"(?:^ {4}|`)mpscale ([a-z]+)((?: [^`\n#]*)?)", text_of(page), re.MULTILINE)
        for command, arguments in printed:
            assert command in known, (page, command)
            given = set(re.findall(r"(?<= )--[a-z-]+", arguments)) - known[command]
            if command == "run":  # all its options are pytest's
                given -= {option for option in given if pytestconfig.getoption(option, given) is not given}
            # Options of pytest may be passed on to the others, too.
            assert [option for option in given if not option.startswith("--mp-")] == [], (page, command)


def test_the_command_reference_has_every_command_and_no_colours():
    page = site_hooks().command_reference()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        cli.main(["history", "--help"])
    assert re.sub(r"\s+", " ", printed.getvalue()).strip() in re.sub(r"\s+", " ", page)
    assert "\x1b" not in page


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("guides/a.md", "../../results/reference/R/report.html", "../reports/R.html"),
        ("ci.md", "../.github/workflows/nightly.yml", "files/nightly.yml.txt"),
        ("guides/a.md", "../../README.md", "../index.md"),
        ("hardware.md", "../results/reference/", "reports.md"),
        ("guides/a.md", "../ci.md#gates", "../ci.md#gates"),
        ("a.md", "https://example.org/../x", "https://example.org/../x"),
        ("a.md", "../nowhere.txt", "../nowhere.txt"),
    ],
)
def test_links_out_of_the_docs_lead_to_what_the_site_has(page, link, expected, monkeypatch, tmp_path):
    build = site_hooks()
    for name in ("results/reference/R/report.html", ".github/workflows/nightly.yml", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(build, "ROOT", tmp_path)
    assert build.link_on_site(link, page) == expected


def test_the_python_reference_has_every_public_name():
    documented = set(re.findall(r"^::: mpscale\.\S*?(\w+)$", text_of("docs/reference/api.md"), re.MULTILINE))
    public = {*mpscale.__all__, *mpscale.scaling.__all__} - {"__version__", "MODES"}
    assert public <= documented


def test_the_glossary_has_every_word_of_a_report():
    page = text_of("docs/glossary.md")
    for code, word in WORDS.items():
        assert f"| {word} | `{code}` |" in page
    for status in STATUSES:
        assert f"| `{status}` |" in page
    for doubt in Doubt:
        assert f"`{doubt}`:" in page


def test_every_mode_has_a_row_in_the_guide():
    page = text_of("docs/guides/running.md")
    assert [mode for mode in MODES if f"| `{mode}` |" not in page] == []


def test_readme_prints_no_code_that_is_not_tried():
    tried = {block for page in PAGES for block in blocks(page)}
    assert [block for block in blocks("README.md") if block not in tried] == []
