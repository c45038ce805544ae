"""Read files that a user names: regular files of a limited size."""

from __future__ import annotations

import errno
import os
import stat


def read_regular(path: str | os.PathLike[str], most: int | None) -> bytes:
    """Read a regular file of at most `most` bytes; None: of any size.

    A pipe, a device or a socket is not read, since it may block or never end.

    Errors: `OSError`, with the reason in `strerror`; `ValueError` for an invalid path.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # without O_NONBLOCK a pipe blocks here
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "a special file", path)
        if most is None:
            return file.read()
        content = file.read(most + 1) if status.st_size <= most else None
    if content is None or len(content) > most:  # files in /proc have the size 0
        raise OSError(errno.EFBIG, f"a file of more than {most} bytes", path)
    return content
