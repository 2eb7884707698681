"""DeepSeek-V3.2: DeepSeek-V3 with an indexer, which chooses the tokens that a token sees in rows above `index_topk`."""

from dataclasses import replace

from jtune.errors import DataError
from jtune.models.config import Indexer
from jtune.models.families.base import Asked, Family, Fields, Names, listed_sparse
from jtune.models.families.deepseek_v3 import PATTERNS, grouped_experts, latent_attention


def read(c: Asked) -> Fields:
    fields = latent_attention(c, interleaved=True)
    if strange := {*c["layer_types"]} - {"indexed_attention"}:
        raise DataError(f"config.json: layer_types: {', '.join(sorted(strange))} is not supported")
    c.get("first_k_dense_replace")  # what transformers made the list of
    indexer = Indexer(c["index_n_heads"], c["index_head_dim"], c["index_topk"])
    return {
        **fields,
        "latent": replace(fields["latent"], indexer=indexer),
        "mlp_bias": bool(c["mlp_bias"]),
        "experts": grouped_experts(c),
        "layers": listed_sparse(c),
    }


FAMILY = Family(read, lambda config: Names(patterns=PATTERNS))
