"""The picture of training, read back from its SVG."""

from __future__ import annotations

import pytest
from support.runfolder import record
from support.svg import SVG, groups, path_of, root_of, run_of, texts

from mpscale.report.training_figure import training

NAN = float("nan")


def trained(tmp_path, losses, **options):
    """The picture of a run with these losses by mode and seed."""
    steps = {
        f"toy--{mode}--s{seed}--r0": [row if isinstance(row, tuple) else (row, "", "") for row in rows]
        for (mode, seed), rows in losses.items()
    }
    return training(run_of(tmp_path, *(record(mode, seed) for mode, seed in losses), steps=steps, **options))


def zero(root):
    return path_of(root, "same-1-1")[0][1]


def test_a_line_is_the_difference_to_fp32_of_the_same_seed(tmp_path):
    # The second seed starts higher under both, and mixed-bf16 is 0.1 above fp32 in each.
    losses = {
        (mode, seed): [2 - step / 10 + seed + more for step in range(10)]
        for mode, more in (("fp32", 0), ("tf32", 0), ("mixed-bf16", 0.1))
        for seed in (0, 1)
    }
    root = root_of(trained(tmp_path, losses))
    assert [y for _, y in path_of(root, "loss-1-1")] == pytest.approx([zero(root)] * 10, abs=0.02)
    (above,) = {round(y, 1) for _, y in path_of(root, "loss-1-2")}
    assert above < zero(root) - 10
    assert "loss minus fp32's, which went from 2.50 to 1.60 in 10 steps" in texts(root)
    assert "fp32" not in texts(root)


def test_without_fp32_the_loss_itself_is_drawn_and_the_picture_says_so(tmp_path):
    picture = trained(tmp_path, {("mixed-bf16", 0): [4.0, 2.0, 1.0], ("tf32", 0): [4.0, 2.0, 1.0]})
    root = root_of(picture)
    assert "no fp32 to compare it with: the loss itself, 3 steps" in texts(root)
    heights = [y for _, y in path_of(root, "loss-1-1")]
    assert heights[0] - heights[1] == pytest.approx(2 * (heights[1] - heights[2]), abs=0.05)
    assert "minus" not in picture.caption


def test_a_mode_without_a_seed_of_fp32_is_left_out_and_counted(tmp_path):
    picture = trained(tmp_path, {("fp32", 0): [1.0], ("tf32", 0): [1.0], ("mixed-bf16", 1): [1.0]})
    assert picture.caption.endswith("Not drawn: 1 mode without a seed that fp32 has.")
    assert not groups(root_of(picture), "loss-1-2")


def test_a_lost_seed_has_a_star_where_it_ended(tmp_path):
    losses = {("fp32", seed): [1.0] * 6 for seed in (0, 1)}
    losses |= {("mixed-static", 0): [1.0] * 6, ("mixed-static", 1): [1.5] * 3 + [NAN] * 3}
    picture = trained(tmp_path, losses)
    root = root_of(picture)
    (star,) = groups(root, "lost-1-1")
    assert "A star is the last finite loss of a seed (1 of them)" in picture.caption
    line = path_of(root, "loss-1-1")
    assert float(next(star.iter(f"{SVG}use")).get("x")) == pytest.approx(line[2][0], abs=0.02)
    assert len(line) == 6


def test_a_training_without_a_finite_loss_says_so(tmp_path):
    root = root_of(trained(tmp_path, {("fp32", 0): [1.0] * 6, ("mixed-fp8", 0): [NAN] * 6}))
    assert "no finite loss" in texts(root)


def test_a_mode_far_away_does_not_flatten_the_others(tmp_path):
    losses = {("fp32", 0): [1.0 - step / 100 for step in range(50)]}
    for mode, off in (("tf32", 0.01), ("mixed-bf16", 0.02), ("mixed-static", 1e6)):
        losses[(mode, 0)] = [loss + off for loss in losses[("fp32", 0)]]
    picture = trained(tmp_path, losses)
    root = root_of(picture)
    assert zero(root) - path_of(root, "loss-1-1")[0][1] > 5
    assert "+1,000,000" in texts(root)
    assert "A triangle at the edge" in picture.caption


