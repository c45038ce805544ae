"""Check by the structure of PyTorch code that it is linear in some tensors, on which no factor or condition depends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from atn_norms.backends.traced.recorder import CREATES, Call, Untraceable, described, source_line
from atn_norms.statistics import CountedMoments, Moments

_CONSTANT, _VARYING, _DEPENDENT = range(3)  # computed from neither, from `weights` alone, from `leaves`
_DEPENDS = "a weight depends on the statistic"
_MERGES = Moments.pool.__code__, CountedMoments.pool.__code__
_INDEPENDENT = CREATES - {"lift_fresh", "lift_fresh_copy"}  # operations that read the shape of their argument alone
_READS = {"tolist", "numpy", "__array__", "__dlpack__", "__deepcopy__"}  # functions that are no operations

# Operations that are linear in their argument `self`.
_OF_SELF = {"_reshape_alias", "_to_copy", "_unsafe_view", "alias", "as_strided", "clone", "constant_pad_nd", "cumsum"}
_OF_SELF |= {"detach", "diagonal", "div", "expand", "fill", "flip", "gather", "index", "index_fill", "index_select"}
_OF_SELF |= {"masked_fill", "mean", "neg", "permute", "repeat", "roll", "select", "slice", "split", "split_with_sizes"}
_OF_SELF |= {"squeeze", "sum", "t", "transpose", "unbind", "unfold", "unsqueeze", "view", "zero"}
# Operation -> names of the arguments in which it is linear together, and names of arguments in each of which alone.
_LINEAR: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(_OF_SELF, (("self",), ())),
    **dict.fromkeys(("cat", "stack"), (("tensors",), ())),
    **dict.fromkeys(("add", "sub", "rsub", "where"), (("self", "other"), ())),
    **dict.fromkeys(("copy", "scatter", "scatter_add", "select_scatter", "slice_scatter"), (("self", "src"), ())),
    **dict.fromkeys(("index_add", "index_copy"), (("self", "source"), ())),
    **dict.fromkeys(("index_put", "_index_put_impl", "_unsafe_index_put"), (("self", "values"), ())),
    "lerp": (("self", "end"), ()),
    "addcdiv": (("self", "tensor1"), ()),
    "addcmul": (("self",), ("tensor1", "tensor2")),
    "mul": ((), ("self", "other")),
    **dict.fromkeys(("mm", "bmm"), ((), ("self", "mat2"))),
    "mv": ((), ("self", "vec")),
    "dot": ((), ("self", "tensor")),
    **dict.fromkeys(("slice_backward", "select_backward", "diagonal_backward"), (("grad_output",), ())),
    "unfold_backward": (("grad_in",), ()),
}


def check_linear(
    function: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]],
    leaves: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    gradients: bool = True,
) -> None:
    """Raise `Untraceable` unless the code of a function is linear in `leaves`, for all numbers.

    `function` returns the results that may depend on `leaves`, and the results that must not. Factors, conditions and
    indices may depend on `weights`, and constants may be added. Python code may read numbers of neither. With
    `gradients` the gradients must be linear in those of the results, and must not depend on `leaves`. The merge of
    `Moments` counts as linear.
    """
    mode = _Dependence(leaves, weights)
    with torch.enable_grad(), mode:
        dependent, independent = _observe(function)
        if any(mode.level(tensor) == _DEPENDENT for tensor in independent):
            raise Untraceable(_DEPENDS)
        outputs = [tensor.clone() for tensor in dependent if tensor.requires_grad]  # their hooks run before others
        if gradients and outputs:
            for tensor in outputs:
                tensor.register_hook(lambda gradient: mode.mark([gradient], _DEPENDENT))
            _differentiate(torch.stack([tensor.sum() for tensor in outputs]).sum(), leaves)


def _observe(function: Callable[[], Any]) -> Any:
    return function()


def _differentiate(loss: Tensor, leaves: Sequence[Tensor]) -> None:
    """Differentiate a number; for tensors `torch.autograd.grad` imports sympy, which takes a second."""
    torch.autograd.grad(loss, leaves, allow_unused=True)


class _Dependence(TorchDispatchMode):
    """Follow the dependence on tensors through every operation inside the block, by the storages that hold them."""

    def __init__(self, leaves: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        super().__init__()
        self._levels: dict[int, int] = {}
        self._kept: list[Tensor] = []  # the address of a storage that is freed would be used again
        self._reads = _Reads(self)
        self.mark(weights, _VARYING)
        self.mark(leaves, _DEPENDENT)

    def __enter__(self) -> _Dependence:
        self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._reads.__exit__(*error)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: torch would wrap the method and import its compiler, which takes more than a second."""
        return False

    def level(self, tensor: Tensor) -> int:
        """Return the dependence of a tensor."""
        return self._levels.get(_storage(tensor), _CONSTANT)

    def mark(self, tensors: Sequence[Tensor], level: int) -> None:
        """Record the dependence of tensors and of all their views."""
        for tensor in tensors:
            self._levels[_storage(tensor)] = max(level, self.level(tensor))
            self._kept.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = Call(func, args, kwargs or {}, [], None, source_line())
        level = self._checked(call)
        out = func(*args, **call.kwargs)
        results = [*_tensors(out), *(tensor for _, tensor, written in _arguments(call) if written)]
        if level == _DEPENDENT and not all(tensor.is_floating_point() for tensor in results):
            raise _nonlinear(call)
        self.mark(results, level)
        return out

    def _checked(self, call: Call) -> int:
        """Return the dependence of the results of an operation; `Untraceable` if they are not linear in the leaves."""
        level, tags = max(map(self.level, call.tensors), default=_CONSTANT), call.function.tags
        if torch.Tag.nondeterministic_seeded in tags:
            raise call.unsupported("is random")
        if level == _CONSTANT or call.name in _INDEPENDENT:
            return _CONSTANT
        if torch.Tag.data_dependent_output in tags:
            raise _read(call.where)
        if torch.Tag.dynamic_output_shape in tags and self._selects_by_number(call):
            raise call.unsupported("returns a shape that depends on numbers")
        if level == _VARYING or self._merges(call):
            return level
        together, alone = _LINEAR.get(call.name.removesuffix("_"), ((), ()))
        names = {name for name, tensor, _ in _arguments(call) if self.level(tensor) == _DEPENDENT}
        allowed = names <= {*together, *alone} and len(names & {*alone}) <= 1
        if not allowed or call.kwargs.get("rounding_mode") is not None:
            raise _nonlinear(call)
        return level

    def _selects_by_number(self, call: Call) -> bool:
        """Return True for an operation whose result has a shape that depends on numbers, such as `x[x > 0]`."""
        if call.name != "index":
            return True
        indices = [index for name, index, _ in _arguments(call) if name == "indices"]
        return any(index.dtype in (torch.bool, torch.uint8) and self.level(index) for index in indices)

    def _merges(self, call: Call) -> bool:
        """Return True inside the merge of `Moments`, whose weights must not depend on the leaves."""
        frame: Any = sys._getframe(2)
        while frame is not None and frame.f_code not in _MERGES:
            frame = frame.f_back
        if frame is not None and self.level(frame.f_locals["weights"]) == _DEPENDENT:
            raise Untraceable(_DEPENDS + described(call.where))
        return frame is not None


class _Reads(TorchFunctionMode):
    """Reject functions that read numbers without an operation."""

    def __init__(self, dependence: _Dependence) -> None:
        super().__init__()
        self._dependence = dependence

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _READS and self._dependence.level(args[0]):
            raise _read(source_line())
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(value: Any) -> Iterator[Tensor]:
    for part in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(part, Tensor):
            yield part


def _arguments(call: Call) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield every tensor of the arguments with the name of its argument, and True if the operation writes it."""
    for place, argument in enumerate(call.function._schema.arguments):
        value = call.args[place] if place < len(call.args) else call.kwargs.get(argument.name)
        for tensor in _tensors(value):
            yield argument.name, tensor, argument.alias_info is not None and argument.alias_info.is_write


def _read(where: tuple[str, int] | None) -> Untraceable:
    return Untraceable(f"a number is read out of a tensor{described(where)}")


def _nonlinear(call: Call) -> Untraceable:
    return call.unsupported("is not linear in the statistic")
