"""Speed and memory side by side in one run: torch.nn, the textbook window, and every backend whose laws hold."""

from atn_norms.bench.engine import measure
from atn_norms.bench.records import Bench, CaseResult, Row
from atn_norms.bench.spec import BenchSpec, Case, Size

__all__ = ["Bench", "BenchSpec", "Case", "CaseResult", "Row", "Size", "measure"]
