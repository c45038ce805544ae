"""Tests of the conformance suite: wrong plugins that it must detect, correct ones that must pass, and its interface."""
