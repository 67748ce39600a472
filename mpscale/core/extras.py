"""What the extra ``bench`` installs beyond the base, and what to say where that is missing.

The base is what :class:`mpscale.LossScaleOptimizer` needs: TensorFlow, Keras and NumPy.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

BENCH = {
    "cloudpickle": "cloudpickle",
    "markdown_it": "markdown-it-py",
    "matplotlib": "matplotlib",
    "orjson": "orjson",
    "packaging": "packaging",
    "pandas": "pandas",
    "pynvml": "nvidia-ml-py",
    "pytest": "pytest",
    "pytest_benchmark": "pytest-benchmark",
    "rich": "rich",
    "scipy": "scipy",
    "tabulate": "tabulate",
}
"""The modules of the extra, each with the package that has it."""


def missing() -> list[str]:
    """Return the packages of the extra that are not installed."""
    return [package for module, package in BENCH.items() if importlib.util.find_spec(module) is None]


def lacks(packages: Iterable[str]) -> str:
    """Return the sentence which says that these packages are missing, and what to do."""
    return f"not installed: {', '.join(packages)}; to measure and to read runs, pip install 'mpscale[bench]'"


def why_not_imported(error: ImportError) -> str | None:
    """Return :func:`lacks` for an import that failed because the extra is not installed, else None."""
    module = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and module in BENCH and BENCH[module] in (packages := missing()):
        return lacks(packages)
    return None
