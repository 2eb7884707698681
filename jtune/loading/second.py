"""The second model of a run, beside the one that trains: a teacher (`teacher_model`), or a reference that is another
checkpoint (`ref_model`).

It has its own decoder, dtype and shardings, and nothing of it trains. What it says of a token can be compared with what
the other model says because both have the same token under the same id.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jtune.config import Config
from jtune.config.preference import needs_reference
from jtune.config.stages import rules_of
from jtune.errors import DataError
from jtune.interop.peft_shapes import adapter_shapes
from jtune.loading.model import Model, adapter_reader, compute_dtype, form_of, on_devices, placement, read_base
from jtune.loading.source import Source, fetch_model, read_bare_source, read_source
from jtune.models import CausalLM, abstract_params
from jtune.models.attention import choose
from jtune.sharding import check_experts
from jtune.tuning import is_adapter, is_node, lora, quantize
from jtune.tuning.prepare import in_dtypes

log = logging.getLogger("jtune")

SHOWN = 3  # tokens in a message


# ---------------------------------------------------------------------- before its weights are read


def role_of(config: Config) -> str | None:
    """The argument that asks for a second model; None: the run has none.

    >>> from jtune.config import load_config
    >>> role_of(load_config(["model_name_or_path=m", "teacher_model=t"], command="plan"))
    'teacher_model'
    """
    args, stage = config.finetuning, rules_of(config.finetuning.stage)
    if stage.learns_tokens and args.teacher_model:
        return "teacher_model"
    asked = args.ref_model or args.ref_model_adapters
    return "ref_model" if asked and needs_reference(SimpleNamespace(**vars(args))) else None


def second_config(config: Config) -> Config:
    """The arguments of a run of the second model: its path, its adapters and its bits are in the usual places.

    `ref_model_adapters` without `ref_model` stand on the base of the run, kept in the bits that this is kept in.
    """
    role, own = role_of(config), config.model
    assert role is not None
    path, adapters, bits = (getattr(config.finetuning, role + end) for end in ("", "_adapters", "_quantization_bit"))
    is_base = path in (None, own.model_name_or_path)
    model = replace(
        own,
        model_name_or_path=path or own.model_name_or_path,
        model_revision=own.model_revision if is_base else "main",
        adapter_name_or_path=adapters,
        quantization_bit=bits or (None if path else own.quantization_bit),
        train_from_scratch=False,
        moe_aux_loss_coef=None,
        resize_vocab=False,
        add_tokens=(),
        add_special_tokens=(),
        new_special_tokens_config=None,
    )
    return replace(config, model=model)


def fetch_second(config: Config, *, weights: bool = True) -> Path | None:
    """The folder of the second model, downloaded if it is a hub id; None: the run has none."""
    return fetch_model(second_config(config).model, weights=weights) if role_of(config) else None


def with_second(source: Source, *, weights: bool = True) -> Source:
    """`source` with that of the second model, if the run has one.

    Args:
      weights: False: download the small files only.

    Raises:
      DataError: it cannot be read, or it has another vocabulary.
    """
    folder = fetch_second(source.config, weights=weights)
    if folder is None:
        return source
    config = second_config(source.config)
    if source.tokenizer is None:
        return source._replace(second=read_bare_source(config, folder))
    second = read_source(config, folder)
    check_vocabularies(f"{role_of(config)}: {second.folder}", source, second)
    return source._replace(second=second)


def check_vocabularies(name: str, source: Source, second: Source) -> None:
    """See that each token of the run has the same id in the second model, and a row there if it has one here.

    A second model may know more tokens; rows that pad a table to a round size do not matter.

    Args:
      name: of the second model, for the message.

    Raises:
      DataError: the tokens that differ.
    """
    ours, theirs = source.tokenizer.get_vocab(), second.tokenizer.get_vocab()
    other = sorted((i, token) for token, i in ours.items() if theirs.get(token) != i)
    if other:
        there = lambda token: f"id {theirs[token]}" if token in theirs else "not"
        shown = "; ".join(f"{token!r} is id {i} here, {there(token)} there" for i, token in other[:SHOWN])
        raise DataError(
            f"{name} has another vocabulary than {source.folder}: {len(other)} of {len(ours)} tokens differ ({shown}). "
            "Two models are compared token by token: take one of the same family, with the same tokenizer"
        )
    rows, most = second.decoder.vocab_size, source.decoder.vocab_size
    without = sorted(i for i in ours.values() if rows <= i < most)
    if without:
        token = source.tokenizer.convert_ids_to_tokens(without[0])
        raise DataError(
            f"{name} has {rows} rows in its vocabulary, and {len(without)} tokens of {source.folder} have ids beyond "
            f"them: {token!r} is id {without[0]}. Take a model of the same family, with the same tokenizer"
        )
    if len(theirs) > len(ours):
        log.info("%s knows %d tokens more than %s", name, len(theirs) - len(ours), source.folder)


# ---------------------------------------------------------------------- its weights


def load_second(source: Source, mesh: Mesh) -> Model:
    """Read the weights of a second model straight to their places, adapters merged; no leaf is wider than its dtype.

    Args:
      source: of the second model (`Source.second`).

    Raises:
      DataError: the weights or an adapter cannot be read, or do not fit config.json.
    """
    config, args = source.config, source.config.model
    check_experts(mesh, source.decoder.num_experts)
    log.info("the second model, %s:", args.model_name_or_path)
    params = read_base(args, source, mesh, seed=config.training.seed)
    dtype = compute_dtype(config, source)
    params, mask = _frozen(params, source, dtype, adapter_reader(args))
    return on_devices(config, source, mesh, dtype, params, mask)


def abstract_second(source: Source, mesh: Mesh | AbstractMesh, *, platform: str) -> Model:
    """`load_second` on shapes: nothing is read or allocated. For the arguments see `jtune.loading.model`."""
    config, args = source.config, source.config.model
    of_devices = mesh if isinstance(mesh, Mesh) else None
    dtype = compute_dtype(config, source, platform)

    def prepared(params: Any) -> Any:
        kept = quantize.placed(quantize.apply(params, form_of(args)), source.decoder, of_devices)
        read = lambda params, decoder, path: adapter_shapes(params, decoder, path, config)
        return _frozen(kept, source, dtype, read)[0]

    params = jax.eval_shape(prepared, abstract_params(source.decoder, source.stored_dtype))
    shardings = placement(params, source.decoder, mesh)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)
    backend, _ = choose(args.flash_attn, platform, source.decoder, dtype)
    mask = jax.tree.map(lambda _: False, params)
    return Model(CausalLM(source.decoder, dtype=dtype, attention=backend, mesh=of_devices), params, mask)


def _frozen(params: Any, source: Source, dtype: jnp.dtype, read_adapter: Callable) -> tuple[Any, Any]:
    """The parameters with the adapters, and the mask of what trains: nothing. Traceable.

    Adapters are merged, but not into kernels that are kept in few bits: merged, these would be kept in 16 or 32.
    """
    merge = lambda x: lora.merge(x) if is_adapter(x) and not is_node(x.base) else x
    for path in source.config.model.adapter_name_or_path:
        log.info("adapter %s", path)
        params, _ = read_adapter(params, source.decoder, path)
        params = jax.tree.map(merge, params, is_leaf=is_node)
    mask = jax.tree.map(lambda _: False, params)
    return in_dtypes(params, mask, dtype, dtype), mask
