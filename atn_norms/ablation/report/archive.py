"""Write and read the record of a published report: `study.json`, `results.csv` and `curves.csv`."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atn_norms.ablation.analysis.comparison import outcome
from atn_norms.ablation.grid.functions import KIND
from atn_norms.ablation.report.csv_export import NO_REASON
from atn_norms.ablation.store.files import Folder, StoreError, is_temporary
from atn_norms.ablation.store.folder import ELSEWHERE, RESOLVED
from atn_norms.ablation.store.identity import settings_hash
from atn_norms.ablation.store.records import StudyRecord, TaskFacts, TrialRecord
from atn_norms.errors import SpecError, brief

FILE = "study.json"
RECORD = (FILE, "results.csv")  # the files by which a published report is recognized
READ = (*RECORD, "curves.csv")  # the files from which `read` makes a record
MOST_BYTES = 2**28  # bytes of the largest file that is read: 256 MiB
_KEPT = ("steps", "keep")  # training options that a report reads
_HASHES = ("data", "plugins")
_NUMBERS = ("seconds", "attempts")
_MACHINE = ("versions", "processor")


def study_json(record: StudyRecord) -> str:
    """Return the contents of `study.json`: the study, its tasks and environment, and the points of each trial."""
    trials = [
        {
            "id": trial.id,
            "points": list(trial.points),
            "train": {key: trial.trial["train"][key] for key in _KEPT if key in trial.trial["train"]},
            **{key: trial.trial[key] for key in _HASHES if trial.trial.get(key)},
            **_settings(settings_hash(trial.trial)),
            **_hidden(record, trial),
            **{key: trial.run[key] for key in _MACHINE if trial.run and trial.run.get(key)},
        }
        for trial in record.trials
    ]
    whole = {
        "name": record.name,
        "study": record.study,
        "environment": record.environment,
        "axes": record.axes,
        "tune": record.tune,
        "tasks": {name: facts.as_json() for name, facts in record.tasks.items()},
        "baseline": record.baseline,
    }
    lines = ",\n".join(json.dumps(trial, ensure_ascii=False) for trial in trials)
    head = json.dumps(whole, ensure_ascii=False, indent=1)
    return f'{head[:-2]},\n "trials": [\n{lines}\n]}}\n'


def _hidden(record: StudyRecord, trial: TrialRecord) -> dict[str, str]:
    """Return what results.csv lacks: the status where a score is beyond 1e30, and the traceback of a failed trial."""
    trace = (trial.error or {}).get("traceback") if trial.status == "failed" else None
    stored = {} if outcome(record, trial) == trial.status else {"status": trial.status}
    return stored | ({"traceback": str(trace)} if trace else {})


def _settings(digest: str | None) -> dict[str, str]:
    """Return the entry of a trial's hash, which `merge` compares; reports of earlier versions lack it."""
    return {"settings": digest} if digest else {}


def is_report(folder: Path | str) -> bool:
    """Return True if a folder is a published report."""
    return all((Path(folder) / name).is_file() for name in RECORD)


def refuse_other_files(folder: Path | str) -> None:
    """Raise `SpecError` for a folder with files that no report wrote; a published report may be replaced."""
    place = Folder(folder)
    if not place.path.is_dir() or (is_report(folder) and not place.has(RESOLVED)):
        return
    others = [name for name in place.names() if not is_temporary(name)]
    if others:
        got, expected = f"a folder with {others[0]!r}", "an empty folder, or a published report"
        raise SpecError(position=str(folder), got=got, expected=expected, detail=ELSEWHERE)


def refuse_size(folder: Folder, content: Mapping[str, bytes]) -> None:
    """Raise `StoreError` for a report with a file that `read` would refuse, unless the report is in its study's folder.

    The report in the folder of a study is made again from the study.
    """
    if (folder.path.parent / RESOLVED).is_file():
        return
    for name in READ:
        if (size := len(content[name])) > MOST_BYTES:
            fewer = "; a study with a larger train.log_every, or fewer reports, has fewer points"
            cure = fewer if name == "curves.csv" else ""
            raise StoreError(f"{folder.path / name}: got {size} bytes; expected at most {MOST_BYTES}, to be read{cure}")


