"""Ministral 3: Mistral stretched by yarn, with queries that grow with their position."""

from dataclasses import replace

from jtune.errors import DataError
from jtune.models.config import QueryScale
from jtune.models.families import mistral
from jtune.models.families.base import Asked, Family, Fields


def read(c: Asked) -> Fields:
    fields, parameters = mistral.read(c), c["rope_parameters"]
    beta, length = (parameters.get(key) for key in ("llama_4_scaling_beta", "original_max_position_embeddings"))
    if not beta:
        return fields
    if not length:
        raise DataError("config.json: rope_parameters: llama_4_scaling_beta needs original_max_position_embeddings")
    grows = QueryScale(beta, length)
    return {**fields, "layers": tuple(replace(layer, query_scale=grows) for layer in fields["layers"])}


FAMILY = Family(read)
