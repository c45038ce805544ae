"""Run, resume and read studies."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atn_norms.commands.console import Json, all_at_home, at_home, print_json, print_table
from atn_norms.commands.output import emit, outliving_readers
from atn_norms.commands.signals import exit_code, handle
from atn_norms.errors import SpecError, not_installed, plural, short_repr

if TYPE_CHECKING:
    from atn_norms.ablation import Event, OnEvent, Plan, StudyRecord, StudySpec
    from atn_norms.specs import Where


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A study's folder.", callback=at_home)]
WORKERS = 2
Workers = Annotated[int, typer.Option(min=0, help="Local processes; 0 trains in this process, without Dask.")]
Scheduler = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Address of a Dask scheduler, such as tls://host:port.")
]


def ablate(
    study: Annotated[
        str, typer.Argument(metavar="STUDY", help="A study file, or the name of a ready-made study.")
    ] = "quick",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Override an option; may be repeated.")
    ] = None,
    workers: Workers = WORKERS,
    scheduler: Scheduler = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the study; default: studies/NAME-KEY.", callback=at_home),
    ] = None,
    reuse: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Copy the finished trials that another study shares; may be repeated.",
            callback=all_at_home,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the trials and estimate their duration; train nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train and compare every point of a study, and write the report; the same command resumes a stopped study."""
    with _resumable("the same command"):
        from atn_norms.ablation import create, make_plan
        from atn_norms.ablation.studies import finished_elsewhere

        _need(workers, scheduler)
        spec, where = _read(study, settings or [])
        if dry_run:
            plan = make_plan(spec, where)
            there = finished_elsewhere(plan, reuse or [])
            plan = replace(plan, trials=tuple(each for each in plan.trials if each.id not in there))
            _list_trials(plan, None if scheduler else max(1, min(workers, len(plan.trials))), as_json)
            return
        options = [("--set", each) for each in settings or []] + [("--reuse", str(each)) for each in reuse or []]
        command = ["atn-norms", "ablate", study, *chain(*options), *_processes(workers, scheduler)]
        folder = create(spec, out, where=where, reuse=reuse or [], command=command)
        _run(folder, workers, scheduler, as_json)


def resume(
    folder: Folder,
    workers: Workers = WORKERS,
    scheduler: Scheduler = None,
    settings: Annotated[list[str] | None, typer.Option("--set", hidden=True)] = None,
    as_json: Json = False,
) -> None:
    """Resume a study; failed trials run again, finished ones do not."""
    with _resumable(_resumption(folder, workers, scheduler)):
        from atn_norms.ablation import refuse_edited

        _require_no_settings(folder, settings or [])
        _need(workers, scheduler)
        refuse_edited(folder)
        _run(folder, workers, scheduler, as_json)


def _require_no_settings(folder: Path, settings: Sequence[str]) -> None:
    if settings:
        words = ["atn-norms", "ablate", str(folder / "study.yaml"), "--out", str(folder)]
        command = shlex.join([*words, *(word for setting in settings for word in ("--set", setting))])
        raise SpecError(
            "--set",
            "an override of the study",
            "none, since resume continues a study unchanged",
            detail=f"To extend the study: {command}",
        )


def status(folder: Folder, as_json: Json = False) -> None:
    """Show the progress of a study, trial by trial."""
    from atn_norms.ablation import load
    from atn_norms.commands.progress import called, step_of

    record = load(folder, curves=False)
    count = record.counts()
    trials = [
        {
            "id": trial.id,
            "status": trial.status,
            "points": list(trial.points),
            "seed": trial.seed,
            "step": trial.step,
            "steps": trial.trial["train"]["steps"],
            "error": trial.error["error"] if trial.error else None,
            "reason": (trial.result or {}).get("reason"),
        }
        for trial in record.trials
    ]
    if as_json:
        print_json({"name": record.name, "folder": str(folder), "counts": count, "trials": trials})
        return
    rows = [
        (
            t["id"],
            t["status"],
            step_of(t["step"], t["steps"]),
            f"{called(t['points'][0])} seed={t['seed']}",
            t["error"] or t["reason"],
        )
        for t in trials
    ]
    print_table(f"study {record.name!r} in {folder}", ("trial", "status", "steps", "point", "why"), rows)
    emit("\n" + ", ".join(f"{number} {name}" for name, number in count.items() if number))
    if count["pending"] or count["failed"]:
        emit(f"to resume: {shlex.join(['atn-norms', 'resume', str(folder)])}")


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="A study's folder, or several to merge.", callback=all_at_home),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the report; default: DIR/report.", callback=at_home)
    ] = None,
    reach: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=LEVEL", help="Compare the steps until validation reaches LEVEL; may be repeated."),
    ] = None,
    formats: Annotated[
        str, typer.Option(metavar="LIST", help="File formats of pictures and tables: svg, png, md, tex.")
    ] = "svg,png,md,tex",
    as_json: Json = False,
) -> None:
    """Rebuild the report of a study, or a published report from its own files, and print its table.

    Several folders of one study, for instance with different seeds, give one report. This needs --out.
    """
    _need(None)
    levels = _levels(reach or [])
    folder, *others = folders
    if others and out is None:
        raise SpecError("--out", "nothing", "a folder for the report of several studies")
    with _resumable(shlex.join(["atn-norms", "report", *map(str, folders), *(["--out", str(out)] if others else [])])):
        from atn_norms.ablation import merge
        from atn_norms.ablation.report import is_report, read
        from atn_norms.ablation.report.archive import refuse_other_files

        if out is not None and out.resolve() != (folder / "report").resolve():
            refuse_other_files(out)
        records = {str(each): read(each) if is_report(each) else _load(each) for each in folders}
        wanted = [each.strip() for each in formats.split(",") if each.strip()]
        _report(merge(records), folder, as_json, out or (folder if is_report(folder) else None), levels, wanted)


