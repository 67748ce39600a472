"""Which packages a command imports."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping


def run_and_list_imports(
    *arguments: str, environ: Mapping[str, str] | None = None
) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run the ``mpscale`` command; return how it ended, and the top-level packages that it imported."""
    command = [sys.executable, "-X", "importtime", "-m", "mpscale.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120)
    found = re.findall(r"^import time: +\d+ \| +\d+ \| +(\w+)", done.stderr, re.M)
    assert "argparse" in found
    done.stderr = "".join(line for line in done.stderr.splitlines(True) if not line.startswith("import time:"))
    return done, set(found)
