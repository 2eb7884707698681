"""What other programs read of a model that is written: how it is asked (its chat template), and where answers end.

The tokens that end an answer are said in three files, and each is the only one that some program reads: the tokenizer's
(vLLM, llama.cpp), config.json (what has no generation_config.json beside it), generation_config.json (transformers'
`generate`, vLLM). They are made to agree as transformers' Trainer does it, and so LLaMA-Factory.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jtune.config import Config
from jtune.config.stages import rules_of
from jtune.data import Template
from jtune.data.encode.pretraining import document_end
from jtune.data.encode.turns import rendering
from jtune.data.templates import chat_template
from jtune.data.templates.jinja import to_jinja
from jtune.errors import DataError
from jtune.files import read_object
from jtune.interop.hf import GENERATION
from jtune.interop.probes import Probe, differs, other_ids, probes
from jtune.models.families.wrapped import text_part, with_text

log = logging.getLogger("jtune")

JINJA, MORE_JINJA = "chat_template.jinja", "additional_chat_templates"
LEGACY = ("special_tokens_map.json", "added_tokens.json")  # of older tokenizers; today tokenizer.json says it all
GLUE = ("", "prepend", "always", "first")
OTHER_WAY = {
    "plain": "asks in another way",
    "tools": "writes tools in another way",
    "thinking": "writes thoughts in another way",
}


class Endings(NamedTuple):
    """What is written beside the weights."""

    source: dict[str, Any]  # config.json
    generation: dict[str, Any]  # generation_config.json
    eos: tuple[int, ...]  # what ends an answer, first what the model learns to end it with


def resolve_endings(
    config: Config, template: Template | None, tokenizer: Any, source: Mapping[str, Any], base: Path
) -> Endings:
    """What is written, and in `tokenizer` the chat template that is written with it.

    A template by name is written as Jinja, unless the tokenizer's own chat template asks in the same way, also of tools
    and with thoughts. Stage pt has no use for a chat template, and leaves it.

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
    asked = list(probes(template, how))
    make = partial(to_jinja, template.form, tokenizer, **how)

    def faults(glue: str) -> tuple[int, int]:
        wrong = [probe.kind for probe in asked if other_ids(template, make(glue=glue), probe)]
        return wrong.count("plain"), len(wrong)

    exact = next((glue for glue in GLUE if faults(glue) == (0, 0)), None)
    if own is not None:
        other = _other_way(template, own, asked, exact=exact is not None)
        if other is None:
            _warn_of_ids(template, own, [probe for probe in asked if probe.asks])
            return own
    glue = min(GLUE, key=faults) if exact is None else exact
    why = "the model has no chat template" if own is None else f"the model's own chat template {OTHER_WAY[other]}"
    others = sorted(set(_named(tokenizer)) - {"default"})
    gone = f"; its others are left out ({', '.join(others)})" if others else ""
    log.info("%s is written for template %s: %s%s", JINJA, template.name, why, gone)
    text = make(glue=glue)
    if any(differs(template, text, probe) for probe in asked if probe.kind == "tools"):
        log.warning("template %s: %s refuses tools: it could not write them as they are learned", template.name, JINJA)
        text, asked = make(glue=glue, tools=False), [probe for probe in asked if probe.kind != "tools"]
    _warn_of_ids(template, text, asked)
    return text


def _other_way(template: Template, own: Any, asked: Sequence[Probe], *, exact: bool) -> str | None:
    """The kind of the first conversation that the tokenizer's own chat template asks of in another way than `template`.

    Args:
      exact: whether one made of the format gives the ids of all of them; then the tokenizer's own has to, too.
    """
    for probe in asked:
        text = _chosen(own, probe)
        if probe.asks and (differs(template, text, probe) or (exact and other_ids(template, text, probe))):
            return probe.kind
        if (probe.kind, probe.turns) == ("plain", 1) and differs(template, text, probe, ends=False):
            return probe.kind
    return None


def _chosen(text: Any, probe: Probe) -> str:
    """Of several chat templates the one that transformers takes."""
    if isinstance(text, str):
        return text
    return text["tool_use"] if probe.kind == "tools" and "tool_use" in text else text["default"]


def _named(tokenizer: Any) -> list[str]:
    """The names of the tokenizer's chat templates, where it has several."""
    return list(tokenizer.chat_template) if isinstance(tokenizer.chat_template, Mapping) else []


def _warn_of_ids(template: Template, text: Any, asked: Sequence[Probe]) -> None:
    for probe in asked:
        if (other := other_ids(template, _chosen(text, probe), probe)) is not None:
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
