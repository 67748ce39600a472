"""The reason of an error is what the user's code or TensorFlow says is wrong, not the path to it."""

import errno
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpscale.core.cause import Cause
from mpscale.core.processes.events import Failed
from mpscale.harness.conversation import one_line
from mpscale.worker.errors import cause
from mpscale.worker.refusal import refusals_of

X = tf.constant([[1.0, 2.0], [2.0, 3.0]])


class NeedsTwo(Exception):
    """An exception that AutoGraph cannot recreate."""

    def __init__(self, what, where):
        super().__init__(f"{what} is missing in {where}")


class Unreadable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class Refusing(keras.layers.Layer):
    def call(self, x):
        raise ValueError("my layer wants three columns")


class Unwrapping(keras.layers.Layer):
    def call(self, x):
        try:
            {}["a"]
        except KeyError as error:
            raise ValueError("the table has no a") from error


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.refusing = Refusing()

    def call(self, x):
        return self.refusing(x)


class Multiplying(keras.layers.Layer):
    def call(self, x):
        return tf.matmul(x, tf.ones((5, 5)))


def refuse(x):
    raise ValueError("the labels must be whole numbers")


def need_two(x):
    raise NeedsTwo("a column", "the data")


def assert_less(x):
    tf.debugging.assert_less(x, 1.0, message="labels must be below 1")
    return x


def ask_python(x):
    def fail(x):
        raise RuntimeError("python said no")

    return tf.py_function(fail, [x], tf.float32)


def traced(function):
    return lambda: tf.function(function, jit_compile=False)(X)


REASONS = {
    "a loss that refuses its labels": (traced(refuse), "ValueError: the labels must be whole numbers"),
    "an exception of the user's own class": (traced(need_two), "NeedsTwo: a column is missing in the data"),
    "a layer that refuses its input": (lambda: Refusing()(X), "ValueError: my layer wants three columns"),
    "the same layer in a traced step": (lambda: traced(Refusing())(), "ValueError: my layer wants three columns"),
    "a layer in a model in a traced step": (lambda: traced(Subclassed())(), "ValueError: my layer wants three columns"),
    "an exception raised from another one": (lambda: traced(Unwrapping())(), "ValueError: the table has no a"),
    "data that do not fit the model": (
        lambda: traced(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]))(),
        "ValueError: Input 0 with name 'None' of layer 'dense",
    ),
    "a product of the wrong shape": (lambda: Multiplying()(X), "InvalidArgumentError: Matrix size-incompatible: In[0]"),
    "an assertion in the graph": (traced(assert_less), "InvalidArgumentError: assertion failed: [labels must be below"),
    "an index that is too large": (
        traced(lambda x: tf.gather(x, [7, tf.cast(x[0, 0], tf.int32)])),
        "InvalidArgumentError: indices[0] = 7 is not in [0, 2)",
    ),
    "a function in Python below the graph": (traced(ask_python), "UnknownError: RuntimeError: python said no"),
    "a message in colours": (
        lambda: exec(r"raise ValueError('\x1b[1;31mno\x1b[0m data\x07\nin d\udcff \u2013 \u00e4')"),
        "ValueError: no data in d\udcff \u2013 \u00e4",
    ),
    "sys.exit with a text": (lambda: sys.exit("no data"), "SystemExit: no data"),
    "sys.exit with a number": (lambda: sys.exit(0), "SystemExit: the code of the case called sys.exit(0)"),
    "sys.exit without anything": (sys.exit, "SystemExit: the code of the case called sys.exit(None)"),
    "a missing key": (lambda: {}["labels"], "KeyError: 'labels'"),
    "an error without a text": (lambda: exec("raise Unreadable"), "Unreadable: its message cannot be read: Runtime"),
}


def reported(act, jit=False):
    """Return the event that reports the exception if ``act`` is what a case does once its model is built."""
    with pytest.raises(BaseException) as caught, refusals_of(keras.Sequential(), jit, Channel()):
        act()
    return cause(caught.value)


class Channel:
    def values(self, values): ...


def recorded(act, jit=False):
    """Return the reason that the supervisor records if ``act`` ends a case."""
    event = reported(act, jit)
    return one_line(f"{event.type}: {event.message}")


@pytest.mark.parametrize("what", REASONS)
def test_the_reason_is_what_is_wrong_without_its_wrapping(what):
    act, expected = REASONS[what]
    reason = recorded(act)
    assert reason.startswith(expected)
    for around in ("in user code", "Exception encountered", "Arguments received", "{{function_node", "[Op:", "File "):
        assert around not in reason


