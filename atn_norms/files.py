"""Read files that a user names, regular ones of a limited size, and write whole files."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from atn_norms.errors import SpecError
from atn_norms.text import encodable

CHUNK = 2**20  # bytes read at a time


def read_regular(path: str | os.PathLike[str], most: int | None) -> bytes:
    """Read a regular file of at most `most` bytes; None: of any size.

    A pipe, a device or a socket is not read, since it may block or never end.

    Errors: `OSError`, with the reason in `strerror`; `ValueError` for an invalid path.
    """
    with open(_opened(path), "rb") as file:
        if most is None:
            return file.read()
        content = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
    if content is None or len(content) > most:  # files in /proc have the size 0
        raise OSError(errno.EFBIG, f"a file of more than {most} bytes", path)
    return content


def absolute(path: str) -> str:
    """Return an absolute path; `~` is the home folder.

    Errors: `SpecError` for a path that UTF-8 cannot encode, such as below a folder whose name is in another encoding.
    """
    whole = str(Path(os.path.expanduser(path)).absolute())
    if encodable(whole) != whole:
        raise SpecError(got=f"{whole!a}", expected="a path that UTF-8 can encode")
    return whole


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a regular file of any size, in hexadecimal; errors as in `read_regular`."""
    with open(_opened(path), "rb") as file:
        total = hashlib.sha256()
        while chunk := file.read(CHUNK):
            total.update(chunk)
    return total.hexdigest()


def write_whole(path: Path, content: bytes, keep: bool = False) -> None:
    """Write a file durably: after a crash the old file or the new one exists, never a part.

    A symbolic link is replaced by the file, not followed. With `keep` a file that exists is an error.

    Errors: `OSError`; no temporary file remains.
    """
    new = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(new, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep:
            path.hardlink_to(new)  # unlike a rename, this fails where the file exists by now
        else:
            os.replace(new, path)
    finally:
        with suppress(OSError):  # it was renamed, or was never created
            new.unlink()


def physical_memory() -> int | None:
    """Return the memory of the machine in bytes, or None if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def most_bytes() -> int:
    """Return the size of the largest model or checkpoint that is read: half of this machine's memory."""
    memory = physical_memory()
    return 2**33 if memory is None else memory // 2


def _opened(path: str | os.PathLike[str]) -> int:
    """Open a regular file and return its descriptor."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # without O_NONBLOCK a pipe blocks here
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.EINVAL, "a special file", path)
