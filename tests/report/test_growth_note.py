"""What the report says about how soon a dynamic loss scale grew."""

import pytest
from support.runfolder import finished, record, write_run

from mpscale.core.runs import read_run
from mpscale.report.growth import growth


@pytest.mark.parametrize(
    ("cases", "said"),
    [
        ([{"growth_interval": None}], []),
        ([{"growth_interval": 2000, "attempted_steps": 5000}], []),
        ([{"growth_interval": 2000, "attempted_steps": 20, "synthetic_inputs": True}], []),
        (
            [{"growth_interval": 200}],
            ["after 200 steps (toy: up to 0.5 % of the steps)", "2,000 steps, that is 0.05 %"],
        ),
        (
            [{"growth_interval": 40}, {"growth_interval": 30, "workload": "b*d"}],
            ["40 steps (toy: up to 2.4 % of the steps), 30 steps (b\\*d: up to 3.2 % of the steps)"],
        ),
        ([{"growth_interval": 2000}], ["toy could only fall", "the training has 500", "growth_interval=50`"]),
        ([{"growth_interval": 1, "attempted_steps": 1}], ["after 1 step without", "growth_interval=1`"]),
    ],
)
def test_a_short_growth_interval_and_a_scale_that_could_not_grow_are_pointed_out(tmp_path, cases, said):
    rows = [record("mixed-dynamic", **{"attempted_steps": 500, **case}) for case in cases]
    text = growth(read_run(write_run(tmp_path, finished([record("fp32", attempted_steps=500), *rows]))))
    assert bool(text) is bool(said)
    assert [words for words in said if words not in text] == []
