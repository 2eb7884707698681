"""The stages a YAML may name: the rows each one reads, and which arguments are for it.

Here is what configuration and data need to know of a stage. What a stage computes is a record in `jtune.stages`.
"""

from dataclasses import dataclass
from typing import Literal

# text: a document. conversation: turns, of which answers are learned. prompt: a conversation that is to be answered.
# pair: a prompt with a chosen and a rejected answer. feedback: a conversation that is marked as good or bad.
RowKind = Literal["text", "conversation", "prompt", "pair", "feedback"]


@dataclass(frozen=True)
class StageRules:
    """What a stage reads and accepts."""

    name: str
    rows: RowKind
    encodes: bool = True  # False: reading its rows is not built yet
    trains: bool = True  # False: its rows can be read and shown, but training is not built yet
    scores: bool = False  # the model gives a score, not text
    token_losses: bool = False  # dft_alpha and its kin change the loss of a token
    answers: bool = False  # predict_with_generate, compute_accuracy: answers beside those of the data

    @property
    def has_prompts(self) -> bool:
        """Whether rows are rendered by a chat template."""
        return self.rows != "text"

    @property
    def learns_tokens(self) -> bool:
        """Whether the loss is one of single tokens, which label smoothing and noise on embeddings are defined for."""
        return self.rows in ("text", "conversation")

    @property
    def has_preferences(self) -> bool:
        """Whether rows say which of two answers, or whether an answer, is wanted."""
        return self.rows in ("pair", "feedback")

    @property
    def compares_answers(self) -> bool:
        """Whether the log-probabilities of a pair's answers are compared: the losses of `pref_loss`."""
        return self.rows == "pair" and not self.scores

    @property
    def has_reference(self) -> bool:
        """Whether answers are compared with what a reference model says of them."""
        return self.has_preferences and not self.scores


RULES = {
    rules.name: rules
    for rules in (
        StageRules("pt", "text"),
        StageRules("sft", "conversation", token_losses=True, answers=True),
        StageRules("rm", "pair", scores=True),
        StageRules("dpo", "pair"),
        StageRules("kto", "feedback"),
        StageRules("ppo", "conversation", encodes=False, trains=False),
    )
}


def rules_of(stage: str) -> StageRules:
    """The rules of a stage that `stage` of the arguments names."""
    return RULES[stage]
