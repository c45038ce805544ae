"""Generate damaged study folders: other file types, links to the outside, unusual values, swapped contents."""

import json
import os
import random
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from atn_norms.ablation import create, run

STUDY: dict[str, Any] = {
    "model": {"cell": "rnn", "hidden_size": 3},
    "task": {"kind": "adding", "length": 4, "train": 20, "validation": 5, "test": 5},
    "train": {
        "steps": 4,
        "batch_size": 5,
        "log_every": 1,
        "eval_every": 2,
        "checkpoint_every": 1,
        "keep_model": "none",
    },
    "axes": {"norm": ["none", "layer"]},
    "seeds": 1,
}
OF_STUDY = ["study.yaml", "study.resolved.json", "environment.json", ".lock"]
OF_TRIAL = [
    "trial.json", "metrics.jsonl", "checkpoint.pt", "result.json", "run.json", "error.json", "log.txt", ".lock",
]  # fmt: skip
ODD: list[Any] = [
    None, True, -1, 0, 3, 10**9, 10**400, 1e308, "", "x" * 10_000, "../../x", "/etc/passwd", "\x1b]0;title\x07",
    "\u202e",
    [], [[]], {}, {"": ""}, float("nan"), float("inf"), "NaN", 1.5,
]  # fmt: skip
TEXTS = [
    b"", b"{", b"null", b"[]", b"{}", b"\xff\xfe", b'{"step": NaN}', b"[" * 5000 + b"]" * 5000, b"1" * 5001,
    b'{"holder": "x", "machine": "elsewhere", "beat": 1}', b"\0" * 512, b'{"trial": 1e999}',
]  # fmt: skip


class Interrupt(BaseException):
    pass


def finished(folder: Path) -> None:
    """Create a study whose trials are done."""
    run(create(STUDY, folder), workers=0)


def unfinished(folder: Path) -> None:
    """Create a study: the first trial is done, the second was interrupted after a checkpoint."""

    def interrupt(event: Any) -> None:
        if event.finished == 1 and event.kind == "step" and event.step == 3:
            raise Interrupt

    with suppress(Interrupt):
        run(create(STUDY, folder), workers=0, on_event=interrupt)


def damage(folder: Path, outside: Path, dice: random.Random) -> str:
    """Apply one random damage to a folder, and return its description."""
    trials = folder / "trials"
    is_whole = trials.is_dir() and not trials.is_symlink()
    place = dice.choice([folder, *(sorted(each for each in trials.iterdir() if each.is_dir()) if is_whole else ())])
    name = dice.choice(OF_STUDY if place == folder else OF_TRIAL)
    damage_file = dice.choice(DAMAGES)
    if (place != folder and place.is_symlink()) or _is_pipe(place / name):
        return "nothing"  # an earlier damage is here: writing would leave the folder or block
    with suppress(
        OSError, ValueError, MemoryError, TypeError, LookupError
    ):  # an earlier damage removed what this one needs
        damage_file(place, name, outside, dice)
    return f"{damage_file.__name__} {place.relative_to(folder) / name}"


def _is_pipe(path: Path) -> bool:
    return path.is_symlink() or (path.exists() and not (path.is_file() or path.is_dir()))


def truncate(place: Path, name: str, outside: Path, dice: random.Random) -> None:
    content = (place / name).read_bytes()
    (place / name).write_bytes(content[: dice.randrange(len(content) + 1)])


def flip(place: Path, name: str, outside: Path, dice: random.Random) -> None:
    content = bytearray((place / name).read_bytes())
    for _ in range(dice.randint(1, 3) if content else 0):
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    (place / name).write_bytes(content)


def replace_text(place: Path, name: str, outside: Path, dice: random.Random) -> None:
    (place / name).write_bytes(dice.choice(TEXTS))


