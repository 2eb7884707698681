"""Documents as ids: blocks of joined texts, or a row for each."""

from functools import partial

import datasets
import numpy as np
import pyarrow as pa

from jtune.data.cache.fingerprint import fingerprint
from jtune.data.cache.shards import UNSHARED, Sharing, make_in_shards
from jtune.data.encode.arrow import IDS, NOTED, Aligned, aligned_columns, arrow_table, encode_slice
from jtune.data.templates.template import Template

DOCUMENTS = datasets.Features({"input_ids": IDS, "cut": datasets.Value("bool"), **NOTED})


def encode_documents(
    table: datasets.Dataset,
    template: Template,
    *,
    cutoff_len: int,
    packing: bool = True,
    neat_packing: bool = False,
    overlong: str = "truncate",
    sharing: Sharing = UNSHARED,
) -> datasets.Dataset:
    """Ids of the texts of aligned rows; every token is learned, so there is no column of labels.

    With `packing`, the texts of each batch of rows are joined by eos and cut every `cutoff_len` tokens, and what is
    left at the end of a batch is dropped. Without, each text is a row, and one of more than `cutoff_len` tokens becomes
    what `overlong` asks for (see `Rules`); with `neat_packing` it is split.
    """
    form = "split" if neat_packing else "blocks" if packing else overlong
    args = {"cutoff_len": cutoff_len, "form": form, "eos": document_end(template)}
    return make_in_shards(
        partial(
            encode_slice,
            aligned_columns(table, "messages", "fault", "dataset", "row"),
            encode_texts,
            template=template,
            **args,
        ),
        table,
        DOCUMENTS,
        sharing,
        name=fingerprint(table, "pt", (args, template.key)),
        what="Encoding",
        batched_for=sharing.num_proc or 1 if form == "blocks" else 1,
    )


def document_end(template: Template) -> str:
    """The text that ends a document: Llama 3's answers end with another token than its documents."""
    return "<|end_of_text|>" if template.name == "llama3" else template.tokenizer.eos_token


def encode_texts(batch: Aligned, *, template: Template, cutoff_len: int, form: str, eos: str) -> pa.Table:
    tokenizer = template.tokenizer
    kept = [messages[0]["content"] for messages, fault in zip(batch["messages"], batch["fault"]) if not fault]
    texts = [template.guard(text) + eos for text in kept]
    bos = tokenizer.bos_token_id if getattr(tokenizer, "add_bos_token", False) else None
    if bos is not None and form != "blocks":
        texts = [tokenizer.bos_token + text for text in texts]
    ids = template.token_ids(texts)
    documents = np.split(ids.values, np.cumsum(ids.sizes)[:-1]) if texts else []
    if form == "split":
        pieces = [ids[i : i + cutoff_len] for ids in documents for i in range(0, len(ids), cutoff_len)]
        return arrow_table({"input_ids": pieces, "cut": [False] * len(pieces)}, DOCUMENTS)
    if form != "blocks":
        cut = [len(ids) > cutoff_len for ids in documents]
        most = 0 if form == "drop" else cutoff_len
        kept = [ids[:most] if long else ids for ids, long in zip(documents, cut)]
        return arrow_table({"input_ids": kept, "cut": cut}, DOCUMENTS)
    joined = np.concatenate([np.zeros(0, np.int32), *documents])
    blocks = joined[: len(joined) // cutoff_len * cutoff_len].reshape(-1, cutoff_len)
    if bos is not None:
        blocks[:, 0] = bos  # in the place of a token, as LLaMA-Factory does
    return arrow_table({"input_ids": list(blocks), "cut": [False] * len(blocks)}, DOCUMENTS)
