"""What `packing`, `neat_packing` and `cutoff_len` mean for each kind of rows: the one place that knows."""

from jtune.config.arguments import DataArguments
from jtune.config.stages import StageRules

PADDING = 1  # LLaMA-Factory's packed rows end with one token of padding


def joins_texts(packing: bool | None) -> bool:
    """Whether documents are joined and cut into blocks of `cutoff_len`: so unless `packing` is false."""
    return packing is None or packing


def packs_examples(data: DataArguments, stage: StageRules) -> bool:
    """Whether rows are made of several examples, once for the run. Blocks of joined documents are rows already; units
    of preferences are what is counted, and lie in rows update by update."""
    return not stage.has_preferences and bool(data.neat_packing or (data.packing and stage.rows != "text"))


def longest_example(data: DataArguments, stage: StageRules) -> int:
    """The tokens that an example is cut to: as in LLaMA-Factory, packed rows have room for one token of padding.

    The blocks of joined documents have it where `packing` is asked for, and not by default.
    """
    separate = stage.rows == "prompt" or (stage.rows == "text" and data.neat_packing)
    return data.cutoff_len - (PADDING if data.packing and not separate else 0)
