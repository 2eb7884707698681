"""nanochat: no norm has a scale, queries and keys rotate clockwise, and logits are capped."""

from dataclasses import replace

from jtune.models.families.base import Asked, Family, Fields, Names, biases, common

WORDS = {"up_proj": "fc1", "down_proj": "fc2"}


def read(c: Asked) -> Fields:
    fields = common(c)
    return {
        **fields,
        **biases(c),
        "norm_scale": False,
        "embedding_norm": True,
        "qk_norm": "head",
        "qk_norm_after_rope": True,
        "ropes": (replace(fields["ropes"][0], clockwise=True),),
        "mlp": "plain",
        "logit_softcap": c["final_logit_softcapping"],
    }


FAMILY = Family(read, lambda config: Names(words=WORDS))
