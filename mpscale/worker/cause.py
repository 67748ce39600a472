"""Why a case failed, in the words that say so: what the user's code or TensorFlow raised, without what was put around.

Keras and AutoGraph raise an exception of their own in place of the one that says what is wrong. Its message begins
with the way to the error, or ends with the arguments of a layer. The whole of it is in the traceback, which the record
keeps.
"""

from __future__ import annotations

import re
import traceback
from typing import Any

_NO_JIT = "XLA could not compile the train step or the evaluation: --mp-jit off runs them without it"
_OUT_OF_MEMORY = ("ResourceExhaustedError", "MemoryError")


def cause(error: BaseException, jit: bool) -> dict[str, Any]:
    """What the supervisor is told of an exception: its ``type``, its ``message``, and whether memory ran out, ``oom``.

    Args:
        error: as it was caught.
        jit: whether train steps are compiled by XLA.
    """
    first = _unwrapped(error)
    message = _said(first)
    if _is_operation_error(first):
        message = _without_surroundings(message)
    if not message.strip():
        message = _where(error)
    names = {type(error).__name__, type(first).__name__}
    oom = bool(names.intersection(_OUT_OF_MEMORY)) or _allocation_failed(error)
    if jit and not oom and _is_operation_error(first) and _refused_by_xla(first):
        message = f"{message.strip()}. {_NO_JIT}"
    return {"type": type(first).__name__, "message": message, "oom": oom}


def _unwrapped(error: BaseException) -> BaseException:
    """The exception that Keras or AutoGraph raised another one for.

    Both raise theirs while they handle it, so it is the context of theirs. Keras marks its own. AutoGraph hangs the
    same metadata on both.
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
    """For an exception without a message, such as that of a bare ``assert``: the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].line} (line {frames[-1].lineno} of {frames[-1].filename})" if frames else ""


def _is_operation_error(error: BaseException) -> bool:
    """Whether an operation of TensorFlow raised it. Known by name: this may run before TensorFlow was imported."""
    return any(kind.__name__ == "OpError" and kind.__module__.startswith("tensorflow") for kind in type(error).__mro__)


_STACK_BEFORE = re.compile(r"\AGraph execution error:.*^  File [^\n]*\n", re.DOTALL | re.MULTILINE)
_BEHIND = re.compile(
    r"\s*(\n\s*Traceback \(most recent call last\)|\n\s*The op is created at|\n\s*Stack trace for op definition"
    r"|\n\s*\[\[\{\{node|\n\s*tf2xla conversion failed|\[Op:\w).*",
    re.DOTALL,
)
_AMONG = re.compile(r"\{\{function_node [^}]*\}\} ?|\[_XlaMustCompile=[^\]]*\]|\{\{node [^}]*\}\}$")


def _without_surroundings(message: str) -> str:
    """The message of an operation's error without the stack before it, and without node, stack and notes behind it.

    TensorFlow composes it as one text, so nothing but the text tells its parts apart. What does not look like this
    stays as it is.
    """
    text = _AMONG.sub("", _STACK_BEFORE.sub("", _BEHIND.sub("", message))).strip()
    return text or message


def _refused_by_xla(error: BaseException) -> bool:
    """Whether XLA could not compile a function.

    A compiled program has no operation that could fail with such a code, so it failed to be compiled. That a function
    had to be compiled is an attribute of its definition. TensorFlow names the function in the message alone, and where
    the definition is gone by now, the message names the attribute or XLA's device.
    """
    from tensorflow.python.eager import context
    from tensorflow.python.framework import errors

    codes = (errors.INVALID_ARGUMENT, errors.UNIMPLEMENTED, errors.FAILED_PRECONDITION, errors.NOT_FOUND)
    text = _said(error)
    if getattr(error, "error_code", None) == errors.INTERNAL:
        # On a GPU a compiled program can fail with this code, too. XLA's autotuner runs before there is one.
        return text.startswith("Autotuner ")
    if getattr(error, "error_code", None) not in codes:
        return False
    named = re.search(r"\[Op:(\S+)\]", text)
    if named is not None and context.context().has_function(named[1]):
        return bool(context.context().get_function_def(named[1]).attr["_XlaMustCompile"].b)
    return any(mark in text for mark in ("_XlaMustCompile=true", "XLA_CPU_JIT", "XLA_GPU_JIT"))


def _allocation_failed(error: BaseException) -> bool:
    """XLA reports an exhausted device as an internal error whose text says so."""
    text = _said(error).lower()
    return "out of memory" in text or "resource_exhausted" in text
