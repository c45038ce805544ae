"""Deliberately wrong plugins with typical mistakes, each with the law that must catch it."""

from tests.testing.gallery.entry import GALLERY, Wrong

from tests.testing.gallery import backends, cells, normalizers, options, statistics, tasks, windows  # isort: skip

__all__ = ["GALLERY", "Wrong", "backends", "cells", "normalizers", "options", "statistics", "tasks", "windows"]
