"""Optimizers of `torch.optim` by name; their options are checked and filled in from torch's signatures."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from atn_norms.ablation.grid.errors import Problem, invalid
from atn_norms.errors import did_you_mean, short_repr

# They need a closure, sparse gradients or matrices only; trials have dense vectors and matrices and no closure.
_UNUSABLE = {"Optimizer", "LBFGS", "SparseAdam", "Muon"}
# Names of options in other libraries.
_ELSEWHERE = {"learning_rate": "lr", "beta": "betas", "epsilon": "eps", "decay": "weight_decay"}
# Options that do not change the result of an update: not part of a trial's identity.
_EXECUTION = {"params", "foreach", "capturable", "differentiable", "fused"}


def kinds() -> dict[str, type[torch.optim.Optimizer]]:
    """Return the usable optimizers by lower-case name.

    >>> "adam" in kinds(), "lbfgs" in kinds()
    (True, False)
    """
    entries = vars(torch.optim).items()
    classes = {n: each for n, each in entries if isinstance(each, type) and issubclass(each, torch.optim.Optimizer)}
    return {name.lower(): each for name, each in sorted(classes.items(), key=_lower) if name not in _UNUSABLE}


def defaults(kind: str) -> dict[str, Any]:
    """Return every option of an optimizer with torch's default, numbers as floats."""
    parameters = inspect.signature(kinds()[kind].__init__).parameters
    return {
        name: _plain(parameter.default)
        for name, parameter in parameters.items()
        if name != "self" and name not in _EXECUTION and parameter.default is not inspect.Parameter.empty
    }


def option_named(name: object) -> str | None:
    """Return the option that any optimizer has under a name, or under the name in another library; None without one.

    >>> option_named("learning_rate"), option_named("steps")
    ('lr', None)
    """
    option = _ELSEWHERE.get(str(name), str(name))
    return option if any(option in defaults(kind) for kind in kinds()) else None


def resolve(value: Any) -> dict[str, Any]:
    """Fill in the options of an optimizer given by name, or as a mapping with `kind` (by default adam).

    Errors: `pydantic.ValidationError` (a `ValueError`), located at the option, for an unknown kind or option, a value
    of another type than torch's default, and a value that torch rejects.

    >>> resolve({"kind": "sgd", "lr": 0.1})["momentum"]
    0.0
    >>> from atn_norms.registry import to_spec_error
    >>> try:
    ...     resolve({"kind": "sgd", "mometum": 0.9})
    ... except ValueError as error:
    ...     print(str(to_spec_error(error)).split(";")[0])
    mometum: got an unknown option of 'sgd'
    """
    value = {"kind": value} if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise invalid("optimizer", [Problem((), f"got {short_repr(value)}; expected an optimizer's name or a mapping")])
    kind = value.get("kind", "adam")
    if not isinstance(kind, str) or kind not in kinds():
        known = f"expected one of {', '.join(kinds())}{did_you_mean(kind, kinds())}"
        raise invalid("optimizer", [Problem(("kind",), f"got unknown optimizer {short_repr(kind)}; {known}")])
    options = defaults(kind)
    problems = []
    for name, given in value.items():
        if name == "kind":
            continue
        if name not in options:
            known = f"expected one of {', '.join(options)}{did_you_mean(_ELSEWHERE.get(name, name), options)}"
            problems.append(Problem((name,), f"got an unknown option of {kind!r}; {known}"))
        elif not _alike(given, options[name]):
            problems.append(
                Problem((name,), f"got {short_repr(given)}; expected a value like torch's default {options[name]!r}")
            )
        else:
            options[name] = _plain(given)
    resolved = {"kind": kind, **options}
    if not problems:
        try:
            make(resolved, [torch.nn.Parameter(torch.zeros(1))])
        except (ValueError, TypeError) as error:
            problems = [Problem((), f"torch rejects the options: {error}")]
    if problems:
        raise invalid("optimizer", problems)
    return resolved


def make(resolved: Mapping[str, Any], parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Make an optimizer of some parameters from the options that `resolve` returned."""
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in resolved.items() if name != "kind"}
    optimizer: Any = kinds()[resolved["kind"]]
    return optimizer(parameters, **options)


def _lower(item: tuple[str, object]) -> str:
    return item[0].lower()


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _alike(given: Any, default: Any) -> bool:
    if isinstance(default, list):
        return (
            isinstance(given, (tuple, list))
            and len(given) == len(default)
            and all(_alike(*pair) for pair in zip(given, default, strict=True))
        )
    if default is None or given is None:
        return default is None and (given is None or _is_number(given))
    if isinstance(default, float):
        return _is_number(given)
    return type(given) is type(default)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"enum": list(kinds())},
        {"type": "object", "properties": {"kind": {"enum": list(kinds())}}},
    ]
}
