"""`fs3/_native.pyi` says exactly what the native module has."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import fs3
from fs3 import _native, native

STUB = ast.parse((Path(fs3.__file__).parent / "_native.pyi").read_text())
# What every class has, or what the typing of the stub needs.
IMPLICIT = {"T_co", "T"}
# Special methods that the stub names.
SPECIAL = {"__await__", "__getitem__", "__len__"}
# What Python 3.11 has no name for in the binary.
UNNAMED = {"__buffer__"}


def _names(body: list[ast.stmt]) -> set[str]:
    found = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def _public(thing: Any) -> set[str]:
    inherited = set(dir(object)) | {"__module__", "__doc__"}
    return {name for name in vars(thing) if name not in inherited and (not name.startswith("_") or name in SPECIAL)}


def _is_property(node: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)


def _stub_parameters(node: ast.FunctionDef) -> list[tuple[str, bool, str]]:
    """(name, keyword-only, default as written or "") without self."""
    arguments = node.args
    plain = arguments.posonlyargs + arguments.args
    defaults = [""] * (len(plain) - len(arguments.defaults)) + [ast.unparse(d) for d in arguments.defaults]
    found = [(a.arg, False, d) for a, d in zip(plain, defaults, strict=True) if a.arg not in ("self", "cls")]
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append((argument.arg, True, ast.unparse(default) if default is not None else ""))
    return found


def _check_signature(where: str, node: ast.FunctionDef, function: Any) -> None:
    actual = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
    stub = _stub_parameters(node)
    assert [(name, only) for name, only, _ in stub] == [
        (p.name, p.kind is inspect.Parameter.KEYWORD_ONLY) for p in actual
    ], where
    for (name, _, default), parameter in zip(stub, actual, strict=True):
        assert (default != "") == (parameter.default is not inspect.Parameter.empty), f"{where}: default of {name}"
        if default not in ("", "...") and parameter.default is not ...:
            assert ast.literal_eval(default) == parameter.default, f"{where}: default of {name}"


def test_the_stub_names_exactly_what_the_module_has() -> None:
    actual = {name for name in vars(_native) if not name.startswith("_")} | {"__version__"}
    assert _names(STUB.body) - IMPLICIT == actual


def test_every_class_has_exactly_the_members_of_the_stub() -> None:
    for node in STUB.body:
        if isinstance(node, ast.ClassDef):
            assert _names(node.body) - UNNAMED - {"__new__"} == _public(getattr(_native, node.name)), node.name


def test_every_signature_is_that_of_the_stub() -> None:
    checked = 0
    for node in STUB.body:
        if isinstance(node, ast.FunctionDef):
            _check_signature(node.name, node, getattr(_native, node.name))
            checked += 1
        elif isinstance(node, ast.ClassDef):
            cls = getattr(_native, node.name)
            for member in node.body:
                if not isinstance(member, ast.FunctionDef) or _is_property(member) or member.name in UNNAMED:
                    continue
                function = cls if member.name == "__new__" else getattr(cls, member.name)
                _check_signature(f"{node.name}.{member.name}", member, function)
                checked += 1
    assert checked > 50


def test_everything_is_reexported() -> None:
    assert set(native.__all__) == _names(STUB.body) - IMPLICIT
    assert all(getattr(native, name) is getattr(_native, name) for name in native.__all__)
