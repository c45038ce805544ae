"""Laws of every kind: it builds, its options tell all of it, and its calls are functions of what they are given."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor, nn

from atn_norms.registry import KindField, registry
from atn_norms.testing.comparing import compare, demand
from atn_norms.testing.law import Case, law
from atn_norms.testing.subjects import SpecSubject, Subject, importable
from atn_norms.windows import Window

SPECS = ("normalizer", "window", "cell", "task")
RUNS = ("normalizer", "window", "cell", "backend")
DIFFERENCE = 1e-6  # step of a difference quotient: its error is about 1e-12 f''' by the step, 1e-10 f by rounding


@law("every", *SPECS)
def it_builds(subject: SpecSubject) -> None:
    """`build` returns what its family asks for, and an option that cannot serve is refused with `ValueError`.

    Every other law needs something to look at; where this one fails, the others are skipped.
    """
    demand(not subject.fault(), subject.fault())


@law("every", *SPECS)
def options_survive_a_dump(subject: SpecSubject) -> None:
    """A spec is its options: dumped (to Python or JSON) and read again it is equal, and builds what gives the same.

    A trial of a study is known by its options alone. What a dump leaves out is not part of the trial's identity, so two
    different trials would be taken for one, and a worker would train something else than was asked for.
    """
    spec = subject.spec
    fields = set(type(spec).model_fields)
    dump = spec.model_dump()
    demand(set(dump) == fields, f"the dump has {sorted(dump)}, and the options are {sorted(fields)}")
    for name, again in (
        ("a dump", type(spec).model_validate(dump)),
        ("a JSON dump", type(spec).model_validate_json(spec.model_dump_json())),
    ):
        demand(again == spec, f"{name} reads as {again!r}, and it was {spec!r}")
        compare(subject.answer(again), subject.answer(spec), tolerance=0, what=f"what it computes after {name}")
    window = subject.built(spec)
    if isinstance(window, Window) and type(window).spec is not Window.spec:  # it says which options build it
        said = window.spec()
        demand(said == spec, f"the window says its options are {said!r}, and it was built by {spec!r}")


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
    """A spec and what it builds can be pickled, and what comes back gives the same.

    `torch.save(layer)`, `copy.deepcopy(layer)` and worker processes all go through pickle.
    """
    again = pickle.loads(pickle.dumps(subject.spec))
    demand(again == subject.spec, f"pickled, the spec came back as {again!r}")
    compare(subject.answer(again), subject.answer(subject.spec), tolerance=0, what="what a pickled spec computes")
    pickle.loads(pickle.dumps(subject.built(subject.spec)))


def _unregistered(subject: SpecSubject) -> str | None:
    entry = registry.kinds(subject.family).get(subject.spec.kind)
    return None if entry and entry.spec is type(subject.spec) else f"{subject.spec.kind!r} is not registered"


@law("every", *SPECS, unless=_unregistered)
def the_registry_builds_the_same(subject: SpecSubject) -> None:
    """By its kind and options, as a study file names it, the registry finds the same spec, and has a schema for it.

    Model files, studies, `atn-norms list` and editors know a plugin by nothing else.
    """
    found = KindField(subject.family).resolve(subject.spec.model_dump())
    demand(found == subject.spec, f"by its kind and options it is {found!r}, and it was {subject.spec!r}")
    properties = type(subject.spec).model_json_schema()["properties"]
    missing = set(type(subject.spec).model_fields) - set(properties)
    demand(not missing, f"the JSON schema lacks {sorted(missing)}")


@law("every", *RUNS)
def calls_are_pure(subject: Subject, case: Case) -> None:
    """The same inputs give the same outputs whatever was computed in between, and nothing random is drawn.

    State is passed in and handed back. What is kept on the module leaks from one sequence into the next, a killed
    study does not resume to the same numbers, and a draw from torch's generator shifts everybody else's.
    """
    made, first, second = subject.make(case), subject.inputs(case), subject.inputs(case, seed=5000)
    before = torch.get_rng_state()
    once = subject.run(made, first)
    subject.run(made, second)
    compare(subject.run(made, first), once, tolerance=0, what="the same call again")
    demand(torch.equal(torch.get_rng_state(), before), "it draws from torch's global generator")
    if isinstance(made, nn.Module):
        made.eval()
        kept = {name: value.clone() for name, value in made.state_dict().items()}
        subject.run(made, first)
        compare(dict(made.state_dict()), kept, tolerance=0, what="the state dict after evaluation")


@law("every", *RUNS)
def inputs_are_left_alone(subject: Subject, case: Case) -> None:
    """What is passed in is not written to.

    The caller goes on using it: a pre-activation is stored for the backward pass, a state may be continued twice.
    """
    inputs = subject.inputs(case)
    copies = [each.clone() for each in inputs]
    subject.run(subject.make(case), inputs)
    compare(list(inputs), copies, tolerance=0, what="an input after the call")


@law("every", "normalizer", "window", "cell", steps=(3, 4, 5), batch=(2, 3))
def gradients_are_derivatives(subject: Subject, case: Case) -> None:
    """The gradient of everything that comes out is the derivative by everything that went in, past steps included.

    Checked by a difference quotient in float64. The gradient flows through every step of the window: one that is cut
    (a detached statistic, a detached past) trains another model than the forward pass describes.
    """
    made, inputs = subject.make(case), [each.requires_grad_() for each in subject.inputs(case)]
    parameters = list(made.parameters()) if isinstance(made, nn.Module) else []
    wanted = [*inputs, *parameters]
    outputs = _floating(subject.run(made, inputs))
    loss = _weighed(outputs, case.seed)
    demand(loss.requires_grad, "nothing that comes out depends on what went in")
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    source = torch.Generator().manual_seed(case.seed + 77)
    for index, (tensor, gradient) in enumerate(zip(wanted, gradients, strict=True)):
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
    """A sum in which every number has a weight of its own, so that none can stand in for another."""
    source = torch.Generator().manual_seed(seed + 99)
    parts = [(each * torch.randn(each.shape, generator=source, dtype=torch.float64)).sum() for each in outputs]
    return torch.stack(parts).sum()
