"""The options of a layer: one model, which every constructor of a layer uses."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from numbers import Integral, Real
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator

from atn_norms.backends import known
from atn_norms.cells import Cell, CellSpec, Placement
from atn_norms.errors import SpecError, mismatch, unknown, with_article
from atn_norms.layers.classes import class_of
from atn_norms.layers.memory import check_memory
from atn_norms.normalizers import Normalizer, NormSpec, PerGate
from atn_norms.normalizers.base import LARGEST
from atn_norms.options import Options
from atn_norms.registry import KindField, to_spec_error
from atn_norms.windows import AnyWindow, SlidingSpec, Window, WindowSpec, to_window_options

if TYPE_CHECKING:
    from atn_norms.layers.recurrent import Recurrent


def _no_norm(value: Any) -> Any:
    return None if value == "none" else value


MOST_LAYERS = 10_000  # a module costs time and memory whatever its size

AnyNorm = Annotated[NormSpec | None, KindField("normalizer", _no_norm, {"const": "none"})]


class NormSites(Options):
    """One norm for each named site; other sites have no norm."""

    family: ClassVar[str | None] = "normalizer"
    sites: dict[str, AnyNorm]


class WindowSites(Options):
    """One window for each named site; other sites have a window of 1."""

    family: ClassVar[str | None] = "window"
    sites: dict[str, AnyWindow]


NormLike = NormSpec | NormSites | Mapping[str, Any] | str | None
"""A norm: None, a kind such as `"layer"`, a mapping with `kind`, a spec, or a mapping `{"sites": {site: norm}}`."""

WindowLike = WindowSpec | WindowSites | Window[Any] | Mapping[str, Any] | int | str
"""A window: k steps, a kind, a mapping with `kind`, a spec, a `Window`, or a mapping `{"sites": {site: window}}`."""

PlacementLike = Placement | Mapping[str, str] | None
"""A placement of the norms: None for the default, a `Placement`, or a mapping of its options."""


def _norms(value: Any) -> Any:
    return NormSites.model_validate(value) if isinstance(value, Mapping) and "sites" in value else _no_norm(value)


def _windows(value: Any) -> Any:
    of_sites = isinstance(value, Mapping) and "sites" in value
    return WindowSites.model_validate(value) if of_sites else to_window_options(value)


def _sites_schema(family: str) -> dict[str, Any]:
    of_sites = {"type": "object", "description": f"site (ih, hh, c, sum) to {family}"}
    return {"type": "object", "properties": {"sites": of_sites}, "required": ["sites"], "additionalProperties": False}


class LayerSpec(Options):
    """All options of a layer: sizes, cell, norm, window, placement, initialization, backend.

    | option | meaning |
    |---|---|
    | `cell` | `lstm`, `gru`, `rnn`, or a plugin's; a kind, or a mapping with `kind` and its options |
    | `norm` | `none`, a kind, a mapping with `kind`, or `{sites: {ih: ..., hh: ..., c: ...}}` |
    | `window` | an integer k (the last k steps), a kind, a mapping with `kind`, or `{sites: ...}` |
    | `init` | `torch`: uniform within 1 / sqrt(hidden_size); `paper`: W orthogonal, U one identity per gate, biases 0 |
    | `forget_bias` | start of the forget gate's shift: in the `bias` of the norm, or in `bias_ih` without a norm |

    Errors: `ValidationError` (a `ValueError`); `to_spec_error` converts it to a `SpecError`.

    >>> LayerSpec(cell="lstm", input_size=2, hidden_size=60, norm="layer", window=25).build()
    LSTM(2, 60, norm=layer, window=25)
    """

    cell: Annotated[CellSpec, KindField("cell")]
    input_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_layers: int = Field(default=1, ge=1, le=MOST_LAYERS)
    bias: bool = True
    batch_first: bool = False
    dropout: float = Field(default=0.0, ge=0, le=1)
    bidirectional: bool = False
    norm: Annotated[NormSpec | NormSites | None, KindField("normalizer", _norms, _sites_schema("norm"))] = None
    window: Annotated[WindowSpec | WindowSites, KindField("window", _windows, {"type": "integer", "minimum": 1})] = (
        Field(default_factory=lambda: SlidingSpec(steps=1))
    )
    placement: Placement = Placement()
    init: Literal["torch", "paper"] = "torch"
    forget_bias: float | None = Field(default=None, ge=-LARGEST, le=LARGEST)
    backend: str = "auto"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        cell = self.equations()
        self._check_sites(cell)
        self._check_windows_have_norms(cell)
        if self.backend not in (names := ["auto", *known()]):
            raise SpecError.of([unknown("backend", self.backend, names, path=("backend",))])
        self._check_size(cell, {})  # before a norm is built for such a size
        norms = {site: self._sketched(cell, site) for site in cell.sites}
        self._check_size(cell, norms)
        self._check_windows(norms)
        if self.forget_bias is not None:
            self._check_forget_bias(cell, norms)
        return self

    @property
    def directions(self) -> int:
        """2 if bidirectional, else 1."""
        return 2 if self.bidirectional else 1

    def equations(self) -> Cell:
        """Return the cell of these options."""
        return self.cell.build(self.hidden_size, self.placement)

    def norm_at(self, site: str) -> NormSpec | None:
        """Return the norm of one site."""
        return self.norm.sites.get(site) if isinstance(self.norm, NormSites) else self.norm

    def window_at(self, site: str) -> WindowSpec:
        """Return the window of one site."""
        if isinstance(self.window, WindowSites):
            return self.window.sites.get(site, SlidingSpec(steps=1))
        return self.window

    def normalizer(self, cell: Cell, site: str) -> Normalizer | None:
        """Build the normalizer of one site: one for each gate if `placement.gates` is `per_gate`."""
        spec = self.norm_at(site)
        if spec is None:
            return None
        features, gates = cell.sites[site], cell.gates_at(site)
        try:
            if self.placement.gates == "per_gate" and gates > 1:
                return PerGate([_built(spec, features // gates) for _ in range(gates)])
            return _built(spec, features)
        except Exception as error:  # whatever a plugin raises
            detail = f"{spec.kind!r} at site {site!r} with {features} features: {error}"
            raise SpecError("norm", detail=detail) from error

    @property
    def has_statistics(self) -> bool:
        """True if any site has a normalizer with a statistic, so that the window changes the result."""
        cell = self.equations()
        norms = [self._sketched(cell, site) for site in cell.sites]
        return any(norm is not None and not norm.stateless for norm in norms)

    def _sketched(self, cell: Cell, site: str) -> Normalizer | None:
        """Build the normalizer on the meta device, or on the CPU if its constructor needs numbers."""
        try:
            with torch.device("meta"):
                return self.normalizer(cell, site)
        except ValueError:
            return self.normalizer(cell, site)

    def layer_inputs(self, layer: int) -> int:
        """Return the input features of one layer of the stack."""
        return self.input_size if layer == 0 else self.equations().output_size * self.directions

    def build(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Recurrent:
        """Build the layer: an `LSTM`, `GRU` or `RNN`, or a `Recurrent` for another cell."""
        return class_of(self.cell.kind).from_spec(self, device, dtype)

    def _check_sites(self, cell: Cell) -> None:
        sites = list(cell.sites)
        for option, value in (("norm", self.norm), ("window", self.window)):
            for site in value.sites if isinstance(value, (NormSites, WindowSites)) else ():
                if site not in sites:
                    raise SpecError.of([unknown("site", site, sites, path=(option, "sites", site))])

    def _check_windows_have_norms(self, cell: Cell) -> None:
        alone = SlidingSpec(steps=1)
        explicit = self.window.sites if isinstance(self.window, WindowSites) else dict.fromkeys(cell.sites, self.window)
        if not isinstance(self.window, WindowSites) and any(self.norm_at(site) for site in cell.sites):
            return
        for site, window in explicit.items():
            if window != alone and self.norm_at(site) is None:
                got = f"{with_article(f'{window.kind!r} window')} without a norm whose statistics it could pool"
                raise SpecError(self._window_path(site), got, "a norm, or a window of 1")

    def _check_windows(self, norms: Mapping[str, Normalizer | None]) -> None:
        for site, norm in norms.items():
            spec = self.window_at(site)
            try:
                reason = norm.unsupported_reason(spec.build()) if norm is not None else None
            except Exception as error:  # whatever a plugin raises
                raise SpecError("window", detail=f"{spec.kind!r} at site {site!r}: {error}") from error
            if reason is not None:
                detail = f"{spec.kind!r} with norm {_kinds(self.norm)} at site {site!r}: {reason}"
                raise SpecError(self._window_path(site), detail=detail)

    def _window_path(self, site: str) -> tuple[str, ...]:
        return ("window", "sites", site) if isinstance(self.window, WindowSites) else ("window",)

    def _check_size(self, cell: Cell, norms: Mapping[str, Normalizer | None]) -> None:
        inner = self.directions * cell.output_size
        layers = [self.input_size] + [inner] * min(self.num_layers - 1, 1)
        sizes = [self.directions * sum(map(prod, cell.shapes(i, self.bias).values())) for i in layers]
        parameters = sizes[0] + (self.num_layers - 1) * sizes[-1]
        kept = sum(t.numel() for norm in norms.values() if norm for t in (*norm.parameters(), *norm.buffers()))
        parameters += self.directions * self.num_layers * kept
        sizes = f"{self.hidden_size} with input_size {self.input_size} and num_layers {self.num_layers}"
        check_memory("hidden_size", sizes, parameters, note=f" with norm {_kinds(self.norm)}" if kept else "")

    def _check_forget_bias(self, cell: Cell, norms: Mapping[str, Normalizer | None]) -> None:
        if "f" not in cell.gates:
            got = f"{self.forget_bias} for cell {self.cell.kind!r}, which has no forget gate"
            raise SpecError("forget_bias", got, "no forget_bias")
        norm = norms["sum" if "sum" in norms else "ih"]
        if norm is None and not self.bias:
            got = f"{self.forget_bias} without a norm and with bias false"
            raise SpecError("forget_bias", got, "bias true, or no forget_bias")
        if norm is not None and forget_shift(cell, norm) is None:
            got = f"{self.forget_bias} for an input-side norm ({type(norm).__name__}) without a bias"
            raise SpecError("forget_bias", got, "a norm with a bias (for rms: bias true), or no forget_bias")


def _built(spec: NormSpec, features: int) -> Normalizer:
    norm = spec.build(features)
    if not isinstance(norm, Normalizer):
        raise TypeError(mismatch("build", type(norm).__name__, "a Normalizer"))
    return norm


def _kinds(norm: NormSpec | NormSites | None) -> str:
    specs = norm.sites.values() if isinstance(norm, NormSites) else [norm]
    return ", ".join(sorted({spec.kind for spec in specs if spec is not None}))


def forget_shift(cell: Cell, norm: Normalizer) -> torch.Tensor | None:
    """Return the part of a norm's shift for the forget gate, or None if the norm has no shift."""
    place = cell.gates.index("f")
    if isinstance(norm, PerGate):
        return getattr(norm.gates[place], "bias", None)
    bias = getattr(norm, "bias", None)
    return None if bias is None else bias.view(len(cell.gates), -1)[place]


def to_plain(value: Any) -> Any:
    """Convert the numbers of numpy in an option to numbers of Python, and every mapping to a dict."""
    if isinstance(value, Mapping):
        return {key: to_plain(entry) for key, entry in value.items()}
    if isinstance(value, Integral) and not isinstance(value, (bool, int)):
        return int(value)
    if isinstance(value, Real) and not isinstance(value, (bool, int, float)):
        return float(value)
    return value


def make_layer_spec(**options: Any) -> LayerSpec:
    """Build the options of a layer from keyword arguments; `SpecError` (a `ValueError`) for an invalid option."""
    options = to_plain(options)
    try:
        return LayerSpec.model_validate(options)
    except ValidationError as error:
        raise to_spec_error(error, data=options) from None
