"""A way of tuning that jtune does not have takes one class, and nothing else changes: docs/methods.md shows it."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import adamw

from jtune import tuning
from jtune.errors import ConfigError
from jtune.interop import hf, peft
from jtune.losses.batch import make_loss_sum, token_losses
from jtune.models import CausalLM, DecoderConfig, init_params
from jtune.models.kernels import project
from jtune.sharding import make_mesh, replicated, tree_shardings
from jtune.train.state import init_state
from jtune.train.step import make_train_step
from jtune.tuning import lora
from jtune.tuning.nodes import in_float32
from jtune.tuning.show import show

CONFIG = DecoderConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8,
)  # fmt: skip


# [example]
@partial(jax.tree_util.register_dataclass, data_fields=["base", "gain"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Scaled(tuning.Node):
    """Each output of a kernel times a number that is learned, in the manner of IA3 (arXiv:2205.05638)."""

    base: Any
    gain: Any  # [..., out]

    adapter = ("gain",)

    def project(self, x, rng, group_sizes):
        return project(x, self.base, rng, group_sizes) * self.gain.astype(x.dtype)

    def merged(self, dtype=None):
        return (in_float32(self.base) * self.gain[..., None, :]).astype(dtype or self.dtype)


def scaled(params, targets):
    ones = lambda kernel: jnp.ones((*kernel.shape[:-2], kernel.shape[-1]))
    return tuning.replace(params, tuning.select(params, targets), lambda where, module, k: Scaled(k, ones(k)))


# [example]


@pytest.fixture(scope="module")
def base():
    return jax.jit(lambda: init_params(CONFIG, jax.random.key(0)))()


def batch(mesh=None):
    ids = np.random.default_rng(0).integers(1, 64, (2, 8, 16)).astype(np.int32)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), ids.shape)
    arrays = {"input_ids": ids, "targets": np.roll(ids, -1, -1), "positions": positions, "segment_ids": 1 + 0 * ids}
    return arrays | {"loss_weights": np.ones(ids.shape, np.float32), "divisor": np.float32(ids.size)}


def trained(params, updates=3, mesh=None):
    mask = tuning.trainable_mask(params)
    if mesh is not None:
        params = jax.device_put(params, tree_shardings(tuning.prepared_axes(params, CONFIG), params, mesh))
    trainable, frozen = tuning.partition(params, mask)
    tx = adamw(trainable)
    state = init_state(trainable, tx)
    loss_sum = make_loss_sum(CausalLM(CONFIG, mesh=mesh), label_capacity=128, batch_shards=1)
    step = jax.jit(make_train_step(token_losses(loss_sum), tx, max_grad_norm=1.0, dropout_key=None))
    data = batch() if mesh is None else jax.device_put(batch(), replicated(mesh))
    losses = []
    for _ in range(updates):
        state, metrics = step(state, frozen, data, 1e-2)
        losses.append(float(metrics.loss))
    return losses, tuning.combine(state.trainable, frozen)


def test_it_starts_as_the_model_trains_and_leaves_the_rest_alone(base, capsys):
    params = scaled(base, "all")
    model, ids = CausalLM(CONFIG), batch()["input_ids"][0]
    act = lambda p: np.asarray(model.apply({"params": p}, ids))
    np.testing.assert_allclose(act(params), act(base), atol=1e-6)
    losses, after = trained(params)
    assert losses[2] < losses[1] < losses[0]
    show(after)
    assert "gain" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, lora.split(after)[0], base)
    np.testing.assert_allclose(act(lora.merge(after)), act(after), atol=1e-5)


def test_eight_devices_train_it_as_one_does(base):
    mesh = make_mesh(fsdp=4, tensor=2)
    np.testing.assert_allclose(trained(scaled(base, "all"), mesh=mesh)[0], trained(scaled(base, "all"))[0], rtol=1e-5)


def test_it_stands_on_another_adapter_and_another_on_it(base):
    below = scaled(lora.merge(lora.add(base, "q_proj")), "q_proj")
    node = below["layers"]["self_attn"]["q_proj"]["kernel"]
    below["layers"]["self_attn"]["q_proj"]["kernel"] = lora.LoRA(node, jnp.ones((4, 32, 2)), jnp.ones((4, 2, 32)), 0.1)
    model, ids = CausalLM(CONFIG), batch()["input_ids"][0]
    act = lambda p: np.asarray(model.apply({"params": p}, ids))
    np.testing.assert_allclose(act(lora.merge(below)), act(below), atol=1e-5)
    assert sum(jax.tree.leaves(tuning.adapter_mask(below))) == 3


def test_the_documentation_shows_this_class():
    here = Path(__file__)
    example = here.read_text().split("# [example]\n")[1].strip()
    assert example in (here.parents[2] / "docs" / "methods.md").read_text()


def test_its_model_can_be_written_and_a_peft_adapter_cannot(base, tmp_path):
    _, after = trained(scaled(base, "q_proj"), updates=1)
    with pytest.raises(ConfigError, match=r"PEFT has no adapter like Scaled: merge it"):
        peft.save_adapter(after, tuning.adapter_mask(after), CONFIG, tmp_path / "adapter", base="base")
    hf.save_model(after, CONFIG, {"model_type": "llama", "dtype": "float32"}, tmp_path / "model")
    again = hf.load_params(tmp_path / "model", CONFIG)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, lora.merge(after))
