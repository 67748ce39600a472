"""What the terminal shows while cases run."""

import pytest

from mpscale.core.case import Case, Settings
from mpscale.core.record import Record
from mpscale.core.wire import Phase, PhaseReached, StepsDone
from mpscale.terminal import LiveLine, Progress


def case(number, mode="fp32", repeat=0):
    return Case("w", mode, number, repeat, number, Settings())


class Screen:
    """Collect what is written, with a clock that the test sets."""

    def __init__(self, live):
        self.text, self.now = "", 0.0
        self.progress = Progress(LiveLine(self.write, live), lambda: self.now)
        self.progress.plan([case(number) for number in range(3)])

    def write(self, text):
        self.text += text

    def run(self, number, seconds, **values):
        self.progress.started(case(number))
        self.progress.event(case(number), PhaseReached(Phase.COMPILED))
        self.progress.event(case(number), StepsDone(100, 2000))
        self.now += seconds
        self.progress.finished(case(number), Record({"status": "ok", **values}))


def test_without_a_terminal_there_are_plain_lines():
    screen = Screen(live=False)
    screen.run(0, 60.0, step_time_ms_median=1.5, final_accuracy=0.925, overflow_steps=3)
    assert screen.text.splitlines() == [
        "[1/3] w fp32 seed 0: starting",
        "[1/3] w fp32 seed 0: ok, 1.5 ms a step, accuracy 92.5 %, 3 overflows (60.0 s, about 2:00 left)",
    ]


def test_on_a_terminal_the_live_line_is_below_the_finished_cases():
    screen = Screen(live=True)
    screen.run(0, 1.0)
    *live, last = screen.text.split("\r")
    assert live[3].rstrip() == "[1/3] w fp32 seed 0: training 100/2000"
    assert last.startswith("[1/3] w fp32 seed 0: ok")
    assert screen.text.count("\n") == 1
    # The live line is erased before the finished line is written.
    assert live[-1].strip() == ""
    assert len(live[-1]) >= len(live[3].rstrip())


@pytest.mark.parametrize("phase", Phase)
def test_every_phase_has_a_word_for_people(phase):
    screen = Screen(live=True)
    screen.progress.event(case(0), PhaseReached(phase))
    assert screen.text.rstrip().rpartition(": ")[2]


def test_live_line_never_wraps():
    screen = Screen(live=True)
    screen.progress = Progress(LiveLine(screen.write, True, columns=20), lambda: 0.0)
    screen.progress.plan([case(0)])
    screen.progress.started(case(0))
    assert screen.text == "\r[1/1] w fp32 seed 0"


def test_time_left_goes_down_to_nothing():
    screen = Screen(live=False)
    for number in range(3):
        screen.run(number, 10.0)
    left = [line.rpartition(", about ")[2] for line in screen.text.splitlines() if ": ok" in line]
    assert left[:2] == ["0:20 left)", "0:10 left)"]
    assert screen.text.splitlines()[-1].endswith("(10.0 s)")


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ({"status": "crashed", "status_reason": "killed by SIGSEGV"}, "crashed, killed by SIGSEGV"),
        ({"status": "error", "status_reason": "a\nb"}, "error, a"),
        ({"metric_name": "mse", "metric_value": 0.25}, "ok, mse 0.25"),
        ({"host_other_cpu_share": 0.5}, "ok, busy machine: other processes took 50 % of its CPU time"),
        ({"host_other_cpu_share": 0.05}, "ok"),
    ],
)
def test_line_shows_how_the_case_ended(values, shown):
    screen = Screen(live=False)
    screen.progress.started(case(0))
    screen.progress.finished(case(0), Record({"status": "ok", **values}))
    assert f"seed 0: {shown} (" in screen.text
