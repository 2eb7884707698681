"""The order of the folders, and sizes that keep files readable: the house of docs/architecture.md stays."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

HOME = Path(__file__).parents[1] / "jtune"

# Lowest floor first: a folder imports from its own floor and from lower ones.
FLOORS = [
    ["errors", "files", "secrets"],
    ["config"],
    ["distributed"],
    ["sharding"],
    ["models"],
    ["tuning"],
    ["data"],
    ["interop"],
    ["loading"],
    ["losses", "generation"],
    ["stages"],
    ["train"],
    ["evaluation"],
    ["planning"],
    ["quickstart", "commands"],
    ["cli"],
]
ROOMS = [  # of data
    ["report"],
    ["cache"],
    ["tokens"],
    ["sources"],
    ["formats"],
    ["templates"],
    ["encode"],
    ["pipeline", "stream"],
    ["batching"],
]
MOST_LINES, MOST_OF_A_FUNCTION, MOST_PARAMETERS = 450, 120, 8
NUMERIC = {  # kernels, which take arrays one by one, and a schedule whose parameters are transformers' names
    *("attend", "attend_cached", "flash_attention", "splash_attention", "sum_labelled"),
    *("_by_queries_kernel", "_by_keys_kernel", "_warmup_stable_decay"),
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(HOME.rglob("*.py")):
        parts = path.relative_to(HOME.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), ast.parse(path.read_text())


def imports(tree: ast.Module) -> Iterator[str]:
    """What a module imports of jtune, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jtune"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("jtune."))


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def upward(floors: list[list[str]], depth: int, home: str) -> list[str]:
    """Imports from a lower floor to a higher one; `depth`: of the name that says the floor in a dotted path."""
    rank = {name: number for number, floor in enumerate(floors) for name in floor}
    found = []
    for module, tree in modules():
        own = rank.get(".".join(module.split(".")[depth : depth + 1]))
        for name in imports(tree):
            parts = name.split(".")
            other = rank.get(parts[depth]) if len(parts) > depth and name.startswith(home) else None
            if own is not None and module.startswith(home) and other is not None and other > own:
                found.append(f"{module} imports {name}")
    return found


def test_every_folder_has_a_floor():
    known = {name for floor in FLOORS for name in floor}
    there = {path.stem for path in HOME.iterdir() if not path.name.startswith("__")}
    assert there == known
    rooms = {name for room in ROOMS for name in room}
    assert {path.stem for path in (HOME / "data").iterdir() if not path.name.startswith("__")} == rooms


def test_folders_import_from_lower_floors_only():
    assert upward(FLOORS, 1, "jtune.") == []


def test_rooms_of_data_import_from_earlier_rooms_only():
    assert upward(ROOMS, 2, "jtune.data.") == []


def test_what_is_private_stays_in_its_module():
    taken = [f"{module} imports {name}" for module, tree in modules() for name in imports(tree)]
    assert [line for line in taken if line.rsplit(".", 1)[1].startswith("_") and "__" not in line] == []


def test_nothing_outside_the_stages_asks_which_stage_it_is():
    lines = []
    for path in sorted(HOME.rglob("*.py")):
        if path.parts[-2] != "stages" and path.name != "stages.py":
            asks = (line for line in path.read_text().splitlines() if "stage ==" in line or "stage in" in line)
            lines += [f"{path.name}: {line.strip()}" for line in asks]
    assert lines == []


def test_files_and_functions_can_be_read():
    faults = []
    for path in sorted(HOME.rglob("*.py")):
        text, name = path.read_text(), path.relative_to(HOME)
        if text.count("\n") > MOST_LINES:
            faults.append(f"{name} has {text.count(chr(10))} lines")
        for function in functions(ast.parse(text)):
            parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            count = len([parameter for parameter in parameters if parameter.arg not in ("self", "cls")])
            lines = (function.end_lineno or 0) - function.lineno + 1
            if lines > MOST_OF_A_FUNCTION:
                faults.append(f"{name}: {function.name} has {lines} lines")
            if count > MOST_PARAMETERS and function.name not in NUMERIC:
                faults.append(f"{name}: {function.name} has {count} parameters")
    assert faults == []


def test_run_reads_as_a_table_of_contents():
    [train] = [f for f in functions(ast.parse((HOME / "commands" / "train.py").read_text())) if f.name == "train"]
    assert (train.end_lineno or 0) - train.lineno < 85


def test_nobody_is_told_to_install_another_project():
    """`jtune` on PyPI is not this project: the distribution is `jtune-llm`. And where only the folder is on Python's
    path, there is no distribution to ask for a version.
    """
    root = HOME.parent
    pages = [root / "README.md", root / "pyproject.toml", *(root / "docs").rglob("*.md"), root / ".ci" / "run"]
    code = [path for folder in ("jtune", "scripts", "configs") for path in (root / folder).rglob("*") if path.is_file()]
    other = re.compile(r"""install (-\S+ )*['"]?jtune\b(?!-llm)|['"]jtune\[|version\(['"]jtune""")
    kinds = ("", ".py", ".md", ".sh", ".yaml", ".sbatch", ".toml")
    texts = {path: path.read_text() for path in pages + code if path.suffix in kinds}
    assert [f"{path.name}: {match[0]}" for path, text in texts.items() for match in other.finditer(text)] == []


def test_what_is_said_to_be_installed_is_an_extra():
    import tomllib

    from jtune.config.trackers import TRACKERS

    extras = tomllib.loads((HOME.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pages = [HOME.parent / "README.md", *(HOME.parent / "docs").rglob("*.md"), *HOME.rglob("*.py")]
    named = {name for path in pages for name in re.findall(r"jtune-llm\[([a-z-]+)\]", path.read_text())}
    assert named | set(TRACKERS) - {"tensorboard"} <= set(extras)
