"""Make the data files in mpscale/workloads/data again: ``python selfcheck/workload_data.py FOLDER``.

Needs ``pip install mnist1d==0.0.2.post1 scikit-learn==1.9.1``, which mpscale itself does not. The files hold what these
packages give, bit by bit, in the order in which ``train_test_split`` puts it. mpscale checks the digest of what it
loads, so a change of a file or of NumPy cannot go unnoticed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np


def mnist1d() -> dict[str, Any]:
    """The 5,000 published examples in their order, and 10,000 of another seed, in float32; labels."""
    x, y = _mnist1d(5000, seed=42)
    more_x, more_y = _mnist1d(10_000, seed=2011_14439)
    mean, deviation = x.mean(), x.std()
    x, more_x = (((samples - mean) / deviation).astype(np.float32) for samples in (x, more_x))
    return {"x": x, "y": y.astype(np.uint8), "test_x": more_x, "test_y": more_y.astype(np.uint8)}


def _mnist1d(examples: int, seed: int) -> tuple[Any, Any]:
    """The examples of ``mnist1d.make_dataset`` before it standardises them."""
    from mnist1d.data import get_dataset_args, get_templates, set_seed
    from mnist1d.transform import transform

    args, templates = get_dataset_args(), get_templates()
    set_seed(seed)
    labels = np.repeat(templates["y"], examples // len(templates["y"]))
    samples = np.stack([transform(templates["x"][label], templates["t"], args)[0] for label in labels])
    shuffle = np.random.permutation(len(labels))
    return samples[shuffle], labels[shuffle]


def digits() -> dict[str, Any]:
    """1,797 images of 8 x 8 pixels from 0 to 16, 1,297 of them to train on and 500 to test; labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return _split(500, found.target, x=found.images.astype(np.uint8), y=found.target.astype(np.uint8))


def diabetes() -> dict[str, Any]:
    """442 patients, 300 of them to train on and 142 to test: ten figures of each, and how far the disease went."""
    from sklearn.datasets import load_diabetes

    found = load_diabetes(scaled=False)
    return _split(142, None, x=found.data.astype(np.float32), y=found.target.astype(np.float32))


def _split(test_size: int, classes: Any, **arrays: Any) -> dict[str, Any]:
    from sklearn.model_selection import train_test_split

    order = np.arange(len(arrays["x"]))
    parts = train_test_split(order, test_size=test_size, stratify=classes, random_state=0)
    return {
        f"{part}_{name}": array[chosen]
        for part, chosen in zip(("train", "test"), parts, strict=True)
        for name, array in arrays.items()
    }


if __name__ == "__main__":
    (folder,) = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    for make in (mnist1d, digits, diabetes):
        np.savez_compressed(folder / f"{make.__name__}.npz", **make())
