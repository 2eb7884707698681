"""Every optimizer takes a value head along with what else trains."""

import jax
import jax.numpy as jnp
import numpy as np
import optimizers
import pytest

from jtune.config import FinetuningArguments, TrainingArguments
from jtune.models.value_head import draw_value_head
from jtune.train.optimizer import apply_update, init_optimizer, optimizer_of

HEAD = draw_value_head(64, jax.random.key(0))


@pytest.mark.parametrize(
    ("finetuning", "training", "tree"),
    [
        ({"use_galore": True}, {}, "full"),
        ({"use_apollo": True}, {}, "full"),
        ({"use_muon": True}, {}, "full"),
        ({"use_adam_mini": True}, {}, "full"),
        ({"loraplus_lr_ratio": 16.0}, {}, "lora"),
        ({}, {"optim": "adamw_8bit"}, "lora"),
        ({}, {"optim": "adafactor"}, "full"),
        ({"pure_bf16": True}, {}, "lora"),
    ],
)
def test_an_optimizer_moves_the_value_head_too(finetuning, training, tree):
    trainable = {**{"full": optimizers.full, "lora": optimizers.adapters}[tree](), "v_head": HEAD}
    training = TrainingArguments(learning_rate=1e-2, **training)
    tx = optimizer_of(training, FinetuningArguments(**finetuning), trainable, optimizers.DECODER)
    gradients = jax.tree.map(lambda x: jnp.full(x.shape, 0.01), trainable)
    direction, _ = tx.update(gradients, init_optimizer(tx, trainable), trainable)
    key = jax.random.key(1) if "pure_bf16" in finetuning else None
    after = apply_update(trainable, direction, jnp.float32(1e-2), key)["v_head"]
    jax.tree.map(lambda x, before: np.testing.assert_array_less(x, before), after, HEAD)
    assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype("float32")}
    if "use_galore" in finetuning:  # its scale, 2, is not for heads: Adam's first step is the learning rate
        np.testing.assert_allclose(HEAD["kernel"] - after["kernel"], 1e-2, rtol=1e-2)
