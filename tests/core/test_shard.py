"""The parts of a plan: every case once, groups whole, and numbers as even as groups allow."""

from collections import Counter

import pytest

from mpscale.core.case import CaseId, Settings, Variant, plan
from mpscale.core.mode import MODES
from mpscale.core.shard import Shard, Share, group_of

SMALL = [MODES[name] for name in ("fp32", "mixed-dynamic")]
LARGE = [MODES[name] for name in ("fp32", "tf32", "mixed-static", "mixed-dynamic", "mixed-bf16")]


def cases(*workloads, seeds=4, repeats=2, modes=SMALL, shuffle=0, **sweep):
    planned = plan(workloads, modes, seeds, repeats, Settings(), shuffle_seed=shuffle, **sweep)
    return [case.named for case in planned]


def parts(planned, of):
    return [Share.of_plan(planned, Shard(part, of)).own() for part in range(1, of + 1)]


PLANS = {
    "seeds and repeats": cases("a", "b", "module:c"),
    "one workload": cases("a", seeds=7, repeats=0),
    "workloads with other modes": cases("a", "b", modes=LARGE) + cases("c", "d", seeds=1),
    "a sweep": cases("a", "b", batches=[8, 16], scales=[1.0, 8.0], modes=LARGE),
    "less than was planned": [case for case in cases("a", "b") if case.seed != 1 and case.mode != "fp32"],
    "names with plus and dashes": cases("a--b", "a+b", "x:y.z"),
}


@pytest.mark.parametrize("of", [1, 2, 3, 5, 8, 50])
@pytest.mark.parametrize("name", PLANS)
def test_each_case_is_in_one_part_and_groups_are_whole(name, of):
    planned = PLANS[name]
    dealt = parts(planned, of)
    assert sorted(case for part in dealt for case in part) == sorted(map(str, planned))
    groups = {str(case): group_of(case) for case in planned}
    assert sum(len({groups[case] for case in part}) for part in dealt) == len(set(groups.values()))
    largest = max(Counter(groups.values()).values())
    assert max(map(len, dealt)) - min(map(len, dealt)) <= largest


@pytest.mark.parametrize("of", [2, 3, 4])
def test_trainings_and_repeats_of_a_workload_are_dealt_evenly(of):
    for kind in [("a", True), ("a", False), ("b", True), ("b", False)]:
        numbers = []
        for part in parts(cases("a", "b", seeds=6, repeats=5), of):
            mine = [CaseId.parse(case) for case in part]
            numbers.append(sum((case.workload, case.repeat == 0) == kind for case in mine))
        assert max(numbers) - min(numbers) <= len(SMALL)


def test_parts_do_not_depend_on_the_order_in_which_a_session_shuffles_modes():
    share, other = (
        Share.of_plan(cases("a", "b", modes=LARGE, shuffle=seed, batches=[8, 16]), Shard(2, 3)) for seed in (1, 2)
    )
    assert share.plan == other.plan
    assert share.own() == other.own()


def test_every_batch_and_scale_of_a_seed_is_in_one_part():
    variants = [CaseId("a", "mixed-static", 0, 0, Variant(batch, scale)) for batch in (8, 16) for scale in (1.0, 2.0)]
    assert sorted(map(len, parts(variants, 4))) == [0, 0, 0, 4]


@pytest.mark.parametrize("text", ["1/1", "2/3", " 3 / 3 ", "1000/1000"])
def test_a_part_is_written_as_it_is_read(text):
    assert str(Shard.parse(text)) == text.replace(" ", "")


@pytest.mark.parametrize(
    "text", ["", "2", "0/3", "4/3", "1/0", "-1/3", "1/1001", "1/2/3", "1.0/2", "a/b", "1/٣", "²/3"]
)
def test_what_names_no_part_is_refused_with_what_is_allowed(text):
    with pytest.raises(ValueError, match="expected I/N such as 2/3"):
        Shard.parse(text)


@pytest.mark.parametrize(
    "odd",
    [
        None,
        [],
        {"part": 0, "of": 2, "plan": []},
        {"part": True, "of": 2, "plan": []},
        {"part": 3, "of": 2, "plan": []},
        {"part": 1, "of": 10**9, "plan": []},
        {"part": 1, "of": 2, "plan": ["no case"]},
        {"part": 1, "of": 2, "plan": [["toy--fp32--s0--r0"]]},
        {"part": 1, "of": 2},
    ],
)
def test_what_a_stranger_wrote_for_a_part_counts_as_none(odd):
    assert Share.of_run({"shard": odd}) is None


def test_a_part_comes_back_from_run_json():
    share = Share.of_plan(cases("a"), Shard(2, 3))
    assert Share.of_run({"shard": share.to_json()}) == share
    assert share.words() == "part 2 of 3: 4 of 12 cases"
    assert "has nothing to do: the 12 cases are 6 groups" in Share(Shard(7, 7), share.plan).words()
