"""Find the statements of a Python file that only start studies, so that changing them changes no trial."""

from __future__ import annotations

import ast
import dis
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType

ENTRY = "atn_norms.ablation.ablate"  # a call of it starts a study; changing it does not change what a trial computes
PLAIN = {
    "dict",
    "enumerate",
    "float",
    "int",
    "len",
    "list",
    "print",
    "range",
    "reversed",
    "sorted",
    "str",
    "tuple",
    "zip",
}
METHODS = {"items", "keys", "values", "format"}  # of a dict or a text
READS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")  # instructions that read a global
STORES = ("STORE_GLOBAL", "STORE_NAME")


def starting(tree: ast.Module) -> list[ast.stmt]:
    """Return the top-level statements that only start studies.

    These are the block under `if __name__ == "__main__":`, calls of `ablate`, and loops and conditions that call it. A
    loop must do nothing before the call but set names and call `PLAIN` functions, and other statements must not read
    these names.
    """
    names = dict(_bound(tree))
    calls = [node for node in tree.body if _is_main(node) or _is_call(node, names)]
    loops = [node for node in tree.body if node not in calls and _only_starts([node], names)]
    others = [node for node in tree.body if node not in calls and node not in loops]
    if loops and not _globals(loops, STORES).isdisjoint(_globals(others, READS)):
        return calls
    return calls + loops


def counted_starts(tree: ast.Module) -> list[int]:
    """Return the lines of calls of `ablate` in statements that do more than to start studies."""
    names, starts = dict(_bound(tree)), starting(tree)
    counted = (each for node in tree.body if node not in starts for each in ast.walk(node))
    return sorted({each.lineno for each in counted if isinstance(each, ast.Call) and _is_entry(each, names)})


def _bound(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the names that absolute imports at the top level of a file bind, and what they stand for.

    A name that a definition or an assignment binds too stands for itself.
    """
    for node in sorted(tree.body, key=lambda each: not isinstance(each, ast.Import | ast.ImportFrom)):
        if isinstance(node, ast.Import):
            for each in node.names:
                first = each.name.partition(".")[0]
                yield (each.asname, each.name) if each.asname else (first, first)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((each.asname or each.name, f"{node.module}.{each.name}") for each in node.names)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.name
        elif isinstance(node, ast.Assign):
            yield from ((each.id, each.id) for each in node.targets if isinstance(each, ast.Name))


def _is_main(node: ast.stmt) -> bool:
    """Check for the block under `if __name__ == "__main__":`."""
    tests = "__name__ == '__main__'", "'__main__' == __name__"
    return isinstance(node, ast.If) and not node.orelse and ast.unparse(node.test) in tests


def _is_call(node: ast.stmt, names: Mapping[str, str]) -> bool:
    """Check for a call of `ablate` whose record may be assigned."""
    return isinstance(node, ast.Expr | ast.Assign) and isinstance(node.value, ast.Call) and _is_entry(node.value, names)


def _is_entry(call: ast.Call, names: Mapping[str, str]) -> bool:
    """Check for a call of `ablate`; `names` are `_bound`."""
    first, dot, rest = ast.unparse(call.func).partition(".")
    return f"{names.get(first, first)}{dot}{rest}" == ENTRY


def _only_starts(block: Sequence[ast.stmt], names: Mapping[str, str]) -> bool | None:
    """Check that a block starts a study; None where it does something else before that than to set names or print."""
    starts = False
    for node in block:
        if _is_call(node, names):
            return True  # what follows is never executed in a trial
        if isinstance(node, ast.For | ast.If):
            if not _is_plain(node.iter if isinstance(node, ast.For) else node.test, names):
                return None
            inner = [_only_starts(each, names) for each in (node.body, node.orelse)]
            if None in inner:
                return None
            starts = starts or True in inner
        elif not _is_harmless(node, names):
            return None
    return starts


def _is_harmless(node: ast.stmt, names: Mapping[str, str]) -> bool:
    """Check for an assignment to names, an expression, and a statement without an effect."""
    if isinstance(node, ast.Expr):
        return _is_plain(node.value, names)
    if isinstance(node, ast.Assign):
        return all(isinstance(each, ast.Name) for each in node.targets) and _is_plain(node.value, names)
    return isinstance(node, ast.Pass | ast.Continue | ast.Break)


def _is_plain(value: ast.expr, names: Mapping[str, str]) -> bool:
    """Check that an expression calls `PLAIN` functions only: another one could change what a trial computes."""
    return all(_is_plain_call(each, names) for each in ast.walk(value) if isinstance(each, ast.Call))


def _is_plain_call(call: ast.Call, names: Mapping[str, str]) -> bool:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr in METHODS
    return isinstance(call.func, ast.Name) and call.func.id in PLAIN and call.func.id not in names


def _globals(statements: Sequence[ast.stmt], instructions: Sequence[str]) -> set[str]:
    """Return the globals that some instructions of statements, and of functions and classes in them, read or set."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        codes = [compile(ast.Module(list(statements), []), "<statements>", "exec", dont_inherit=True)]
    found = set[str]()
    for code in codes:
        found |= {each.argval for each in dis.get_instructions(code) if each.opname in instructions}
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
    return found
