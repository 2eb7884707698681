"""How answers are chosen: by the arguments, as in LLaMA-Factory, and by what else the model's own file says."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jtune.config import GeneratingArguments
from jtune.errors import DataError
from jtune.generation.sampling import Sampling
from jtune.interop.endings import read_generation
from jtune.interop.hf import GENERATION

# What the arguments say, whatever a generation_config.json says of it.
SHARED = (
    "do_sample", "temperature", "top_k", "top_p", "num_beams", "max_new_tokens", "repetition_penalty", "length_penalty",
)  # fmt: skip
# What else it may say of which tokens come: the values with which it says nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "typical_p": (None, 1.0),
    "top_h": (None,),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "bad_words_ids": (None, []),
    "force_words_ids": (None, []),
    "constraints": (None, []),
    "sequence_bias": (None, {}),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1.0),
    "penalty_alpha": (None, 0.0),
    "diversity_penalty": (None, 0.0),
    "num_beam_groups": (None, 1),
    "early_stopping": (None, False),
    "renormalize_logits": (None, False),
    "watermarking_config": (None,),
    "dola_layers": (None,),
}


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The content of a model's generation_config.json, nothing if there is none.

    Raises:
      DataError: it is not JSON, or says of the choice of tokens what jtune does not do.
    """
    found = read_generation(folder)
    for name, neutral in NEUTRAL.items():
        if found.get(name) not in neutral:
            raise DataError(f"{folder / GENERATION}: {name}: {found[name]} is not supported: take it out of the file")
    return found


def end_ids(own: Mapping[str, Any]) -> list[int]:
    """The tokens that end an answer, by a generation_config.json."""
    eos = own.get("eos_token_id")
    return [] if eos is None else [eos] if isinstance(eos, int) else eos


def sampling_of(args: GeneratingArguments, own: Mapping[str, Any], stop_ids: Sequence[int]) -> Sampling:
    """What the arguments say, with LLaMA-Factory's defaults, and what the model's file says that they do not have.

    Args:
      own: `read_generation_config`.
      stop_ids: of the template; the model's own ends of an answer are added.

    Raises:
      DataError: a value of the model's file is out of its range.

    >>> sampling_of(GeneratingArguments(top_p=0.5), {"top_p": 0.8, "min_p": 0.1}, [2])  # doctest: +ELLIPSIS
    Sampling(max_new_tokens=1024, do_sample=True, temperature=0.95, top_k=50, top_p=0.5, min_p=0.1, ...)
    """
    chosen = {name: getattr(args, name) for name in SHARED}
    if chosen["max_new_tokens"] < 1:
        chosen["max_new_tokens"] = args.max_length
    if not chosen["temperature"] or not chosen["top_p"]:  # the likeliest only
        chosen |= {"do_sample": False, "temperature": 1.0, "top_p": 1.0}
    chosen["top_k"] = max(0, chosen["top_k"])
    ends = tuple(sorted({*stop_ids, *end_ids(own)}))
    try:
        return Sampling(**chosen, min_p=own.get("min_p") or 0.0, eos_ids=ends)
    except ValueError as error:
        raise DataError(f"generation_config.json of the model: {error}") from error


def most_tokens(args: GeneratingArguments, sampling: Sampling, prompt: int, positions: int) -> int:
    """How many tokens the answer to a prompt of so many tokens may have; below 1: the prompt is too long.

    Args:
      positions: that the model has learned; 0: there is no such limit.
    """
    total = [args.max_length] if args.max_new_tokens < 1 else []
    total += [positions] if positions else []
    return min([sampling.max_new_tokens, *(limit - prompt for limit in total)])


def describe_sampling(s: Sampling) -> str:
    """How answers are chosen, in a few words.

    >>> describe_sampling(Sampling(do_sample=True, temperature=0.95, top_p=0.7, top_k=50))
    'sampled, temperature 0.95, top_p 0.7, top_k 50, at most 128 tokens'
    """
    if s.do_sample:
        words = [f"sampled, temperature {s.temperature:g}"]
        words += [f"top_p {s.top_p:g}"] if s.top_p < 1 else []
        words += [f"top_k {s.top_k}"] if s.top_k else []
        words += [f"min_p {s.min_p:g}"] if s.min_p else []
    else:
        words = [f"the best of {s.num_beams} beams" if s.num_beams > 1 else "the likeliest token each time"]
    words += [f"repetition_penalty {s.repetition_penalty:g}"] if s.repetition_penalty != 1.0 else []
    return ", ".join([*words, f"at most {s.max_new_tokens} tokens"])
