"""XLA's autotuning results, shared by the processes of a workload and mode.

XLA times candidates for each product and convolution, for up to a minute a process, and takes the fastest. With
``--mp-autotune shared`` the first process of a workload and mode saves what it found, and later ones load it. They then
run the same kernels, which takes the choice of kernels out of the noise between processes.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from mpscale.core.case import Case
from mpscale.core.columns import MEASURED
from mpscale.core.files.temporary import TemporaryFolder


class SharedTuning:
    """One file of results for each workload and mode of a run, whose cases have everything else in common.

    Args:
        folder: where they are. If it is removed, cases tune again.
    """

    def __init__(self, folder: TemporaryFolder) -> None:
        self._folder = folder
        self._numbers: dict[tuple[str, str], int] = {}

    def flag(self, case: Case) -> str | None:
        """Return the flag for XLA with which a case starts; None if it shares nothing."""
        if case.settings.autotune != "shared" or not case.settings.jit:
            return None
        if _holds_something(self._results(case)):
            return f"--xla_gpu_load_autotune_results_from='{self._results(case)}'"
        self._unchecked(case).unlink(missing_ok=True)
        return f"--xla_gpu_dump_autotune_results_to='{self._unchecked(case)}'"

    def ended(self, case: Case, status: str) -> None:
        """Keep what a case has saved if it ran to its end; forget what it has loaded if it failed.

        XLA writes the file again for every program that it compiles, so that of a process that was killed may be cut
        short, and kernels that were chosen on a throttled GPU may not be the fastest.
        """
        if status in MEASURED:
            if _holds_something(self._unchecked(case)):
                self._unchecked(case).replace(self._results(case))
        elif status in ("error", "crashed"):
            self._results(case).unlink(missing_ok=True)

    def _results(self, case: Case) -> Path:
        # A number, because not every name of a workload is one that XLA's flags and the file system can hold.
        number = self._numbers.setdefault(case.place, len(self._numbers))
        # XLA writes and reads text if the name ends like this.
        return self._folder.path / f"autotuning-{number}.textproto"

    def _unchecked(self, case: Case) -> Path:
        return self._results(case).with_suffix(".new.textproto")


def _holds_something(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.stat().st_size > 0
    return False
