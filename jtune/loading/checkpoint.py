"""A model in one call, for the REPL and for scripts."""

import jax
import jax.numpy as jnp

from jtune.interop import hf, peft
from jtune.loading import vocabulary
from jtune.models import CausalLM
from jtune.models.families import decoder_config


def load_model(path: str, adapter: str | None = None, dtype: str = "float32") -> tuple[CausalLM, dict]:
    """Read a Hugging Face checkpoint, and a PEFT adapter onto it.

    >>> model, params = load_model("path/to/model")                      # doctest: +SKIP
    >>> logits = model.apply({"params": params}, input_ids)              # doctest: +SKIP

    Args:
      path: a folder, or a hub id.
      adapter: a folder, or a hub id; its kernels are `jtune.lora.LoRA` nodes in `params`. One that was trained with
        another vocabulary brings its rows along.
      dtype: of the parameters and of the computation.

    Returns:
      The module and its parameters, on the first device. `model.apply({"params": params}, input_ids, positions=None,
      segment_ids=None)` with int32 `[batch, seq]` gives logits float32 `[batch, seq, vocab]`.

    Raises:
      DataError: what is wrong with the files.
    """
    folder = hf.fetch(path)
    config, _ = vocabulary.untied(decoder_config(hf.read_config(folder)), folder, ())
    params = hf.load_params(folder, config, dtype=jnp.dtype(dtype))
    if adapter is not None:
        config, params = vocabulary.as_adapter(params, config, hf.fetch(adapter))
        params, _ = peft.load_adapter(params, config, adapter, base=path)
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    return CausalLM(config, dtype=jnp.dtype(dtype)), params
