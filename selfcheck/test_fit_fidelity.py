"""Whether the step time of a compiled model is that of Keras' own ``fit``.

    pytest selfcheck/test_fit_fidelity.py --restarts 10

Three loops are timed against each other as in test_fidelity.py: mpscale's steps of a compiled model; the train function
of ``fit``, called with batches that are on the device; and ``fit`` with a cached tf.data pipeline, which also contains
its callbacks and its input. All start from the same weights, see the same batches and have the same losses. The ratio
of mpscale to the train function is printed with its 95 % interval, and must not be shown to exceed 1.01. That to
``fit`` is only printed: what it says is the cost of ``fit`` besides its steps.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import test_fidelity
from tabulate import tabulate
from test_fidelity import BLOCK_S, race, ratios, row, verdict

from mpscale.analysis.stats import geometric_interval

PAIRS = {"mpscale / fit's step": ("mpscale", "fit's step"), "mpscale / fit": ("mpscale", "fit")}


@pytest.mark.parametrize("jit", ["on", "off"])
@pytest.mark.parametrize("mode", ["fp32", "mixed-dynamic"])
@pytest.mark.parametrize("workload", ["mlp", "cnn"])
def test_fit_fidelity(workload, mode, jit, device, request, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(test_fidelity, "CONTESTANT", Path(__file__).with_name("fit_contestant.py"))
    restarts, rounds = request.config.getoption("restarts"), request.config.getoption("rounds")
    asked = {"workload": f"fit_workloads:{workload}", "mode": mode, "jit": jit == "on", "device": device.to_json()}
    asked |= {"block_s": BLOCK_S, "rounds": rounds}
    taken = [race({**asked, "seed": random.randrange(2**31)}, device, tmp_path / "log") for _ in range(restarts)]
    rows = [row(name, ratios(taken, *pair), taken, pair) for name, pair in PAIRS.items()]
    with capsys.disabled():
        title = f"{workload}, {mode}, XLA {jit}; {restarts} restarts of {rounds} blocks"
        print(f"\n\n{title}\n\n{tabulate(rows, headers='keys', tablefmt='github', stralign='right')}")
    found = geometric_interval(ratios(taken, *PAIRS["mpscale / fit's step"]))
    assert verdict(found) != "not met", f"{found.estimate:.3f}, at least {found.low:.3f}"


device = test_fidelity.device
