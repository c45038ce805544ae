"""Ways to run a cell over a sequence: one signature, chosen by refusal, judged against `reference`."""

from atn_norms.backends.base import Backend, choose, known, refusals
from atn_norms.backends.reference import Reference
from atn_norms.backends.torch_nn import TorchNN

__all__ = ["Backend", "Reference", "TorchNN", "choose", "known", "refusals"]
