"""The optimizer as an optax transform that gives the direction; the step scales it by the learning rate.

What the arguments ask for is put together here: from optax where it computes what the reference does, else from the
rules in jtune/train/optimizers, each of one parameter at a time.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from jtune import tuning
from jtune.config import FinetuningArguments, TrainingArguments
from jtune.config.optimizers import method, options
from jtune.errors import ConfigError
from jtune.models import DecoderConfig
from jtune.models.families import file_names
from jtune.train.optimizers import adam, blocks
from jtune.train.optimizers.adafactor import adafactor
from jtune.train.optimizers.leafwise import Path, Rule, Shape, by_path, keys, lead, leafwise
from jtune.train.optimizers.low_rank import apollo, galore
from jtune.train.optimizers.muon import muon

PyTree = Any


def decay(weight_decay: float, mask: PyTree) -> optax.GradientTransformation:
    return optax.add_decayed_weights(weight_decay, mask=mask) if weight_decay else optax.identity()


def init_optimizer(tx: optax.GradientTransformation, trainable):
    """Optimizer state in float32 whatever the dtype of the parameters (moments in 8 bits apart).

    Gradients are accumulated in float32; moments of a lower precision would be promoted by the first update, the state
    would change its type, and its buffers could not be donated any more.
    """
    return tx.init(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable))


def optimizer_of(
    training: TrainingArguments, finetuning: FinetuningArguments, trainable: PyTree, decoder: DecoderConfig
) -> optax.GradientTransformation:
    """The optimizer that the arguments ask for.

    Of several flags LLaMA-Factory takes the first in the order GaLore, APOLLO, LoRA+, Adam-mini, Muon; here they are
    refused together.

    Args:
      trainable: tree of arrays or `jax.ShapeDtypeStruct`s, None where frozen; with shardings, if there is a mesh.

    Raises:
      ConfigError: a name of `galore_target` or `apollo_target` matches nothing.
    """
    chosen = method(training.optim, training.adafactor)
    given = options(chosen, training.optim_args)
    mask = None if finetuning.use_muon else tuning.decay_mask(trainable)
    if finetuning.use_galore or finetuning.use_apollo or finetuning.use_adam_mini or finetuning.use_muon:
        rules = _flagged(chosen, training, finetuning, trainable, decoder)
        tx = optax.chain(leafwise(rules), decay(training.weight_decay, mask))
    elif chosen in ("sgd", "rmsprop", "adagrad"):  # torch adds the decay to the gradient
        tx = optax.chain(decay(training.weight_decay, mask), _of_gradient(chosen, given))
    else:
        tx = optax.chain(_decoupled(chosen, given, training, trainable, decoder), decay(training.weight_decay, mask))
    if finetuning.loraplus_lr_ratio is None:
        return tx
    embedding = finetuning.loraplus_lr_embedding / training.learning_rate
    return optax.chain(tx, loraplus(finetuning.loraplus_lr_ratio, embedding))


def optimizer_settings(training: TrainingArguments, finetuning: FinetuningArguments) -> tuple[Any, ...]:
    """Everything about the optimizer that a compiled step depends on, but for the shapes of its state."""
    words = ("adam_", "optim", "adafactor", "weight_decay", "galore", "apollo", "use_", "loraplus", "pure_bf16")
    both = {**vars(training), **vars(finetuning)}
    return tuple((name, value) for name, value in sorted(both.items()) if any(word in name for word in words))


def _of_gradient(chosen: str, given: dict[str, Any]) -> optax.GradientTransformation:
    """torch.optim's SGD, RMSprop, Adagrad, without their decay."""
    if chosen == "adagrad":
        return leafwise(lambda path, shape: adam.adagrad(given["eps"], given["lr_decay"]))
    momentum = optax.trace(given["momentum"], nesterov=given.get("nesterov", False))
    scaled = optax.identity()
    if chosen == "rmsprop":
        scale = optax.scale_by_stddev if given["centered"] else optax.scale_by_rms
        scaled = scale(decay=given["alpha"], eps=given["eps"], eps_in_sqrt=False)
    return optax.chain(scaled, momentum) if given["momentum"] else scaled


def _decoupled(
    chosen: str, given: dict[str, Any], training: TrainingArguments, trainable: PyTree, decoder: DecoderConfig
) -> optax.GradientTransformation:
    """Those whose decay is the learning rate times the parameter."""
    beta1, beta2, epsilon = training.adam_beta1, training.adam_beta2, training.adam_epsilon
    if chosen == "adafactor":
        return leafwise(lambda path, shape: adafactor(lead(path)))
    if chosen == "lion":
        return optax.scale_by_lion(beta1, beta2)
    if chosen == "ademamix":
        return optax.contrib.scale_by_ademamix(beta1, beta2, given["beta3"], given["alpha"], epsilon)
    if chosen == "adamw":
        return optax.scale_by_adam(beta1, beta2, epsilon)
    block_of = small_blocks(trainable, decoder)
    if chosen == "lion_8bit":
        return leafwise(lambda path, shape: adam.lion(beta1, beta2, block_of(path, shape)))
    return leafwise(lambda path, shape: adam.adam(beta1, beta2, epsilon, block=block_of(path, shape)))


