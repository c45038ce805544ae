"""The task kind `python`: a study that varies the arguments of a user's function."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator

from atn_norms.ablation.grid.errors import Problem
from atn_norms.ablation.grid.imports import local_files, module_name, syntax_tree, text_of
from atn_norms.ablation.grid.sources import DIGITS, hash_files
from atn_norms.ablation.grid.starts import counted_starts, starting
from atn_norms.errors import Problem as SpecProblem
from atn_norms.errors import SpecError, did_you_mean, message, nearest, nearest_file, unknown
from atn_norms.files import absolute
from atn_norms.options import Options

KIND = "python"
PROVIDED = ("seed", "trial")  # arguments that every study passes to a function that accepts them
TRAINING = ("steps", "patience", "divergence_factor", "threads")  # the options of `train` that a function's trials use
UNKNOWN_STEPS = 1  # `train.steps` of a function whose study does not set them

RESTORE = "Restore it, or make a new study."  # the cure for a changed file
NamedFiles = tuple[str, tuple[str, ...]]  # the file of a function, and the other files
Sources = dict[str, dict[str, str]]  # option -> path -> hash
_loading = False  # whether a function's file is being executed, so that its call of `ablate` starts no second study


class FunctionSpec(Options):
    """Call a Python function: `function(**arguments, seed=..., trial=...)` returns the metrics of a trial.

    | option | meaning |
    |---|---|
    | `file` | the Python file that defines the function, relative to where the program runs |
    | `function` | its name, at the top level of the file |
    | `arguments` | arguments of every trial; an axis of the study is an argument too |
    | `metric` | the returned metric that is compared; None: the first that the function returns |
    | `goal` | `min` where a smaller metric is better, `max` where a larger one is |
    | `reports` | the values of `trial.report`: a `loss` (smaller is better), or the `metric` |
    | `files` | other files and folders that the result depends on; a changed file makes another study |
    """

    family: ClassVar[str | None] = "task"
    recommended: ClassVar[Mapping[str, Any]] = {}
    kind: Literal["python"] = KIND
    file: Annotated[str, AfterValidator(absolute)]
    function: str = "train"
    arguments: dict[str, Any] = {}
    metric: str | None = None
    goal: Literal["min", "max"] = "min"
    reports: Literal["loss", "metric"] = "loss"
    files: tuple[Annotated[str, AfterValidator(absolute)], ...] = ()

    @property
    def named_files(self) -> NamedFiles:
        """The options that name files."""
        return self.file, self.files

    def hashes(self) -> tuple[dict[str, str], Sources]:
        """Compute content hashes: of the file with the local modules it imports, and of the other files.

        The first result has one hash for each option, which identifies trials. The second has the hash of each file.

        Errors: `SpecError` naming a file that cannot be read.
        """
        code = _code(Path(self.file))
        named = {name: hash_files(_existing(Path(name))) for name in self.files}
        together = {"files": _digest("\n".join(named.values()))} if named else {}
        texts = {path: _digest(text) for path, text in code.items()}
        return {"file": _hash_together(code)} | together, {"file": texts, "files": named}

    def data(self) -> dict[str, str]:
        """Compute one hash for each option that names files. Errors as in `hashes`."""
        return self.hashes()[0]

    def unsupported_reason(self, layer: Any) -> str | None:
        """Return None: a function accepts any layer; arguments named `norm` and `window` are checked elsewhere."""
        return None


def shorthand(value: Any) -> Any:
    """Return the options of a python task where a mapping names that kind, and any other value unchanged."""
    return FunctionSpec.model_validate(dict(value)) if is_function(value) else value


def declared_steps(trial: Mapping[str, Any]) -> int | None:
    """Return the steps of a trial; None for a function whose study does not set them."""
    steps: int = trial["train"]["steps"]
    return None if steps == UNKNOWN_STEPS and is_function(trial["task"]) else steps


def is_function(task: Any) -> bool:
    """Check whether a task, as written in a file or in a trial, is a function."""
    return task == KIND or isinstance(task, FunctionSpec) or (isinstance(task, Mapping) and task.get("kind") == KIND)


def hash_code(file: Path) -> str:
    """Compute a hash of a Python file and of the modules beside it that it imports, directly or indirectly.

    In a package these are the modules of the package. Installed modules do not count, since a user does not edit them.

    The block under `if __name__ == "__main__":`, and calls of this package's `ablate` with the loops around them, are
    left out: they start studies and change no result.

    Errors: `SpecError` for a file that cannot be read or is not Python.
    """
    return _hash_together(_code(file))


def _code(file: Path) -> dict[str, str]:
    """Return the counted text of a file and of the modules that it imports, by relative path."""
    return {os.path.relpath(each, file.parent): _counted(each) for each in sorted(local_files(file))}


def _hash_together(code: Mapping[str, str]) -> str:
    return _digest("".join(f"{path}\0{text}\n" for path, text in code.items()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def check_arguments(task: FunctionSpec, given: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the problems of a study's arguments with a function's signature, without running its code."""
    try:
        definition = _definition(task)
    except SpecError as error:
        yield from placed_in("task", error)
        return
    names = [each.arg for each in (*definition.args.posonlyargs, *definition.args.args, *definition.args.kwonlyargs)]
    optional = len(definition.args.defaults)
    positional = len(definition.args.posonlyargs) + len(definition.args.args)
    required = names[: positional - optional]
    required += [
        each.arg
        for each, default in zip(definition.args.kwonlyargs, definition.args.kw_defaults, strict=True)
        if default is None
    ]
    where = f"{task.function} in {Path(task.file).name}"
    if only := ", ".join(each.arg for each in definition.args.posonlyargs):
        got = f"got positional-only parameters of {where}: {only}"
        yield Problem(("task", "function"), f"{got}; expected parameters that can be passed by name")
    for name in given:
        if name in PROVIDED:
            yield Problem(("model", name), f"got an argument that the study sets; expected others: {where}")
        elif name not in names and definition.args.kwarg is None:
            near = did_you_mean(name, names)
            yield Problem(
                ("model", name), f"got no argument of {where}; expected {', '.join(names) or 'no argument'}{near}"
            )
    for name in required:
        if name not in given and name not in PROVIDED:
            yield Problem(
                ("task", "arguments"), f"got no value for {name}, which {where} needs; expected an axis or a value"
            )


