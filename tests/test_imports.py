"""Imports run in one direction between the rooms, also those inside functions: see docs/contributing.md."""

import ast

from helpers import REPOSITORY

LEVELS = (
    {"utils"},
    {"diversity"},
    {"models", "pipeline", "datasets"},
    {"training", "engine"},
    {"reports", "benchmarks"},
    {"studies"},
    {"main", "analyze", "table", "benchmark", "study"},
)
"""The lowest first; a module imports from its own level and from lower ones, and diversity from itself alone."""

LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def imported(text):
    """(line, first word) of each absolute import of a module."""
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        yield from ((node.lineno, name.partition(".")[0]) for name in names)


def upward(room, text):
    """The imports of a room's module that run upwards."""
    allowed = {"diversity"} if room == "diversity" else {of for of in LEVEL_OF if LEVEL_OF[of] <= LEVEL_OF[room]}
    return [(line, name) for line, name in imported(text) if name in LEVEL_OF and name not in allowed]


def test_no_import_runs_upwards():
    files = [*REPOSITORY.glob("*.py"), *(path for room in LEVEL_OF for path in (REPOSITORY / room).rglob("*.py"))]
    rooms = {path: path.relative_to(REPOSITORY).parts[0].removesuffix(".py") for path in files}
    assert {*rooms.values()} == {*LEVEL_OF}
    assert {str(path): found for path in files if (found := upward(rooms[path], path.read_text()))} == {}


def test_an_import_inside_a_function_is_found():
    text = "import torch\n\ndef draw():\n    from reports import figures\n    import utils"
    assert upward("training", text) == [(4, "reports")]
    assert upward("diversity", text) == [(4, "reports"), (5, "utils")]
    assert upward("main", text) == []
