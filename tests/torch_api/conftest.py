"""Check the backend that a row of the compatibility table names."""

from collections import Counter

import pytest

from atn_norms.backends.native.library import Library
from atn_norms.backends.reference import Reference
from atn_norms.backends.torch_nn import TorchNN


@pytest.fixture
def runs(monkeypatch):
    """Count the runs of each backend; a layer without a norm counts as `torch` only where a backend runs it."""
    counts = Counter()

    def count(owner, method, name):
        original = getattr(owner, method)

        def counted(self, *arguments, **options):
            counts[name] += 1
            return original(self, *arguments, **options)

        monkeypatch.setattr(owner, method, counted)

    count(Library, "run", "native")
    count(Reference, "run", "reference")
    count(TorchNN, "run", "torch")
    return counts
