"""Numbers of floating-point operations of the operators, for `torch.utils.flop_counter.FlopCounterMode`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from typing import Any

import torch

from atn_norms.backends.fused.inputs import Grads, Inputs

COUNTER = "torch.utils.flop_counter"  # imports Triton, where it is installed
_waiting: list[str] = []


def register_flops(name: str) -> None:
    """Count the matrix products of the operators `name` and `name_backward`, from the import of torch's counter on."""
    if COUNTER in sys.modules:
        _register(name)
        return
    if not _waiting:
        sys.meta_path.insert(0, _AfterCounter)  # type: ignore[arg-type]
    _waiting.append(name)


class _AfterCounter:
    """Register the numbers of all operators when torch's counter is imported."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        if name != COUNTER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not _AfterCounter]
                while _waiting:
                    _register(_waiting.pop())

            loader.exec_module = execute_and_register
        return spec


def _register(name: str) -> None:
    """Register the numbers of two operators; operations outside matrix products are not counted."""
    from torch.utils.flop_counter import register_flop_formula

    def count(inputs: Sequence[Any]) -> tuple[int, int]:
        xs, weight_ih, weight_hh, *_ = inputs
        weight_hr = inputs[Inputs._fields.index("weight_hr")] or (0, 0)
        rows = 2 * xs[0] * xs[1]
        recurrent = weight_hh[0] * weight_hh[1] + weight_hr[0] * weight_hr[1]
        return rows * weight_ih[0] * weight_ih[1], rows * recurrent

    @register_flop_formula(getattr(torch.ops.atn_norms, name))
    def _(*inputs: Any, **_: Any) -> int:
        return sum(count(inputs))

    @register_flop_formula(getattr(torch.ops.atn_norms, f"{name}_backward"))
    def _(*arguments: Any, **_: Any) -> int:
        inputs, recurrent = count(arguments[len(Grads._fields) :])
        return (2 if arguments[-1] else 1) * inputs + 2 * recurrent
