"""Labels of the values of an axis, which records and reports show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atn_norms.ablation.store.files import canonical
from atn_norms.options import Options, kind_label


def label(value: Any) -> str:
    """Return the label of a value of an axis.

    >>> label(None), label(25), label(1e9), label({"kind": "layer", "eps": 0.001})
    ('none', '25', '1e+09', 'layer(eps=0.001)')
    >>> label("none"), label("")
    ('none', '""')
    >>> label({"sites": {"ih": 25, "hh": "cumulative"}})
    'sites(ih=25, hh=cumulative)'
    """
    if value is None:
        return "none"
    if isinstance(value, str) and value:
        return value
    if isinstance(value, Mapping) and isinstance(value.get("kind"), str):
        return kind_label(value["kind"], {name: label(each) for name, each in value.items() if name != "kind"})
    if isinstance(value, Mapping) and list(value) == ["sites"] and isinstance(value["sites"], Mapping):
        return kind_label("sites", {site: label(each) for site, each in value["sites"].items()})
    if isinstance(value, float) and abs(value) >= 1e6 and float(f"{value:g}") == value:
        return f"{value:g}"
    return canonical(plain(value))


def plain(value: Any) -> Any:
    """Return a value with every options model in it as a mapping."""
    if isinstance(value, Options):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value
