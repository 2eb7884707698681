"""Batches of aligned rows in, encoded rows out, both in Arrow: what every kind of row has in common."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jtune.data.encode.notes import column_of
from jtune.data.templates.template import Template
from jtune.data.tokens.ids import Ids

Aligned = Mapping[str, Sequence[Any]]  # a batch of aligned rows

IDS = datasets.List(datasets.Value("int32"))
NOTED = {"noted": datasets.Value("string")}  # see notes.py
ORIGIN = {
    "cut": datasets.Value("bool"),
    "fault": datasets.Value("string"),
    "dataset": datasets.Value("int32"),
    "row": datasets.Value("int64"),
}


def aligned_columns(table: datasets.Dataset, *names: str) -> datasets.Dataset:
    """These columns of aligned rows. As Arrow: `datasets` takes three times as long to make Python objects of them."""
    return table.select_columns(list(names)).with_format("arrow")


def encode_slice(
    table: datasets.Dataset, encode: Callable[..., pa.Table], start: int, stop: int, *, template: Template, **how: Any
) -> pa.Table:
    """The result of `encode` for the rows of `table`, whose format is Arrow, from one number up to another."""
    batch: Any = table[start:stop]
    rows = {name: _with_filled_keys(batch[name]).to_pylist() for name in batch.column_names}
    made = encode(rows, template=template, **how)
    return made.append_column("noted", column_of(batch, made, template))


def _with_filled_keys(column: pa.ChunkedArray) -> pa.Array:
    """Messages without the keys that none of them has: each key costs time, and most rows have two."""
    array = column.combine_chunks()
    if not pa.types.is_list(array.type):
        return array
    values = array.flatten()
    names = [field.name for k, field in enumerate(array.type.value_type) if values.field(k).null_count < len(values)]
    messages = pa.StructArray.from_arrays([values.field(name) for name in names], names) if names else values
    offsets = pc.call_function("subtract", [array.offsets, array.offsets[0]])
    return pa.ListArray.from_arrays(offsets, messages)


def arrow_table(columns: Mapping[str, Any], features: datasets.Features) -> pa.Table:
    """Encoded rows as a table of `features`, without the column of notes.

    Ids may come joined, as `Ids`: Arrow takes one array sooner than many lists.
    """
    arrays = []
    features = datasets.Features({name: feature for name, feature in features.items() if name not in NOTED})
    for name, feature in features.items():
        if feature != IDS:
            arrays.append(pa.array(columns[name], feature.pa_type))
            continue
        ids = columns[name] if isinstance(columns[name], Ids) else Ids.join(columns[name])
        offsets = np.concatenate([[0], np.cumsum(ids.sizes)]).astype(np.int32)
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids.values)))
    return pa.Table.from_arrays(arrays, schema=features.arrow_schema)


class Rows:
    """Encoded rows that are added one by one: `add` each row of a batch, then take `table()`."""

    def __init__(self, batch: Aligned, features: datasets.Features):
        self.batch, self.features = batch, features
        self.columns: dict[str, list[Any]] = {name: [] for name in features if name not in NOTED}

    def add(
        self, i: int, ids: Mapping[str, Sequence[int]] | None = None, *, fault: str = "", cut: bool = False
    ) -> None:
        """Add row `i` of the batch; columns of ids that are not given are empty."""
        own = {"fault": fault, "cut": cut, "dataset": self.batch["dataset"][i], "row": self.batch["row"][i]}
        for name, column in self.columns.items():
            if name == "kto_tags":
                column.append(bool(self.batch["desirable"][i]))
            elif name == "margin":
                column.append(self.batch["margin"][i] or 0.0)
            else:
                column.append(own[name] if name in own else (ids or {}).get(name, ()))

    def table(self) -> pa.Table:
        return arrow_table(self.columns, self.features)
