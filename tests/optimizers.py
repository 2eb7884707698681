"""A small mixture of experts as shapes and numbers, gradients for it, and optimizers run on it: ours, and torch's."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtune.config import FinetuningArguments, TrainingArguments
from jtune.models import abstract_params
from jtune.models.families import decoder_config
from jtune.train.optimizer import apply_update, init_optimizer, optimizer_of
from jtune.tuning import lora
from jtune.tuning.masks import adapter_mask, partition

DECODER = decoder_config(
    {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "tie_word_embeddings": False,
    }
)
STEPS = 10
RATES = [1e-2 * (1 + 0.1 * i) for i in range(STEPS)]  # another one at each update
ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8}


def draw(shapes: Any, seed: int, scale: float = 1.0) -> Any:
    """Numbers for a tree of shapes, each tensor of another size."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: (scale * rng.uniform(0.2, 2) * rng.standard_normal(x.shape)).astype(np.float32), shapes
    )


@cache
def full() -> Any:
    whole = abstract_params(DECODER)
    layers = whole["layers"]
    some = {
        "input_layernorm": layers["input_layernorm"],
        "self_attn": {name: layers["self_attn"][name] for name in ("q_proj", "v_proj", "o_proj")},
        "mlp": {"experts": {"up_proj": layers["mlp"]["experts"]["up_proj"]}},
    }
    return draw(whole | {"layers": some}, 0)


@cache
def adapters() -> Any:
    """The trained part of the model with LoRA on its projections of values, and a norm that trains whole."""
    params = lora.add(jax.tree.map(jnp.asarray, full()), ("v_proj", "up_proj"), rank=4)
    mask = adapter_mask(params) | {"norm": {"scale": True}}
    return draw(partition(params, mask)[0], 1)


@cache
def gradients(tree: str) -> list[Any]:
    like = {"full": full, "lora": adapters}[tree]()
    return [draw(like, 10 + step, scale=0.01 * (1 + step % 3)) for step in range(STEPS)]


def separated(steps: list[Any]) -> list[Any]:
    """Gradients with singular values of matrices that are well apart: each is 0.8 of the one before.

    Of random matrices they nearly meet, and where two meet their vectors are any two of a plane: which ones a device
    finds is its own rounding.
    """

    def separate(g: np.ndarray) -> np.ndarray:
        if g.ndim < 2:
            return g
        u, s, vt = np.linalg.svd(g.astype(np.float64), full_matrices=False)
        s = s[..., :1] * 0.8 ** np.arange(s.shape[-1])
        return ((u * s[..., None, :]) @ vt).astype(np.float32)

    return [jax.tree.map(separate, step) for step in steps]


def arguments(**given: Any) -> tuple[TrainingArguments, FinetuningArguments]:
    """The two groups of arguments that choose an optimizer, full tuning unless something else is said."""
    given = {"finetuning_type": "full", **ADAM, **given}
    mine = {name for name in given if name in FinetuningArguments.__dataclass_fields__}
    training = TrainingArguments(**{name: value for name, value in given.items() if name not in mine})
    return training, FinetuningArguments(**{name: given[name] for name in mine})


def ours(tree: str = "full", *, steps: int = STEPS, place: Callable[[Any], Any] = lambda x: x, **given: Any) -> Any:
    """(parameters, state) after updates on `gradients(tree)`."""
    params = jax.tree.map(jnp.asarray, {"full": full, "lora": adapters}[tree]())
    params = place(params)
    tx = optimizer_of(*arguments(**given), params, DECODER)

    @jax.jit
    def update(params: Any, state: Any, grads: Any, rate: jax.Array) -> Any:
        direction, state = tx.update(grads, state, params)
        return apply_update(params, direction, rate, None), state

    state = init_optimizer(tx, params)
    for step in range(steps):
        params, state = update(params, state, place(gradients(tree)[step]), jnp.float32(RATES[step]))
    return params, state


def tensors(tree: Any) -> dict[str, np.ndarray]:
    """The tensors as a torch model has them: one for each layer and expert, kernels and adapters transposed.

    The names are Hugging Face's as far as rules look at them: words of modules, lora_A, lora_B, bias, norm.
    """
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        last = getattr(path[-1], "name", names[-1])
        turned = last in ("kernel", "a", "b")
        stacked = (names[0] == "layers") + ("experts" in names)
        for index in np.ndindex(leaf.shape[:stacked]):
            tensor = np.asarray(leaf)[index]
            name = ".".join([*names[:-1], {"a": "lora_A", "b": "lora_B"}.get(last, "weight"), *map(str, index)])
            found[name] = tensor.T if turned else tensor
    return found


def theirs(make: Callable[[dict[str, Any]], Any], tree: str = "full", *, steps: int = STEPS) -> dict[str, np.ndarray]:
    """Parameters by name after a torch optimizer's updates.

    Args:
      make: `(named parameters) -> optimizer`; its groups' rates are multiplied as a schedule does.
    """
    import torch

    start = {"full": full, "lora": adapters}[tree]()
    named = {name: torch.nn.Parameter(torch.tensor(x.copy())) for name, x in tensors(start).items()}
    optimizer = make(named)
    first = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for name, g in tensors(gradients(tree)[step]).items():
            named[name].grad = torch.tensor(g.copy())
        for group, rate in zip(optimizer.param_groups, first):
            group["lr"] = rate * RATES[step] / RATES[0]
        optimizer.step()
    return {name: p.detach().numpy() for name, p in named.items()}


def decays(name: str) -> bool:
    return "norm" not in name


def assert_equal(params: Any, expected: dict[str, np.ndarray], tree: str = "full", *, rtol: float = 1e-5) -> None:
    """Every tensor has moved as it should: to a relative 1e-5 of the largest move of its numbers."""
    start, found = tensors({"full": full, "lora": adapters}[tree]()), tensors(params)
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        most = np.abs(want - start[name]).max()
        assert most > 0, f"{name} has not moved"
        np.testing.assert_allclose(found[name], want, rtol=1e-6, atol=rtol * most, err_msg=name)
