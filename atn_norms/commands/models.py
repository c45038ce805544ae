"""Describe the layer that a model file builds."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atn_norms.commands.console import Json, print_json, print_table
from atn_norms.commands.output import emit
from atn_norms.errors import SpecError

if TYPE_CHECKING:
    from atn_norms.layers import Recurrent


def show(
    model: Annotated[Path, typer.Argument(metavar="MODEL.yaml", help="A layer as YAML, JSON or TOML.")],
    as_json: Json = False,
) -> None:
    """Validate a model file, build its layer, and print sites, parameters, state size and backend."""
    from atn_norms.specs import build, read

    data, _ = read(model)
    if isinstance(data, Mapping) and not {"task", "tasks", "axes"}.isdisjoint(data):
        cure = f"For its trials: {shlex.join(['atn-norms', 'ablate', str(model), '--dry-run'])}"
        raise SpecError(position=str(model), got="a study", expected="a model file", detail=cure)
    facts = describe(build(model))
    if as_json:
        print_json(facts)
        return
    sites = [(s["site"], s["features"], _named(s["norm"]), _named(s["window"])) for s in facts["sites"]]
    print_table(f"sites of the {facts['spec']['cell']['kind']}", ("site", "features", "norm", "window"), sites)
    emit()
    rows = [(p["name"], " x ".join(map(str, p["shape"])), p["count"]) for p in facts["parameters"]]
    print_table("parameters", ("name", "shape", "count"), [*rows, ("all", "", facts["parameter_count"])])
    state = facts["state"]
    emit(f"\nstate of one sequence: {state['numbers']} numbers, {state['bytes']} bytes")
    emit(f"\n{facts['explanation']}")


def describe(layer: Recurrent) -> dict[str, Any]:
    """Describe a layer: options, sites, parameters, and the state of one sequence."""
    from atn_norms.layers import explain
    from atn_norms.pytree import tree_leaves

    spec = layer.spec
    state = list(tree_leaves(layer.initial(1)))
    return {
        "spec": spec.model_dump(mode="json"),
        "sites": [
            {
                "site": site,
                "features": features,
                "norm": None if (norm := spec.norm_at(site)) is None else norm.model_dump(mode="json"),
                "window": None if norm is None else spec.window_at(site).model_dump(mode="json"),
            }
            for site, features in layer.cell.sites.items()
        ],
        "parameters": [
            {"name": name, "shape": list(parameter.shape), "count": parameter.numel()}
            for name, parameter in layer.named_parameters()
        ],
        "parameter_count": sum(parameter.numel() for parameter in layer.parameters()),
        "state": {
            "numbers": sum(leaf.numel() for leaf in state),
            "bytes": sum(leaf.numel() * leaf.element_size() for leaf in state),
        },
        "explanation": explain(layer),
    }


def _named(spec: dict[str, Any] | None) -> str:
    if spec is None:
        return "none"
    options = ", ".join(f"{name}={value}" for name, value in spec.items() if name != "kind")
    return f"{spec['kind']}({options})" if options else spec["kind"]
