"""The plan of a run and the names of its cases."""

import json

import pytest

from mpscale.core.case import Case, CaseId, SeriesKey, Settings, Variant, plan, series_key
from mpscale.core.columns import METHOD_VERSION
from mpscale.core.mode import MODES

ALL = [MODES["fp32"], MODES["mixed-static"], MODES["mixed-dynamic"], MODES["mixed-bf16"]]


def plan_of(**options):
    options = {"workloads": ["a", "b"], "modes": ALL, "seeds": 3, "repeats": 2, "settings": Settings(), **options}
    return list(plan(**options))


def test_every_mode_meets_every_seed_and_repeat_once():
    cases = plan_of()
    assert len({case.id for case in cases}) == len(cases) == 2 * 4 * (3 + 2)
    assert [case.order for case in cases] == list(range(40))


def test_modes_of_a_seed_run_side_by_side():
    cases = plan_of()
    groups = [case.group for case in cases[::4]]
    assert groups == [(w, s, r) for w in "ab" for s, r in [(0, 0), (1, 0), (2, 0), (0, 1), (0, 2)]]
    for start in range(0, 40, 4):
        assert {case.mode for case in cases[start : start + 4]} == {mode.name for mode in ALL}


def test_a_sweep_meets_every_batch_and_only_a_constant_scale_meets_every_scale():
    batches, scales = (16, 64), (8.0, 128.0, 2.0**24)
    cases = plan_of(batches=batches, scales=scales)
    assert len({case.id for case in cases}) == len(cases) == 2 * 2 * (3 + 3) * (3 + 2)
    for case in cases:
        assert case.settings.batch_size == case.variant.batch
        scale = case.settings.static_scale
        assert case.variant.scale == (scale if case.mode == "mixed-static" else None)
    # The modes that are compared with each other run side by side, and all batches of a seed before the next seed.
    groups = [case.group for case in cases]
    assert groups[:24] == [(f"a @{batch}", seed, 0) for seed in (0, 1) for batch in batches for _ in range(6)]
    places = {case.place for case in cases[:6]}
    assert places == {("a @16", mode) for mode in ("fp32", "mixed-dynamic", "mixed-bf16")} | {
        ("a @16", f"mixed-static @{scale}") for scale in ("8", "128", "2^24")
    }


def test_without_a_sweep_a_case_has_no_variant():
    (case, *_) = plan_of(settings=Settings(batch_size=64, static_scale=8.0))
    assert case.identity().keys() == {"case_id", "workload", "mode", "seed", "repeat", "order"}
    assert case.place == (case.workload, case.mode)


def test_order_of_modes_is_shuffled_and_reproducible():
    orders = {tuple(case.mode for case in plan_of()[start : start + 4]) for start in range(0, 40, 4)}
    assert len(orders) > 3
    assert plan_of(shuffle_seed=1) == plan_of(shuffle_seed=1)
    assert plan_of(shuffle_seed=1) != plan_of(shuffle_seed=2)


def test_a_case_survives_the_wire():
    settings = Settings(dynamic_scale={"initial": 4.0}, steps_per_call=20)
    for variant in (Variant(), Variant(64, 2.0**24), Variant(replicas=2)):
        case = Case("w", "mixed-dynamic", 1, 0, 3, settings, variant)
        assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case


def test_id_is_a_file_name_even_for_a_workload_named_by_module():
    assert Case("pkg.mod:attr", "fp32", 0, 2, 0, Settings()).id == "pkg.mod+attr--fp32--s0--r2"


@pytest.mark.parametrize(
    ("text", "known", "case"),
    [
        ("toy--fp32--s0--r2", [], ("toy", "fp32", 0, 2)),
        ("pkg.mod+attr--mixed-bf16--s10--r0", [], ("pkg.mod:attr", "mixed-bf16", 10, 0)),
        ("c++--fp32--s0--r0", ["c++"], ("c++", "fp32", 0, 0)),
        ("a--b--fp32--s0--r0", [], ("a--b", "fp32", 0, 0)),
        ("toy--fp32--batch64--s0--r0", [], ("toy", "fp32", 0, 0, 64)),
        ("a--b--mixed-static--scale0.5--s1--r0", [], ("a--b", "mixed-static", 1, 0, None, 0.5)),
        ("toy--mixed-static--batch64--scale1e+30--s0--r2", [], ("toy", "mixed-static", 0, 2, 64, 1e30)),
        ("a--batch8--fp32--batch64--s0--r0", [], ("a--batch8", "fp32", 0, 0, 64)),
        ("a--scale8--fp32--s0--r0", [], ("a--scale8", "fp32", 0, 0)),
        ("toy--fp32--replicas2--s0--r0", [], ("toy", "fp32", 0, 0, None, None, 2)),
        ("a--replicas2--fp32--batch8--replicas4--s0--r0", [], ("a--replicas2", "fp32", 0, 0, 8, None, 4)),
    ],
)
def test_an_id_says_which_case_it_is(text, known, case):
    assert CaseId.parse(text, known) == CaseId(*case[:4], Variant(*case[4:]))
    assert str(CaseId.parse(text, known)) == text


