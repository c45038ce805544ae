"""Measured cost of the reference backend, which `explain` prints where the native backend does not run a layer.

The factors are processor time of a training step relative to the native backend, best of interleaved rounds: an LSTM
with layer normalization at all sites, a window of 25 steps, float32, one thread, on an AMD EPYC (Zen 5) with AVX-512.
The keys are (input, hidden, batch, steps). `atn-norms bench --threads 1 --windows 25 --runners native,reference`
measures wall time.
"""

REFERENCE_PER_NATIVE = {(2, 60, 50, 100): 26.5, (10, 68, 128, 120): 12.8, (200, 512, 32, 100): 4.8}


def cost_of_reference() -> str:
    """Return the measured factors as a phrase.

    >>> cost_of_reference()
    'measured at 26, 13, 5 times the time of native (LSTM, layer norm, k = 25, hidden 60, 68, 512)'
    """
    factors = ", ".join(f"{factor:.0f}" for factor in REFERENCE_PER_NATIVE.values())
    hidden = ", ".join(str(size[1]) for size in REFERENCE_PER_NATIVE)
    return f"measured at {factors} times the time of native (LSTM, layer norm, k = 25, hidden {hidden})"
