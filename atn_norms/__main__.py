"""`python -m atn_norms` is the command line."""

from atn_norms.cli import program

if __name__ == "__main__":
    raise SystemExit(program())
