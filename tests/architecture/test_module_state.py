"""A module is definitions and constants: importing it does no work, and it keeps nothing that could change.

A container that could change is allowed as a constant only where its annotation (Mapping, Sequence, Set, Collection)
lets mypy refuse every change; tuples, frozensets and MappingProxyType need none.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

import pytest
from sources import Source, dotted, full_names, house, report

READ_ONLY = {"Mapping", "Sequence", "Set", "AbstractSet", "Collection"}
FREEZERS = {"frozenset", "tuple", "types.MappingProxyType", "enum.Enum", "collections.namedtuple"}
CHANGEABLE = {
    "list",
    "dict",
    "set",
    "bytearray",
    "dict.fromkeys",
    "collections.defaultdict",
    "collections.deque",
    "collections.Counter",
    "collections.OrderedDict",
    "collections.ChainMap",
    "weakref.WeakKeyDictionary",
    "weakref.WeakValueDictionary",
    "weakref.WeakSet",
    "itertools.count",
}
MEMORIES = {"functools.cache", "functools.lru_cache"}

# Calls that only describe or compute a constant. Decorators are definitions and may be anything.
CONSTANT_CALLS = FREEZERS | {
    *(
        "object",
        "range",
        "int",
        "float",
        "str",
        "bytes",
        "bool",
        "len",
        "min",
        "max",
        "sum",
        "abs",
        "round",
        "property",
        "type",
    ),
    *(
        "re.compile",
        "re.escape",
        "re.sub",
        "json.JSONEncoder",
        "json.JSONDecoder",
        "struct.Struct",
        "logging.getLogger",
        "pathlib.Path",
        "pathlib.PurePosixPath",
    ),
    *("typing.TypeVar", "typing.TypeVarTuple", "typing.ParamSpec", "typing.NewType", "typing.cast"),
    *("dataclasses.field", "enum.auto", "contextvars.ContextVar", "datetime.timedelta", "fractions.Fraction"),
    *("ipaddress.ip_network", "ipaddress.ip_address", "operator.attrgetter", "operator.itemgetter"),
    *("pydantic.Field", "pydantic.ConfigDict", "pydantic.PrivateAttr", "pydantic.StringConstraints"),
    *("pydantic.AfterValidator", "pydantic.BeforeValidator", "pydantic.Discriminator", "pydantic.Tag"),
    *("pydantic.TypeAdapter", "typer.Typer", "typer.Option", "typer.Argument"),
}
CONSTANT_METHODS = {"encode", "decode", "join", "split", "strip", "replace", "format", "lower", "upper", "to_bytes"}
CONSTANT_METHODS |= {"keys", "values", "items"}


def check_module(source: Source, frozen: frozenset[str] = frozenset()) -> list[str]:
    """Work at import, things that could change, and ways to change them. `frozen` are classes of frozen records."""
    broken = [source.at(node, "global") for node in ast.walk(source.tree) if isinstance(node, ast.Global)]
    for node in source.tree.body:
        broken += _check_statement(source, node, frozen)
    return broken


def _check_statement(source: Source, node: ast.stmt, frozen: frozenset[str]) -> Iterator[str]:
    match node:
        case ast.Import() | ast.ImportFrom() | ast.Pass() | ast.Expr(value=ast.Constant()):
            pass
        case ast.Expr(value=ast.Call(func=ast.Attribute(attr="add_typer"))):
            pass  # the one way to put a command under another
        case ast.Expr(value=ast.Call(func=ast.Call(func=ast.Attribute(attr="command")))):  # a decorator, spelled out
            pass  # the one way to put a command under another
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            for decorator in node.decorator_list:
                called = decorator.func if isinstance(decorator, ast.Call) else decorator
                if MEMORIES & {*full_names(source, called)}:
                    yield source.at(node, f"{node.name} remembers its calls")
            yield from _check_calls(source, [*node.args.defaults, *filter(None, node.args.kw_defaults)], frozen)
        case ast.ClassDef():
            for inner in node.body:
                if isinstance(inner, ast.Assign | ast.AnnAssign):
                    yield from _check_calls(source, filter(None, [inner.value]), frozen)
                else:
                    yield from _check_statement(source, inner, frozen)
        case ast.Assign() | ast.AnnAssign():
            yield from _check_constant(source, node, frozen)
        case ast.If() if _is_main_guard(node):
            pass
        case ast.If(body=body, orelse=orelse) | ast.Try(body=body, orelse=orelse):
            handlers = [inner for handler in getattr(node, "handlers", []) for inner in handler.body]
            for inner in [*body, *handlers, *orelse]:
                yield from _check_statement(source, inner, frozen)
        case _:
            yield source.at(node, f"{type(node).__name__.lower()} runs at import")


def _check_constant(source: Source, node: ast.Assign | ast.AnnAssign, frozen: frozenset[str]) -> Iterator[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = [name for target in targets for name in (target.elts if isinstance(target, ast.Tuple) else [target])]
    if not all(isinstance(name, ast.Name) for name in names):
        yield source.at(node, "changes something at import")
        return
    if node.value is None or dotted(names[0]) == "__all__":
        return
    if not (isinstance(node, ast.AnnAssign) and _is_read_only(source, node.annotation)):
        for part in _thawed(source, node.value):
            yield source.at(part, f"{dotted(names[0])} could change: make it a tuple or a frozenset, or annotate it")
    yield from _check_calls(source, [node.value], frozen)


def _thawed(source: Source, value: ast.expr) -> Iterator[ast.expr]:
    """The parts of a constant that could be changed in place."""
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        yield value
    elif isinstance(value, ast.Call):
        names = {*full_names(source, value.func)}
        if names & CHANGEABLE:
            yield value
        elif not names & FREEZERS:
            for argument in [*value.args, *(keyword.value for keyword in value.keywords)]:
                yield from _thawed(source, argument)
    elif isinstance(value, ast.BinOp):
        yield from _thawed(source, value.left)  # of two containers, the left one decides what the result is
    elif isinstance(value, ast.Tuple | ast.IfExp | ast.Starred):
        for part in ast.iter_child_nodes(value):
            if isinstance(part, ast.expr):
                yield from _thawed(source, part)


def _check_calls(source: Source, values: Iterable[ast.AST], frozen: frozenset[str]) -> Iterator[str]:
    own = {node.name: node for node in source.tree.body if isinstance(node, ast.FunctionDef)}
    entered: set[str] = set()
    waiting = [*_calls(values)]
    while waiting:
        call = waiting.pop()
        names = {*full_names(source, call.func)}
        method = dotted(call.func).rpartition(".")[2] if isinstance(call.func, ast.Attribute) else ""
        is_record = {name.rpartition(".")[2] for name in names} & frozen
        if functions := names & own.keys():  # a function of this file is as harmless as the calls in it
            waiting += [inner for name in functions - entered for inner in _calls(own[name].body)]
            entered |= functions
        elif not (names & (CONSTANT_CALLS | CHANGEABLE) or method in CONSTANT_METHODS or is_record):
            yield source.at(call, f"{dotted(call.func)} is called at import")


def _calls(values: Iterable[ast.AST]) -> Iterator[ast.Call]:
    """Calls made when the values are built: those inside a lambda wait until it is called."""
    waiting: list[ast.AST] = list(values)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Call):
            yield node
        if not isinstance(node, ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def _is_read_only(source: Source, annotation: ast.expr) -> bool:
    outer = annotation.value if isinstance(annotation, ast.Subscript) else annotation
    if dotted(outer).rpartition(".")[2] in {"Final", "ClassVar"} and isinstance(annotation, ast.Subscript):
        return _is_read_only(source, annotation.slice)
    return any(name.rpartition(".")[2] in READ_ONLY for name in full_names(source, outer))


def _is_main_guard(node: ast.If) -> bool:
    return isinstance(node.test, ast.Compare) and dotted(node.test.left) == "__name__"


def frozen_classes(sources: tuple[Source, ...]) -> frozenset[str]:
    """Frozen dataclasses and pydantic models, enums, named tuples by name: making one only writes down a constant."""
    classes = [node for source in sources for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)]
    frozen = {node.name for node in classes if _is_frozen(node)}
    while heirs := {node.name for node in classes if _base_names(node) & frozen} - frozen:
        frozen |= heirs  # dataclasses, pydantic models and enums hand their frozenness down
    return frozenset(frozen)


def _is_frozen(node: ast.ClassDef) -> bool:
    made_by = [decorator for decorator in node.decorator_list if isinstance(decorator, ast.Call)]
    made_by += [line.value for line in node.body if isinstance(line, ast.Assign) and isinstance(line.value, ast.Call)]
    return bool(_base_names(node) & {"NamedTuple", "Enum", "StrEnum", "IntEnum"}) or any(
        dotted(call.func).rpartition(".")[2] in {"dataclass", "ConfigDict"}
        and any(ast.unparse(keyword) == "frozen=True" for keyword in call.keywords)
        for call in made_by
    )


def _base_names(node: ast.ClassDef) -> set[str]:
    return {dotted(base).rpartition(".")[2] for base in node.bases}


def test_modules_keep_no_state_and_do_no_work() -> None:
    sources = house()
    frozen = frozen_classes(sources)
    broken = [line for source in sources for line in check_module(source, frozen)]
    assert not broken, report(broken)


@pytest.mark.parametrize(
    "text",
    [
        "seen = []",
        "SEEN = {}",
        "CODES = {'a', 'b'}",
        "TABLE: dict[str, int] = {'a': 1}",
        "PAIRS = (1, [2])",
        "SQUARES = [x * x for x in range(3)]",
        "from collections import defaultdict as dd\nwaiting = dd(list)",
        "import collections\nQUEUE = collections.deque()",
        "count = 0\ndef f():\n    global count\n    count += 1",
        "A = 1\nA += 1",
        "from typing import Final\nNAMES: Final = []",
        "import functools\n@functools.cache\ndef f(): ...",
        "from functools import lru_cache\n@lru_cache(maxsize=8)\ndef f(): ...",
        "print('hello')",
        "import torch\ntorch.set_num_threads(1)",
        "import torch\ntorch.backends.cudnn.benchmark = True",
        "import os\nos.environ['A'] = '1'",
        "TEXT = open('x').read()",
        "import time\nSTART = time.time()",
        "for x in range(3):\n    pass",
        "with open('x') as f:\n    pass",
        "class A:\n    secret = make_secret()",
        "class A:\n    print('hello')",
        "def f(now=clock()): ...",
        "TEXT = read()\ndef read():\n    return tidy(1)\ndef tidy(x):\n    return open('x')",
        "TABLE = {'a'} | OTHER",
        "engine = Engine()",
        "try:\n    import a\nexcept ImportError:\n    warn()",
    ],
)
def test_state_and_work_are_found(text: str) -> None:
    assert check_module(Source.parse("omnilmm/flow.py", text)) != []


@pytest.mark.parametrize(
    "text",
    [
        '"""Words."""\nfrom __future__ import annotations\nimport re\nA = 1\nPATTERN = re.compile("a")',
        "CODES = frozenset({'a', 'b'})",
        "from types import MappingProxyType\nTABLE = MappingProxyType({'a': 1})",
        "from collections.abc import Mapping\nTABLE: Mapping[str, int] = {'a': 1}",
        "from collections.abc import Sequence\nfrom typing import Final\nSIZES: Final[Sequence[int]] = [1, 2]",
        "__all__ = ['a']",
        "from collections.abc import Callable\nProgress = Callable[[int, int], None]",
        "from typing import Annotated\nfrom pydantic import Field\nCount = Annotated[int, Field(ge=0)]",
        "import logging\nlogger = logging.getLogger(__name__)",
        "from dataclasses import dataclass, field\n@dataclass\nclass A:\n    x: list = field(default_factory=list)",
        "@dataclass(frozen=True)\nclass Limits:\n    a: int = 1\nDEFAULT = Limits(a=2)",
        "from pydantic import ConfigDict\n"
        "class A:\n    model_config = ConfigDict(frozen=True)\nclass B(A): ...\nDEFAULT = B()",
        "import typer\napp = typer.Typer()\nkeys = typer.Typer()\napp.add_typer(keys, name='keys')",
        "import typer\nfrom cluster.train import train\napp = typer.Typer()\napp.command('train')(train)",
        "from functools import cached_property\nclass A:\n    @cached_property\n    def f(self): ...",
        "PREFIX = 'a'.encode() + bytes(4)",
        "import re\ndef tidy(x):\n    return re.sub('a', 'b', x.strip())\nTEXT = tidy(' a ')",
        "A = frozenset({1})\nB = A | {2}",
        "MAKE = lambda: Engine()",
        "if __name__ == '__main__':\n    main()",
        "try:\n    import a\nexcept ImportError:\n    a = None",
        "def f():\n    seen = {}\n    return seen",
    ],
)
def test_definitions_and_constants_pass(text: str) -> None:
    source = Source.parse("omnilmm/flow.py", text)
    assert check_module(source, frozen_classes((source,))) == []


def test_only_frozen_records_are_constants() -> None:
    thawed = Source.parse("omnilmm/flow.py", "@dataclass\nclass Limits:\n    a: int = 1\nDEFAULT = Limits(a=2)")
    assert frozen_classes((thawed,)) == frozenset()
    assert check_module(thawed) != []
