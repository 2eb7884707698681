"""How near answers are to those expected: BLEU-4 and ROUGE, as LLaMA-Factory measures them.

The libraries are those that it uses (pip install 'jtune-llm[metrics]'), so that the figures are the same: BLEU over
characters, with Chen and Cherry's third smoothing (NIST's); ROUGE over the words that jieba cuts a text into, blanks
among them being none, F-measure. All are percentages, rounded to four digits for each answer and then averaged.
"""

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from jtune.config.check import SIMILARITY as NAMES
from jtune.errors import ConfigError

LIBRARIES = ("nltk", "jieba", "rouge_chinese")


def check_installed() -> None:
    """Raise a ConfigError if a library is missing."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"predict_with_generate measures BLEU and ROUGE with {', '.join(missing)}, which is not installed: "
            "pip install 'jtune-llm[metrics]'"
        )


def similarity(answers: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """The means over all pairs, under `NAMES`; 0 to 100.

    >>> similarity(["the cat sat"], ["the cat sat"])                                           # doctest: +SKIP
    {'bleu-4': 100.0, 'rouge-1': 100.0, 'rouge-2': 100.0, 'rouge-l': 100.0}
    """
    found = [scores(answer, label) for answer, label in zip(answers, expected, strict=True)]
    return {name: float(np.mean([score[name] for score in found])) for name in NAMES}


def scores(answer: str, label: str) -> dict[str, float]:
    """The figures of one answer."""
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    jieba.setLogLevel(logging.WARNING)  # it tells that it reads its dictionary
    found = {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0}
    words, label_words = (" ".join(jieba.cut(text)) for text in (answer, label))
    if words.split() and label_words.split():
        rouge: Any = Rouge().get_scores(words, label_words)
        found = {name: score["f"] for name, score in rouge[0].items()}
    bleu: Any = sentence_bleu([list(label)], list(answer), smoothing_function=SmoothingFunction().method3)
    found["bleu-4"] = float(bleu)
    return {name: round(100 * value, 4) for name, value in found.items()}
