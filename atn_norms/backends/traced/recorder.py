"""Record the tensor operations of PyTorch code, with their source lines."""

from __future__ import annotations

import linecache
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_TORCH = str(Path(torch.__file__).parent)
_PACKAGE = str(Path(__file__).parents[2])
_TRACING = "traced/normalizer.py", "traced/linearity.py"  # files that run the code of a plugin


class Untraceable(Exception):
    """PyTorch code without a program; the text names the operation and the line."""


@dataclass(frozen=True)
class Call:
    """One operation: the function, its arguments, its results, and the source line of the call."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Tensor]
    constant: Tensor | None
    where: tuple[str, int] | None

    @property
    def name(self) -> str:
        """Name of the operation, without namespace and overload."""
        return self.function._schema.name.partition("::")[2]

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, including those in lists."""
        found: list[Tensor] = []
        for argument in (*self.args, *self.kwargs.values()):
            found += [
                part
                for part in (argument if isinstance(argument, (list, tuple)) else [argument])
                if isinstance(part, Tensor)
            ]
        return found

    def unsupported(self, reason: str = "has no native instruction") -> Untraceable:
        """Return the error with the position of a call and the reason why it has no instruction."""
        return Untraceable(f"{self.name} {reason}{described(self.where)}")


def described(where: tuple[str, int] | None) -> str:
    """Return file, line and text of a source position, in parentheses."""
    if where is None:
        return " (in a gradient)"
    path, line = where
    text = linecache.getline(path, line).strip()
    return f" ({Path(path).name}, line {line}: {text})" if text else f" ({Path(path).name}, line {line})"


class Recorder(TorchDispatchMode):
    """Record every operation inside the block in `calls`, in order, and the Python code that ran with its module.

    Where a profiler observes the thread, no code is recorded.
    """

    def __init__(self, executed: dict[CodeType, str]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._executed, self._attributes, self._profiles = executed, _Attributes(), False

    def __enter__(self) -> Recorder:
        self._attributes.__enter__()
        self._profiles = sys.getprofile() is None
        if self._profiles:
            sys.setprofile(self._note)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._profiles:
            sys.setprofile(None)
        super().__exit__(*error)
        self._attributes.__exit__(*error)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            self._executed.setdefault(frame.f_code, frame.f_globals.get("__name__", ""))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: torch would wrap the method and import its compiler, which takes more than a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        where = source_line()
        if func is torch.ops.aten._local_scalar_dense.default:
            raise Untraceable(f"a number is read out of a tensor{described(where)}")
        out = func(*args, **kwargs)
        results = [part for part in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(part, Tensor)]
        call = Call(func, args, kwargs, results, None, where)
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise call.unsupported("is random")
        if results and (not call.tensors or call.name in CREATES):
            call = Call(func, args, kwargs, results, results[0].clone(), where)
        self.calls.append(call)
        return out


class _Attributes(TorchFunctionMode):
    """Reject methods and attributes of tensors that are no operation for a `TorchDispatchMode`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS:
            raise Untraceable(f"a number is read out of a tensor{described(source_line())}")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if name == "__set__":
            raise Untraceable(f"the attribute {attribute!r} of a tensor is set{described(source_line())}")
        if name == "_is_view" or (name == "__get__" and attribute in _GRAPH):
            raise Untraceable(f"the attribute {attribute or name!r} of a tensor is read{described(source_line())}")
        return func(*args, **(kwargs or {}))


# Methods that give Python the elements of a tensor, or its memory.
_READS = {"tolist", "numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage"}
_READS |= {"__repr__", "__format__", "__reduce_ex__", "apply_", "map_", "map2_"}
# Attributes with the state of autograd, and the address of a tensor.
_GRAPH = {"grad", "grad_fn", "retains_grad", "output_nr", "_version", "_base", "_cdata"}
# Operations whose results do not depend on the elements of their arguments.
CREATES = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "lift_fresh", "empty_like"}
CREATES |= {"new_empty", "new_empty_strided", "lift_fresh_copy"}


def raised_at(error: Exception) -> tuple[str, int] | None:
    """Return the innermost line outside of torch and this package that raised an error."""
    frames = [(each.filename, each.lineno or 0) for each in traceback.extract_tb(error.__traceback__)]
    own = [frame for frame in frames if not frame[0].startswith((_PACKAGE, _TORCH, "<"))]
    return own[-1] if own else None


def source_line() -> tuple[str, int] | None:
    """Return the innermost line outside of torch and this package, or else the line of a normalizer of this package.

    A mode calls this function from its own method. The result is None in a gradient.
    """
    frame, own = sys._getframe(2), None
    while frame is not None:
        path, traces = frame.f_code.co_filename, frame.f_code.co_filename.endswith(_TRACING)
        if path == __file__ or traces:
            if frame.f_code.co_name == "_differentiate":
                return None
        elif path.startswith(_PACKAGE):
            own = own or (path, frame.f_lineno)
            if "/traced/" in path:
                break
        elif not path.startswith(_TORCH) and not path.startswith("<"):
            return path, frame.f_lineno
        if frame.f_code.co_name == "_observe" and traces:
            break
        frame = frame.f_back
    return own
