"""What is tortured: small runs of a suite outside the repository, in a folder of their own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from support.nvml_stand_in import Script
from support.small_suite import SUITE, command, environment, write

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
_TESTED = Path(str(importlib.util.find_spec("mpscale").origin)).parents[1]  # type: ignore[union-attr]
"""Where the mpscale is that this process would import, and so the runs."""
MARKER = "MPSCALE_TORTURE"
"""The environment variable by which processes of a run are known. All that a run starts inherit it."""

# What a shell starts in the background ignores SIGINT, what nohup starts SIGHUP, and so would the run.
_HEARING = (
    "import os, signal, sys\n"
    "for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(each, signal.SIG_DFL)\n"
    "os.execv(sys.argv[1], sys.argv[1:])"
)


@dataclass(frozen=True)
class Layout:
    """A plan of cases, and how they run.

    Args:
        options: for pytest.
        gpu: whether the machine has a GPU, which the tests' driver library simulates.
    """

    options: tuple[str, ...]
    gpu: bool = False


def _layout(workloads: str, modes: str, repeats: int, *more: str, gpu: bool = False) -> Layout:
    names = ",".join(f"torture_workloads:{name}" for name in workloads.split(","))
    # Without XLA, whose compilation takes a third of the time.
    common = ("--mp-seeds=1", "--mp-timing=0.02", "--mp-energy=0", "--mp-jit=off", "-q")
    return Layout((f"--mp-workloads={names}", f"--mp-modes={modes}", f"--mp-repeats={repeats}", *common, *more), gpu)


_THREE = "fp32,mixed-static,mixed-dynamic"
LAYOUTS = {
    "fork": _layout("steady,lingers", _THREE, 1),
    "fresh": _layout("lingers", _THREE, 0, "--mp-start-method=fresh"),
    "gpu": _layout("steady,lingers", "fp32,mixed-dynamic", 1, gpu=True),
    "short": _layout("lingers", _THREE, 0),
}
"""Each takes 10 to 20 s undisturbed, on two cores without other work."""


@dataclass(frozen=True)
class Place:
    """Where a run happens, and everything that it may write to.

    Args:
        folder: of the run; created.
        layout: what runs.
        shared: holds caches that are slow to fill, and the driver library if there is one.
    """

    folder: Path
    layout: Layout
    shared: Path

    def __post_init__(self) -> None:
        """Write the suite."""
        for path in (self.suite, self.temporary, self.home):
            path.mkdir(parents=True)
        write(self.suite, test_suite=SUITE)
        for source in (HERE / "torture_workloads.py", HERE.parent / "support" / "suite_workloads.py"):
            shutil.copy(source, self.suite)

    @property
    def suite(self) -> Path:
        """The working directory."""
        return self.folder / "suite"

    @property
    def results(self) -> Path:
        """The results folder."""
        return self.suite / "results"

    @property
    def temporary(self) -> Path:
        """TMPDIR."""
        return self.folder / "tmp"

    @property
    def home(self) -> Path:
        """HOME, which a run leaves as it is."""
        return self.folder / "home"

    @property
    def token(self) -> str:
        """The value of :data:`MARKER`."""
        return f"{self.folder}/"

    def environment(self) -> dict[str, str]:
        """The environment of a session."""
        variables = {
            MARKER: self.token,
            "TMPDIR": str(self.temporary),
            "HOME": str(self.home),
            "XDG_CACHE_HOME": str(self.shared / "cache"),
            "MPLCONFIGDIR": str(self.shared / "cache" / "matplotlib"),
            "KERAS_HOME": str(self.shared / "cache" / "keras"),
            "PYTHONPATH": str(_TESTED),
            "PYTHONDONTWRITEBYTECODE": "1",
            "CUDA_VISIBLE_DEVICES": "-1",
            "TF_CPP_MIN_LOG_LEVEL": "2",
        }
        if self.layout.gpu:
            script = Script(self.folder / "nvml.txt")
            script.process("compute", "@worker", 300)
            variables |= script.environ(self.shared / "nvml")
        environ = environment(**variables)
        if self.layout.gpu:
            del environ["CUDA_VISIBLE_DEVICES"]
        return environ

    def start(self, output: Path, *options: str) -> subprocess.Popen[bytes]:
        """Start a session; what it prints goes to a file."""
        with output.open("wb") as file:
            return subprocess.Popen(
                [sys.executable, "-S", "-c", _HEARING, *command(*self.layout.options, *options)],
                cwd=self.suite,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def runs(self) -> list[Path]:
        """The folders of runs."""
        return sorted(path for path in self.results.glob("runs/*") if path.is_dir() and not path.is_symlink())

    def outside(self) -> set[str]:
        """All files but those in the results folder and the folder for temporary files.

        The folder .benchmarks is pytest-benchmark's.
        """
        found = set()
        for top in (self.suite, self.home):
            for folder, folders, files in os.walk(top):
                if Path(folder) == self.suite and "results" in folders:
                    folders.remove("results")
                names = [name for name in [*folders, *files] if name != ".benchmarks"]
                found |= {str((Path(folder) / name).relative_to(self.folder)) for name in names}
        return found