@pytest.mark.parametrize(
    ("losses", "pieces", "points"),
    [
        ([1.0, 0.5, 0.25], 1, 3),
        ([1.0, 0.5, NAN, 0.25, 0.2], 2, 4),
        ([1.0, 0.5, float("inf"), NAN], 1, 2),
        ([1.0 / (1 + step) for step in range(1200)], 1, 60),
    ],
)
def test_a_line_breaks_where_no_loss_is_finite_and_has_at_most_sixty_points(tmp_path, losses, pieces, points):
    root = root_of(trained(tmp_path, {("fp32", 0): losses}))
    (group,) = groups(root, "loss-1-1")
    assert next(group.iter(f"{SVG}path")).get("d").count("M") == pieces
    assert len(path_of(root, "loss-1-1")) == points


def test_steps_that_overflowed_are_ticks_at_their_step_and_join_if_they_touch(tmp_path):
    rows = [(1.0, 64, int(step in (10, 11, 50))) for step in range(100)]
    picture = trained(tmp_path, {("fp32", 0): [1.0] * 100, ("mixed-dynamic", 0): rows})
    root = root_of(picture)
    ticks, line = path_of(root, "overflow-1-1"), path_of(root, "loss-1-1")
    assert len(ticks) == 4
    step = (line[-1][0] - line[0][0]) / 98  # between the centres of the first and the last two steps
    assert ticks[1][0] - ticks[0][0] == pytest.approx(2 * (ticks[3][0] - ticks[2][0]), rel=0.01)
    assert ticks[3][0] - ticks[2][0] == pytest.approx(step, rel=0.02)
    assert "Ticks along the axis: steps that overflowed." in picture.caption
    assert "scale 64, overflow 3/100" in texts(root)


def test_steps_that_always_overflow_do_not_swell_the_picture(tmp_path):
    rows = [(1.0, 2**20, 1)] * 20_000
    picture = trained(tmp_path, {("mixed-static", 0): rows})
    assert len(path_of(root_of(picture), "overflow-1-1")) == 2
    assert len(picture.svg) < 15_000
    assert "scale 2^20, overflow 20,000/20,000" in texts(root_of(picture))


@pytest.mark.parametrize(
    ("scales", "points"),
    [
        ([8.0] * 1000, 0),
        ([8.0] * 500 + [4.0] * 500, 5),  # each but the first includes the corner before it
        ([float("inf")] * 3 + [0.0] * 3, 0),
        ([2.0 ** (step % 9) for step in range(5000)], 245),
    ],
)
def test_a_loss_scale_is_drawn_as_steps_where_it_moved(tmp_path, scales, points):
    picture = trained(tmp_path, {("mixed-keras", 0): [(1.0, scale, 0) for scale in scales]})
    root = root_of(picture)
    assert bool(groups(root, "scale-1-1")) == bool(points) == ("the loss scale, a line per seed" in picture.caption)
    assert not points or len(path_of(root, "scale-1-1")) <= points


def test_ticks_of_a_loss_scale_are_powers_of_two(tmp_path):
    rows = [(1.0, 2.0 ** (15 - step // 10), 0) for step in range(160)]
    found = texts(root_of(trained(tmp_path, {("mixed-dynamic", 0): rows})))
    assert {"1", "64", "2^12", "scale 1 to 2^15, overflow 0/160"} <= set(found)


def test_seeds_of_unequal_length_and_unreadable_steps_do_not_prevent_the_picture(tmp_path):
    steps = {"toy--fp32--s0--r0": [(1.0, "", "")] * 3, "toy--fp32--s1--r0": [(0.5, "", "")] * 250}
    run = run_of(tmp_path, record("fp32", 0), record("fp32", 1), record("fp32", 2), steps=steps)
    (run.path / "steps" / "toy--fp32--s2--r0.csv.gz").write_bytes(b"no gzip")
    assert training(run).caption.endswith("Not drawn: 1 training whose steps cannot be read.")


def test_only_the_first_ten_seeds_are_drawn_and_the_caption_says_so(tmp_path):
    losses = {("mixed-dynamic", seed): [(1.0, 2.0**seed, 0), (1.0, 2.0 ** (seed + 1), 0)] for seed in range(12)}
    picture = trained(tmp_path, losses)
    assert len(groups(root_of(picture), "scale-1-1")) == 10
    assert "Drawn: the first 10 seeds of each mode." in picture.caption
    few = trained(tmp_path / "few", dict(list(losses.items())[:10]))
    assert "Drawn" not in few.caption
