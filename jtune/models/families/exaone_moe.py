"""K-EXAONE: EXAONE 4's attention, norms before both halves of a layer, and the experts of DeepSeek-V3."""

from jtune.models.families import exaone4
from jtune.models.families.base import Asked, Family, Fields, listed_sparse
from jtune.models.families.deepseek_v3 import grouped_experts


def read(c: Asked) -> Fields:
    fields = exaone4.read(c)
    c.get("first_k_dense_replace")  # what transformers made the list of
    layers = listed_sparse(c, fields["layers"])
    mixture = grouped_experts(c, shared="num_shared_experts")
    return {**fields, "block": "before", "experts": mixture, "layers": layers}


FAMILY = Family(read)
