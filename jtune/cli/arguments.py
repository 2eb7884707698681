"""How click reads `CASE.yaml key=value --key value` beside a command's own options: help, nearest names, completion."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from glob import glob
from typing import Any, Literal, get_args, get_origin

import click
from click.shell_completion import BashComplete, CompletionItem, ZshComplete, add_completion_class

from jtune.errors import ConfigError

GIVEN = (
    "Arguments are LLaMA-Factory's. CASE.yaml holds them as `key: value` lines; on the command line, key=value, "
    "--key value or --key=value set or replace one. `jtune help lora_rank` explains one, `jtune help all` lists all."
)


class CaseCommand(click.Command):
    """A command with options of its own; all other words are a case and arguments, for `load_config` to read."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        # A short option would be looked for inside each word with a single dash, as in `--default_system -h`.
        self.context_settings = {"ignore_unknown_options": True, "help_option_names": ["--help"]}
        self.epilog = GIVEN

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, ["--help" if word == "-h" else word for word in args])
        if not ctx.resilient_parsing:
            self.check_spelling(ctx, ctx.params["words"])
        return rest

    def check_spelling(self, ctx: click.Context, words: Sequence[str]) -> None:
        """Refuse a word that is no argument and nearly one of the command's options."""
        from jtune.config.arguments import FIELDS
        from jtune.config.foreign import FOREIGN
        from jtune.config.renamed import RENAMED

        options = [name for param in self.get_params(ctx) for name in param.opts if name.startswith("--")]
        for word in words:
            flag = word.partition("=")[0]
            name = flag.removeprefix("--").replace("-", "_")
            known = not flag.startswith("--") or name in FIELDS or name in FOREIGN or name in RENAMED
            if not known and (near := nearest(flag, options, 0.75)):
                raise click.UsageError(f"{flag} is not an option. Did you mean {near}?", ctx)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return super().shell_complete(ctx, incomplete) + list(argument_names(incomplete, "--", ""))


class Commands(click.Group):
    """The commands in the order of their declaration; an unknown one is refused with the nearest name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name in self.commands or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        near = nearest(name, self.commands)
        hint = f" Did you mean {near!r}?" if near else ""
        raise ConfigError(f"{name!r} is not a command.{hint} There are: {', '.join(self.commands)}.")


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of `names` that is most like `name`, or None.

    >>> nearest("trian", ["plan", "train"])
    'train'
    """
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return near[0] if near else None


class WholeNumber(click.ParamType):
    """A whole number from 0."""

    name = "N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, str) and not value.isdecimal():
            self.fail(f"expected a whole number, found {value!r}", param, ctx)
        return int(value)


class NumberOrShare(click.ParamType):
    """A number of documents, or a share of them below 1."""

    name = "N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return float(value)
        except ValueError:
            self.fail(f"expected a number of documents, or a share below 1, found {value!r}", param, ctx)


# ---------------------------------------------------------------------- completion


def complete_words(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completions of a word that is no option: a file first, then `key=`, then a value of that key.

    bash passes `stage=s` as three words, other shells as one.
    """
    given: Sequence[str] = ctx.params.get(param.name or "") or ()
    key, equals, start = incomplete.partition("=")
    if equals:
        return [CompletionItem(f"{key}={value}") for value in values(key) if value.startswith(start)]
    if given:
        key = given[-2] if given[-1] == "=" and len(given) > 1 else given[-1]
        if found := [value for value in values(key) if value.startswith(incomplete)]:
            return [CompletionItem(value) for value in found]
    elif glob(f"{incomplete}*"):
        return [CompletionItem(incomplete, type="file")]
    return list(argument_names(incomplete, "", "="))


def complete_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of arguments, for `jtune help`."""
    return list(argument_names(incomplete, "", ""))


def argument_names(incomplete: str, before: str, after: str) -> Iterator[CompletionItem]:
    """Every argument that starts with `incomplete`, between `before` and `after`, with its meaning."""
    from jtune.config.arguments import FIELDS

    for name, field in FIELDS.items():
        if f"{before}{name}".startswith(incomplete):
            yield CompletionItem(f"{before}{name}{after}", help=field.metadata["doc"])


def values(name: str) -> list[str]:
    """The values of an argument that has few.

    >>> values("--finetuning_type"), values("packing"), values("lora_rank")
    (['lora', 'freeze', 'full', 'oft'], ['true', 'false'], [])
    """
    from jtune.config.arguments import FIELDS
    from jtune.config.kinds import takes_bool

    field = FIELDS.get(name.removeprefix("--"))
    if field is None:
        return []
    if get_origin(field.type) is Literal:
        return [str(value) for value in get_args(field.type)]
    return ["true", "false"] if takes_bool(field.type) else []


# The library's scripts put a space after what they complete; after `key=` the value must follow at once. Where a
# version of click has other lines, the space stays.
@add_completion_class
class Bash(BashComplete):
    name = "bash"
    source_template = BashComplete.source_template.replace(
        "COMPREPLY+=($value)", "COMPREPLY+=($value)\n            [[ $value == *= ]] && compopt -o nospace"
    )


@add_completion_class
class Zsh(ZshComplete):
    name = "zsh"
    source_template = ZshComplete.source_template.replace(
        "_describe -V unsorted completions_with_descriptions -U",
        "local -a suffix=()\n"
        "        [[ ${completions_with_descriptions[1]%%%%:*} == *= ]] && suffix=(-S '')\n"
        '        _describe -V unsorted completions_with_descriptions -U "${suffix[@]}"',
    )
