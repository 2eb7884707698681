"""Phi-3.5-MoE: LayerNorms, biases, and two experts, each of which shares its weight with those of nearly its score.

transformers draws the experts at random while it trains (arXiv:2409.12136); jtune takes the best, as in evaluation.
"""

import logging
from dataclasses import replace

from jtune.errors import DataError
from jtune.models.config import Layer
from jtune.models.families import mixtral
from jtune.models.families.base import Asked, Family, Fields, Names, biases, common, experts, layer_norm, windows

log = logging.getLogger("jtune")


def read(c: Asked) -> Fields:
    if c["num_experts_per_tok"] != 2:
        raise DataError(f"config.json: num_experts_per_tok is {c['num_experts_per_tok']}; phimoe's router chooses 2")
    log.info("phimoe: its router trains without noise: it takes the best experts, as in evaluation")
    c.get("input_jitter_noise")
    mixture = experts(
        c, width="intermediate_size", scoring="sparsemixer", renormalise=False, margin=2 * c["router_jitter_noise"]
    )
    fields = common(c)
    return {
        **fields,
        **biases(c),
        **layer_norm(c["rms_norm_eps"]),
        "ropes": (replace(fields["ropes"][0], **_factor(c)),),
        "head_bias": bool(c["lm_head_bias"]),
        "experts": mixture,
        "layers": tuple(Layer(window=window, sparse=True) for window in windows(c)),
    }


def _factor(c: Asked) -> Fields:
    """The factor of cos and sin, which the config gives for short and for long segments."""
    parameters = c["rope_parameters"]
    if parameters.get("rope_type", "default") == "default":
        return {}
    short, long = (parameters[f"{length}_mscale"] for length in ("short", "long"))
    if short != long:
        raise DataError(f"config.json: short_mscale {short} and long_mscale {long} differ, which is not supported")
    return {"attention_factor": short}


FAMILY = Family(read, lambda config: Names(words=mixtral.WORDS), modules=lambda config: Names(words={"gate": "router"}))
