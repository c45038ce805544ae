"""One call of the kernels: allocation, launches, and the parts that run in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from atn_norms.backends.fused.checks import check_gradients, check_inputs
from atn_norms.backends.fused.inputs import Fitted, Grads, Inputs
from atn_norms.backends.fused.operators import Operators
from atn_norms.backends.fused.plan import CELLS, DOUBLE, Plan
from atn_norms.backends.triton.backward import recurrent_backward
from atn_norms.backends.triton.forward import recurrent_forward
from atn_norms.backends.triton.gates import Tensors
from atn_norms.backends.triton.limits import unsupported
from atn_norms.backends.triton.pooling import Site
from atn_norms.backends.triton.rows import measure_rows, pool_steps, pooled_grads, row_grads, sum_affine, sum_steps
from atn_norms.backends.triton.sites import SiteCall, past

WHOLE = 256  # hidden units up to which one program computes all steps of its rows
LANES = 32
NOTHING = Site._make([*[None] * 14, 1, 0])


class _Call:
    """Data of a call that both directions share."""

    def __init__(self, plan: Plan, inputs: Inputs, kept: Sequence[Tensor]) -> None:
        affine, states, self.lengths = iter(inputs.affine), iter(inputs.states), inputs.lengths
        laid_out: list[Any] = [None if tensor is None else tensor.contiguous() for tensor in inputs[:7]]
        self.plan = plan
        self.xs, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, self.h0, self.c0 = laid_out
        xs: Tensor = self.xs
        self.steps, self.batch, self.inputs = xs.shape
        self.hidden = self.weight_hh.shape[1]
        self.projected, self.product, self.cells, *statements = kept
        self.sites: dict[str, SiteCall] = {}
        for one, kept_of in zip(plan.sites, statements, strict=True):
            own = [
                next(affine).contiguous() if has else xs.new_full((one.features,), fill)
                for has, fill in ((one.gain, 1.0), (one.shift, 0.0))
            ]
            leaves = [next(states) for _ in range(1 + one.leaves)] if inputs.states else []
            self.sites[one.site] = SiteCall(one, (self.steps, self.batch), own, leaves, kept_of)
        self.whole = self.hidden <= WHOLE
        self.compute = tl.float64 if xs.dtype == DOUBLE else tl.float32
        self.ragged = {"RAGGED": self.lengths is not None}

    def options(self) -> dict[str, Any]:
        """Constants of the recurrent kernels."""
        found: dict[str, Any] = {"IH_NORM": 0, "IH_EPS": 0.0}
        for name in ("HH", "C"):
            found |= {f"{name}_NORM": 0, f"{name}_EPS": 0.0, f"{name}_WINDOW": 0, f"{name}_DECAY": 1.0}
        for name, site in self.sites.items():
            name = name.upper()
            found |= {f"{name}_NORM": site.norm, f"{name}_EPS": site.plan.eps[0]}
            if name != "IH":
                found |= {f"{name}_WINDOW": site.window, f"{name}_DECAY": site.plan.decay}
        wide = max(16, _power_of_two(self.hidden))
        rows = 16 if self.whole else max(1, 1024 // wide)  # Triton's product needs at least 16
        tf32 = self.xs.is_cuda and _tf32_allowed()
        return (
            found
            | self.ragged
            | {
                "CELL": CELLS[self.plan.cell],
                "ROWS": rows,
                "WIDE": wide,
                "CHUNK": 16,
                "PRODUCT": self.whole,
                "PRECISION": "tf32" if tf32 else "ieee",
                "COMPUTE": self.compute,
                "num_warps": min(16, max(4, rows * wide // 128)),
                "num_stages": 1,
            }
        )

    def three(self) -> list[Site]:
        """Return the sites of a cell."""
        return [self.sites[name].site() if name in self.sites else NOTHING for name in ("ih", "hh", "c")]

    def rows(self, wide: int) -> dict[str, Any]:
        """Return the block sizes of the kernels that process rows of `wide` features one by one."""
        width = _power_of_two(wide)
        rows = max(1, 1024 // width)
        return {"ROWS": rows, "WIDE": width, "COMPUTE": self.compute, "num_warps": 4 if width <= 2048 else 8}

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """Run a kernel on the device of the call."""
        with torch.cuda.device(self.xs.device) if self.xs.is_cuda else nullcontext():
            LAUNCH(kernel, grid, *arguments, **options)

    def recurrent(self, kernel: Any, tensors: Tensors, first: int, last: int, options: dict[str, Any]) -> None:
        """Run a recurrent kernel over steps `first` to `last`."""
        grid = (_ceiling(self.batch, options["ROWS"]),)
        sizes = first, last, self.steps, self.batch, self.hidden
        self.launch(kernel, grid, tensors, *self.three(), *sizes, **options)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    kernel[grid](*arguments, **options)


LAUNCH: Callable[..., None] = _launch  # tests replace it to compile without a device


class Kernels:
    """The kernels in the form that the operators call; their layout is the plan."""

    def allocate(self, plan: Plan, inputs: Inputs, keep: bool) -> tuple[list[Tensor], list[Tensor]]:
        xs, states, c0 = inputs.xs, inputs.states, inputs.c0
        (steps, batch, _), hidden = xs.shape, inputs.weight_hh.shape[1]
        results = [xs.new_empty(steps, batch, hidden), xs.new_empty(inputs.h0.shape), xs.new_empty(c0.shape)]
        results += [xs.new_empty(shape, dtype=DOUBLE) for site in plan.sites for shape in site.shapes(batch)]
        if not keep:
            return results, []
        wide = plan.gates * hidden
        return results, [
            xs.new_empty(steps, batch, wide),
            xs.new_empty(steps, batch, wide),
            xs.new_empty(steps if plan.is_lstm else 0, batch, hidden),
            *(xs.new_empty(3 * past(site, bool(states)) + 5 * steps, batch, dtype=DOUBLE) for site in plan.sites),
        ]

    def fit(self, plan: Plan, inputs: Inputs) -> Fitted | None:
        return None

    def check(self, plan: Plan, inputs: Inputs) -> Fitted:
        reason = unsupported(plan)
        if reason is not None:
            raise ValueError(f"plan: got a plan without a kernel: {reason.text}")
        check_inputs(plan, inputs, inputs.xs.device)
        return Fitted(plan, inputs, [])

    def fit_backward(
        self, plan: Plan, inputs: Inputs, grads: Grads, ys: Tensor, kept: Sequence[Tensor]
    ) -> Fitted | None:
        return None

    def check_backward(self, plan: Plan, inputs: Inputs, grads: Grads, ys: Tensor, kept: Sequence[Tensor]) -> Fitted:
        fitted = self.check(plan, inputs)
        _, like = self.allocate(plan, inputs._replace(xs=inputs.xs.to("meta")), True)
        check_gradients(plan, inputs, grads, ys, kept, [(tuple(each.shape), each.dtype) for each in like])
        return fitted

    def forward(self, fitted: Fitted, keep: bool, states: bool = True) -> tuple[list[Tensor], list[Tensor]]:
        plan, inputs, _ = fitted
        _, kept = self.allocate(plan, inputs, True)
        return _forward(plan, inputs, kept), kept if keep else []

    def backward(
        self, fitted: Fitted, grads: Grads, ys: Tensor, kept: Sequence[Tensor], wants_xs: bool
    ) -> list[Tensor]:
        return _backward(fitted.layout, fitted.inputs, grads, ys, kept, wants_xs)


def _forward(plan: Plan, inputs: Inputs, kept: list[Tensor]) -> list[Tensor]:
    """Return the results of `Kernels.forward`, and write the tensors that backward reads."""
    call = _Call(plan, inputs, kept)
    xs = call.xs
    output, wide = xs.new_empty(call.steps, call.batch, call.hidden), plan.gates * call.hidden
    flat = call.xs.reshape(-1, call.inputs)
    _product(flat, call.weight_ih, call.bias_ih, call.projected.view(-1, wide))
    for site in call.sites.values():
        site.start()
    entry = call.sites.get("ih")
    if entry is not None:
        many = call.steps * call.batch
        blocks = call.rows(wide)
        grid = (_ceiling(many, blocks["ROWS"]),)
        call.launch(measure_rows, grid, call.projected, entry.site(), many, call.batch, wide, NORM=entry.norm, **blocks)
        call.launch(
            pool_steps, (_ceiling(call.batch, LANES),), entry.site(), call.lengths, call.steps, call.batch,
            LANES=LANES, WINDOW=entry.window, DECAY=entry.plan.decay, num_warps=1, **call.ragged,
        )  # fmt: skip
    options = call.options()
    bias = call.bias_hh if call.bias_hh is not None else xs.new_zeros(wide)
    turned = call.weight_hh.t().contiguous() if call.whole else None
    tensors = Tensors(
        call.projected, call.product, call.weight_hh, turned, bias, call.h0, call.c0, output, call.cells, call.lengths,
        *[None] * 7,
    )  # fmt: skip
    if call.whole:
        call.recurrent(recurrent_forward, tensors, 0, call.steps, options)
    else:
        for t in range(call.steps):
            _product(output[t - 1] if t else call.h0, call.weight_hh, bias, call.product[t])
            call.recurrent(recurrent_forward, tensors, t, t + 1, options)
    last = [_at_the_end(output, call.h0, call.lengths)]
    last.append(_at_the_end(call.cells, call.c0, call.lengths) if plan.is_lstm else torch.empty_like(call.c0))
    return [output, *last, *(leaf for site in call.sites.values() for leaf in site.following(call.lengths))]


def _backward(
    plan: Plan, inputs: Inputs, grads: Grads, ys: Tensor, kept: Sequence[Tensor], wants_xs: bool
) -> list[Tensor]:
    """Return the gradients of xs, weights, biases, h0, c0, every affine tensor, and every state's leaves."""
    dys, dhn, dcn, dnext = grads
    call = _Call(plan, inputs, kept)
    wide, hidden, steps, batch = plan.gates * call.hidden, call.hidden, call.steps, call.batch
    leaves, passed = iter(dnext), {}
    extras = {
        name: site.state_grads([next(leaves) for _ in range(1 + site.plan.leaves)], call.lengths)
        for name, site in call.sites.items()
    }
    has_extra = any(extra is not None for extra, _ in extras.values())
    for name, (extra, beside) in extras.items():
        passed[name] = beside
        empty = torch.zeros(2, steps, batch, dtype=DOUBLE, device=ys.device) if has_extra and extra is None else extra
        call.sites[name].turn(empty)
    dh, dc = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (dhn, dcn))
    dprojected, dproduct = torch.empty_like(call.projected), torch.empty_like(call.product)
    apart = plan.cell == "gru" and "hh" in call.sites
    drecurrent = torch.empty_like(call.product) if apart else dprojected
    dcell = torch.empty_like(call.cells) if "c" in call.sites else None
    tensors = Tensors(
        call.projected, call.product, call.weight_hh, None, None, call.h0, call.c0, ys, call.cells, call.lengths,
        dys.contiguous(), dh, dc, dprojected, drecurrent, dproduct, dcell,
    )  # fmt: skip
    options = call.options() | {"EXTRA": has_extra}
    if call.whole:
        call.recurrent(recurrent_backward, tensors, 0, steps, options)
    else:
        for t in reversed(range(steps)):
            call.recurrent(recurrent_backward, tensors, t, t + 1, options)
            dh.addmm_(dproduct[t], call.weight_hh)
    affine = {
        "ih": (call.projected, dprojected),
        "hh": (call.product, drecurrent),
        "c": (call.cells, dcell),
    }
    daffine = []
    for name, site in call.sites.items():
        found = _affine(call, site, *affine[name])
        daffine += [each for each, has in zip(found, (site.plan.gain, site.plan.shift), strict=True) if has]
    entry = call.sites.get("ih")
    if entry is not None:
        _input_norm(call, entry, dprojected, has_extra)
    dbefore = [leaf for name, site in call.sites.items() for leaf in site.before(passed[name])]
    flat = dprojected.view(-1, wide)
    dxs = (flat @ call.weight_ih).view_as(call.xs) if wants_xs else ys.new_empty(0)
    dweight_ih = flat.t() @ call.xs.reshape(-1, call.inputs)
    dweight_hh = dproduct[0].t() @ call.h0
    if steps > 1:
        dweight_hh.addmm_(dproduct[1:].reshape(-1, wide).t(), ys[:-1].reshape(-1, hidden))
    biases = [ys.new_empty(0), ys.new_empty(0)]
    if call.bias_ih is not None:
        biases = [flat.sum(0), dproduct.view(-1, wide).sum(0)]
    return [dxs, dweight_ih, dweight_hh, *biases, dh, dc, ys.new_empty(0), *daffine, *dbefore]