def _flagged(
    chosen: str,
    training: TrainingArguments,
    finetuning: FinetuningArguments,
    trainable: PyTree,
    decoder: DecoderConfig,
) -> Callable[[Path, Shape], Rule]:
    """The rules of `use_galore`, `use_apollo`, `use_adam_mini`, `use_muon`."""
    betas, epsilon = (training.adam_beta1, training.adam_beta2), training.adam_epsilon
    raw = adam.adam(*betas, epsilon, raw_epsilon=True)
    places = by_path(trainable, lambda x: getattr(x, "sharding", None))
    place = lambda path: s if isinstance(s := places.get(jax.tree_util.keystr(path)), NamedSharding) else None
    if finetuning.use_muon:
        low = training.bf16 or finetuning.pure_bf16
        dtype = jnp.dtype(jnp.bfloat16 if low else jnp.float32)
        return lambda path, shape: muon(lead(path), place(path), dtype) if muon_takes(path, shape) else raw
    if finetuning.use_adam_mini:
        return lambda path, shape: adam.adam_mini(path, lead(path), decoder.head_dim, *betas, epsilon)
    if finetuning.use_apollo:
        scaled = targets(trainable, decoder, "apollo_target", finetuning.apollo_target)
        key = jax.random.key(training.seed)
        rule = partial(
            apollo,
            rank=finetuning.apollo_rank,
            interval=finetuning.apollo_update_interval,
            scale=finetuning.apollo_scale,
            per_channel=finetuning.apollo_scale_type == "channel",
            betas=betas,
            epsilon=epsilon,
        )
        return lambda path, shape: rule(leaf_key(key, path), stacked=lead(path)) if scaled(path, shape) else raw

    projected = targets(trainable, decoder, "galore_target", finetuning.galore_target)
    block_of = small_blocks(trainable, decoder)

    def inner(path: Path, shape: Shape) -> Rule:
        if chosen == "adafactor":
            return adafactor(lead(path))
        if chosen == "adamw":
            return raw
        return adam.adam(*betas, epsilon, block=block_of(path, shape))

    rule = partial(
        galore,
        rank=finetuning.galore_rank,
        interval=finetuning.galore_update_interval,
        scale=finetuning.galore_scale,
        kind=finetuning.galore_proj_type,
    )
    return lambda path, shape: (
        rule(partial(inner, path), stacked=lead(path), sharding=place(path))
        if projected(path, shape)
        else inner(path, shape)
    )


def muon_takes(path: Path, shape: Shape) -> bool:
    """Whether a tensor is a matrix, in each layer, and neither embeddings nor a head."""
    return len(shape) - lead(path) == 2 and not any("embed" in key or "lm_head" in key for key in keys(path))


def targets(
    trainable: PyTree, decoder: DecoderConfig, argument: str, names: Sequence[str]
) -> Callable[[Path, Shape], bool]:
    """Whether a leaf is the kernel of a module that `names` select, as `lora_target` would.

    Raises:
      ConfigError: a name that matches nothing.
    """
    try:
        chosen = set(tuning.select(trainable, names, file_names(decoder)))
    except ConfigError as error:
        raise ConfigError(str(error).replace("lora_target", argument)) from None
    return lambda path, shape: keys(path)[-1] == "kernel" and keys(path)[:-1] in chosen


def small_blocks(trainable: PyTree, decoder: DecoderConfig) -> Callable[[Path, Shape], tuple[int, int] | None]:
    """The blocks in which a parameter's moments are kept in 8 bits; None: in float32.

    So are tensors of fewer than 4096 numbers, as bitsandbytes has it, and embeddings, as Hugging Face's Trainer asks
    of it.
    """
    axes = {
        jax.tree_util.keystr(path): names
        for path, names in jax.tree_util.tree_leaves_with_path(
            tuning.prepared_axes(trainable, decoder), is_leaf=lambda x: isinstance(x, tuple) and _is_axes(x)
        )
    }

    def of(path: Path, shape: Shape) -> tuple[int, int] | None:
        if keys(path)[-1] == "embedding" or not blocks.worth(shape, lead(path)):
            return None
        names = axes[jax.tree_util.keystr(path)]
        finest = next((i for i, name in enumerate(names) if name in ("embed", "rank")), None)
        return blocks.blocks(shape, lead(path), finest)

    return of


def _is_axes(x: tuple) -> bool:
    return all(name is None or isinstance(name, str) for name in x)


def loraplus(ratio: float, embedding: float) -> optax.GradientTransformation:
    """LoRA+ (arXiv:2402.12354): what adapters' `b` and vectors move by, times `ratio`; weight decay with it.

    Args:
      embedding: the factor of the `b` of an embedding's adapter instead.
    """

    def factor(path: Path, shape: Shape) -> float:
        is_b = isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "b"
        if is_b and keys(path)[-1] == "embedding":
            return embedding
        return ratio if is_b or len(shape) - lead(path) == 1 else 1.0

    scale = lambda updates, _: jax.tree_util.tree_map_with_path(lambda path, u: u * factor(path, u.shape), updates)
    return optax.stateless(scale)


def leaf_key(key: jax.Array, path: Path) -> jax.Array:
    """A key of one leaf, which depends on its path only."""
    return jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))


def apply_update(params: PyTree, direction: PyTree, learning_rate: jax.Array, key: jax.Array | None) -> PyTree:
    """`params - learning_rate * direction`, computed in float32, in the dtype of the parameters.

    Args:
      key: of the random rounding of bfloat16 parameters, another for each update; None: to the nearest.
    """

    def move(path: Path, p: jax.Array, d: jax.Array) -> jax.Array:
        new = p.astype(jnp.float32) - learning_rate * d
        if p.dtype == jnp.bfloat16 and key is not None:
            return rounded_at_random(new, leaf_key(key, path))
        return new.astype(p.dtype)

    return jax.tree_util.tree_map_with_path(move, params, direction)


def rounded_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to bfloat16, up or down with the probabilities that make it right in the mean.

    A bfloat16 number has 8 bits: what an update adds to it is mostly less than half of the last one, and rounding to
    the nearest leaves it where it was, update after update (arXiv:2010.06192). The bits follow from the key and an
    element's index, so that they are the same on every mesh.
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
