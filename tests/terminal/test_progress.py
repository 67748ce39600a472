"""What the terminal shows while cases run."""

import pytest

from mpscale.core.case import Case, Settings
from mpscale.core.processes.events import Phase, PhaseReached, StepsDone
from mpscale.core.record import Record
from mpscale.terminal.progress import LiveLine, Progress
from mpscale.terminal.streams import PIPE, Surface

TERMINAL = Surface(100, live=True)


def case(number, mode="fp32", repeat=0):
    return Case("w", mode, number, repeat, number, Settings())


class Screen:
    """Collect what is written, with a clock that the test sets."""

    def __init__(self, surface=PIPE, judge=lambda record: ("", "")):
        self.text, self.now = "", 0.0
        self.progress = Progress(LiveLine(self.write, surface), lambda: self.now, judge)
        self.progress.plan([case(number) for number in range(3)])

    def write(self, text):
        self.text += text

    def run(self, number, seconds, **values):
        self.progress.started(case(number))
        self.progress.event(case(number), PhaseReached(Phase.COMPILED))
        self.progress.event(case(number), StepsDone(100, 2000))
        self.now += seconds
        self.progress.finished(case(number), Record({"status": "ok", **values}))

    @property
    def live(self):
        """The states of the live line."""
        return [part.rstrip() for part in self.text.split("\r") if part.strip() and "\n" not in part]


def test_without_a_terminal_there_is_a_line_per_case():
    screen = Screen()
    screen.run(0, 60.0, step_time_ms_median=1.5, final_accuracy=0.925, overflow_steps=3)
    assert screen.text == "[1/3]  w  fp32  seed 0  ok, 1.5 ms, accuracy 92.5 %, 3 overflows, about 2:00 left\n"


def test_on_a_terminal_the_live_line_is_below_the_finished_cases():
    screen = Screen(TERMINAL)
    screen.run(0, 60.0)
    screen.run(1, 60.0)
    assert screen.live == [
        "0 of 3 done; w fp32 seed 0: starting",
        "0 of 3 done; w fp32 seed 0: training",
        "0 of 3 done; w fp32 seed 0: training 100/2000",
        "1 of 3 done, about 2:00 left; w fp32 seed 1: starting",
        "1 of 3 done, about 2:00 left; w fp32 seed 1: training",
        "1 of 3 done, about 2:00 left; w fp32 seed 1: training 100/2000",
    ]
    assert screen.text.count("\n") == 2
    assert screen.text.endswith("\r[2/3]  w  fp32  seed 1  ok\n")
    # The live line is erased before the finished line is written.
    *_, live, erased, _ = screen.text.split("\r")
    assert erased.strip() == ""
    assert len(erased) >= len(live.rstrip())


def test_a_stopped_run_leaves_an_empty_line():
    screen = Screen(TERMINAL)
    screen.progress.started(case(0))
    screen.progress.stopped()
    *_, live, erased, last = screen.text.split("\r")
    assert (erased.strip(), last) == ("", "")
    assert len(erased) >= len(live)


@pytest.mark.parametrize("phase", Phase)
def test_every_phase_has_a_word_for_people(phase):
    screen = Screen(TERMINAL)
    screen.progress.event(case(0), PhaseReached(phase))
    assert screen.live[-1].rpartition(": ")[2]


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (100, "0 of 3 done; w fp32 seed 0: training 100/2000"),
        (45, "0 of 3 done; w fp32 seed 0: training"),
        (20, "0 of 3 done; w fp32"),
        (8, "0 of 3"),
    ],
)
def test_the_live_line_never_wraps_and_never_cuts_a_number(columns, shown):
    screen = Screen(Surface(columns, live=True))
    screen.progress.event(case(0), StepsDone(100, 2000))
    screen.progress._doing = "training"
    screen.progress.event(case(0), StepsDone(100, 2000))
    assert screen.live[-1] == shown


def test_time_left_goes_down_to_nothing():
    screen = Screen()
    for number in range(3):
        screen.run(number, 10.0)
    first, second, last = screen.text.splitlines()
    assert first.endswith(", about 0:20 left")
    assert second.endswith(", about 0:10 left")
    assert last.endswith("ok")


def test_columns_of_finished_cases_are_aligned():
    screen = Screen()
    screen.progress.plan([case(3, "mixed-dynamic", repeat=12)])
    for each in (case(0), case(3, "mixed-dynamic", repeat=12)):
        screen.progress.finished(each, Record({"status": "ok"}))
    first, second = screen.text.splitlines()
    assert first.index("ok") == second.index("ok")


LONG = "InternalError: no supported configuration was found for the convolution " * 3


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ({"status": "crashed", "status_reason": "killed by SIGSEGV"}, "crashed, killed by SIGSEGV"),
        ({"status": "error", "status_reason": "a\nb"}, "error, a"),
        ({"metric_name": "mse", "metric_value": 0.25}, "ok, mse 0.25"),
        ({"has_metric": False, "synthetic_inputs": True}, "ok, synthetic inputs"),
        ({"overflow_steps": 0}, "ok, no overflow"),
        ({"overflow_steps": 1}, "ok, 1 overflow"),
        ({"host_other_cpu_share": 0.5}, "ok, busy machine (50 %)"),
        ({"host_other_cpu_share": 0.05}, "ok"),
        ({"device_busy_share": 0.31}, "ok, GPU busy 31 %"),
    ],
)
def test_line_shows_how_the_case_ended(values, shown):
    screen = Screen(TERMINAL)
    screen.progress.started(case(0))
    screen.progress.finished(case(0), Record({"status": "ok", **values}))
    assert screen.text.splitlines()[-1].endswith(f"seed 0  {shown}")


@pytest.mark.parametrize("surface", [PIPE, Surface(80, live=True), Surface(200, live=True)])
def test_the_line_of_a_case_is_short_and_ends_with_a_word(surface):
    screen = Screen(surface)
    screen.progress.finished(case(0), Record({"status": "error", "status_reason": LONG, "step_time_ms_median": 1.25}))
    line = screen.text.splitlines()[-1]
    assert len(line) < min(100, surface.columns or 100)
    assert LONG.startswith(line.partition("1.25 ms, ")[2])
    assert line.split()[-1] in LONG.split()


def test_a_word_on_the_speed_follows_the_step_time():
    screen = Screen(Surface(100, colour=True, live=True), judge=lambda record: ("slower so far", "bad"))
    screen.progress.finished(case(0), Record({"status": "ok", "step_time_ms_median": 2.0}))
    assert "ok, 2 ms, \x1b[31mslower so far\x1b[0m" in screen.text