def test_a_bare_assert_is_named_by_its_line():
    # pytest rewrites the asserts of test modules, so this one is compiled separately.
    source = "def fail(x):\n    assert len(x) > 3\n"
    names = {}
    exec(compile(source, "loss.py", "exec"), names)
    assert recorded(lambda: names["fail"](X)).endswith("(line 2 of loss.py)")


def test_a_long_message_keeps_its_end():
    def fail():
        raise ValueError("\n".join(["Shapes:", *(f"layer {n} (None, {n})" for n in range(200)), "the last is wrong"]))

    reason = recorded(fail)
    assert reason.startswith("ValueError: Shapes: layer 0 (None, 0)")
    assert reason.endswith("layer 199 (None, 199) the last is wrong")
    assert len(reason) <= 503


STRINGS = tf.constant(np.array(["a", "b"], dtype=object))
TABLE = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer([1, 2], [3, 4]), -1)

NOT_FOR_XLA = {
    "strings": (lambda x: tf.strings.length(tf.strings.as_string(x)), "AsString"),
    "tf.print": (lambda x: [x, tf.print(x)][0], "StringFormat"),
    "tf.py_function": (lambda x: tf.py_function(lambda y: y, [x], tf.float32), "EagerPyFunc"),
    "tf.numpy_function": (lambda x: tf.numpy_function(lambda y: y, [x], tf.float32), "PyFunc"),
    "labels that are strings": (lambda x: tf.gather(STRINGS, [0]), "DT_STRING"),
    "a lookup table": (lambda x: TABLE.lookup(tf.cast(x, tf.int32)), "LookupTableFindV2"),
    "a decomposition": (lambda x: tf.linalg.lu(x)[0], "Lu"),
    "a shuffle, on a CPU": (lambda x: tf.random.shuffle(tf.reshape(x, [4])), "Expected comparison type SIGNED"),
}


@pytest.mark.parametrize("what", NOT_FOR_XLA)
def test_a_function_that_xla_cannot_compile_is_a_refusal_that_names_the_operation(what):
    function, named = NOT_FOR_XLA[what]
    event = reported(lambda: tf.function(function, jit_compile=True)(X), jit=True)
    reason = one_line(f"{event.type}: {event.message}")
    assert event.cause is Cause.XLA_REFUSED
    assert named in reason
    assert "XLA cannot compile" in reason
    assert len(reason) <= 503


@pytest.mark.parametrize("what", ["an assertion in the graph", "an index that is too large", "a missing key"])
def test_an_error_outside_of_xla_does_not_blame_it(what):
    assert reported(REASONS[what][0], jit=True).cause is Cause.EXCEPTION


def test_a_function_of_the_users_own_that_xla_refuses_is_no_refusal_of_the_case():
    event = reported(lambda: tf.function(NOT_FOR_XLA["strings"][0], jit_compile=True)(X), jit=False)
    assert event.cause is Cause.EXCEPTION


def test_out_of_memory_is_recognised_by_type_even_inside_a_layer():
    class Greedy(keras.layers.Layer):
        def call(self, x):
            raise MemoryError("no more")

    with pytest.raises(Exception, match="no more") as caught:
        traced(Greedy())()
    assert cause(caught.value) == Failed("MemoryError", "no more", Cause.OUT_OF_MEMORY)


@pytest.mark.parametrize(
    ("error", "oom"),
    [
        (np.exceptions.AxisError("axis 3 is out of bounds"), False),
        (tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor"), True),
        (tf.errors.InternalError(None, None, "Dst tensor is not initialized."), True),
        (tf.errors.InternalError(None, None, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (tf.errors.InternalError(None, None, "CUBLAS_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1.22GiB."), True),
    ],
)
def test_out_of_memory_is_recognised_by_what_libraries_say(error, oom):
    assert (cause(error).cause is Cause.OUT_OF_MEMORY) == oom


def test_numpys_own_memory_error_is_out_of_memory():
    with pytest.raises(MemoryError) as caught:
        np.empty(2**62, np.int8)
    assert cause(caught.value).cause is Cause.OUT_OF_MEMORY


@pytest.mark.parametrize(
    "write",
    [
        lambda: Path("/dev/full").write_text("weights"),
        # TensorFlow has one type of error for a full disk and for lack of memory.
        lambda: tf.io.write_file("/dev/full", "weights"),
    ],
    ids=["Python", "TensorFlow"],
)
def test_a_full_disk_is_not_lack_of_memory(write):
    with pytest.raises(Exception, match="No space left") as caught:
        write()
    assert cause(caught.value).cause is Cause.FILE_SYSTEM


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), OSError(errno.EDQUOT, "quota")])
def test_what_else_may_be_used_up(error):
    assert cause(error).cause is Cause.FILE_SYSTEM
