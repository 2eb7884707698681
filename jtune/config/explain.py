"""The meaning of an argument, from the same tables that check it: `jtune help NAME`, `jtune help all`."""

import dataclasses
from typing import Any

from jtune.config.arguments import FIELDS, SECTIONS
from jtune.config.check import unknown
from jtune.config.foreign import FOREIGN
from jtune.config.kinds import describe_kind
from jtune.config.renamed import RENAMED


def explain(name: str) -> str:
    """One argument in a few words; for "all", every honoured argument, by section.

    >>> print(explain("lora_rank"))
    lora_rank: rank of the adapters (a whole number, at least 1; default: 8)
    """
    name = name.removeprefix("--").replace("-", "_")
    if name == "all":
        return "\n\n".join(_section(title, section) for title, section in SECTIONS.items())
    if name in FIELDS:
        return _line(FIELDS[name])
    if name in RENAMED:
        why = f" ({RENAMED[name].why})" if RENAMED[name].why else ""
        return f"{name}: another name of {RENAMED[name].name}{why}. {explain(RENAMED[name].name)}"
    if name in FOREIGN:
        group = FOREIGN[name]
        default = _show(group.names[name])
        verb = "not supported" if group.refused else "ignored"
        return f"{name}: an argument of LLaMA-Factory; {verb}: {group.why} (accepted: {default})"
    return unknown(name)


def _section(title: str, section: type) -> str:
    heading = f"{title}: {(section.__doc__ or '').strip()}"
    return "\n".join([heading, *(f"  {_line(field)}" for field in dataclasses.fields(section))])


def _line(field: dataclasses.Field) -> str:
    within = field.metadata["within"]
    kind = describe_kind(field.type) + (f", {within.text}" if within else "")
    derived = field.default is None and "default:" in field.metadata["doc"]
    default = "" if derived else f"; default: {_show(field.default)}"
    return f"{field.name}: {field.metadata['doc']} ({kind}{default})"


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
