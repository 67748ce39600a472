"""Fixtures of the telemetry tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.gpu_case import GpuCase
from support.nvml_stand_in import Script, build


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """An idle A100."""
    return Script(tmp_path / "nvml.txt")


@pytest.fixture(scope="session")
def older(stand_in_nvml: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds the stand-in without the given symbols, like an older driver."""
    built: dict[tuple[str, ...], Path] = {(): stand_in_nvml}

    def without(*symbols: str) -> Path:
        if symbols not in built:
            built[symbols] = build(tmp_path_factory.mktemp("older"), without=symbols)
        return built[symbols]

    return without


@pytest.fixture
def gpu_case(script: Script, stand_in_nvml: Path) -> Iterator[Callable[..., GpuCase]]:
    """Makes cases under the stand-in, and cleans them up."""
    made: list[GpuCase] = []

    def make(library: Path = stand_in_nvml, **options: Any) -> GpuCase:
        made.append(GpuCase(script, library, **options))
        return made[-1]

    yield make
    for case in made:
        case.close()