def set_value(place: Path, name: str, outside: Path, dice: random.Random) -> None:
    """Set a random entry of a JSON file to an unusual value."""
    with suppress(ValueError):
        data = json.loads((place / name).read_bytes())
        inner = data
        while isinstance(inner, dict | list) and inner:
            key = dice.choice(list(inner)) if isinstance(inner, dict) else dice.randrange(len(inner))
            if not isinstance(inner[key], dict | list) or not inner[key] or dice.random() < 0.3:
                inner[key] = dice.choice(ODD)
                break
            inner = inner[key]
        (place / name).write_text(json.dumps(data))


def swap(place: Path, name: str, outside: Path, dice: random.Random) -> None:
    """Swap a file between two trials."""
    first, second = sorted((place if (place / "trials").is_dir() else place.parents[1]).joinpath("trials").iterdir())
    name = dice.choice(OF_TRIAL)
    if (first / name).is_file() and (second / name).is_file():
        content = (first / name).read_bytes()
        (first / name).write_bytes((second / name).read_bytes())
        (second / name).write_bytes(content)
    elif (first / name).is_file():
        shutil.copy(first / name, second / name)


def _clear(path: Path) -> Path:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    return path


def delete(place: Path, name: str, outside: Path, dice: random.Random) -> None:
    _clear(place / name)


def link_out(place: Path, name: str, outside: Path, dice: random.Random) -> None:
    _clear(place / name).symlink_to(outside / dice.choice(["precious.txt", "missing", "folder", "result.json"]))


def link_device(place: Path, name: str, outside: Path, dice: random.Random) -> None:
    _clear(place / name).symlink_to(dice.choice(["/dev/zero", "/dev/null", "/proc/kmsg", "/dev/stdin"]))


def link_folder(place: Path, name: str, outside: Path, dice: random.Random) -> None:
    """Replace a trial, all trials or the report by a link to a folder outside."""
    root = place if (place / "trials").is_dir() else place.parents[1]
    target = dice.choice([root / "trials", root / "report", *(root / "trials").iterdir()])
    _clear(target).symlink_to(outside / "folder")


def make_pipe(place: Path, name: str, outside: Path, dice: random.Random) -> None:
    os.mkfifo(_clear(place / name))


def make_socket(place: Path, name: str, outside: Path, dice: random.Random) -> None:
    here = os.getcwd()
    path = _clear(place / name)
    os.chdir(path.parent)  # socket paths have a length limit
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(name)
    finally:
        os.chdir(here)


def make_folder(place: Path, name: str, outside: Path, dice: random.Random) -> None:
    _clear(place / name).mkdir()
    if dice.random() < 0.5:
        (place / name / "inside").write_text("x")


def make_huge(place: Path, name: str, outside: Path, dice: random.Random) -> None:
    with open(_clear(place / name), "wb") as file:
        file.truncate(dice.choice([2**31, 2**40]))  # sparse: takes no disk space


def from_the_future(place: Path, name: str, outside: Path, dice: random.Random) -> None:
    path = place / ".lock"
    beat = {"holder": f"elsewhere/1/{'0' * 8}", "machine": "elsewhere", "beat": dice.choice([1, 10**400]), "step": 1}
    path.write_text(json.dumps(beat))
    later = time.time() + 10**6
    os.utime(path, (later, later))


def rename_trial(place: Path, name: str, outside: Path, dice: random.Random) -> None:
    """Change the id of a trial in the resolved study."""
    root = place if (place / "trials").is_dir() else place.parents[1]
    data = json.loads((root / "study.resolved.json").read_bytes())
    odd = [str(outside / "made"), "../../made", "..", ".", "", "0" * 16, "a/b", "\0", 3, None]
    data["trials"][0]["id"] = dice.choice(odd)
    (root / "study.resolved.json").write_text(json.dumps(data))


DAMAGES: list[Callable[[Path, str, Path, random.Random], None]] = [
    truncate, flip, replace_text, set_value, set_value, set_value, swap, delete, link_out, link_device, link_folder,
    make_pipe, make_socket, make_folder, make_huge, from_the_future, rename_trial,
]  # fmt: skip