def read(folder: Path | str) -> StudyRecord:
    """Return the record of a published report, from which `write` makes the same report.

    Errors: `StoreError` that names the file that cannot be read, or is damaged.
    """
    folder = Path(folder)
    try:
        whole = json.loads(_text(folder / FILE))
        curves = _curves(folder / "curves.csv")
        lines = {line["trial"]: line for line in _lines(folder / "results.csv")}
        size = max(map(len, lines), default=0)  # the files have the first characters of the ids
        entries = [(entry, entry["id"][:size]) for entry in whole.pop("trials")]
        trials = tuple(_trial(entry, lines[name], curves.get(name, [])) for entry, name in entries)
        tasks = {name: TaskFacts(**facts) for name, facts in whole.pop("tasks").items()}
        return StudyRecord(**whole, tasks=tasks, trials=trials)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError, csv.Error) as error:
        problem = brief(repr(error), 200)
        raise StoreError(f"{folder}: damaged, {FILE} and the CSV files do not fit ({problem})") from error


def _text(path: Path) -> str:
    content = Folder(path.parent).read(path.name, MOST_BYTES)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StoreError(f"{path}: got bytes that are not UTF-8 ({error.reason}); expected UTF-8 text") from error


def _lines(path: Path) -> list[dict[str, str]]:
    return [{_plain(k): _plain(v) for k, v in line.items()} for line in csv.DictReader(io.StringIO(_text(path)))]


def _plain(field: str) -> str:
    """Return a field without the apostrophe that prevents spreadsheets from executing it."""
    return field[1:] if re.match(r"'[=+\-@\t\r]", field) else field


def _curves(path: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in _lines(path):
        measured = {key: float(line[key]) if line[key] else None for key in ("train_loss", "validation")}
        found[line["trial"]].append({"step": int(line["step"]), **measured})
    return found


def _trial(entry: dict[str, Any], line: dict[str, str], curve: list[dict[str, Any]]) -> TrialRecord:
    status, reason, step = entry.get("status", line["status"]), line["reason"], int(line["step"] or 0)
    if status != line["status"] and reason == NO_REASON:
        reason = ""
    result = None
    if status in ("done", "diverged"):
        outcome = "finished" if status == "done" else "diverged"
        result = {"trial": entry["id"], "outcome": outcome, "metrics": _metrics(line)}
        result |= {"step": step} if line["step"] else {}
        result |= {"reason": reason} if reason else {}
    run = {key: json.loads(line[key]) for key in _NUMBERS if line[key]} | (
        {"host": line["host"]} if line["host"] else {}
    )
    run |= {key: entry[key] for key in _MACHINE if key in entry}
    seed = int(line["seed"])
    return TrialRecord(
        id=entry["id"],
        trial={
            "seed": seed,
            "task": {} if line["steps"] else {"kind": KIND},  # a function whose study declares no steps
            "train": entry["train"],
            **{key: entry.get(key, {}) for key in _HASHES},
            **_settings(entry.get("settings")),
        },
        points=tuple(entry["points"]),
        seed=seed,
        status=status,  # type: ignore[arg-type]
        result=result,
        curve=curve,
        run=run or None,
        error={"error": reason, "traceback": entry.get("traceback", "")} if status == "failed" else None,
        step=step,
    )


def _metrics(line: dict[str, str]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for split in ("test", "validation"):
        columns = {split: line["metric"], **{c: c.removeprefix(f"{split} ") for c in line if c.startswith(f"{split} ")}}
        values = {name: float(line[column]) for column, name in columns.items() if line[column]}
        if values:
            found[split] = values
    return found