def _load(folder: Path) -> StudyRecord:
    """Read a study, with a warning where its study.yaml was edited: a report does not use this file."""
    from atn_norms.ablation.store.files import StoreError
    from atn_norms.ablation.store.folder import StudyFolder
    from atn_norms.ablation.studies import refuse_edited_file

    store = StudyFolder(folder)
    resolved = store.resolved()
    try:
        refuse_edited_file(store, resolved)
    except (SpecError, StoreError) as error:
        emit(f"warning: {error}\nThe report is of the study as it was created.", error=True)
    return store.load(resolved)


def _levels(settings: Sequence[str]) -> dict[str, float]:
    levels = {}
    for count, each in enumerate(settings, start=1):
        task, equals, level = each.rpartition("=")
        try:
            levels[task] = float(level)
        except ValueError:
            equals = ""
        if not (equals and task):
            expected = "TASK=LEVEL with a number, such as adding=0.05"
            raise SpecError("--reach", short_repr(each), expected)
        if len(levels) < count:
            raise SpecError("--reach", f"{short_repr(task)} twice", "one level for each task")
    return levels


def _need(workers: int | None, scheduler: str | None = None) -> None:
    """Require every package that a study needs before training begins; with None, those of a report."""

    models = [] if workers is None else ["safetensors"]
    processes = ["distributed"] if scheduler else ["distributed", "cryptography"] if workers else []
    missing = [
        module for module in ("numpy", "matplotlib", *models, *processes) if importlib.util.find_spec(module) is None
    ]
    if missing:
        alternative = ", or use --workers 0" if set(missing) <= {"distributed", "cryptography"} else ""
        raise not_installed(" and ".join(missing), "ablation", cure=alternative)
    if scheduler is not None:
        from atn_norms.ablation.execution.engine import check_scheduler

        check_scheduler(scheduler)


def _read(study: str, settings: Sequence[str]) -> tuple[StudySpec, Where]:
    from atn_norms.ablation import StudySpec, override
    from atn_norms.ablation.grid import presets
    from atn_norms.ablation.grid.overrides import placed
    from atn_norms.specs import parse, read, validate

    if study not in presets.names() and Path(study).is_dir():
        cure = f"To resume a study in it: atn-norms resume {study}"
        raise SpecError(position=study, got="a folder", expected="a study file", detail=cure)
    data, where = parse(presets.text(study), f"{study}.yaml") if presets.is_name(study) else read(Path(study))
    if not presets.is_name(study):
        data.setdefault("name", _name_of(Path(study)))
    where = placed(data, settings, where)
    return validate(StudySpec, override(data, settings), where), where


def _name_of(file: Path) -> str:
    """Return the stem of a study file where it is a valid name, and the default name otherwise."""
    from atn_norms.ablation.grid.study import NAME, StudySpec

    return file.stem if re.fullmatch(NAME, file.stem) else StudySpec.model_fields["name"].default


def _run(folder: Path, workers: int, scheduler: str | None, as_json: bool) -> None:
    with _resumable(_resumption(folder, workers, scheduler)), outliving_readers():
        from atn_norms.ablation import run
        from atn_norms.ablation.execution.remaining import RemainingTime
        from atn_norms.commands.progress import live_progress

        shown: list[OnEvent] = []

        def start(record: StudyRecord) -> None:
            left = [trial for trial in record.trials if trial.status not in ("done", "diverged")]
            if as_json:
                return
            costs = _announce(record, folder, len(left), workers, scheduler)
            if left:
                remaining = RemainingTime(left, None if scheduler else max(1, workers), costs)
                live = live_progress(remaining, len(record.trials) - len(left), len(record.trials))
                shown.append(stack.enter_context(live))

        def show(event: Event) -> None:
            for each in shown:
                each(event)

        with ExitStack() as stack:
            record = run(folder, workers=workers, scheduler=scheduler, on_start=start, on_event=show)
        _report(record, folder, as_json)
    failed = [trial for trial in record.trials if trial.status == "failed"]
    if failed:
        command = shlex.join(["atn-norms", "status", str(folder)])
        emit(f"{plural(len(failed), 'trial')} failed; see {command}", error=True)
        raise typer.Exit(1)


