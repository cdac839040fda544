"""No module needs one that needs it, by whatever way, and no two folders need each other: also for types alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TREES = ("safemerge_callback", "recipes", "method_comparison", "benchmarks")


def module_of(path, root):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(root):
    """Module -> its file."""
    return {module_of(path, root): path for tree in TREES for path in sorted((root / tree).rglob("*.py"))}


def imported(name, path, known):
    """What a module imports of `known`, at its head, in a function or for a type checker alone."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                # A name of a module, or else of the package's face.
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base


def graph(root):
    known = modules(root)
    return {name: {one for one in imported(name, path, known) if one in known} - {name} for name, path in known.items()}


def circles(graph):
    """The sets of nodes that reach each other."""
    reach = {node: reached(graph, node) for node in graph}
    return {frozenset(o for o in reach[node] if node in reach[o]) | {node} for node in graph if node in reach[node]}


def reached(graph, start):
    seen, todo = set(), [start]
    while todo:
        for node in graph.get(todo.pop(), ()):
            if node not in seen:
                seen.add(node)
                todo.append(node)
    return seen


def both_ways(root):
    """Pairs of folders that import each other; a folder within another is a room of it, and no pair."""
    known, pairs = modules(root), set()
    for name, others in graph(root).items():
        pairs |= {(known[name].parent, known[other].parent) for other in others}
    nested = {(a, b) for a, b in pairs if a == b or a in b.parents or b in a.parents}
    return {(str(a), str(b)) for a, b in pairs - nested if (b, a) in pairs and a < b}


def test_no_circle_among_modules():
    assert circles(graph(ROOT)) == set()


def test_no_two_folders_import_each_other():
    assert both_ways(ROOT) == set()


@pytest.mark.parametrize("how", ["head", "types", "function"])
def test_a_circle_is_found_however_it_is_hidden(tmp_path, how):
    line = {
        "head": "from ..two.b import B",
        "types": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..two.b import B",
        "function": "def f():\n    from ..two import b",
    }[how]
    for name, text in {"one/a.py": line, "two/b.py": "import safemerge_callback.one.a\nclass B: ..."}.items():
        path = tmp_path / "safemerge_callback" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert circles(graph(tmp_path)) == {frozenset({"safemerge_callback.one.a", "safemerge_callback.two.b"})}
    assert len(both_ways(tmp_path)) == 1
