"""Property tests of statistics, windows, cells and layers, derived from the mathematics and run by hypothesis."""
