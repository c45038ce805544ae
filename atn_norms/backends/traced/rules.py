"""Rules that translate operations of PyTorch to instructions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from atn_norms.backends.traced.patterns import Expression
from atn_norms.backends.traced.program import Op

if TYPE_CHECKING:
    from atn_norms.backends.traced.lowering import Builder

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule for operations with these names, without namespace and overload."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _simple(op: Op) -> Rule:
    return lambda b, *values: b(op, *values)


for _name, _op in {
    "neg": Op.NEG, "abs": Op.ABS, "sgn": Op.SIGN, "sign": Op.SIGN, "reciprocal": Op.RECIPROCAL, "sqrt": Op.SQRT,
    "rsqrt": Op.RSQRT, "exp": Op.EXP, "log": Op.LOG, "tanh": Op.TANH, "sigmoid": Op.SIGMOID, "log1p": Op.LOG1P,
    "expm1": Op.EXPM1, "erf": Op.ERF, "sin": Op.SIN, "cos": Op.COS, "mul": Op.MUL, "maximum": Op.MAX,
    "minimum": Op.MIN, "gt": Op.GT, "ge": Op.GE, "lt": Op.LT, "le": Op.LE, "eq": Op.EQ, "ne": Op.NE,
    "logical_and": Op.AND, "logical_or": Op.OR, "logical_not": Op.NOT, "bitwise_and": Op.AND, "bitwise_or": Op.OR,
    "bitwise_not": Op.NOT, "where": Op.WHERE,
}.items():  # fmt: skip
    RULES[_name] = _simple(_op)


@rule("clone", "contiguous", "_unsafe_view", "view_copy", "_reshape_copy", "expand_copy", "alias_copy")
def _copy(b: Builder, x: Any, *shape: Any, **options: Any) -> Any:
    x = b.wrap(x)
    return Expression(x.slot, x.table, b.shape) if len(x.table) == math.prod(b.shape) else b.wrap(x)


@rule("_to_copy")
def _to_copy(b: Builder, x: Any, **options: Any) -> Any:
    wanted = options.get("dtype") or x.dtype
    if wanted == torch.float32 and x.dtype == torch.float64:
        return b(Op.ROUND, x)
    return b(Op.NE, x, 0.0) if wanted == torch.bool and x.dtype != torch.bool else b.wrap(x)


@rule("add")
def _add(b: Builder, x: Any, y: Any, alpha: float = 1) -> Any:
    return b(Op.ADD, x, y if alpha == 1 else b(Op.MUL, y, alpha))


@rule("sub")
def _sub(b: Builder, x: Any, y: Any, alpha: float = 1) -> Any:
    return b(Op.SUB, x, y if alpha == 1 else b(Op.MUL, y, alpha))


@rule("rsub")
def _rsub(b: Builder, x: Any, y: Any, alpha: float = 1) -> Any:
    return b(Op.SUB, y, x if alpha == 1 else b(Op.MUL, x, alpha))


@rule("div")
def _div(b: Builder, x: Any, y: Any, rounding_mode: Any = None) -> Any:
    if rounding_mode is not None:
        raise b.call.unsupported("rounds")
    return b(Op.DIV, x, y)


@rule("pow")
def _pow(b: Builder, x: Any, y: Any) -> Any:
    if not isinstance(y, (int, float)) or isinstance(x, (int, float)):
        return b(Op.POW, x, y)
    special = {0.5: Op.SQRT, -0.5: Op.RSQRT, -1.0: Op.RECIPROCAL}
    if y in special:
        return b(special[y], x)
    if y in (1, 2, 3, 4):
        square = x if y == 1 else b(Op.MUL, x, x)
        return square if y < 3 else b(Op.MUL, square, x if y == 3 else square)
    return b(Op.POW, x, y)


@rule("square")
def _square(b: Builder, x: Any) -> Any:
    return b(Op.MUL, x, x)


@rule("exp2")
def _exp2(b: Builder, x: Any) -> Any:
    return b(Op.EXP, b(Op.MUL, x, math.log(2.0)))


@rule("log2", "log10")
def _log_of(b: Builder, x: Any) -> Any:
    return b(Op.DIV, b(Op.LOG, x), math.log(2.0 if b.call.name.startswith("log2") else 10.0))


@rule("relu")
def _relu(b: Builder, x: Any) -> Any:
    return b(Op.MAX, x, 0.0)


@rule("threshold")
def _threshold(b: Builder, x: Any, threshold: float, value: float) -> Any:
    return b(Op.WHERE, b(Op.LE, x, threshold), value, x)


@rule("threshold_backward")
def _threshold_back(b: Builder, g: Any, x: Any, threshold: float) -> Any:
    return b(Op.WHERE, b(Op.LE, x, threshold), 0.0, g)


@rule("clamp")
def _clamp(b: Builder, x: Any, low: Any = None, high: Any = None, **named: Any) -> Any:
    low, high = named.get("min", low), named.get("max", high)
    x = x if low is None else b(Op.MAX, x, low)
    return x if high is None else b(Op.MIN, x, high)


@rule("hardtanh")
def _hardtanh(b: Builder, x: Any, low: float = -1, high: float = 1) -> Any:
    return b(Op.MIN, b(Op.MAX, x, low), high)


@rule("clamp_min")
def _clamp_min(b: Builder, x: Any, low: Any) -> Any:
    return b(Op.MAX, x, low)


@rule("clamp_max")
def _clamp_max(b: Builder, x: Any, high: Any) -> Any:
    return b(Op.MIN, x, high)


@rule("hardtanh_backward")
def _hardtanh_back(b: Builder, g: Any, x: Any, low: float, high: float) -> Any:
    return b(Op.WHERE, b(Op.AND, b(Op.GT, x, low), b(Op.LT, x, high)), g, 0.0)


@rule("tanh_backward")
def _tanh_back(b: Builder, g: Any, y: Any) -> Any:
    return b(Op.MUL, g, b(Op.SUB, 1.0, b(Op.MUL, y, y)))


@rule("sigmoid_backward")
def _sigmoid_back(b: Builder, g: Any, y: Any) -> Any:
    return b(Op.MUL, g, b(Op.MUL, y, b(Op.SUB, 1.0, y)))


@rule("silu")
def _silu(b: Builder, x: Any) -> Any:
    return b(Op.MUL, x, b(Op.SIGMOID, x))


@rule("silu_backward")
def _silu_back(b: Builder, g: Any, x: Any) -> Any:
    s = b(Op.SIGMOID, x)
    return b(Op.MUL, g, b(Op.MUL, s, b(Op.ADD, 1.0, b(Op.MUL, x, b(Op.SUB, 1.0, s)))))


@rule("softplus")
def _softplus(b: Builder, x: Any, beta: float = 1, threshold: float = 20) -> Any:
    scaled = b(Op.MUL, x, beta)
    return b(Op.WHERE, b(Op.GT, scaled, threshold), x, b(Op.DIV, b(Op.LOG1P, b(Op.EXP, scaled)), beta))


@rule("softplus_backward")
def _softplus_back(b: Builder, g: Any, x: Any, beta: float, threshold: float) -> Any:
    scaled = b(Op.MUL, x, beta)
    return b(Op.WHERE, b(Op.GT, scaled, threshold), g, b(Op.MUL, g, b(Op.SIGMOID, scaled)))


@rule("leaky_relu")
def _leaky(b: Builder, x: Any, slope: float = 0.01) -> Any:
    return b(Op.WHERE, b(Op.GT, x, 0.0), x, b(Op.MUL, x, slope))


@rule("leaky_relu_backward")
def _leaky_back(b: Builder, g: Any, x: Any, slope: float, is_result: bool) -> Any:
    return b(Op.WHERE, b(Op.GT, x, 0.0), g, b(Op.MUL, g, slope))


@rule("masked_fill")
def _masked_fill(b: Builder, x: Any, mask: Any, value: Any) -> Any:
    return b(Op.WHERE, mask, value, x)


@rule("addcmul")
def _addcmul(b: Builder, x: Any, y: Any, z: Any, value: float = 1) -> Any:
    return b(Op.ADD, x, b(Op.MUL, b(Op.MUL, y, z), value))


@rule("addcdiv")
def _addcdiv(b: Builder, x: Any, y: Any, z: Any, value: float = 1) -> Any:
    return b(Op.ADD, x, b(Op.MUL, b(Op.DIV, y, z), value))


@rule("lerp")
def _lerp(b: Builder, x: Any, y: Any, weight: Any) -> Any:
    """Start at the nearer end, as torch does: a far end may be infinite."""
    difference = b(Op.SUB, y, x)
    from_x = b(Op.ADD, x, b(Op.MUL, weight, difference))
    from_y = b(Op.SUB, y, b(Op.MUL, difference, b(Op.SUB, 1.0, weight)))
    return b(Op.WHERE, b(Op.LT, b(Op.ABS, weight), 0.5), from_x, from_y)


@rule("sum")
def _sum(b: Builder, x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    return b.sum(x, dim, keepdim)


@rule("mean")
def _mean(b: Builder, x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    return b.mean(x, dim, keepdim)


@rule("var", "std")
def _var(b: Builder, x: Any, dim: Any = None, correction: float = 1, keepdim: bool = False) -> Any:
    x = b.wrap(x)
    centred = b(Op.SUB, x, b.mean(x, dim, True))
    total = b.sum(b(Op.MUL, centred, centred), dim, keepdim)
    count = math.prod(x.shape) / max(math.prod(total.shape), 1)
    var = b(Op.DIV, total, float(max(count - (1 if correction is None else correction), 0)))
    return b(Op.SQRT, var) if b.call.name == "std" else var


@rule("linalg_vector_norm")
def _vector_norm(
    b: Builder, x: Any, order: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Any:
    if order == 2:
        return b(Op.SQRT, b.sum(b(Op.MUL, x, x), dim, keepdim))
    if order == 1:
        return b.sum(b(Op.ABS, x), dim, keepdim)
    if order == 0 or math.isinf(order):
        raise b.call.unsupported(f"of order {order} has no native instruction")
    return b(Op.POW, b.sum(b(Op.POW, b(Op.ABS, x), order), dim, keepdim), 1.0 / order)
