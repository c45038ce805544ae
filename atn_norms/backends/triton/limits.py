"""Limits of the Triton kernels: plans that they do not run."""

from __future__ import annotations

from atn_norms.backends.fused.plan import Plan
from atn_norms.backends.program import Unsupported


def unsupported(plan: Plan) -> Unsupported | None:
    """Return the reason why the kernels of this backend do not run a plan, or None."""
    if not plan.sites:
        return Unsupported("no norm", "it runs normed cells only")
    if plan.joint or plan.normed_carry or plan.projected:
        return Unsupported("placement", f"it runs the default placement only, and the cell is {plan.cell}")
    if plan.coupled:
        return Unsupported("norm", "it has no kernel for norms over the rows of a batch")
    traced = [site.site for site in plan.sites if site.traced is not None]
    if traced:
        text = f"it has no kernel for traced normalizers, and there is one at {', '.join(traced)}"
        return Unsupported("norm", text)
    grouped = [site for site in plan.sites if site.groups > 1]
    if grouped:
        text = f"it has no kernel for a norm of groups, and the one at {grouped[0].site} has {grouped[0].groups}"
        return Unsupported("norm", text)
    detached = [site.site for site in plan.sites if site.detached]
    if detached:
        text = f"it has no kernel for detached windows, and there is one at {', '.join(detached)}"
        return Unsupported("window", text)
    other = [site.site for site in plan.sites if site.taps or site.past]
    if other:
        text = f"it has no kernel for windows of plugins, and there is one at {', '.join(other)}"
        return Unsupported("window", text)
    return None
