"""LFM2 with experts: LFM2's layers, those after the first few with experts chosen by sigmoids."""

from dataclasses import replace

from jtune.models.families import lfm2
from jtune.models.families.base import Asked, Family, Fields, Names, experts

PATTERNS = ((r"\.e_score_correction_bias$", ".expert_bias"),)


def read(c: Asked) -> Fields:
    fields = lfm2.convolutional(c)
    mixture = experts(
        c,
        scoring="sigmoid",
        renormalise=bool(c["norm_topk_prob"]),
        sum_eps=1e-6,
        scale=float(c["routed_scaling_factor"]),
        correction_bias=bool(c["use_expert_bias"]),
    )
    dense = c["num_dense_layers"]
    layers = tuple(replace(layer, sparse=i >= dense) for i, layer in enumerate(fields["layers"]))
    return {**fields, "experts": mixture, "layers": layers}


FAMILY = Family(read, lambda config: Names(words=lfm2.WORDS, patterns=PATTERNS))
