"""GLM-5: the layers of DeepSeek-V3.2."""

from jtune.errors import DataError
from jtune.models.families import deepseek_v32
from jtune.models.families.base import Asked, Family, Fields, Names


def read(c: Asked) -> Fields:
    if strange := {*c["indexer_types"]} - {"full"}:  # layers without an indexer of their own
        raise DataError(f"config.json: indexer_types: {', '.join(sorted(strange))} is not supported")
    return deepseek_v32.read(c)


FAMILY = Family(read, lambda config: Names(patterns=deepseek_v32.PATTERNS))
