"""From what follows `jtune COMMAND` to `{name: Given}`: a YAML or JSON file, `key=value`, `--key value`.

Values keep their origin, so that every later message can name a line. OmegaConf reads the YAML: `1e-5` is a number,
`${model_name_or_path}` refers to another argument, `${oc.env:HOME}` to the environment; a repeated key is an error.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from jtune.config.arguments import FIELDS
from jtune.config.foreign import FOREIGN
from jtune.config.kinds import BOOLEANS, takes_bool, takes_list, takes_text
from jtune.config.limits import check_expanded, check_nodes, fault_of
from jtune.config.renamed import RENAMED, SPELLINGS, current
from jtune.errors import ConfigError
from jtune.secrets import is_secret, remember

MAX_BYTES = 1_000_000
# What YAML raises for a value that is not what its tag says, as in `!!int x` and `!!bool x`.
NO_VALUE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
FORMS = "write CASE.yaml key=value ... or --key value ..."


class Origin(NamedTuple):
    """Where an argument was given. Origins sort in the order in which they are read."""

    command_line: bool
    line: int
    path: str

    def __str__(self) -> str:
        if self.command_line:
            return "command line"
        return f"{self.path}:{self.line}" if self.line else self.path


class Fault(NamedTuple):
    origin: Origin
    message: str
    name: str = ""  # of the argument, if the fault is in one


class Given(NamedTuple):
    value: Any
    origin: Origin


class Parsed(NamedTuple):
    given: dict[str, Given]
    faults: list[Fault]
    origin: Origin  # of the case as a whole


COMMAND_LINE = Origin(True, 0, "")


def parse(argv: Sequence[str], beneath: Mapping[str, Any] | None = None) -> Parsed:
    """Read the file and the words after it. Only their syntax is checked.

    Args:
      beneath: arguments in the place of a file: `argv` then begins with the folder that they are of.

    Raises:
      ConfigError: the file cannot be read at all. Smaller faults are collected in the result.
    """
    words = list(argv)
    config: Any = OmegaConf.create({})
    lines, faults, origin = {}, [], COMMAND_LINE
    if not words:
        raise ConfigError(f"no arguments are given: {FORMS}")
    if {"-h", "--help"} & set(words):
        raise ConfigError(f"{FORMS}\n`jtune help` lists commands and arguments, `jtune help NAME` explains an argument")
    if beneath is not None:
        origin = Origin(False, 0, words.pop(0))
        config = OmegaConf.create({name: _literal(value) for name, value in beneath.items()})
    elif not (words[0].startswith("-") or "=" in words[0]) or Path(words[0]).is_file():
        path = words.pop(0)
        origin = Origin(False, 0, path)
        config, lines, faults = _read_file(path)
    overridden = set()
    for name, text in _split_words(words, faults):
        try:
            config = OmegaConf.merge(config, _override(name, text))
        except OmegaConfBaseException as error:
            faults.append(Fault(COMMAND_LINE, f"{name}: {_first_line(error)}{_ESCAPE}", name))
            continue
        except (*NO_VALUE, RecursionError):  # `!!bool x`; a number of thousands of digits; lists in lists
            faults.append(Fault(COMMAND_LINE, f"{name}: {text[:40]}{'...' * (len(text) > 40)} cannot be read", name))
            continue
        overridden.add(name.split(".")[0])
    plain: Any = OmegaConf.to_container(config)
    check_expanded(plain, str(origin))
    given = {}
    for key in config:
        name = str(key)
        where = COMMAND_LINE if name in overridden else origin._replace(line=lines.get(name, 0))
        try:
            value = config[key]
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except MissingMandatoryValue:
            faults.append(Fault(where, f"{name} is left open (???): set it, as in {name}=VALUE", name))
        except OmegaConfBaseException as error:
            faults.append(Fault(where, f"{name}: {_first_line(error)}{_ESCAPE}", name))
        else:
            remember(name, value)
            if fault := fault_of(value):
                faults.append(Fault(where, f"{name}: {fault}", name))
                continue
            given[name] = Given(value, where)
    return Parsed(given, faults, origin)


_ESCAPE = r". (To mean the characters themselves, write \${...})"


def _literal(value: Any) -> Any:
    """A value in which OmegaConf reads no references to others."""
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return value.replace("${", r"\${") if isinstance(value, str) else value


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")


# ------------------------------------------------------------------ files


def _read_file(path: str) -> tuple[Any, dict[str, int], list[Fault]]:
    """`(DictConfig, line of each key, faults)` of a YAML or JSON file."""
    text = _read_text(Path(path))
    content = None
    if path.endswith(".json"):
        try:
            content = json.loads(text)
        except RecursionError:
            raise ConfigError(f"{path}: nested too deeply") from None
        except ValueError as error:
            line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise ConfigError(f"{path}{line}: this is not JSON: {error}") from error
        text = text.replace("\t", " ")  # JSON is YAML except for tabs, which JSON allows only outside of strings
    root = _compose(text, path)
    lines: dict[str, int] = {}
    faults, pairs = [], []
    for key, value in root.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in lines:
            faults.append(Fault(Origin(False, line, path), f"{name} is given twice, first in line {lines[name]}", name))
            continue
        lines[name] = line
        pairs.append((key, value))
    for line, merged in [(key.start_mark.line + 1, value) for key, value in pairs if key.value == "<<"]:
        if isinstance(merged, yaml.MappingNode):
            lines = {str(key.value): line for key, _ in merged.value} | lines
    while True:
        try:
            if content is not None:
                return OmegaConf.create({key: content[key] for key in content if key in lines}), lines, faults
            root.value = pairs
            # Serialize again only if a pair was removed: the parser's errors count the lines of the text that it gets.
            return OmegaConf.create(yaml.serialize(root, Dumper=yaml.SafeDumper) if faults else text), lines, faults
        except yaml.YAMLError as error:
            raise ConfigError(_not_yaml(error, path)) from error
        except OmegaConfBaseException as error:
            bad = re.split(r"[.\[]", str(getattr(error, "full_key", None) or ""))[0]
            if bad not in lines:
                raise ConfigError(f"{path}: {_first_line(error)}") from error
            faults.append(Fault(Origin(False, lines[bad], path), f"{bad}: {_first_line(error)}{_ESCAPE}", bad))
            pairs = [pair for pair in pairs if str(pair[0].value) != bad]
            del lines[bad]
        except NO_VALUE as error:
            raise ConfigError(f"{path}: a value is not what its tag (!!...) says: {_first_line(error)}") from error


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; expected a .yaml, .yml or .json file")
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(f"{path}: a case is a .yaml, .yml or .json file: {FORMS}")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes; a case has at most {MAX_BYTES}")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        others = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = f" In {path.parent} there are: {', '.join(others[:8])}" if others else ""
        raise ConfigError(f"{path}: there is no such file.{hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}: save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def _compose(text: str, path: str) -> yaml.MappingNode:
    """The tree of YAML nodes, with their lines; anchors are not expanded yet."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            raise ConfigError(f"{path}: the file is empty; expected `key: value` lines")
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}:{root.start_mark.line + 1}: expected `key: value` lines at the top")
        check_nodes(root, path)
    except yaml.YAMLError as error:
        raise ConfigError(_not_yaml(error, path)) from error
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    return root


