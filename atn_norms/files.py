"""Read files that a user names: regular files of a limited size."""

from __future__ import annotations

import errno
import os
import stat


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
    """Read a regular file of at most `most` bytes.

    A pipe, a device or a socket could block for ever or never end, so nothing of it is read.

    Errors: `OSError`, whose `strerror` is the reason; `ValueError` for a path that no file can have.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # without O_NONBLOCK a pipe blocks here
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "a special file", path)
        content = file.read(most + 1) if status.st_size <= most else None
    if content is None or len(content) > most:  # some files, as in /proc, do not know their size
        raise OSError(errno.EFBIG, f"a file of more than {most} bytes", path)
    return content
