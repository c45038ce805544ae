"""Open, read and write the files of a store: atomic, durable, regular, and never through a symbolic link.

Every change of a file calls named failpoints (`result.json:renamed`), where tests inject failures; see `failpoints`.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from atn_norms.ablation.store.failpoints import failpoint
from atn_norms.errors import short_repr
from atn_norms.text import encodable

MOST_BYTES = 2**24  # bytes of a small file, such as a result: 16 MiB
CHUNK = 2**20  # bytes read at a time
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFREG: "a file",
}


class StoreError(OSError):
    """A study's folder cannot be used; the message names the file and the fix.

    `is_of_system` is true where the system failed to read or write a file, which may be intact.
    """

    is_of_system = False


class Busy(StoreError):
    """Another process holds a lock."""


@contextmanager
def named(action: str, path: Path) -> Iterator[None]:
    """Convert an error of the system to a `StoreError` that names the action and the file."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        problem = StoreError(f"cannot {action} {path}: {error.strerror or error}")
        problem.is_of_system = True
        raise problem from error


class Folder:
    """A folder of a store, given as a root and the names of the folders inside it.

    | symbol | meaning |
    |---|---|
    | `root` | a path that may contain symbolic links: the user chooses it |
    | `inside` | names below the root; none of them, and no file, is opened through a symbolic link |

    Errors: `StoreError` naming the path for a link, a pipe, a device or a folder where a file is expected, for a file
    that is too large, and for errors of the system.

    >>> folder = Folder("store")
    >>> folder.make()
    >>> folder.write("a.txt", b"content")
    >>> folder.read("a.txt"), folder.names()
    (b'content', ['a.txt'])
    """

    def __init__(self, root: Path | str, *inside: str) -> None:
        self.root, self.inside = Path(root), inside
        self.path = self.root.joinpath(*inside)
        if "\0" in str(self.path):
            raise StoreError(f"{short_repr(str(self.path))}: got a path with a NUL character; expected one without")

    def folder(self, name: str) -> Folder:
        """Return a folder inside this one, which may not exist yet."""
        return Folder(self.root, *self.inside, name)

    @contextmanager
    def opened(self) -> Iterator[int]:
        """Open the folder inside a `with` block, and return its descriptor."""
        descriptor = os.open(self.root, os.O_PATH | os.O_DIRECTORY)
        try:
            for depth, name in enumerate(self.inside, 1):
                try:
                    below = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
                except OSError as error:
                    _refuse_kind(descriptor, self.root.joinpath(*self.inside[:depth]), stat.S_IFDIR, error)
                    raise
                os.close(descriptor)
                descriptor = below
            yield descriptor
        finally:
            os.close(descriptor)

    def make(self, made: list[Path] | None = None, sync: bool = True) -> None:
        """Create the folder and its parents, durably with `sync`; append those created to `made`."""
        with named("create the folder", self.path):
            missing = (each for each in reversed(self.root.parents) if not each.exists())
            for path in (*missing, self.root):
                _make(path, None, made, sync)
            for depth, name in enumerate(self.inside, 1):
                with Folder(self.root, *self.inside[: depth - 1]).opened() as parent:
                    _make(self.root.joinpath(*self.inside[:depth]), (parent, name), made, sync)

    def open(self, name: str, flags: int = os.O_RDONLY) -> int:
        """Open a regular file and return its descriptor; `OSError` if the system fails."""
        path = self.path / name
        with self.opened() as folder:
            try:
                descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666, dir_fd=folder)
            except OSError as error:
                _refuse_kind(folder, path, stat.S_IFREG, error)
                raise
        if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise StoreError(_wrong_kind(path, mode, stat.S_IFREG))
        return descriptor

    def read(self, name: str, most: int = MOST_BYTES) -> bytes:
        """Read a whole file of at most `most` bytes."""
        path = self.path / name
        with named("read", path):
            descriptor = self.open(name)
            try:
                refuse_size(path, os.fstat(descriptor).st_size, most)
                content = b"".join(chunks(descriptor, most + 1))
            finally:
                os.close(descriptor)
        refuse_size(path, len(content), most)
        return content

    def read_json(self, name: str, most: int = MOST_BYTES, cure: str = "") -> dict[str, Any]:
        """Read a JSON object; `StoreError` for a damaged one, with file, line and cure."""
        content = self.read(name, most)
        try:
            return parse_object(content, str(self.path / name))
        except StoreError as error:
            raise StoreError(f"{error}{'; ' if cure else ''}{cure}") from error

    def sync(self) -> None:
        """Make the entries of the folder durable."""
        with named("write", self.path), self.opened() as folder:
            _sync(folder)

    def write(self, name: str, content: bytes, sync: bool = True) -> None:
        """Write a file atomically and durably: after a kill, the old or the new file exists.

        Without `sync` its entry in the folder is not yet durable: after a power failure, the new file may be missing.

        Errors: `StoreError` naming the file; the old content stays and no temporary file remains.
        """
        new = temporary(name)
        with named("write", self.path / name), self.opened() as folder:
            failpoint(f"{name}:begin")
            try:
                descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666, dir_fd=folder)
                try:
                    write_all(descriptor, content)
                    failpoint(f"{name}:written")
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                failpoint(f"{name}:synced")
                os.replace(new, name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(new, dir_fd=folder)
                raise
            failpoint(f"{name}:renamed")
            if sync:
                _sync(folder)
            failpoint(f"{name}:durable")

    def write_json(self, name: str, value: Any, sync: bool = True) -> None:
        """Write a value as readable JSON, atomically."""
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        self.write(name, (text + "\n").encode(), sync)

    def append(self, name: str, line: str) -> None:
        """Append a line to a log for people; the line is not made durable."""
        with named("write", self.path / name):
            failpoint(f"{name}:add")
            descriptor = self.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            try:
                write_all(descriptor, f"{encodable(line)}\n".encode())
            finally:
                os.close(descriptor)
            failpoint(f"{name}:added")

    def remove(self, name: str) -> None:
        """Remove a file, or a link to a file, if it exists."""
        with named("remove", self.path / name), self.opened() as folder:
            failpoint(f"{name}:remove")
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
            failpoint(f"{name}:removed")

    def rename(self, name: str, new: str) -> None:
        """Rename an entry of any kind, and replace a file of the new name."""
        with named("rename", self.path / name), self.opened() as folder:
            os.replace(name, new, src_dir_fd=folder, dst_dir_fd=folder)

    def stat(self, name: str) -> os.stat_result:
        """Return the status of an entry without following a link; `OSError` if there is none."""
        with self.opened() as folder:
            return os.stat(name, dir_fd=folder, follow_symlinks=False)

    def has(self, name: str) -> bool:
        """Return True if an entry with this name exists; False if the folder does not exist."""
        try:
            self.stat(name)
        except FileNotFoundError:
            return False
        except OSError as error:
            with named("read", self.path / name):
                raise error
        return True

    def names(self) -> list[str]:
        """Return the sorted names of all entries in the folder."""
        with named("read", self.path), self.opened() as folder:
            descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
            try:
                return sorted(os.listdir(descriptor))
            finally:
                os.close(descriptor)

    def remove_leftovers(self) -> None:
        """Remove the temporary files of killed processes; the caller must hold the lock."""
        for name in self.names():
            if is_temporary(name):
                self.remove(name)


def temporary(name: str) -> str:
    """Return a unique name of a temporary file, across all machines that share the folder."""
    return f".{name}.{secrets.token_hex(6)}.tmp"


def is_temporary(name: str) -> bool:
    """Return True if a name has the form of `temporary`.

    >>> is_temporary(temporary("a.json")), is_temporary("a.json")
    (True, False)
    """
    return name.startswith(".") and name.endswith(".tmp")


def write_all(descriptor: int, content: bytes) -> None:
    """Write all bytes: on a nearly full disk, the system may write only a part before it raises an error."""
    while content:
        content = content[os.write(descriptor, content) :]


def chunks(descriptor: int, most: int) -> Iterator[bytes]:
    """Yield at most `count` bytes of a file, piece by piece."""
    while most > 0 and (chunk := os.read(descriptor, min(CHUNK, most))):
        yield chunk
        most -= len(chunk)


def refuse_size(path: Path, size: int, most: int) -> None:
    """Raise `StoreError` for a file that is larger than allowed."""
    if size > most:
        raise StoreError(f"{path}: got a file of over {most} bytes; expected at most {most}")


def _make(path: Path, at: tuple[int, str] | None, made: list[Path] | None, sync: bool) -> None:
    """Create a folder by its path, or by its name in an opened folder, unless it exists."""
    name, parent = (path, None) if at is None else (at[1], at[0])
    try:
        os.mkdir(name, 0o777, dir_fd=parent)
    except FileExistsError:
        mode = os.stat(name, dir_fd=parent, follow_symlinks=at is None and path.exists()).st_mode
        if not stat.S_ISDIR(mode):
            raise StoreError(_wrong_kind(path, mode, stat.S_IFDIR)) from None
        return
    if made is not None:
        made.append(path)
    failpoint("folder:made")
    if not sync:
        return
    above = os.open(path.parent, os.O_PATH | os.O_DIRECTORY) if parent is None else parent
    try:
        _sync(above)
    finally:
        if parent is None:
            os.close(above)


def _sync(folder: int) -> None:
    """Make the entries of an opened folder durable."""
    descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_kind(folder: int, path: Path, expected: int, error: OSError) -> None:
    """Raise `StoreError` if an entry could not be opened because it is a link, a pipe, or of another kind."""
    if error.errno not in (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO):
        return
    try:
        mode = os.stat(path.name, dir_fd=folder, follow_symlinks=False).st_mode
    except OSError:
        return
    if stat.S_IFMT(mode) != expected:
        raise StoreError(_wrong_kind(path, mode, expected)) from error


def _wrong_kind(path: Path, mode: int, expected: int) -> str:
    wanted = "a regular file" if expected == stat.S_IFREG else "a folder"
    return f"{path}: got {_KINDS.get(stat.S_IFMT(mode), 'a special file')}; expected {wanted}"


def canonical(value: Any) -> str:
    """Return the canonical JSON text of a value: sorted keys, no spaces, finite numbers only.

    >>> canonical({"b": 1.0, "a": [None, True]})
    '{"a":[null,true],"b":1.0}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def parse_json(content: bytes, place: str) -> Any:
    """Parse JSON strictly; `StoreError` names the position, with the line in a text of several lines.

    >>> parse_json(b"[1, 2]", "a.json")
    [1, 2]
    >>> parse_json(b"[NaN]", "a.json")
    Traceback (most recent call last):
    ...
    atn_norms.ablation.store.files.StoreError: a.json: damaged: NaN is not a number of JSON
    """
    try:
        return json.loads(content, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        where = f"{place}:{error.lineno}" if b"\n" in content.strip() else place
        raise StoreError(f"{where}: damaged or truncated, not JSON ({error})") from error
    except UnicodeDecodeError as error:
        raise StoreError(f"{place}: damaged or truncated, not UTF-8 text ({error.reason})") from error
    except RecursionError as error:
        raise StoreError(f"{place}: damaged: nested too deeply") from error
    except ValueError as error:  # such as a number of thousands of digits, which Python does not parse
        raise StoreError(f"{place}: damaged: {error}") from error


def parse_object(content: bytes, place: str) -> dict[str, Any]:
    """Parse a JSON object strictly."""
    value = parse_json(content, place)
    if not isinstance(value, dict):
        raise StoreError(f"{place}: damaged: got {type(value).__name__}; expected a JSON object")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")
