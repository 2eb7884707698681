"""Hunyuan, its mixtures: the attention of its dense models, with experts and an MLP of their width for all tokens."""

from typing import Any

from jtune.errors import DataError
from jtune.models.families import hunyuan_v1_dense
from jtune.models.families.base import Asked, Family, Fields, Names, experts

WORDS = {**hunyuan_v1_dense.WORDS, "gate": "gate.wg", "shared_experts": "shared_mlp"}


def read(c: Asked) -> Fields:
    mixture = experts(
        c.also(**{key: _alike(c, key) for key in ("num_experts", "moe_topk")}),
        width="intermediate_size",
        per_token="moe_topk",
        router_float32=True,
        shared_size=c["intermediate_size"],
    )
    return {**hunyuan_v1_dense.read(c), "experts": mixture}


def _alike(c: Asked, key: str) -> Any:
    """The value of a key that may have one for each layer."""
    values = {*c[key]} if isinstance(c[key], list) else {c[key]}
    if len(values) != 1:
        raise DataError(f"config.json: {key} differs between layers ({sorted(values)}); jtune's layers are alike in it")
    return values.pop()


FAMILY = Family(read, lambda config: Names(words=WORDS))
