"""What an exception of a case says: its kind and its message, without what Keras and TensorFlow wrap around it.

Keras and AutoGraph replace the exception of the user's code by one of their own, whose message begins with the path to
the error or ends with the arguments of a layer. All of it is still in the traceback, which the record keeps.

Nothing here imports TensorFlow: an exception may come before it has been imported.
"""

from __future__ import annotations

import errno
import re
import traceback

from mpscale.core.cause import Cause
from mpscale.core.files.errors import is_of_files
from mpscale.core.out_of_memory import ran_out
from mpscale.core.processes.events import Failed

_STACK_ABOVE = re.compile(r"\AGraph execution error:.*^  File [^\n]*\n", re.DOTALL | re.MULTILINE)
_NOTES_BELOW = re.compile(
    r"\s*(\n\s*Traceback \(most recent call last\)|\n\s*The op is created at|\n\s*Stack trace for op definition"
    r"|\n\s*\[\[\{\{node|\n\s*tf2xla conversion failed|\[Op:\w).*",
    re.DOTALL,
)
_NODES_WITHIN = re.compile(r"\{\{function_node [^}]*\}\} ?|\[_XlaMustCompile=[^\]]*\]|\{\{node [^}]*\}\}$")


class XlaRefused(Exception):
    """XLA cannot compile the train step or the evaluation of a model.

    Args:
        what: operations and layers, as in the column ``xla_refused``.
        error: TensorFlow's.
    """

    def __init__(self, what: str, error: BaseException) -> None:
        super().__init__(f"XLA cannot compile {what}: {message_of(error)}")
        self.error = error


class PeerLost(RuntimeError):
    """Another worker of the case ended, did not come, or cannot be reached."""


def cause(error: BaseException) -> Failed:
    """The event that reports an exception."""
    if isinstance(error, PeerLost):
        return Failed(type(error).__name__, str(error), Cause.PEER_LOST)
    if isinstance(error, XlaRefused):
        return Failed(type(error.error).__name__, str(error), Cause.XLA_REFUSED)
    first = unwrapped(error)
    message = message_of(first)
    if not message.strip():
        message = _where(error)
    if _is_of_a_file(first):
        return Failed(type(first).__name__, message, Cause.FILE_SYSTEM)
    return Failed(type(first).__name__, message, Cause.OUT_OF_MEMORY if lacks_memory(error) else Cause.EXCEPTION)


def message_of(error: BaseException) -> str:
    """The message, of an operation's error without what is around it."""
    message = text_of(error)
    return _without_surroundings(message) if is_of_an_operation(error) else message


def lacks_memory(error: BaseException) -> bool:
    """Whether memory ran out."""
    return _is_out_of_memory(error) or _is_out_of_memory(unwrapped(error)) or ran_out(text_of(error))


def unwrapped(error: BaseException) -> BaseException:
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


def text_of(error: BaseException) -> str:
    """The whole message; never raises."""
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


def _is_of_a_file(error: BaseException) -> bool:
    """Whether the disk, a quota or the number of open files was used up, which may pass."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)
    return type(error).__name__ == "ResourceExhaustedError" and is_of_files(_without_surroundings(text_of(error)))


def _is_out_of_memory(error: BaseException) -> bool:
    # NumPy derives its own from MemoryError. TensorFlow's is known by name, as it may not have been imported yet.
    return isinstance(error, MemoryError) or type(error).__name__ == "ResourceExhaustedError"


def is_of_an_operation(error: BaseException) -> bool:
    """Whether a TensorFlow operation raised it. Looks at names, since TensorFlow may not have been imported yet."""
    return any(kind.__name__ == "OpError" and kind.__module__.startswith("tensorflow") for kind in type(error).__mro__)


def _without_surroundings(message: str) -> str:
    """The message of an operation's error, without the stack above it and the node, stack and notes below it.

    TensorFlow joins them into one text, which has to be parsed. A message of another form is returned unchanged.
    """
    text = _NODES_WITHIN.sub("", _STACK_ABOVE.sub("", _NOTES_BELOW.sub("", message))).strip()
    return text or message
