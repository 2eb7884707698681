"""The optimizer as an optax transform that gives the direction; the step scales it by the learning rate."""

import jax
import jax.numpy as jnp
import optax


def make_optimizer(
    *, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, weight_decay: float = 0.0, decay_mask=None
) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) without its last factor, the learning rate, which the step multiplies in as data.

    Args:
      decay_mask: tree of bool like the trainable parameters: what weight decay applies to. Hugging Face decays
        everything but norms and biases.
    """
    return optax.chain(
        optax.scale_by_adam(b1=beta1, b2=beta2, eps=epsilon),
        optax.add_decayed_weights(weight_decay, mask=decay_mask) if weight_decay else optax.identity(),
    )


def init_optimizer(tx: optax.GradientTransformation, trainable):
    """Optimizer state in float32 whatever the dtype of the parameters.

    Gradients are accumulated in float32; moments of a lower precision would be promoted by the first update, the state
    would change its type, and its buffers could not be donated any more.
    """
    return tx.init(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable))
