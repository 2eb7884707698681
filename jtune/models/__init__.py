"""The decoder: one Flax module for all families, and its parameters as a plain tree."""

from jtune.models.config import DecoderConfig, Rope
from jtune.models.decoder import CausalLM, abstract_params, init_params, logical_axes

__all__ = ["CausalLM", "DecoderConfig", "Rope", "abstract_params", "init_params", "logical_axes"]
