"""Schemas written as Python functions, which are read and never run.

    @pml
    def trip(plan, place, days):
        "You plan trips."
        if plan:
            f"Plan {days:4} days."
        match place:
            case "miami":
                "Miami is hot."
            case "oslo":
                "Oslo is not."

``trip`` is then the text of a schema of that name. A string is text, with all its white space, and ``if`` a module;
``match`` is a union with a module per case, and what it matches is only for the reader. ``{days:4}`` in an f-string, or
``param("days", length=4, scaffold="two")``, is a parameter. ``with user:`` puts a role's tag around what is in it.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NoReturn
from xml.sax.saxutils import quoteattr

from kvstore.errors import BadInput
from kvstore.pml.markup import escaped
from kvstore.pml.words import ROLES


def pml(function: Callable[..., Any]) -> str:
    """The text of the schema that a function describes. Raises ``BadInput`` with the line of what has no meaning."""
    try:
        lines, first = inspect.getsourcelines(function)
        nested = lines[0][:1].isspace()
        tree = ast.parse(("if True:\n" if nested else "") + "".join(lines))
    except (OSError, TypeError, SyntaxError) as error:
        raise BadInput(f"the source of {function!r} cannot be read; write it with def, in a file") from error
    found = next((node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)), None)
    if found is None:
        raise BadInput(f"{function!r} is no function of its own; write it with def")
    return _Writer(f"{found.name}()", first - 1 - nested).schema(found)


class _Writer:
    """Writes one function as markup."""

    def __init__(self, name: str, skipped: int) -> None:
        self._name, self._skipped = name, skipped

    def schema(self, function: ast.FunctionDef) -> str:
        return f"<schema name={quoteattr(function.name)}>{self._body(function.body)}</schema>"

    def _body(self, statements: Iterable[ast.stmt]) -> str:
        return "".join(map(self._statement, statements))

    def _statement(self, node: ast.stmt) -> str:
        if isinstance(node, ast.Pass):
            return ""
        if isinstance(node, ast.Expr):
            return self._expression(node.value)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name):
            if node.orelse:
                self._refuse(node.orelse[0], "modules that exclude each other are the cases of a match")
            return self._module(node.test.id, node.body)
        if isinstance(node, ast.Match):
            return f"<union>{''.join(map(self._case, node.cases))}</union>"
        if isinstance(node, ast.With) and len(node.items) == 1:
            role = node.items[0].context_expr
            if isinstance(role, ast.Name) and role.id in ROLES and node.items[0].optional_vars is None:
                return f"<{role.id}>{self._body(node.body)}</{role.id}>"
        return self._refuse(node, "only strings, param(), if NAME:, match: and with ROLE: have a meaning here")

    def _module(self, name: str, body: Iterable[ast.stmt]) -> str:
        return f"<module name={quoteattr(name)}>{self._body(body)}</module>"

    def _case(self, case: ast.match_case) -> str:
        pattern = case.pattern
        if isinstance(pattern, ast.MatchValue) and isinstance(pattern.value, ast.Constant) and case.guard is None:
            name = pattern.value.value
            if isinstance(name, str):
                return self._module(name, case.body)
        return self._refuse(pattern, 'a case is the name of a module: case "name":')

    def _expression(self, node: ast.expr) -> str:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return escaped(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(map(self._expression, node.values))
        if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name) and node.conversion == -1:
            spec = node.format_spec.values if isinstance(node.format_spec, ast.JoinedStr) else []
            if len(spec) == 1 and isinstance(spec[0], ast.Constant) and str(spec[0].value).isdecimal():
                return _parameter(node.value.id, {"length": spec[0].value})
            self._refuse(node, f"give the parameter its length in tokens: {{{node.value.id}:8}}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "param":
            return self._param(node)
        return self._refuse(
            node, "text is a string or an f-string of {name:length}, a parameter param(name, length=...)"
        )

    def _param(self, node: ast.Call) -> str:
        options = {option.arg: option.value for option in node.keywords}
        values = [value.value for value in (*node.args, *options.values()) if isinstance(value, ast.Constant)]
        if len(node.args) != 1 or len(values) != 1 + len(options) or not {"length"} <= options.keys() <= OPTIONS:
            self._refuse(node, 'a parameter is param("name", length=8), with scaffold="..." if need be')
        return _parameter(values[0], dict(zip(map(str, options), values[1:], strict=True)))

    def _refuse(self, node: ast.AST, why: str) -> NoReturn:
        raise BadInput(f"{self._name}, line {getattr(node, 'lineno', 1) + self._skipped}: {why}")


OPTIONS = {"length", "scaffold"}


def _parameter(name: object, options: dict[str, Any]) -> str:
    attributes = "".join(f" {key}={quoteattr(str(value))}" for key, value in {"name": name, **options}.items())
    return f"<parameter{attributes}/>"
