"""Qwen3-VL-MoE, its text model: Qwen3-MoE, with all experts of a layer in one tensor."""

from jtune.errors import DataError
from jtune.models.families import qwen3_vl_text
from jtune.models.families.base import Asked, Family, Fields, Names, experts

PATTERNS = ((r"\.experts\.(\w+)\.weight$", r".experts.\1"),)
AS_IS = frozenset({"gate_up_proj", "down_proj"})


def read(c: Asked) -> Fields:
    if c["mlp_only_layers"] or c["decoder_sparse_step"] != 1:
        raise DataError("config.json: mlp_only_layers, decoder_sparse_step: layers without experts are not supported")
    return {**qwen3_vl_text.read(c), "mlp": "joined", "experts": experts(c)}


FAMILY = Family(read, lambda config: Names(patterns=PATTERNS, stacked_experts=True, as_is=AS_IS))
