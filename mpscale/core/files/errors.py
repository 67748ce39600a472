"""Why a file or folder cannot be used, and what to do about it, in words."""

from __future__ import annotations

import errno
import os

_WORDS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", "free some space, or use a folder on another disk"),
    errno.EDQUOT: ("the disk quota is used up", "delete files of yours, or use a folder on another disk"),
    errno.EFBIG: ("the file would be larger than is allowed", "raise the limit on the size of files (ulimit -f)"),
    errno.EACCES: ("permission denied", "use a folder that you may write to, or change its permissions"),
    errno.EPERM: ("the operation is not permitted", "use a folder that you may write to, or change its permissions"),
    errno.EROFS: ("the file system is read-only", "use a folder on another file system, or mount this one writable"),
    errno.EMFILE: ("this process has too many files open", "raise the limit on open files (ulimit -n)"),
    errno.ENFILE: ("the machine has too many files open", "end other programs, or raise fs.file-max"),
    errno.ENOTDIR: ("a part of the path is a file and not a folder", "name another folder, or move that file away"),
    errno.ENOENT: ("there is no such file or folder", "name one that exists, or make it first"),
    errno.EISDIR: ("it is a folder and not a file", "name a file, or move that folder away"),
    errno.ENAMETOOLONG: ("the name is too long", "use a shorter one"),
    errno.EIO: ("the disk failed (input/output error)", "see the kernel's log (dmesg), and use another disk"),
    errno.ESTALE: ("the network file system has lost it", "mount that again, or use a folder on a local disk"),
    errno.ENOMEM: ("memory ran out", "end other programs"),
    errno.EAGAIN: ("the limit on processes is reached", "end other programs, or raise the limit (ulimit -u)"),
}
"""What a number means, and what to do. Others are told in the words of the system."""

_OF_A_PROCESS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
"""The numbers of errors that lie in what a process or a user may have, and not in a file, a folder or a disk."""

_NO_MEMORY = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE))


def why(error: OSError) -> str:
    """The reason without the file's name, such as ``the disk is full: free some space, ...``."""
    said, number = error.strerror or str(error) or type(error).__name__, error.errno or 0
    # A library may have said more than the system does.
    words, cure = _WORDS.get(number, (said, "")) if said == os.strerror(number) else (said, "")
    return f"{words}: {cure}" if cure else words


def in_words(error: OSError, doing: str | None = None) -> str:
    """What failed, where, why and what to do, in one line.

    Args:
        error: what the system said.
        doing: what was being done, such as ``the report cannot be written``; None to leave that out.
    """
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return ": ".join([*filter(None, [doing, " to ".join(names)]), why(error)])


def is_of_the_disk(error: OSError) -> bool:
    """Whether an error lies in a file, a folder or a disk, and not in what a process or its user may have."""
    return error.errno not in _OF_A_PROCESS


def is_of_files(text: str) -> bool:
    """Whether a message ends with an error of a file although its type says that a resource is exhausted.

    TensorFlow has one type for a full disk, too many open files and lack of memory; its text ends with the system's.
    """
    return text.rstrip().rstrip(".").endswith(_NO_MEMORY)
