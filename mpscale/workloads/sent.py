"""What a script has sent: its pickled workload, large arrays in files of their own, and tf.data pipelines as graphs."""

from __future__ import annotations

import functools
import pickle
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from mpscale.workloads.workload import Workload

_FAIL = 2
"""TensorFlow's policy for state outside of a graph, such as a table or a generator of random numbers: an error."""
_OF_TENSORFLOW = re.compile(r"\{\{.*?\}\} ?|\s*\[Op:.*")
"""What its messages say about itself."""
_PYTHON = ("PyFunc", "PyFuncStateless", "EagerPyFunc")
"""Operations that call a function of the process that has made them."""


@functools.lru_cache(maxsize=4)
def load(path: Path) -> Workload:
    """Unpickle a workload of a parcel. Whatever its functions use is imported, which may raise anything."""
    with path.open("rb") as file:
        found = pickle.load(file)
    assert isinstance(found, Workload)  # the sender has checked it
    return found


def elsewhere() -> NoReturn:
    """Stands in a session for what only a worker may unpickle: it may import anything, and use the GPU."""
    raise RuntimeError("what a script has sent is in the processes of the cases only")


def stand_in() -> Callable[[], NoReturn]:
    """The function :func:`elsewhere`, for a pickle."""
    return elsewhere


def array(path: str) -> npt.NDArray[Any]:
    """An array of the sender. Processes share its pages as long as they do not write to them."""
    return np.asarray(np.load(path, mmap_mode="c", allow_pickle=False))


def mapped(path: str, dtype: Any, offset: int, shape: tuple[int, ...], order: Any) -> npt.NDArray[Any]:
    """An array that was mapped from a file of the user's."""
    return np.asarray(np.memmap(path, dtype, "c", offset, shape, order))


def graph_of(dataset: Any) -> bytes:
    """Describe a ``tf.data.Dataset`` as a graph.

    Raises:
        ValueError: it needs something of this process that a graph cannot hold; the message names it.
    """
    import tensorflow as tf

    variant = tf.data.experimental.to_variant(dataset)
    try:
        text = tf.raw_ops.DatasetToGraphV2(
            input_dataset=variant, external_state_policy=_FAIL, strip_device_assignment=True
        ).numpy()
        graph = tf.compat.v1.GraphDef.FromString(text)
    except tf.errors.OpError as error:
        raise ValueError(_OF_TENSORFLOW.sub("", str(error.message)).partition("\n")[0]) from error
    _refuse_what_differs(graph.node)
    for function in graph.library.function:
        _refuse_what_differs(function.node_def)
    return bytes(text)


def _refuse_what_differs(nodes: Iterable[Any]) -> None:
    """Refuse operations that would do something else in another process."""
    known = {node.name: node for node in nodes}
    for node in known.values():
        if node.op in _PYTHON:
            raise ValueError("it calls a Python function of this process")
        if node.op.startswith("ShuffleDataset"):
            seeds = [known.get(name.partition(":")[0]) for name in node.input[2:4]]
            if all(seed is not None and list(seed.attr["value"].tensor.int64_val) == [0] for seed in seeds):
                raise ValueError("it shuffles without a seed, so each process would see another order")


def dataset(path: str, element_spec: Any) -> Any:
    """The inverse of :func:`graph_of`."""
    import tensorflow as tf

    with tf.device("cpu"):
        variant = tf.raw_ops.DatasetFromGraph(graph_def=Path(path).read_bytes())
    return tf.data.experimental.from_variant(variant, element_spec)
