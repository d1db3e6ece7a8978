"""Descriptions of the catalog's entries for listings, read from their source text, so that no package is imported."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from registry.catalog import Entry


@dataclass(frozen=True)
class Description:
    """Description of an entry for listings, read from its source text.

    Attributes:
        summary: first line of the class's docstring.
        paper: citation, or ''.
        sends: for an algorithm, what is sent and which model predicts, or ''.
        broken: reason why it cannot be loaded, or ''.
    """

    summary: str = ""
    paper: str = ""
    sends: str = ""
    broken: str = ""


def describe(entry: Entry) -> Description:
    """Describe an entry without importing its package."""
    module, _, attribute = entry.target.partition(":")
    try:
        path = _source_file(module)
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    except (ImportError, OSError, SyntaxError, ValueError) as error:
        return Description(broken=f"{type(error).__name__}: {error}")
    missing = _missing_imports(tree)
    if missing:
        return Description(broken=f"needs the package '{missing}', which is not installed")
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == attribute:
            return Description(_first_line(node), _class_text(node, "paper"), _class_text(node, "sends"))
    if attribute in _bound_names(tree):  # made by a call or imported: it exists, but has no text here
        return Description()
    return Description(broken=f"{module} has no '{attribute}'")


def _source_file(module: str) -> Path:
    """Find a module's source file. Unlike `importlib.util.find_spec`, import no parent package."""
    top, *rest = module.split(".")
    spec: ModuleSpec | None = importlib.util.find_spec(top)
    name = top
    for part in rest:
        if spec is None:
            break
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, spec.submodule_search_locations or [])
    if spec is None:
        raise ModuleNotFoundError(f"No module named '{name}'")
    if not spec.origin or not spec.origin.endswith(".py"):
        raise ImportError(f"no source text for '{name}'")
    return Path(spec.origin)


def _missing_imports(tree: ast.Module) -> str:
    """Return the first package of a top-level import that is not installed, or ''."""
    for node in tree.body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        for name in names:
            top = name.partition(".")[0]
            if importlib.util.find_spec(top) is None:
                return top
    return ""


def _first_line(node: ast.ClassDef) -> str:
    text = ast.get_docstring(node) or ""
    return text.partition("\n")[0]


def _class_text(node: ast.ClassDef, name: str) -> str:
    """Return the text that a class body assigns to `name`, or ''."""
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        value = getattr(statement, "value", None)
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""
    return ""


def _bound_names(tree: ast.Module) -> set[str]:
    """Return the names that a module's top level binds."""
    names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names
