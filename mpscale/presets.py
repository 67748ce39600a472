"""Presets: what a run trains where the options do not say."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Preset:
    """One preset. ``train_steps`` None leaves each workload its own number."""

    workloads: tuple[str, ...]
    seeds: int
    timing_s: float
    timing_blocks: int
    train_steps: int | None
    summary: str
    energy_s: float = 10.0


PRESETS: MappingProxyType[str, Preset] = MappingProxyType(
    {
        "smoke": Preset(
            ("mnist1d-mlp", "article-mlp"),
            1,
            0.3,
            10,
            100,
            "seconds a case: shows that everything works, measures nothing well",
            energy_s=0.0,
        ),
        "small": Preset(
            ("mnist1d-mlp", "mnist1d-cnn", "article-mlp"),
            3,
            2.0,
            50,
            None,
            "the default: whole trainings, minutes on two cores",
        ),
        "full": Preset(
            ("mnist1d-mlp", "mnist1d-cnn", "mnist1d-gru", "article-mlp"),
            5,
            4.0,
            50,
            None,
            "more seeds and a recurrent network",
        ),
    }
)
DEFAULT_PRESET = "small"