def _resumption(folder: Path, workers: int, scheduler: str | None) -> str:
    """Return the command that resumes a study with the same workers."""
    return shlex.join(["atn-norms", "resume", str(folder), *_processes(workers, scheduler)])


def _processes(workers: int, scheduler: str | None) -> list[str]:
    """Return the options of a command line for its workers."""
    return ["--scheduler", scheduler] if scheduler else ["--workers", str(workers)] if workers != WORKERS else []


@contextmanager
def _resumable(command: str) -> Iterator[None]:
    """Print the resume command when a signal stops the block."""
    with handle():
        try:
            yield
        except KeyboardInterrupt as end:
            emit(f"\nstopped; finished work is kept. To resume: {command}", error=True)
            raise typer.Exit(exit_code(end)) from None


def _announce(
    record: StudyRecord, folder: Path, left: int, workers: int, scheduler: str | None
) -> dict[str, float] | None:
    """Print the study and its estimated duration; return the predicted seconds of each trial."""
    from atn_norms.ablation.execution.estimate import costs, in_parallel
    from atn_norms.commands.progress import duration

    total = len(record.trials)
    axes = " x ".join([f"{name} {{{', '.join(labels)}}}" for name, labels in record.axes.items()])
    seeds = len({trial.seed for trial in record.trials})
    grid = [", ".join(record.tasks), axes or "one point", plural(seeds, "seed"), plural(total, "trial")]
    emit(f"study {record.name!r}: {'; '.join(grid)}")
    for note in [note for facts in record.tasks.values() for note in facts.notes]:
        emit(f"data: {note}")
    emit(f"folder: {folder}")
    if not left:
        emit("every trial is already done")
        return None
    where = f"on {scheduler}" if scheduler else f"in {workers} processes" if workers else "in this process"
    emit(f"training {left} of {total} trials {where}; Ctrl-C stops, and the same command resumes")
    predicted = None if scheduler else costs(record)  # the speed of this machine
    seconds = in_parallel(predicted, max(1, workers))
    if seconds is not None:
        started = " after the processes start" if workers else ""
        emit(f"estimated duration: about {duration(max(1.0, seconds))}{started}, from a few timed steps")
    return predicted


def _list_trials(plan: Plan, at_a_time: int | None, as_json: bool) -> None:
    from atn_norms.ablation.execution.estimate import duration_of
    from atn_norms.commands.progress import called, duration

    seconds = at_a_time and duration_of([each.trial for each in plan.trials], at_a_time)
    if as_json:
        trials = [{"id": each.id, "points": list(each.points), "trial": each.trial} for each in plan.trials]
        print_json({"name": plan.name, "estimated_seconds": seconds, "trials": trials})
        return
    rows = [
        (each.id, each.trial["seed"], each.trial["train"]["steps"], "; ".join(map(called, each.points)))
        for each in plan.trials
    ]
    print_table(f"study {plan.name!r}: {len(rows)} trials", ("trial", "seed", "steps", "points"), rows)
    if seconds is not None:
        each = f"{at_a_time} at a time" if at_a_time != 1 else "one after another"
        emit(f"\n{len(rows)} trials, {each}: about {duration(max(1.0, seconds))}, estimated from a few steps")


def _report(
    record: StudyRecord,
    folder: Path,
    as_json: bool,
    out: Path | None = None,
    reach: dict[str, float] | None = None,
    formats: Sequence[str] | None = None,
) -> None:
    from atn_norms.ablation.report import FORMATS, findings, table, write
    from atn_norms.ablation.report.sentences import verdict_line
    from atn_norms.ablation.store.folder import StudyFolder

    result = findings(record, reach)
    page, *others = write(result, out or StudyFolder(folder).report, reach, FORMATS if formats is None else formats)
    results = table(result)
    if as_json:
        files = [str(path) for path in (page, *others)]
        print_json({"name": record.name, "folder": str(folder), "results": results.records, "report": files})
        return
    print_table(results.title, results.headers, results.rows)
    emit()
    for task in result.tasks:
        facts = record.tasks[task.task]
        for options, baselines in {"": facts.baselines, **facts.baselines_at}.items():
            if baselines:
                scores = ", ".join(f"{name} {score:.4g}" for name, score in baselines.items())
                emit(f"{task.task}: trivial predictors{options and f' at {options}'}: {scores}")
        emit(f"{task.task}: {verdict_line(result, task)}")
    emit(f"\nreport: {page}")