@pytest.mark.parametrize("text", ["", "toy", "toy--fp32", "toy--fp32--s--r0", "toy--fp32--s0--r0--a1"])
def test_other_texts_are_not_ids(text):
    assert CaseId.parse(text) is None


@pytest.mark.parametrize("workload", ["toy", "pkg.mod:attr", "a/b"])
@pytest.mark.parametrize("mode", ["fp32", "mixed-static", "mixed-dynamic"])
def test_series_key_survives_formatting_and_parsing(workload, mode):
    settings = Settings(dynamic_scale={"initial": 4.0})
    text = series_key(MODES[mode], workload, "sha256:1", 10, 20, settings)
    found = SeriesKey.parse(text)
    assert str(found) == text
    assert (found.workload, found.mode, found.digest, found.settings["batch"]) == (workload, mode, "sha256:1", "10")
    assert SeriesKey.facts(text).keys() >= {"digest", "batch", "steps", "jit", "timing", "method"}


def test_a_workload_has_a_growth_interval_of_its_own_unless_the_user_chose_one():
    own = Settings(dynamic_scale={"hysteresis": 2}).suited_to(200)
    assert own.dynamic_scale == {"hysteresis": 2, "growth_interval": 200}
    for mode, interval in (("mixed-dynamic", 200), ("mixed-keras", 200), ("mixed-static", None), ("fp32", None)):
        assert MODES[mode].growth_interval(own) == interval
    asked = Settings(dynamic_scale={"growth_interval": 500})
    assert asked.suited_to(200) == asked
    usual = Settings().suited_to(None)
    assert (usual, MODES["mixed-dynamic"].growth_interval(usual)) == (Settings(), 2000)


def test_series_key_is_byte_for_byte_that_of_earlier_runs():
    assert series_key(MODES["mixed-static"], "toy", "0aad", 100, 2000, Settings()) == (
        f"toy/0aad/mixed-static/batch=100,steps=2000,jit=on,timing=2s/50,scale=128/method={METHOD_VERSION}"
    )
    assert SeriesKey.facts("old-1") == {"series": "old-1"}


@pytest.mark.parametrize(
    ("mode", "change", "same"),
    [
        ("fp32", {"static_scale": 8.0}, True),
        ("fp32", {"dynamic_scale": {"initial": 4.0}}, True),
        ("mixed-static", {"static_scale": 8.0}, False),
        ("mixed-static", {"dynamic_scale": {"initial": 4.0}}, True),
        ("mixed-dynamic", {"dynamic_scale": {"initial": 4.0}}, False),
        ("mixed-dynamic", {"dynamic_scale": {"hysteresis": 2}}, False),
        ("mixed-dynamic", {"static_scale": 8.0}, True),
        ("graph-rewrite", {"dynamic_scale": {"initial": 4.0}}, False),
        ("mixed-logmax", {"dynamic_scale": {"initial": 4.0}}, True),
        ("mixed-keras", {"dynamic_scale": {"initial": 4.0}}, False),
        ("mixed-keras", {"dynamic_scale": {"hysteresis": 2}}, True),
        ("fp32", {"jit": False}, False),
        ("fp32", {"timing_s": 1.0}, False),
        ("fp32", {"autotune": "shared"}, False),
        ("fp32", {"steps_per_call": 20}, False),
        ("fp32", {"strategy": "mirrored"}, False),
        ("fp32", {"strategy": "mirrored", "replicas": 2}, False),
    ],
)
def test_series_key_changes_only_with_settings_that_move_its_figures(mode, change, same):
    keys = [series_key(MODES[mode], "w", "d", 10, 20, settings) for settings in (Settings(), Settings(**change))]
    assert (keys[0] == keys[1]) is same
