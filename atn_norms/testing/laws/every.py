"""Laws of every kind: it builds, its options describe it completely, and its calls are pure functions."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor, nn

from atn_norms.options import Options, option_schemas
from atn_norms.registry import KindField, registry
from atn_norms.testing.comparing import compare, demand
from atn_norms.testing.law import Case, law
from atn_norms.testing.subjects import SpecSubject, Subject, importable
from atn_norms.windows import Window

SPECS = ("normalizer", "window", "cell", "task")
RUNS = ("normalizer", "window", "cell", "backend")
DIFFERENCE = 1e-6  # step of the difference quotient: an error of 1e-12 f''' from the step, of 1e-10 f from rounding


@law("every", *SPECS)
def it_builds(subject: SpecSubject) -> None:
    """`build` returns an object of its family, and an invalid option is rejected with `ValueError`.

    Every other law needs a built object. Where this law fails, the others are skipped.
    """
    demand(not subject.fault(), subject.fault())


def _dumped_off_default(spec: Options, name: str) -> bool:
    """Return True where a dump omits an option at its default only; older trials then keep their identity."""
    default = type(spec).model_fields[name].get_default()
    if getattr(spec, name) != default:
        return False
    numeric = isinstance(default, int | float) and not isinstance(default, bool)
    for other in (not default, *((default + 1, default / 2) if numeric else (1.0,)), "other"):
        try:
            changed = type(spec).model_validate({**spec.model_dump(), name: other})
        except ValueError:
            continue
        if getattr(changed, name) != default:
            return name in changed.model_dump()
    return False


@law("every", *SPECS)
def options_survive_a_dump(subject: SpecSubject) -> None:
    """A spec is its options: dumped to Python or JSON and read again, it is equal and builds an equivalent object.

    A trial of a study is identified by its options alone. An option that the dump omits is not part of this identity:
    two different trials would count as one, and a worker would train another model than the study file describes.
    A dump may omit an option at its default, and only there.
    """
    spec = subject.spec
    fields = set(type(spec).model_fields)
    dump = spec.model_dump()
    omitted = sorted(name for name in fields - set(dump) if not _dumped_off_default(spec, name))
    demand(set(dump) <= fields and not omitted, f"model_dump: got the fields {sorted(dump)}; expected {sorted(fields)}")
    for name, again in (
        ("a dump", type(spec).model_validate(dump)),
        ("a JSON dump", type(spec).model_validate_json(spec.model_dump_json())),
    ):
        demand(again == spec, f"{name}: read as {again!r}; expected {spec!r}")
        compare(subject.result_of(again), subject.result_of(spec), tolerance=0, what=f"the result after {name}")
    window = subject.built(spec)
    if isinstance(window, Window) and type(window).spec is not Window.spec:
        options = window.spec()
        demand(options == spec, f"Window.spec: got {options!r}; expected {spec!r}, the options that built it")


@law(
    "every",
    *SPECS,
    unless=lambda subject: (
        None
        if importable(type(subject.spec)) and importable(type(subject.built(subject.spec)))
        else f"{type(subject.spec).__qualname__} is defined locally, where pickle cannot find it"
    ),
)
def it_survives_pickling(subject: SpecSubject) -> None:
    """A spec and the object it builds can be pickled, and the unpickled ones compute the same.

    `torch.save(layer)`, `copy.deepcopy(layer)` and worker processes all use pickle.
    """
    again = pickle.loads(pickle.dumps(subject.spec))
    demand(again == subject.spec, f"unpickled spec: got {again!r}; expected {subject.spec!r}")
    compare(
        subject.result_of(again), subject.result_of(subject.spec), tolerance=0, what="the result of an unpickled spec"
    )
    pickle.loads(pickle.dumps(subject.built(subject.spec)))


def _unregistered(subject: SpecSubject) -> str | None:
    entry = registry.kinds(subject.family).get(subject.spec.kind)
    return None if entry and entry.spec is type(subject.spec) else f"{subject.spec.kind!r} is not registered"


@law("every", *SPECS, unless=_unregistered)
def the_registry_builds_the_same(subject: SpecSubject) -> None:
    """From its kind and options, as in a study file, the registry builds an equal spec, and it has a schema.

    Model files, studies, `atn-norms list` and editors know a plugin by its kind and options alone.
    """
    resolved = KindField(subject.family).resolve(subject.spec.model_dump())
    demand(resolved == subject.spec, f"registry: got {resolved!r} from kind and options; expected {subject.spec!r}")
    missing = set(type(subject.spec).model_fields) - set(option_schemas(type(subject.spec)))
    demand(not missing, f"the JSON schema lacks {sorted(missing)}")


@law("every", *RUNS)
def calls_are_pure(subject: Subject, case: Case) -> None:
    """The same inputs give the same outputs whatever was computed in between, and no random number is drawn.

    State is passed in and returned. State kept on the module leaks from one sequence into the next, and an interrupted
    study does not resume to the same numbers. A draw from torch's generator changes all later draws.
    """
    made, first, second = subject.make(case), subject.inputs(case), subject.inputs(case, seed=5000)
    before = torch.get_rng_state()
    once = subject.run(made, first)
    subject.run(made, second)
    compare(subject.run(made, first), once, tolerance=0, what="the same call again")
    demand(torch.equal(torch.get_rng_state(), before), "a call draws from torch's global generator")
    if isinstance(made, nn.Module):
        made.eval()
        kept = {name: value.clone() for name, value in made.state_dict().items()}
        subject.run(made, first)
        compare(dict(made.state_dict()), kept, tolerance=0, what="the state dict after evaluation")


@law("every", *RUNS)
def inputs_are_not_modified(subject: Subject, case: Case) -> None:
    """Inputs are not modified.

    The caller still needs them: a pre-activation is stored for the backward pass, and a state may be continued twice.
    """
    inputs = subject.inputs(case)
    copies = [each.clone() for each in inputs]
    subject.run(subject.make(case), inputs)
    compare(list(inputs), copies, tolerance=0, what="an input after the call")


def _detached(subject: Subject) -> str | None:
    window = subject.built(subject.spec) if isinstance(subject, SpecSubject) else None
    cut = isinstance(window, Window) and window.detaches_past
    return "detaches_past is declared; no_gradient_reaches_the_past tests its gradient" if cut else None


@law("every", "normalizer", "window", "cell", unless=_detached, steps=(3, 4, 5), batch=(2, 3))
def gradients_are_derivatives(subject: Subject, case: Case) -> None:
    """The gradient of every output is its derivative by every input and parameter, past steps included.

    The law compares it with a difference quotient in float64. The gradient flows through every step of the window. A
    cut (a detached statistic, a detached past) trains another model than the forward pass describes.
    """
    made, inputs = subject.make(case), [each.requires_grad_() for each in subject.inputs(case)]
    parameters = list(made.parameters()) if isinstance(made, nn.Module) else []
    sources = [*inputs, *parameters]
    outputs = _floating(subject.run(made, inputs))
    loss = _weighed(outputs, case.seed)
    demand(loss.requires_grad, "no output depends on the inputs")
    gradients = torch.autograd.grad(loss, sources, allow_unused=True)
    source = torch.Generator().manual_seed(case.seed + 77)
    for index, (tensor, gradient) in enumerate(zip(sources, gradients, strict=True)):
        direction = torch.randn(tensor.shape, generator=source, dtype=tensor.dtype)
        sides = []
        with torch.no_grad():
            kept = tensor.detach().clone()
            for sign in (1, -1):
                tensor.copy_(kept + sign * DIFFERENCE * direction)
                sides.append(_weighed(_floating(subject.run(made, inputs)), case.seed))
            tensor.copy_(kept)
        quotient = (sides[0] - sides[1]) / (2 * DIFFERENCE)
        slope = torch.zeros_like(quotient) if gradient is None else (gradient * direction).sum()
        name = f"input {index}" if index < len(inputs) else f"parameter {index - len(inputs)}"
        compare(slope.detach(), quotient, tolerance=1e-3, what=f"the slope by {name}")


def _floating(outputs: Any) -> list[Tensor]:
    return [each for each in outputs if each.is_floating_point()]


def _weighed(outputs: list[Tensor], seed: int) -> Tensor:
    """Return a sum in which every number has a different weight, so that no two of them can be exchanged."""
    source = torch.Generator().manual_seed(seed + 99)
    parts = [(each * torch.randn(each.shape, generator=source, dtype=torch.float64)).sum() for each in outputs]
    return torch.stack(parts).sum()
