"""Every name of jtune that a docstring, a comment or a page mentions exists."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = sorted((ROOT / "jtune").rglob("*.py"))
BASENAMES = {path.name for folder in ("jtune", "tests", "scripts") for path in (ROOT / folder).rglob("*.py")}
NAME = re.compile(r"(?<![\w./-])jtune(?!\.json)(?:\.[A-Za-z_]\w*)+(?![\w/-])")  # a dotted name
FILE = re.compile(r"\b((?:jtune|tests|scripts|docs)/[\w./-]*\.(?:py|md|sh|yaml))\b")  # a path from the root
SIBLING = re.compile(r"(?<![\w./-])(\w+\.py)\b")  # a file without its folder


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute (of an attribute ...) of one."""
    words = name.split(".")
    for length in range(len(words), 0, -1):
        try:
            found = importlib.import_module(".".join(words[:length]))
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("jtune"):
                pytest.skip(f"{name}: {error.name} is not installed")
            continue
        for word in words[length:]:
            if not hasattr(found, word) and word not in getattr(found, "__annotations__", {}):
                return False
            found = getattr(found, word, None)
        return True
    return False


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_names_that_are_mentioned_exist(path):
    text = path.read_text(encoding="utf-8")
    names = [name for name in dict.fromkeys(NAME.findall(text)) if not exists(name)]
    files = [name for name in dict.fromkeys(FILE.findall(text)) if not (ROOT / name).exists()]
    siblings = [name for name in dict.fromkeys(SIBLING.findall(text)) if name not in BASENAMES]
    assert not names + files + siblings
