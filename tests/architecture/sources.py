"""Reads the house as text. Nothing is imported: the laws hold for what is written, not for what happens to run."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("omnilmm", "deployments", "cluster")  # each may import those to its left


@dataclass(frozen=True)
class Source:
    """One parsed file; `path` is relative to the root of the repository, with forward slashes."""

    path: str
    tree: ast.Module

    @classmethod
    def parse(cls, path: str, text: str) -> Source:
        return cls(path, ast.parse(text, path))

    @property
    def module(self) -> str:
        """Dotted name; a package for its `__init__.py`."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def package(self) -> str:
        """What a relative import starts from."""
        return self.module if self.path.endswith("__init__.py") else self.module.rpartition(".")[0]

    def lives_in(self, homes: tuple[str, ...]) -> bool:
        """Whether the file is one of `homes`, or in one of those that end with a slash."""
        return any(self.path == home or (home.endswith("/") and self.path.startswith(home)) for home in homes)

    def at(self, node: ast.AST, what: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 0)} {what}"


def house() -> tuple[Source, ...]:
    """Every Python file of the three packages."""
    paths = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return tuple(Source.parse(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths)


def imports(source: Source) -> Iterator[tuple[str, ast.AST]]:
    """Full dotted name of everything imported anywhere in the file, under TYPE_CHECKING and in functions too.

    `from omnilmm import errors` gives `omnilmm.errors`; `from torch import load` gives `torch.load`.
    `import_module("x")` and `__import__("x")` count as imports of x.
    """
    for node in ast.walk(source.tree):
        match node:
            case ast.Import(names=names):
                yield from ((alias.name, node) for alias in names)
            case ast.ImportFrom(names=names):
                yield from ((f"{_origin(source, node)}.{alias.name}".strip("."), node) for alias in names)
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]) if _called(func) in DYNAMIC_IMPORTS:
                yield name, node


DYNAMIC_IMPORTS = ("import_module", "__import__")


def references(source: Source) -> Iterator[tuple[str, ast.AST]]:
    """`imports`, and every dotted use of an imported name by its full name, whatever it was imported as."""
    yield from imports(source)
    aliases = _aliases(source)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute | ast.Name):
            head, *rest = dotted(node).split(".")
            for origin in aliases.get(head, ()):
                yield ".".join([origin, *rest]), node


def full_names(source: Source, node: ast.AST) -> tuple[str, ...]:
    """What a name or attribute chain may stand for: its imported origins, or itself."""
    head, *rest = dotted(node).split(".")
    return tuple(".".join([origin, *rest]) for origin in _aliases(source).get(head, {head}))


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain; "?" stands for anything that is not a plain name."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attr):
            return f"{dotted(value)}.{attr}"
        case _:
            return "?"


def report(broken: list[str]) -> str:
    """What a failing law prints: one place a line."""
    return "\n".join(["", *sorted(broken)])


def is_under(name: str, prefix: str) -> bool:
    """Whether the dotted `name` is `prefix` or something inside it."""
    return name == prefix or name.startswith(f"{prefix}.")


def _called(func: ast.expr) -> str:
    return dotted(func).rpartition(".")[2]


def _origin(source: Source, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    base = source.package.split(".")
    return ".".join([*base[: len(base) - node.level + 1], *filter(None, [node.module])])


def _aliases(source: Source) -> dict[str, set[str]]:
    """Local name to the full names it was imported from."""
    aliases: dict[str, set[str]] = defaultdict(set)
    for node in ast.walk(source.tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    aliases[alias.asname or alias.name.partition(".")[0]].add(
                        alias.name if alias.asname else alias.name.partition(".")[0]
                    )
            case ast.ImportFrom(names=names):
                for alias in names:
                    aliases[alias.asname or alias.name].add(f"{_origin(source, node)}.{alias.name}")
    return aliases
