"""Check the backend that a row of the compatibility table names."""

from collections import Counter

import pytest

from atn_norms.backends.native.library import Library
from atn_norms.backends.reference import ReferenceProgram
from atn_norms.backends.torch_nn import TorchProgram

COUNTS: Counter[str] = Counter()  # a global, which torch's compiler finds from inside a graph


@pytest.fixture
def runs(monkeypatch):
    """Count the runs of each backend; a layer without a norm counts as `torch` only where a backend runs it."""

    def count(owner, method, name):
        original = getattr(owner, method)

        def counted(self, *arguments, **options):
            COUNTS[name] += 1
            return original(self, *arguments, **options)

        monkeypatch.setattr(owner, method, counted)

    COUNTS.clear()
    count(Library, "run", "native")
    count(ReferenceProgram, "run", "reference")
    count(TorchProgram, "run", "torch")
    return COUNTS
