"""Deliberately wrong subjects, each of a kind that people write, and the law that is meant to catch it."""

from tests.testing.gallery.entry import GALLERY, Wrong

from tests.testing.gallery import backends, cells, normalizers, options, statistics, tasks, windows  # isort: skip

__all__ = ["GALLERY", "Wrong", "backends", "cells", "normalizers", "options", "statistics", "tasks", "windows"]
