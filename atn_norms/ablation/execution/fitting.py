"""Check that the state of a checkpoint fits a trial, before training continues from it."""

from __future__ import annotations

import math
from typing import Any

import torch

from atn_norms.errors import short_repr


class BadState(Exception):
    """A state cannot be restored: it belongs to another trial."""


def check_state(state: dict[str, Any], steps: int, here: dict[str, Any], needs_best: bool) -> None:
    """Raise `BadState` unless a state has exactly the parts of a trainer's state, within their bounds.

    | symbol | meaning |
    |---|---|
    | `steps` | training steps of the trial |
    | `here` | the state of an untrained trainer of the trial |
    | `needs_best` | whether the weights of the best validation are scored or saved |
    """
    if state.keys() != here.keys():
        names = ", ".join(sorted(map(str, state.keys() ^ here.keys())))
        raise BadState(f"got other parts than expected: {names}")
    for name, value, most in (("step", state["step"], steps), ("count", state["count"], steps)):
        if type(value) is not int or not 0 <= value <= most:
            raise BadState(f"{name}: got {short_repr(value)}; expected 0 to {most}")
    numbers = [state["summed"], *([] if state["first"] is None else [state["first"]])]
    watches = [(state["best"], state["since"]), (state["rate"]["best"], state["rate"]["since"])]
    is_number = all(type(each) is float and math.isfinite(each) for each in (*numbers, state["rate"]["scale"]))
    is_watch = all(
        type(best) is float and best == best and type(since) is int and since >= 0 for best, since in watches
    )
    if not (is_number and is_watch):
        raise BadState("got a loss, score or rate that is not a number; expected finite ones")
    if needs_best and state["kept"] is None and state["best"] < math.inf:
        raise BadState("kept: got none, as of another keep_model; expected the weights of the best validation")
    if state["kept"] is not None:
        shapes = {name: each.shape for name, each in here["model"].items()}
        if {name: each.shape for name, each in state["kept"].items()} != shapes:
            raise BadState("kept: got other weights than the model's; expected the same names and shapes")


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimizer, which torch does not compare with the parameters.

    The expected entries and shapes are those after one step with zero gradients. The step may change the parameters, so
    load their values afterwards.

    Errors: `BadState` where the options, or the entries of a parameter, are not those of this optimizer.
    """
    options = [_options(group) for group in optimizer.param_groups]
    for parameter in (each for group in optimizer.param_groups for each in group["params"]):
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    expected = _shapes(optimizer.state_dict())
    if not _shapes(state).items() <= expected.items():  # a parameter without a gradient has no entries
        raise BadState("optimizer: got another state; expected that of the trial's optimizer")
    optimizer.load_state_dict(state)
    if [_options(group) for group in optimizer.param_groups] != options:
        raise BadState("optimizer: got other options; expected those of the trial")


def _shapes(state: dict[str, Any]) -> dict[Any, dict[str, Any]]:
    """Return parameter -> name of an entry -> its shape, or its type where it is no tensor."""
    return {
        parameter: {
            name: value.shape if isinstance(value, torch.Tensor) else type(value) for name, value in entries.items()
        }
        for parameter, entries in state["state"].items()
    }


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "lr")}
