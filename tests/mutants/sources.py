"""What there is to mutate: the places of a module, and the source with each changed."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import attrs
import cosmic_ray.plugins
import parso
from cosmic_ray.ast import ast_nodes
from cosmic_ray.operators.operator import Operator
from parso.python.tree import Keyword

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "trio_pool"

COMPARISONS = {
    *("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is", "Lt_LtE", "Lt_GtE", "LtE_Lt"),
    *("LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt"),
}
BINARIES = {
    *("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_FloorDiv"),
    *("Pow_Mul", "BitOr_BitAnd", "BitAnd_BitOr", "LShift_RShift", "RShift_LShift"),
}
OPERATORS = {
    *(f"ReplaceComparisonOperator_{name}" for name in COMPARISONS),
    *(f"ReplaceBinaryOperator_{name}" for name in BINARIES),
    *("ReplaceUnaryOperator_Delete_Not", "ReplaceUnaryOperator_Delete_USub"),
    *("AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr"),
    *("ReplaceOrWithAnd", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak"),
    *("ExceptionReplacer", "NumberReplacer", "RemoveDecorator"),
    "ZeroIterationForLoop",
}


class DeleteStatement(Operator):  # type: ignore[misc]
    """Takes out a call, an assignment to an attribute or item, or a deletion."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if node.type == "simple_stmt" and self._is_deletable(node.children[0]):
            yield node.children[0].start_pos, node.children[0].end_pos

    def _is_deletable(self, node: Any) -> bool:
        if node.type == "del_stmt":
            return True
        if node.type in {"atom_expr", "power"}:
            return bool(node.get_last_leaf() == ")")
        if node.type != "expr_stmt":
            return False
        target, sign = node.children[0], node.children[1]
        if sign.type == "annassign":
            return False
        return sign.value != "=" or target.type in {"atom_expr", "power"}

    def mutate(self, node: Any, index: int) -> Any:
        first = node.children[0].get_first_leaf()
        node.children[0] = Keyword("pass", first.start_pos, prefix=first.prefix)
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


# What a mutant is known by, as lines move.
KEY = ("module", "function", "operator", "was", "becomes")


@attrs.frozen
class Mutant:
    """One change of one module."""

    module: str
    function: str
    operator: str
    line: int
    was: str
    becomes: str
    source: str = attrs.field(repr=False, eq=False)

    @property
    def place(self) -> tuple[Any, ...]:
        return (self.line, *(getattr(self, field) for field in KEY))