def placed_in(section: str, error: SpecError) -> list[Problem]:
    """Return the problems of an error, located in a section of the study."""
    return [Problem((section, *each.path), message(replace(each, path=()))) for each in error.problems]


def load_function(task: FunctionSpec) -> Callable[..., Any]:
    """Execute a function's file, up to the statement that would start the study again, and return the function.

    `local_modules` decides which modules it imports.

    Errors: `SpecError` for a file that raises, and for a function that is not there.
    """
    global _loading
    file = Path(task.file)
    _loading = True
    try:
        module, is_whole = _executed(file)
    except Exception as error:
        frames = [each for each in traceback.extract_tb(error.__traceback__) if each.filename == str(file)]
        line = f":{frames[-1].lineno}" if frames else ""
        got = f"{type(error).__name__}: {error}"
        raise SpecError(position=f"{file}{line}", got=got, expected="a file that Python can load") from error
    except SystemExit as error:
        got, cure = f"a call of sys.exit({error.code})", "Guard the call with __main__."
        raise SpecError(position=str(file), got=got, expected="a file that Python can load", detail=cure) from None
    finally:
        _loading = False
    function = module.get(task.function)
    if not callable(function):
        names = [name for name, value in module.items() if inspect.isfunction(value)]
        cure = "" if is_whole else "Define it above the first call of ablate: trials execute the file up to that call."
        raise SpecError.of([replace(unknown("function", task.function, names), position=str(file), detail=cure)])
    return function


