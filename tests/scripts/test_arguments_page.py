"""docs/arguments.md is what the tables of arguments say."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_of_arguments_is_up_to_date():
    spec = importlib.util.spec_from_file_location("arguments_page", ROOT / "scripts" / "arguments_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run: python scripts/arguments_page.py"