def _not_yaml(error: yaml.YAMLError, path: str) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f":{mark.line + 1}" if mark else ""
    return f"{path}{line}: this is not YAML: {getattr(error, 'problem', None) or error}"


# ------------------------------------------------------------------ words


def _split_words(words: list[str], faults: list[Fault]) -> Iterator[tuple[str, str]]:
    """`(name, text of the value)` for each `key=value`, `--key value`, `--key=value`, `--key`, `--no_key`."""
    queue = list(words)
    while queue:
        word = queue.pop(0)
        key, equals, text = word.partition("=")
        is_flag = key.startswith("--")
        name = key.removeprefix("--").replace("-", "_")
        if not re.fullmatch(r"[A-Za-z_][\w.]*", name) or not (is_flag or equals):
            if not equals and is_secret(name.rstrip(":")) and queue:
                remember(name, queue[0])  # `hf_hub_token VALUE`, without the --
            faults.append(Fault(COMMAND_LINE, f"{word!r} is neither an argument nor the value of one: {FORMS}"))
        elif equals:
            yield name, text
        else:
            yield from _flag(name, queue, faults)


def _flag(name: str, queue: list[str], faults: list[Fault]) -> Iterator[tuple[str, str]]:
    """A flag without `=`: the next word is its value, if it takes one; for a list, the next words."""
    known = name.split(".")[0] in FIELDS or name in FOREIGN or name in RENAMED
    ours = current(name)  # whose type says how the words are read
    if not known and name.startswith("no_") and _is_switch(name[3:]):
        yield name[3:], "false"
    elif not queue or queue[0].startswith("--"):
        if ours in FIELDS and not takes_bool(FIELDS[ours].type) and True not in SPELLINGS.get(ours, {}):
            faults.append(Fault(COMMAND_LINE, f"--{name} needs a value", name))
        else:
            yield name, "true"
    elif _is_switch(name) and queue[0].lower() not in BOOLEANS:
        yield name, "true"
    else:
        values = [queue.pop(0)]
        while ours in FIELDS and takes_list(FIELDS[ours].type) and queue and re.fullmatch(r"[^-=][^=]*", queue[0]):
            values.append(queue.pop(0))
        yield name, ",".join(values)


def _is_switch(name: str) -> bool:
    """Whether a flag alone means true, and takes only boolean words."""
    name = current(name)
    if name in FIELDS:
        return takes_bool(FIELDS[name].type) and not takes_text(FIELDS[name].type)
    return name in FOREIGN and isinstance(FOREIGN[name].names[name], bool)


def _override(name: str, text: str) -> Any:
    """One override. The value of a text argument is not read as YAML: `a: b`, `# 1` and `007` stay as they are."""
    ours = current(name)
    if ours in FIELDS and takes_text(FIELDS[ours].type) and not takes_bool(FIELDS[ours].type):
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
        value = None if text in ("null", "~") else text[1:-1] if quoted else text
        return OmegaConf.create({name: value})
    try:
        return OmegaConf.from_dotlist([f"{name}={text}"])
    except yaml.YAMLError:
        return OmegaConf.create({name: text})
