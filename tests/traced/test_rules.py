"""Rules of operations: arguments that equal their defaults, and infinite operands."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import atn_norms as an
from atn_norms.backends.traced.comparison import differences
from atn_norms.backends.traced.normalizer import TracedNorm, trace
from atn_norms.backends.traced.rules import RULES

# Calls whose arguments equal the defaults of their operations. Torch drops these arguments before a call is recorded.
CALLS: dict[str, Callable[[Any], Any]] = {
    "hardtanh": lambda x: F.hardtanh(x, -1, 1),
    "hardtanh of floats": lambda x: F.hardtanh(x, -1.0, 1.0),
    "hardtanh of one default": lambda x: F.hardtanh(x, -1, 2),
    "hardtanh in place": lambda x: F.hardtanh(2 * x, -1, 1, inplace=True),
    "relu6": lambda x: F.relu6(3 * x),
    "clamp": lambda x: x.clamp(None, 1),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.01),
    "softplus": lambda x: F.softplus(x, 1, 20),
    "softplus of one default": lambda x: F.softplus(x, 2, 20),
    "threshold": lambda x: F.threshold(x, 0, 0),
    "div": lambda x: torch.div(x, x.abs() + 1, rounding_mode=None),
    "add": lambda x: torch.add(x, x.abs(), alpha=1),
    "sub": lambda x: torch.sub(x, x.abs(), alpha=1),
    "rsub": lambda x: torch.rsub(x, x.abs(), alpha=1),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=1),
    "addcdiv": lambda x: torch.addcdiv(x, x, x.abs() + 1, value=1),
    "sum": lambda x: x - torch.sum(x, None, False, dtype=None),
    "sum over an axis": lambda x: x - torch.sum(x, 1, False).unsqueeze(-1),
    "mean": lambda x: x - torch.mean(x, -1, True, dtype=None),
    "var": lambda x: x / (1 + torch.var(x, -1, unbiased=True, keepdim=True)),
    "var of a correction": lambda x: x / (1 + torch.var(x, -1, correction=1, keepdim=True)),
    "var of no correction": lambda x: x / (1 + torch.var(x, -1, correction=None, keepdim=True)),
    "std": lambda x: x / (1 + torch.std(x, -1, correction=1, keepdim=True)),
    "var_mean": lambda x: x / (1 + torch.var_mean(x, -1, correction=1, keepdim=True)[0]),
    "vector_norm": lambda x: x / (1 + torch.linalg.vector_norm(x, 2, -1, True)),
    "cat": lambda x: torch.cat([x, 2 * x], 0)[1:],
    "stack": lambda x: torch.stack([x, 2 * x], 0)[1],
}


class Called(an.Normalizer):
    stateless = True

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def normalize(self, x: Any, pooled: Any) -> Any:
        return CALLS[self.name](x)


def traced(normalizer: an.Normalizer, features: int) -> TracedNorm:
    found = trace(normalizer, features)
    assert isinstance(found, TracedNorm), found
    return found


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_that_equals_its_default_has_an_effect(name):
    normalizer = Called(name)
    assert max(differences(normalizer, traced(normalizer, 40), rows=1).values()) <= 1e-12


@pytest.mark.parametrize("name", RULES)
def test_the_defaults_of_a_rule_are_those_of_its_operation(name):
    parameters = list(inspect.signature(RULES[name]).parameters.values())[1:]
    by_name = {parameter.name: parameter for parameter in parameters}
    packet = getattr(torch.ops.aten, name)
    for overload in packet.overloads():
        operation = getattr(packet, overload)
        arguments = operation._schema.arguments
        if not isinstance(arguments[0].type, torch.TensorType) or any(argument.is_out for argument in arguments):
            continue
        if torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "CompositeImplicitAutograd"):
            continue
        for place, argument in enumerate(arguments):
            own = by_name.get(argument.name) if argument.kwarg_only else dict(enumerate(parameters)).get(place)
            if argument.has_default_value() and own is not None and own.kind == own.POSITIONAL_OR_KEYWORD:
                default = 1 if argument.name == "correction" else argument.default_value  # None is 1 in torch
                assert own.default == default, (overload, argument.name)


class Interpolated(an.Normalizer):
    """Interpolate between x and a parameter, with a weight that is a number or a parameter."""

    stateless = True

    def __init__(self, weight: float, is_parameter: bool) -> None:
        super().__init__()
        self.end = nn.Parameter(torch.ones(8))
        self.weight = nn.Parameter(torch.tensor(weight)) if is_parameter else weight

    def normalize(self, x: Any, pooled: Any) -> Any:
        return torch.lerp(x, self.end.expand_as(x), self.weight)


INF = float("inf")


@pytest.mark.parametrize("is_parameter", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.3, -0.3, 0.49, 0.5, 0.7, 1.0, 1.5, -2.0])
def test_an_interpolation_with_an_infinite_end_equals_torch(weight, is_parameter):
    normalizer = Interpolated(weight, is_parameter).double()
    with torch.no_grad():
        normalizer.end.copy_(torch.tensor([1.0, 1.0, INF, -INF, INF, INF, 2.0, -INF]))
    x = torch.tensor([[INF, -INF, 1.0, 2.0, INF, 0.0, -1.0, INF]], dtype=torch.float64)
    flat = torch.cat([parameter.reshape(-1) for parameter in normalizer.parameters()]).unsqueeze(0)
    (found,) = traced(normalizer, 8).normalize.evaluate([x, flat.detach()])
    torch.testing.assert_close(found, normalizer.normalize(x, ()).detach(), rtol=1e-14, atol=0.0, equal_nan=True)
