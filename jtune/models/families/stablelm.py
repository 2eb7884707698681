"""StableLM: LayerNorms, a quarter of each head rotates, attention and MLP in parallel if the config says so."""

from jtune.models.families.base import Asked, Family, Fields, Names, common, layer_norm

WORDS = {"q_norm": "q_layernorm.norms", "k_norm": "k_layernorm.norms"}


def read(c: Asked) -> Fields:
    return {
        **common(c),
        **layer_norm(c["layer_norm_eps"]),
        "block": "parallel" if c["use_parallel_residual"] else "before",
        "qkv_bias": bool(c["use_qkv_bias"]),
        "qk_norm": "heads" if c["qk_layernorm"] else None,
    }


FAMILY = Family(read, lambda config: Names(words=WORDS, per_head=frozenset({"q_norm", "k_norm"})))
