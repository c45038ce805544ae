"""The commands, one module for each thing that people come to do; each parses, calls the library and prints."""
