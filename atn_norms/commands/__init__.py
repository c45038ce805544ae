"""The commands, one module for each use. Each command parses, calls the library and prints."""