def _is_program(source: str) -> bool:
    try:
        compile(source, "mutant", "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return True


class Module:
    """The source of one module, and what is where in it."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.source = path.read_text(encoding="utf-8")
        self.lines = self.source.splitlines()
        self._scopes: list[tuple[int, int, str]] = []
        self._statements: dict[int, tuple[int, int]] = {}
        self._skipped: set[tuple[int, int]] = set()
        self._skipped_lines: set[int] = set()
        self._compiled: CodeType | None = None
        self._visit(ast.parse(self.source), ())

    def _visit(self, node: ast.AST, names: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            inner = names
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inner = (*names, child.name)
                scope = (child.lineno, child.end_lineno or 0, ".".join(inner))
                self._scopes.append(scope)
            if isinstance(child, ast.stmt):
                self._note_statement(child)
            if self._is_skipped(child):
                end = child.end_lineno or child.lineno  # type: ignore[attr-defined]
                self._skipped_lines.update(range(child.lineno, end + 1))  # type: ignore[attr-defined]
            for field in ("annotation", "returns"):
                part = getattr(child, field, None)
                if isinstance(part, ast.expr):
                    self._skip(part)
            if isinstance(child, ast.Call) and _name_of(child) == "cancel":
                for keyword in child.keywords:
                    self._skip(keyword.value)
            self._visit(child, inner)

    def _note_statement(self, node: ast.stmt) -> None:
        body = getattr(node, "body", None) or getattr(node, "cases", None)
        first, last = node.lineno, node.end_lineno or node.lineno
        if body:
            inner = body[0]
            inner = getattr(inner, "pattern", inner)
            last = max(first, inner.lineno - 1)
        for line in range(first, last + 1):
            self._statements[line] = (first, last)

    def _is_skipped(self, node: ast.AST) -> bool:
        if isinstance(node, ast.If):
            return ast.unparse(node.test) == "TYPE_CHECKING"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            decorators = {ast.unparse(name) for name in node.decorator_list}
            return node.name == "__repr__" or "overload" in decorators
        if isinstance(node, ast.ClassDef):
            return any(ast.unparse(base).startswith("Protocol") for base in node.bases)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            return ast.unparse(node.value.func).startswith("log.")
        return isinstance(node, (ast.Assert, ast.Import, ast.ImportFrom))

    def _skip(self, node: ast.expr) -> None:
        for line in range(node.lineno, (node.end_lineno or 0) + 1):
            text = self.lines[line - 1]
            start, end = 0, len(text)
            if line == node.lineno:
                start = len(text.encode()[: node.col_offset].decode())
            if line == node.end_lineno:
                end = len(text.encode()[: node.end_col_offset].decode())
            self._skipped.update((line, column) for column in range(start, end))

    def compiled(self, path: str) -> CodeType:
        """Compile it as it is."""
        if self._compiled is None:
            self._compiled = compile(self.source, path, "exec", dont_inherit=True)
        return self._compiled

    def function_at(self, line: int) -> str:
        """Name the innermost function or class that a line is in."""
        inside = [scope for scope in self._scopes if scope[0] <= line <= scope[1]]
        return max(inside)[2] if inside else ""

    def statement_at(self, line: int) -> tuple[int, int]:
        """Return the lines of the statement, or of the head of one with a body."""
        return self._statements.get(line, (line, line))

    def scope_at(self, line: int) -> tuple[int, int]:
        """Return the lines of what a decorator, default or field belongs to."""
        inside = [scope for scope in self._scopes if scope[0] <= line <= scope[1]]
        below = [scope for scope in self._scopes if scope[0] > line]
        if self.lines[line - 1].lstrip().startswith("@") and below:
            inside.append(min(below))
        return max(inside)[:2] if inside else (1, len(self.lines))

    def mutants(
        self, draw: random.Random | None, most: int
    ) -> tuple[int, list[Mutant]]:
        """Make the mutants, or a sample; say how many there are in all."""
        tree = parso.parse(self.source)
        positions = [
            (node, operator, index, start[0])
            for node in ast_nodes(tree)
            for name, operator in _operators().items()
            for index, (start, _) in enumerate(operator.mutation_positions(node))
            if self._matters(name, node, start)
        ]
        total = len(positions)
        if draw is not None and most < total:
            positions = [
                positions[at] for at in sorted(draw.sample(range(total), most))
            ]
        made: dict[str, Mutant] = {}
        for node, operator, index, line in positions:
            source = _mutated(tree, node, operator, index)
            lines = source.splitlines()
            becomes = lines[line - 1].strip() if line <= len(lines) else ""
            name = type(operator).__name__
            was = self.lines[line - 1].strip()
            if name == "RemoveDecorator":
                becomes = ""
            if source == self.source or not _is_program(source):
                total -= 1
                continue
            mutant = Mutant(
                self.name, self.function_at(line), name, line, was, becomes, source
            )
            if made.setdefault(source, mutant) is not mutant:
                total -= 1
        return total, list(made.values())

    def _matters(self, operator: str, node: Any, start: tuple[int, int]) -> bool:
        if start[0] in self._skipped_lines or start in self._skipped:
            return False
        if operator == "AddNot":
            # Else the same as another operator's.
            test = node.children[2] if node.type == "test" else node.children[1]
            return test.type not in {"comparison", "not_test"}
        if operator == "RemoveDecorator":
            name = node.get_code().strip()
            return name not in {"@final", "@overload", "@coroutine"}
        if operator == "DeleteStatement":
            return not self.function_at(start[0]).endswith("__init__")
        return True


def _name_of(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _operators() -> dict[str, Any]:
    found = {
        name.rpartition("/")[2]: cosmic_ray.plugins.get_operator(name)
        for name in cosmic_ray.plugins.operator_names()
    }
    assert found.keys() >= OPERATORS, OPERATORS - found.keys()
    kept = {name: kind() for name, kind in found.items() if name in OPERATORS}
    return kept | {"DeleteStatement": DeleteStatement()}


def _mutated(tree: Any, node: Any, operator: Any, index: int) -> str:
    """Return the source with one change; the tree is left as it was.

    cosmic-ray's own `mutate_code` parses and walks the whole module for each.
    """
    before = [
        (part, part.children[:] if hasattr(part, "children") else part.value)
        for part in (*ast_nodes(node), *([node.parent] if node.parent else ()))
    ]
    try:
        other = operator.mutate(node, index)
        if other is not node:
            at = node.parent.children.index(node)
            node.parent.children[at : at + 1] = [] if other is None else [other]
        return str(tree.get_code())
    finally:
        for part, inside in before:
            setattr(part, "children" if hasattr(part, "children") else "value", inside)


def core_modules() -> list[str]:
    """Name the modules of the floors below the front, as `test_layout` has them."""
    tree = ast.parse((ROOT / "tests/test_layout.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS":
            floors = node.value
            assert isinstance(floors, ast.List)
            found: list[str] = []
            for floor in floors.elts:
                names = {
                    n.value for n in ast.walk(floor) if isinstance(n, ast.Constant)
                }
                if "__init__" in names:
                    return found
                found += sorted(names)
    raise LookupError("tests/test_layout.py has no FLOORS")


def path_of(module: str, root: Path) -> Path:
    return root / "src" / PACKAGE / f"{module}.py"
