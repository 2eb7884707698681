"""What other programs read of a model that is written: how it is asked (its chat template), and where answers end.

The tokens that end an answer are said in three files, and each is the only one that some program reads: the tokenizer's
(vLLM, llama.cpp), config.json (what has no generation_config.json beside it), generation_config.json (transformers'
`generate`, vLLM). They are made to agree as transformers' Trainer does it, and so LLaMA-Factory.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jtune.config import Config
from jtune.config.stages import rules_of
from jtune.data import Template
from jtune.data.encode.pretraining import document_end
from jtune.data.encode.turns import rendering
from jtune.data.formats.messages import FaultyRow
from jtune.data.templates import chat_template
from jtune.data.templates.chat_format import Pieces
from jtune.data.templates.jinja import to_jinja
from jtune.errors import DataError
from jtune.files import read_object
from jtune.interop.hf import GENERATION
from jtune.models.families.wrapped import text_part, with_text

log = logging.getLogger("jtune")

JINJA, MORE_JINJA = "chat_template.jinja", "additional_chat_templates"
LEGACY = ("special_tokens_map.json", "added_tokens.json")  # of older tokenizers; today tokenizer.json says it all
GLUE = ("", "prepend", "always", "first")


class Endings(NamedTuple):
    """What is written beside the weights."""

    source: dict[str, Any]  # config.json
    generation: dict[str, Any]  # generation_config.json
    eos: tuple[int, ...]  # what ends an answer, first what the model learns to end it with


def resolve_endings(
    config: Config, template: Template | None, tokenizer: Any, source: Mapping[str, Any], base: Path
) -> Endings:
    """What is written, and in `tokenizer` the chat template that is written with it.

    A template by name is written as Jinja, unless the tokenizer's own chat template asks in the same way: that one
    knows more, of tools. Stage pt has no use for a chat template, and leaves it.

    Args:
      template: that the model is trained with; None: of an export that names none.
      source: the config.json of the model, with its `vocab_size`.
      base: the folder of the model that it comes from.

    Raises:
      DataError: the model has no row for the token that ends answers; generation_config.json is no JSON object; a chat
        template has a name that no file can have.
    """
    text = text_part(source)
    rows = text.get("vocab_size") or len(tokenizer)
    generation = read_generation(base)
    ends: list[int | None] = []
    if not rules_of(config.finetuning.stage).has_prompts and template is not None:
        ends += [tokenizer.convert_tokens_to_ids(document_end(template))]
    elif template is not None:
        ends += [template.end_id, tokenizer.eos_token_id, *template.stop_ids]
        if template.form is not None:
            if template.end_id >= rows:
                raise DataError(
                    f"template {template.name} ends answers with {tokenizer.convert_ids_to_tokens(template.end_id)}, "
                    f"for which the model has no row (it has {rows}). Is it the template of this model? "
                    "`resize_vocab: true` adds rows"
                )
            tokenizer.chat_template = _to_write(config, template)
        else:
            _note_options(config)
    elif chat_template.exists(tokenizer):
        ends += [chat_template.answer_end(tokenizer)]
    for name in _named(tokenizer):
        if not name or Path(name).name != name:
            raise DataError(f"{base}: the tokenizer has a chat template named {name!r}, which is no name of a file")
    ends += [tokenizer.eos_token_id]
    own = [i for i in dict.fromkeys(ends) if i is not None and i < rows]
    had = next(filter(None, (_ids(x.get("eos_token_id")) for x in (generation, source, text))), [])
    source = _aligned(source, tokenizer, rows)
    eos = tuple(dict.fromkeys((*own, *had)))
    generation.pop("_from_model_config", None)  # it would let config.json, which has one eos, take precedence
    if source.get("pad_token_id") is not None:
        generation["pad_token_id"] = source["pad_token_id"]
    if source.get("bos_token_id") is not None:
        generation.setdefault("bos_token_id", source["bos_token_id"])
    if eos:
        generation["eos_token_id"] = eos[0] if len(eos) == 1 else list(eos)
    return Endings(source, generation, eos)


def read_generation(folder: Path) -> dict[str, Any]:
    """The content of a folder's generation_config.json, nothing if there is none.

    Raises:
      DataError: it is no JSON object, or its eos_token_id is neither a number nor a list of numbers.
    """
    path = folder / GENERATION
    try:
        found = read_object(path)
    except FileNotFoundError:
        return {}
    eos = found.get("eos_token_id")
    if eos is not None and _ids(eos) != (eos if isinstance(eos, list) else [eos]):
        raise DataError(f"{path}: eos_token_id is {str(eos)[:80]!r}, expected a token's number, or a list of them")
    return found


def write_generation(folder: Path, endings: Endings) -> None:
    """generation_config.json, where there is anything to say in it."""
    if not endings.generation:
        (folder / GENERATION).unlink(missing_ok=True)
        return
    (folder / GENERATION).write_text(json.dumps(endings.generation, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """The tokenizer's files, with its chat templates."""
    forget_tokenizer(folder)
    tokenizer.save_pretrained(folder)


def forget_tokenizer(folder: Path) -> None:
    """Remove what an earlier tokenizer may have left, and what would be read beside the files of another."""
    for path in (folder / JINJA, *(folder / name for name in LEGACY), *(folder / MORE_JINJA).glob("*.jinja")):
        path.unlink(missing_ok=True)


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool)]


