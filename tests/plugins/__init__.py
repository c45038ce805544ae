"""Plugins: how they load, what a broken one does to the others, the bundled ones, and the kit for new ones."""
