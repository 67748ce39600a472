"""The order in which a training sees its examples: made from the seed alone, so it is the same in every mode."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt


def batches(examples: int, batch_size: int, steps: int, seed: int) -> npt.NDArray[np.int64]:
    """Indices (steps, batch_size): every epoch a fresh permutation, its incomplete last batch left out.

    Raises:
        ValueError: the batch is larger than the training set.
    """
    if not 1 <= batch_size <= examples:
        raise ValueError(
            f"a batch of {batch_size} cannot be drawn from a training set of {examples}; "
            f"choose a batch_size from 1 to {examples}"
        )
    random = np.random.default_rng(seed)
    per_epoch = examples // batch_size
    epochs = [random.permutation(examples)[: per_epoch * batch_size] for _ in range(-(-steps // per_epoch))]
    return np.concatenate(epochs).reshape(-1, batch_size)[:steps].astype(np.int64)


def digest(arrays: Iterable[Any]) -> str:
    """SHA-256 over the bytes of arrays, as 16 hex digits."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:16]