def _aligned(source: Mapping[str, Any], tokenizer: Any, rows: int) -> dict[str, Any]:
    """config.json with the eos and the pad token of the tokenizer, where the model has rows for them."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    aligned: dict[str, Any] = {}
    if eos is not None and eos < rows:
        had = source.get("eos_token_id")
        aligned["eos_token_id"] = [eos, *(i for i in _ids(had) if i != eos)] if isinstance(had, list) else eos
    if pad is not None and pad < rows:
        aligned["pad_token_id"] = pad
    inside = {key: value for key, value in aligned.items() if key in text_part(source)}
    return {**with_text(source, inside), **aligned}


# ---------------------------------------------------------------------- the chat template


def _to_write(config: Config, template: Template) -> Any:
    """The chat template that asks as `template` does: the tokenizer's own if it does, else one made of the format."""
    tokenizer = template.tokenizer
    own = tokenizer.chat_template if chat_template.exists(tokenizer) else None
    how = rendering(template, rules_of(config.finetuning.stage).rows, config.data.mask_history)
    probes = list(_probes(template, how))
    assert template.form is not None
    texts = [to_jinja(template.form, tokenizer, **how, glue=glue) for glue in GLUE]
    exact = [text for text in texts if not any(_other_ids(template, text, probe) for probe in probes)]
    if own is not None:
        default = own if isinstance(own, str) else own["default"]
        prompts = [probe for probe in probes if probe.asks]
        answers = [probe for probe in probes if not probe.asks and probe.turns == 1]
        differs = any(_disagreement(template, default, probe) for probe in prompts)
        differs |= any(_disagreement(template, default, probe, ends=False) for probe in answers)
        if not differs and not (exact and any(_other_ids(template, default, probe) for probe in prompts)):
            _warn_of_ids(template, default, prompts)
            return own
    text = (exact or texts)[0]
    why = "the model has no chat template" if own is None else "the model's own chat template asks in another way"
    others = sorted(set(_named(tokenizer)) - {"default"})
    gone = f"; its others are left out ({', '.join(others)})" if others else ""
    log.info("%s is written for template %s: %s%s", JINJA, template.name, why, gone)
    _warn_of_ids(template, text, probes)
    return text


def _named(tokenizer: Any) -> list[str]:
    """The names of the tokenizer's chat templates, where it has several."""
    return list(tokenizer.chat_template) if isinstance(tokenizer.chat_template, Mapping) else []


class Probe(NamedTuple):
    """A conversation that shows whether a chat template asks as a template does."""

    what: str
    turns: int
    chat: list[dict[str, str]]
    asks: bool
    expected: Pieces


def _probes(template: Template, how: Mapping[str, bool]) -> Iterator[Probe]:
    for system in (None, "Be brief."):
        opening = [{"role": "system", "content": system}] if system else []
        for turns in (1, 2):
            messages = chat_template.PROBE[: 2 * turns]
            what = f"{turns} turn{'s' if turns > 1 else ''}{', with a system message' if system else ''}"
            asked = template.ask(messages[:-1], system, None)
            yield Probe(f"the prompt of {what}", turns, [*opening, *messages[:-1]], True, asked)
            whole = template.render(messages, system, None, **how)
            pieces = [piece for turn in whole for part in turn for piece in part]
            yield Probe(f"a conversation of {what}", turns, [*opening, *messages], False, pieces)


def _rendered(tokenizer: Any, text: str, probe: Probe) -> str | None:
    """What the Jinja text makes of the conversation; None where it refuses it."""
    try:
        return chat_template.rendered(tokenizer, probe.chat, text, open_answer=probe.asks)
    except FaultyRow:
        return None


def _disagreement(template: Template, text: str, probe: Probe, *, ends: bool = True) -> bool:
    """Whether neither the rendered text nor its ids are those of `template`.

    Args:
      ends: False: white space at the end of the text does not count.
    """
    found = _rendered(template.tokenizer, text, probe)
    expected = chat_template.spoken(template.tokenizer, probe.expected)
    if found is None:
        return True
    same = found == expected if ends else found.rstrip() == expected.rstrip()
    return not same and _other_ids(template, text, probe) is not None


def _other_ids(template: Template, text: str, probe: Probe) -> tuple[Sequence[int], Sequence[int]] | None:
    """From where they differ on: the ids of the rendered text, as others tokenise it, and those of `template`."""
    found = _rendered(template.tokenizer, text, probe)
    ids = [] if found is None else template.token_ids([found]).lists()[0]
    expected = template.tokenise([probe.expected]).lists()[0]
    if ids == expected:
        return None
    at = next((i for i, (a, b) in enumerate(zip(ids, expected)) if a != b), min(len(ids), len(expected)))
    return ids[at:], expected[at:]


def _warn_of_ids(template: Template, text: str, probes: Sequence[Probe]) -> None:
    for probe in probes:
        if (other := _other_ids(template, text, probe)) is not None:
            found, expected = (template.tokenizer.convert_ids_to_tokens(list(ids[:3])) for ids in other)
            log.warning(
                "template %s: programs that render %s tokenise the whole text, training tokenises its parts. In %s "
                "they get the tokens %s where the training has %s",
                template.name,
                JINJA,
                probe.what,
                found,
                expected,
            )
            return


def _note_options(config: Config) -> None:
    """Say what the tokenizer's own chat template does not know of how it was used."""
    if config.data.default_system:
        log.info("%s does not hold default_system: others give it as the system message", JINJA)
    if config.data.enable_thinking is False:
        log.info("%s is rendered with enable_thinking=false: others must ask for that, too", JINJA)
