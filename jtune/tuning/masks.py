"""What trains: a tree of bool beside the parameters, and the tree cut in two along it."""

from typing import Any

import jax

from jtune.tuning.nodes import adapter_mask

PyTree = Any

# The bias of a router's choice, which only decides who is among the best; the factor of a layer's output; constants of
# xIELU; what no product is with.
BUFFERS = frozenset(["e_score_correction_bias", "layer_scalar", "beta", "eps", "indexer"])


def partition(params: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
    """(trainable, frozen): two trees like `params`, each with None where the other has the leaf."""
    trainable = jax.tree.map(lambda x, trains: x if trains else None, params, mask)
    frozen = jax.tree.map(lambda x, trains: None if trains else x, params, mask)
    return trainable, frozen


def combine(trainable: PyTree, frozen: PyTree) -> PyTree:
    """The whole tree again."""
    return jax.tree.map(lambda t, f: f if t is None else t, trainable, frozen, is_leaf=lambda x: x is None)


def full_mask(params: PyTree) -> PyTree:
    """True everywhere, but for what no gradient reaches."""
    return jax.tree_util.tree_map_with_path(lambda path, _: learns(path), params)


def learns(path: Any) -> bool:
    """Whether a path of `jax.tree_util` ends in a parameter, not in what transformers keeps as a buffer."""
    return not any(isinstance(key, jax.tree_util.DictKey) and key.key in BUFFERS for key in path)


def trainable_mask(params: PyTree) -> PyTree:
    """What trains unless something else is said: the adapters if there are any, else everything.

    `jtune.tuning.prepare` and `jtune.tuning.freeze` give the masks of a whole configuration.
    """
    mask = adapter_mask(params)
    return mask if any(jax.tree.leaves(mask)) else full_mask(params)


def decay_mask(trainable: PyTree) -> PyTree:
    """What weight decay applies to: all but norms and biases, as in Hugging Face's Trainer."""

    def decays(path: Any, _: Any) -> bool:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return names[-1] != "scale" and not names[-1].endswith("bias")

    return jax.tree_util.tree_map_with_path(decays, trainable)
