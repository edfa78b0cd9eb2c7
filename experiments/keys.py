"""What a stage's key is made of: the code that it runs, the libraries that this code imports, and the files that it reads.

The code is an import closure: the module that holds the stage's function, every module of ours that it imports (at its top
or inside a function), and so on; imports for type checkers alone do not count, nor do comments and docstrings. Of libraries
the installed versions count; what a library imports in turn it pins itself. Nothing else is left out, as a writer or a
progress bar that "changes no number": a stage that runs once too often costs minutes, a stale one is a wrong number.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

STARTED = time.time()  # code is read once
OURS = ("experiments", "gradmatch", "estimators")  # read as source wherever they are installed
NAMED = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):[A-Za-z_]\w*")  # package.module:function
ABSENT = "absent"  # instead of a version
STATEMENTS = ("body", "orelse", "finalbody", "handlers", "cases")  # where a statement holds others


@dataclass(frozen=True)
class Source:
    """One module as it counts: the hash of its code, and the names of the modules that it imports."""

    digest: str
    imports: frozenset[str]


def code_of(function: str, settings: Any = None) -> dict[str, dict[str, str]]:
    """Digests of the modules, and versions of the libraries, that `package.module:function` needs, by name.

    Functions that the settings name in the same way (a scorer of one's own) are needed too.

    Raises:
        ModuleNotFoundError: there is no source of the function's module.
    """
    module = function.partition(":")[0]
    if locate(module) is None:
        raise ModuleNotFoundError(f"no code found for {module!r}, whose function a stage names")
    found: dict[str, dict[str, str]] = {"modules": {}, "libraries": {}}
    for name in (module, *(named.partition(":")[0] for named in _named(settings))):
        for kind, own in _closure(name).items():
            found[kind] |= own
    return found


def changed_since(moment: float, function: str, settings: Any = None) -> list[str]:
    """The modules of `code_of` whose source was written after a moment (seconds since the epoch)."""
    paths = {name: locate(name) for name in code_of(function, settings)["modules"]}
    return [name for name, path in paths.items() if path and path.stat().st_mtime > moment]


def _named(settings: Any) -> Iterator[str]:
    """Every `package.module:function` among the values of settings."""
    if isinstance(settings, str):
        if NAMED.fullmatch(settings):
            yield settings
    elif isinstance(settings, Mapping):
        for value in settings.values():
            yield from _named(value)
    elif isinstance(settings, Sequence):
        for value in settings:
            yield from _named(value)


@cache
def _closure(module: str) -> dict[str, dict[str, str]]:
    modules: dict[str, str] = {}
    libraries: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        top = name.partition(".")[0]
        if name in modules or top in libraries or top in sys.stdlib_module_names:
            continue
        if locate(name) is not None:
            source = read(name)
            modules[name] = source.digest
            waiting += source.imports
        elif _root(top) is None:
            libraries[top] = version_of(top)
    return {"modules": modules, "libraries": libraries}


@cache
def _root(top: str) -> Path | None:
    """The file of a top-level module or package of ours, or of one that no installed distribution holds (a user's own)."""
    try:
        spec = importlib.util.find_spec(top)  # which imports nothing
    except ValueError:  # made by hand, without a spec
        return None
    if spec is None or not str(spec.origin).endswith(".py") or top in sys.stdlib_module_names:
        return None
    return Path(str(spec.origin)) if top in OURS or version_of(top) == ABSENT else None


@cache
def locate(name: str) -> Path | None:
    """The source of a module of ours, or of a user's; None where there is none, as of a library."""
    top, *rest = name.split(".")
    path = _root(top)
    for part in rest:
        if path is None or path.name != "__init__.py":
            return None
        inside = (path.with_name(f"{part}.py"), path.parent / part / "__init__.py")
        path = next((file for file in inside if file.is_file()), None)
    return path


@cache
def read(name: str) -> Source:
    """A module's code, blind to comments, docstrings, layout and type-only imports. C sources beside it count as its own."""
    path = locate(name)
    assert path is not None  # the closure asks for what it has located
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports, waiting = set(_with_parents(package)), [tree]
    while waiting:
        node: Any = waiting.pop()
        if isinstance(node, ast.If) and _name_of(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
        elif isinstance(getattr(node, "body", None), list):
            node.body = [part for part in node.body if not _is_bare_string(part)]
        imports |= set(_imported(node, package))
        for field in STATEMENTS:
            waiting += getattr(node, field, ())
    parts = [ast.dump(tree).encode(), *(file.read_bytes() for file in sorted(path.parent.glob("*.c")))]
    return Source(hashlib.sha256(b"\0".join(parts)).hexdigest(), frozenset(imports))


def _imported(node: ast.AST, package: str) -> Iterator[str]:
    """The modules that an import statement loads, their packages among them."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield from _with_parents(alias.name)
            if locate(alias.name) is not None:  # any of its attributes may be used
                yield from _lazy(alias.name).values()
    elif isinstance(node, ast.ImportFrom):
        module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
        yield from _with_parents(module)
        if locate(module) is not None:
            for alias in node.names:
                if locate(f"{module}.{alias.name}") is not None:
                    yield f"{module}.{alias.name}"
                elif table := _lazy(module):
                    yield from [table[alias.name]] if alias.name in table else table.values()


def _with_parents(module: str) -> list[str]:
    parts = module.split(".") if module else []  # a module outside packages has none above it
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


@cache
def _lazy(module: str) -> Mapping[str, str]:
    """Public name -> module, of a package that loads them on first use."""
    path = locate(module)
    assert path is not None
    text = path.read_text(encoding="utf-8")
    return dict(_tables(ast.parse(text))) if "\ndef __getattr__(" in text else {}


def _tables(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Entries of the module's tables whose value is the name of a module of ours."""
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                name = getattr(value, "value", None)
                if isinstance(key, ast.Constant) and isinstance(name, str) and locate(name.split(":")[0]):
                    yield str(key.value), name.split(":")[0]


def _name_of(node: ast.AST) -> str:
    return str(getattr(node, "id", getattr(node, "attr", "")))


def _is_bare_string(node: ast.AST) -> bool:
    """A string that stands alone does nothing: a docstring."""
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


@cache
def version_of(library: str) -> str:
    """Version of the distribution that holds a top-level module; ABSENT where none is installed."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        names = _titled().get(library) or metadata.packages_distributions().get(library, [])
        return ", ".join(f"{name} {metadata.version(name)}" for name in sorted(set(names))) or ABSENT


@cache
def _titled() -> Mapping[str, list[str]]:
    """Top-level module -> distributions that say in a file of its own that they hold it; looking through all files is slow."""
    found: dict[str, list[str]] = {}
    for distribution in metadata.distributions():
        for name in (distribution.read_text("top_level.txt") or "").split():
            found.setdefault(name, []).append(distribution.metadata["Name"])
    return found


def content_digest(path: Path) -> str:
    """Hash of a file, or of all files under a folder (a model's, a data set's) with their names."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    parts = []
    for file in files:
        state = file.stat()
        parts.append(
            [file.relative_to(path).as_posix(), _file_digest(file, state.st_mtime_ns, state.st_size)]
        )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@cache
def _file_digest(file: Path, changed: int, size: int) -> str:
    """Hash of a file, read again where it was `changed` or has another `size`."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()
