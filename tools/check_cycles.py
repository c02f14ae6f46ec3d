"""Fails when source files import one another in a circle, and prints every circle as a sentence.

An import inside a function counts like one at the top, because it hides a circle without breaking it. One under
`if TYPE_CHECKING` does not: annotations need no order of files. A name that a package only passes on, lazily
(`core/lazy_exports.py`) or by importing it, counts as an import of the module that defines it. Not seen are modules
whose names are computed, as in a table of methods, and that a package runs when one of its modules is imported.
"""

import ast
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

Graph = dict[str, dict[str, int]]  # file -> files it imports -> line where it first does


class Sources:
    """The modules below a folder that holds packages, and what each gives on from others."""

    def __init__(self, root: Path) -> None:
        self.files = {module_name(path.relative_to(root)): path for path in sorted(root.rglob("*.py"))}
        self.trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.files.items()}
        packages = [name for name, path in self.files.items() if path.name == "__init__.py"]
        self.passed_on = {name: lazily_passed_on(name, self.trees[name]) for name in packages}
        for name in packages:
            for node in self.trees[name].body:
                if isinstance(node, ast.ImportFrom):
                    source = self.absolute(name, node)
                    self.passed_on[name] |= {(a.asname or a.name): f"{source}.{a.name}" for a in node.names}

    def absolute(self, module: str, node: ast.ImportFrom) -> str:
        """Return the module that an import takes its names from, relative ones resolved."""
        if not node.level:
            return node.module or ""
        is_package = self.files[module].name == "__init__.py"
        parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
        return ".".join([*parents, *([node.module] if node.module else [])])

    def defining(self, name: str) -> str | None:
        """Return the module that defines `package.name` or is it; None if it is none of ours."""
        for _ in range(len(self.files)):
            if name in self.files:
                return name
            module, _, attribute = name.rpartition(".")
            if module not in self.files:
                return None
            if attribute not in self.passed_on.get(module, {}):
                return module
            name = self.passed_on[module][attribute]
        raise SystemExit(f"{name} is passed on in a circle of packages")

    def graph(self) -> Graph:
        """Return which file imports which, and where."""
        found: Graph = {name: {} for name in self.files}
        for module, tree in self.trees.items():
            for node in counted(tree):
                for name in self.imported(module, node):
                    target = self.defining(name)
                    if target is not None and target != module:
                        found[module].setdefault(target, node.lineno)
        return found

    def imported(self, module: str, node: ast.stmt | ast.expr) -> list[str]:
        """Return the full names that a statement or a call imports."""
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            return [f"{self.absolute(module, node)}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Call) and is_called(node, "import_module") and isinstance(node.args[0], ast.Constant):
            return [str(node.args[0].value)]
        if isinstance(node, ast.Call) and is_called(node, "lazy_exports"):
            return list(self.passed_on.get(module, {}).values())
        return []


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def is_called(node: ast.Call, name: str) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id == name


def lazily_passed_on(package: str, tree: ast.Module) -> dict[str, str]:
    """Return what `lazy_exports(__name__, {module: names})` gives: the full name of each name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and is_called(node, "lazy_exports"):
            modules = ast.literal_eval(node.args[1])
            return {name: f"{package}.{module}.{name}" for module, names in modules.items() for name in names}
    return {}


def counted(node: ast.AST) -> Iterator[ast.stmt | ast.expr]:
    """Yield what stands in a module and runs, so nothing under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            for other in child.orelse:
                yield other
                yield from counted(other)
            continue
        if isinstance(child, ast.stmt | ast.expr):
            yield child
        yield from counted(child)


def circles(graph: Graph) -> list[list[str]]:
    """Return the circles: for each import that lies on one, a shortest that it closes, each only once."""
    found: dict[frozenset[str], list[str]] = {}
    for module, targets in graph.items():
        for target in targets:
            way = shortest(graph, target, module)
            if way is not None:
                found.setdefault(frozenset(way), [module, *way[:-1]])
    return list(found.values())


def shortest(graph: Graph, start: str, end: str) -> list[str] | None:
    """Return a shortest way of imports from a module to another."""
    before = {start: start}
    waiting = deque([start])
    while waiting:
        module = waiting.popleft()
        if module == end:
            way = [end]
            while way[-1] != start:
                way.append(before[way[-1]])
            return way[::-1]
        for target in graph[module]:
            if target not in before:
                before[target] = module
                waiting.append(target)
    return None


def main(root: Path = Path("src")) -> int:
    sources = Sources(root)
    graph = sources.graph()
    found = circles(graph)
    for way in found:
        steps = [
            f"{sources.files[target]} (line {graph[module][target]})"
            for module, target in zip(way, [*way[1:], way[0]], strict=True)
        ]
        print(f"circle: {sources.files[way[0]]} imports {', which imports '.join(steps)}.")
    if not found:
        print("circles: none")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