def _input_norm(call: _Call, site: SiteCall, d: Tensor, has_extra: bool) -> None:
    """Backward through the norm of the input product, in place."""
    many, wide = call.steps * call.batch, d.shape[-1]
    blocks = call.rows(wide)
    grid = (_ceiling(many, blocks["ROWS"]),)
    grads = torch.empty(2, many, dtype=DOUBLE, device=d.device)
    one = site.site()
    call.launch(
        pooled_grads, grid, d, call.projected, one, grads, many, wide, NORM=site.norm, EPS=site.plan.eps[0], **blocks
    )
    call.launch(
        sum_steps, (_ceiling(call.batch, LANES),), one, grads, call.lengths, call.steps, call.batch,
        LANES=LANES, WINDOW=site.window, DECAY=site.plan.decay, EXTRA=has_extra, num_warps=1, **call.ragged,
    )  # fmt: skip
    call.launch(
        row_grads, grid, d, call.projected, one, grads, call.lengths, many, call.batch, wide,
        EPS=site.plan.eps[0], **call.ragged, **blocks,
    )  # fmt: skip


def _affine(call: _Call, site: SiteCall, a: Tensor, d: Tensor) -> list[Tensor]:
    """Return the gradients of gain and shift: sums in blocks of rows, then over the blocks."""
    many, features = call.steps * call.batch, site.plan.features
    each = max(64, _ceiling(many, 128))
    blocks = _ceiling(many, each)
    sums = d.new_empty(2, blocks, features)
    call.launch(
        sum_affine, (_ceiling(features, 64), blocks), d, a, site.site(), sums, call.lengths,
        many, call.batch, features, each,
        ROWS=16, COLUMNS=64, NORM=site.norm, EPS=site.plan.eps[0], COMPUTE=call.compute, num_warps=4, **call.ragged,
    )  # fmt: skip
    return [sums[0].sum(0), sums[1].sum(0)]


def _tf32_allowed() -> bool:
    """Return True if torch allows TF32 in products, by the setting of the installed version."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32) if precision is None else precision == "tf32"


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)


def _ceiling(number: int, of: int) -> int:
    """Return the number of blocks that hold `number` entries."""
    return -(-number // of)


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def _at_the_end(line: Tensor, initial: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the last value `[B, H]` of each row of `line` `[T, B, H]`; the initial value for a row without steps."""
    if lengths is None:
        return line[-1].clone()
    place = (lengths - 1).clamp(min=0).reshape(1, -1, 1).expand(1, -1, line.shape[2])
    return torch.where((lengths > 0).unsqueeze(1), line.gather(0, place).squeeze(0), initial)


OPERATORS = Operators("recurrent_triton", Kernels())
