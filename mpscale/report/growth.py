"""How soon the dynamic loss scales of a run grew, and what that costs: a note for its report."""

from __future__ import annotations

from collections.abc import Sequence

from mpscale.core.loss_scale import DynamicLossScale
from mpscale.core.record import Record
from mpscale.core.runs import Run
from mpscale.report.table import escape, plural, share

_USUAL = DynamicLossScale.growth_interval


def growth(run: Run) -> str:
    """Say how soon dynamic loss scales doubled, if not as usual, and which trainings were too short for that.

    Workloads with synthetic inputs are left out, since their loss scales say nothing. The text is markdown; it is empty
    if there is nothing to say.
    """
    trained = [
        record
        for record in run.records
        if record["growth_interval"] is not None and record["attempted_steps"] and not record["synthetic_inputs"]
    ]
    still = [record for record in trained if record["growth_interval"] >= record["attempted_steps"]]
    sooner = [record for record in trained if record not in still and record["growth_interval"] < _USUAL]
    return " ".join(filter(None, [_soon(sooner), _never(still)]))


def _soon(sooner: Sequence[Record]) -> str:
    if not sooner:
        return ""
    found = []
    for interval in dict.fromkeys(record["growth_interval"] for record in sooner):
        where = _workloads([record for record in sooner if record["growth_interval"] == interval])
        found.append(f"{plural(interval, 'step')} ({where}: up to {share(1 / (interval + 1), 1)} of the steps)")
    return (
        "A dynamic loss scale that is as high as the gradients allow overflows each time that it doubles. Here it "
        f"doubled after {', '.join(found)} without overflow, so that it moves in a short training. In a longer one "
        f"with the usual {_USUAL:,} steps, that is {share(1 / (_USUAL + 1), 2)}."
    )


def _never(still: Sequence[Record]) -> str:
    if not still:
        return ""
    steps, interval = (min(record[name] for record in still) for name in ("attempted_steps", "growth_interval"))
    return (
        f"The dynamic loss scale of {_workloads(still)} could only fall: it doubles after {plural(interval, 'step')} "
        f"without overflow, and the training has {steps}. To see it grow, train longer, or use `--mp-dynamic-scale "
        f"growth_interval={max(1, steps // 10)}`, which overflows more often than a longer training will."
    )


def _workloads(records: Sequence[Record]) -> str:
    return ", ".join(dict.fromkeys(escape(record["workload"]) for record in records))
