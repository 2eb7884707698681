"""Answers from a model: prompts in, tokens out."""

from jtune.generation.decode import generate, stream
from jtune.generation.sampling import Sampling

__all__ = ["Sampling", "generate", "stream"]
