"""Why a case failed, for programs. ``status`` says how it ended and ``status_reason`` why, for people."""

from __future__ import annotations

from enum import StrEnum


class Cause(StrEnum):
    """The kind of event that ended a case without a usable result.

    Args:
        value: as in the column ``cause``.
        meaning: in words.
        transient: whether another attempt may succeed without a change of the workload or the options.
    """

    meaning: str
    transient: bool

    def __new__(cls, value: str, meaning: str, transient: bool) -> Cause:
        """Make a member; its value is the text alone."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning, member.transient = meaning, transient
        return member

    @classmethod
    def of(cls, value: object) -> Cause | None:
        """The cause with this value; None if there is none, for instance in a run of a newer mpscale."""
        return next((each for each in cls if each.value == value), None)

    EXCEPTION = "exception", "the workload's code, Keras or TensorFlow raised an exception", False
    EXITED = "exited", "its process ended by itself, without a result", False
    FATAL_SIGNAL = "fatal-signal", "its process failed with a signal of its own, such as SIGSEGV", False
    OUT_OF_MEMORY = "out-of-memory", "an allocation failed, or the run's memory limit was exceeded", False
    LIMIT = "limit", "it used more CPU time, or wrote a larger file, than the system allows it (ulimit)", False
    TIMEOUT = "timeout", "it did not finish in time", False
    XLA_REFUSED = "xla-refused", "XLA cannot compile an operation of its train step or its evaluation", False
    OTHER_TRAINING = "other-training", "it did not train the same as the other modes of its seed", False
    OTHER_PRECISION = "other-precision", "it did not compute in the precision of its mode", False
    BAD_RECORD = "bad-record", "a value does not belong in its column", False

    OTHER_COMPILER = "other-compiler", "XLA compiled it and refused another case of its workload", True
    STOPPED = "stopped", "the user, or whoever runs the job, ended the run", True
    NO_END = "no-end", "the journal has no result: the run was killed, or is still going on", True
    UNREADABLE = "unreadable", "its line in the journal cannot be read", True
    KILLED = "killed", "somebody killed its process", True
    OOM_KILLER = "oom-killer", "the kernel killed its process because memory ran out, or probably did", True
    GARBLED = "garbled", "something other than mpscale wrote to its connection", True
    NOT_STARTED = "not-started", "its process could not be started, or the process that starts it died", True
    FILE_SYSTEM = "file-system", "a file or folder that it needs could not be written", True
    PEER_LOST = "peer-lost", "another worker of the case ended, did not come, or could not be reached", True
    GPU_STATE = "gpu-state", "the GPU was throttled, or other processes used it", True
    GPU_LOST = "gpu-lost", "the GPU fell off the bus or was reset", True
