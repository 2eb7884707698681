"""Write docs/arguments.md: each argument of LLaMA-Factory and its relatives, and what jtune does about it.

    python scripts/arguments_page.py

The names come from tests/config/foreign_arguments.json, all else from the tables that check a case.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from jtune.config.arguments import FIELDS
from jtune.config.explain import explain
from jtune.config.foreign import FOREIGN, TRAINING, UPDATES
from jtune.config.renamed import NESTED, RENAMED

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "arguments.md"
NAMES = ROOT / "tests" / "config" / "foreign_arguments.json"
LLAMA_FACTORY = ("llamafactory 0.9.5", "llamafactory main", "llamafactory, Megatron Bridge", "transformers 4.57",
                 "transformers 5.23")  # fmt: skip
INTRO = """# Arguments

What jtune does about each argument of LLaMA-Factory. `python scripts/arguments_page.py` writes this page from the
tables that check a case; `jtune help NAME` explains one argument.

- **honoured**: it means what it means there.
- **read as**: jtune has another name for it. A note names both. Both with different values are an error.
- **noted**: nothing that is computed depends on it. A note says why; the default is accepted silently.
- **refused**: it would change what is computed, and jtune does not do that. An error says what is nearest. An argument
  that only some commands would use is refused by these and accepted by the others.
"""


def page() -> str:
    """The text of docs/arguments.md."""
    names = json.loads(NAMES.read_text())
    current = {name for group in LLAMA_FACTORY for name in names[group]}
    rest = {name for group in names.values() for name in group} | {*RENAMED, *FOREIGN}
    own = [name for name in FIELDS if name not in current]
    sections = (
        "## LLaMA-Factory 0.9.5, its main branch, and the trainers of transformers 4 and 5",
        *_table(current),
        "## jtune's own arguments",
        *_table(own),
        "## Earlier releases, other backends, and generation\n\n"
        "Names of LLaMA-Factory since its first release (llmtuner), of transformers since 4.28, of other training\n"
        "backends, and of transformers' GenerationConfig.",
        *_table(rest - current - {*own}),
    )
    return "\n\n".join((INTRO.rstrip(), *sections)) + "\n"


def _table(names: Iterable[str]) -> Iterator[str]:
    rows = (
        "| `{}` | {} | {} |".format(name, *(cell.replace("|", r"\|") for cell in answer(name)))
        for name in sorted(names)
    )
    yield "\n".join(("| argument | | |", "|---|---|---|", *rows))


def answer(name: str) -> tuple[str, str]:
    """What jtune does about an argument, and why or how."""
    if name in NESTED:  # a mapping
        return "by its keys", f"each has a row of its own: `{name}.KEY`"
    if name in FIELDS:
        return "honoured", explain(name).partition(": ")[2]
    if name in RENAMED:
        return f"read as `{RENAMED[name].name}`", RENAMED[name].why
    group = FOREIGN[name]
    if not group.refused:
        return "noted", group.why
    if group.commands is None:
        return "refused", group.why
    commands = (
        "in training" if group.commands in (TRAINING, UPDATES) else f"by {', '.join(sorted(group.commands - TRAINING))}"
    )
    also = " and training" if group.commands > TRAINING else ""
    return f"refused {commands}{also}", group.why


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