def task_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the file and the name of a function, as options of a python task.

    Errors: `SpecError` for a function that worker processes could not load: one without a file, or inside another.
    """
    name = getattr(function, "__qualname__", type(function).__name__)
    if not inspect.isfunction(function) or "<" in name or "." in name:
        raise SpecError("function", name, "a function defined by def at the top level of a file")
    file = inspect.getsourcefile(function)
    if file is None or not Path(file).is_file():
        got = f"{name}, defined at a prompt or in a notebook"
        expected = "a function in a file, which worker processes can load"
        raise SpecError("function", got, expected, detail="In a notebook, write its cell to a file with %%writefile")
    return {"kind": KIND, "file": file, "function": name}


def changed_files(task: Mapping[str, Any], option: str, before: Sources, after: Sources) -> str:
    """Name the files of an option of a function's task that differ between its earlier and its present hashes.

    Without earlier sources, as in a study of an earlier version, these are all files that the option names.
    """
    then, now = before.get(option, {}), after.get(option, {})
    paths = [path for path in {**then, **now} if then.get(path) != now.get(path)] if then and now else []
    names = [os.path.normpath(Path(task["file"]).parent / path) for path in paths]  # the paths of `files` are absolute
    return ", ".join(names or ([task["file"]] if option == "file" else task["files"]))


def advice(file: Path | str) -> str:
    """Return a sentence for changed code of a file that calls `ablate` where the call counts as code; else no text."""
    with suppress(SpecError):
        if lines := counted_starts(syntax_tree(Path(file))):
            where = f"line{'s' if len(lines) > 1 else ''} {', '.join(map(str, lines))} of {Path(file).name}"
            block = 'the block under `if __name__ == "__main__":`'
            return f"The calls of ablate in {where} count as code; those in {block} do not."
    return ""


def refuse_changed_functions(folder: Path, resolved: Mapping[str, Any]) -> None:
    """Raise `SpecError` where the code or the files of a study's functions have changed since it was created."""
    changes: dict[tuple[str, str, str], None] = {}
    here: dict[NamedFiles, tuple[dict[str, str], Sources]] = {}
    for each in resolved["trials"]:
        trial, label = each["trial"], each["points"][0]["task"]
        if is_function(trial["task"]):
            task = FunctionSpec.model_validate(trial["task"])
            if task.named_files not in here:
                here[task.named_files] = task.hashes()
            data, sources = here[task.named_files]
            before = resolved.get("sources", {}).get(label, {})
            for option, content in trial["data"].items():
                if data[option] != content:
                    cure = " ".join(filter(None, [RESTORE, advice(task.file) if option == "file" else ""]))
                    changes[option, changed_files(trial["task"], option, before, sources), cure] = None
    expected = "the content of the time when the study was created"
    problems = [
        SpecProblem(("task", option), f"changed {name}", expected, position=str(folder), detail=cure)
        for option, name, cure in changes
    ]
    if problems:
        raise SpecError.of(problems)


class AlreadyStarted(BaseException):
    """Ends the execution of a file at its call of `ablate` while a worker loads the function."""


def refuse_nested_start() -> None:
    """Raise `AlreadyStarted` where a study is loading the file that calls this."""
    if _loading:
        raise AlreadyStarted


def _executed(file: Path) -> tuple[dict[str, Any], bool]:
    """Execute a file; return its globals, and False where a call of `ablate` ended the execution."""
    name, _ = module_name(file)
    if package := name.rpartition(".")[0]:  # the file may import relatively
        importlib.import_module(package)
        if name in sys.modules:
            return vars(sys.modules[name]), True
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    there = sys.modules.get(name)
    if there is None or getattr(there, "__file__", None) == str(file):
        sys.modules[name] = module  # so that the function's objects can be pickled, such as by a data loader
    try:
        spec.loader.exec_module(module)
    except AlreadyStarted:
        return vars(module), False
    return vars(module), True


def _existing(path: Path) -> Path:
    if not path.exists():
        raise SpecError(
            "files", got=f"{path}, which does not exist", expected="a file or a folder", nearest=nearest_file(path)
        )
    return path


def _definition(task: FunctionSpec) -> ast.FunctionDef:
    functions = [each for each in syntax_tree(Path(task.file)).body if isinstance(each, ast.FunctionDef)]
    for each in functions:
        if each.name == task.function:
            return each
    names = [each.name for each in functions]
    expected = f"a function that {Path(task.file).name} defines at its top level: {', '.join(names) or 'it has none'}"
    raise SpecError("function", got=repr(task.function), expected=expected, nearest=nearest(task.function, names))


def _counted(file: Path) -> str:
    """Return the text of a file without the lines that only start studies."""
    tree = syntax_tree(file)
    starting_nodes = starting(tree)
    starts, others = set[int](), set[int]()
    for node in tree.body:
        lines = starts if node in starting_nodes else others
        lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    text = re.split("\r\n|\r|\n", text_of(file))  # the lines of Python's grammar: no other character ends one
    return "\n".join(line for number, line in enumerate(text, 1) if number not in starts - others).rstrip()
