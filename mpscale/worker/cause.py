"""Why a case failed: what the user's code or TensorFlow raised, without what others have wrapped around it.

Keras and AutoGraph replace the exception that says what is wrong by one of their own, whose message begins with the
path to the error or ends with the arguments of a layer. The traceback, which the record keeps, still has all of it.
"""

from __future__ import annotations

import re
import traceback

from mpscale.core.out_of_memory import ran_out
from mpscale.core.wire import Failed

_NO_JIT = "XLA could not compile the train step or the evaluation: --mp-jit off runs them without it"


def cause(error: BaseException, jit: bool) -> Failed:
    """What to report of an exception that was caught; ``jit`` says whether XLA compiles train steps."""
    first = _unwrapped(error)
    message = _said(first)
    if _is_operation_error(first):
        message = _without_surroundings(message)
    if not message.strip():
        message = _where(error)
    oom = _is_out_of_memory(error) or _is_out_of_memory(first) or ran_out(_said(error))
    if jit and not oom and _is_operation_error(first) and _refused_by_xla(first):
        message = f"{message.strip()}. {_NO_JIT}"
    return Failed(type(first).__name__, message, oom)


def _unwrapped(error: BaseException) -> BaseException:
    """The exception that Keras or AutoGraph has replaced.

    Both raise theirs while they handle the original, so that is the context of theirs. Keras marks its own exceptions;
    AutoGraph attaches the same metadata to both.
    """
    while error.__context__ is not None:
        metadata = getattr(error, "ag_error_metadata", None)
        of_autograph = metadata is not None and getattr(error.__context__, "ag_error_metadata", None) is metadata
        if not of_autograph and not getattr(error, "_keras_call_info_injected", False):
            break
        error = error.__context__
    return error


def _said(error: BaseException) -> str:
    if isinstance(error, SystemExit) and not isinstance(error.code, str):
        return f"the code of the case called sys.exit({error.code!r})"
    try:
        return str(error)
    except Exception as another:
        return f"its message cannot be read: {type(another).__name__}"


def _where(error: BaseException) -> str:
    """The line that raised an exception, for one without a message, such as that of a bare ``assert``."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].line} (line {frames[-1].lineno} of {frames[-1].filename})" if frames else ""


def _is_out_of_memory(error: BaseException) -> bool:
    # NumPy derives its own from MemoryError. TensorFlow's is known by name, as it may not have been imported yet.
    return isinstance(error, MemoryError) or type(error).__name__ == "ResourceExhaustedError"


def _is_operation_error(error: BaseException) -> bool:
    """Whether a TensorFlow operation raised it. Looks at names, since TensorFlow may not have been imported yet."""
    return any(kind.__name__ == "OpError" and kind.__module__.startswith("tensorflow") for kind in type(error).__mro__)


_STACK_BEFORE = re.compile(r"\AGraph execution error:.*^  File [^\n]*\n", re.DOTALL | re.MULTILINE)
_BEHIND = re.compile(
    r"\s*(\n\s*Traceback \(most recent call last\)|\n\s*The op is created at|\n\s*Stack trace for op definition"
    r"|\n\s*\[\[\{\{node|\n\s*tf2xla conversion failed|\[Op:\w).*",
    re.DOTALL,
)
_AMONG = re.compile(r"\{\{function_node [^}]*\}\} ?|\[_XlaMustCompile=[^\]]*\]|\{\{node [^}]*\}\}$")


def _without_surroundings(message: str) -> str:
    """The message of an operation's error, without the stack before it and the node, stack and notes after it.

    TensorFlow composes it as a single text, so only the text tells its parts apart. A message of another form is left
    as it is.
    """
    text = _AMONG.sub("", _STACK_BEFORE.sub("", _BEHIND.sub("", message))).strip()
    return text or message


def _refused_by_xla(error: BaseException) -> bool:
    """Whether XLA could not compile a function.

    No operation of a compiled program fails with one of these codes, so compiling it failed. Whether a function must
    be compiled is an attribute of its definition, which only the message names. If the definition is gone by now, the
    message contains the attribute or XLA's device.
    """
    from tensorflow.python.eager import context
    from tensorflow.python.framework import errors

    codes = (errors.INVALID_ARGUMENT, errors.UNIMPLEMENTED, errors.FAILED_PRECONDITION, errors.NOT_FOUND)
    text = _said(error)
    if getattr(error, "error_code", None) == errors.INTERNAL:
        # On a GPU a compiled program can also fail with this code. XLA's autotuner runs before there is a program.
        return text.startswith("Autotuner ")
    if getattr(error, "error_code", None) not in codes:
        return False
    named = re.search(r"\[Op:(\S+)\]", text)
    if named is not None and context.context().has_function(named[1]):
        return bool(context.context().get_function_def(named[1]).attr["_XlaMustCompile"].b)
    return any(mark in text for mark in ("_XlaMustCompile=true", "XLA_CPU_JIT", "XLA_GPU_JIT"))
