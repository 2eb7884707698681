"""Ten updates of each optimizer equal those of its reference: torch's, transformers', or the formula of its paper."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optimizers
import pytest
from optimizers import ADAM, DECODER, RATES, adapters, arguments, assert_equal, decays, full, ours, tensors, theirs

from jtune.errors import ConfigError
from jtune.train.optimizer import leaf_key, optimizer_of
from jtune.train.optimizers import blocks

torch = pytest.importorskip("torch")
BETAS = ADAM["adam_beta1"], ADAM["adam_beta2"]
LR = RATES[0]


def groups(named, weight_decay, lr=LR):
    """Hugging Face's two: with decay, and norms and biases without."""
    with_decay = [p for name, p in named.items() if decays(name)]
    without = [p for name, p in named.items() if not decays(name)]
    return [
        {"params": with_decay, "weight_decay": weight_decay, "lr": lr},
        {"params": without, "weight_decay": 0.0, "lr": lr},
    ]


def test_adamw_equals_torch():
    reference = lambda named: torch.optim.AdamW(groups(named, 0.1), betas=BETAS)
    assert_equal(ours(weight_decay=0.1)[0], theirs(reference))


def test_adafactor_equals_transformers():
    from transformers.optimization import Adafactor

    reference = lambda named: Adafactor(groups(named, 0.1), scale_parameter=False, relative_step=False)
    expected = theirs(reference)
    assert_equal(ours(weight_decay=0.1, optim="adafactor")[0], expected)
    assert_equal(ours(weight_decay=0.1, adafactor=True, optim_args="scale_parameter=False")[0], expected)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (None, {}),
        ("momentum=0.9", {"momentum": 0.9}),
        ("momentum=0.9,nesterov=true", {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_sgd_equals_torch(text, options):
    reference = lambda named: torch.optim.SGD(groups(named, 0.1), **options)
    assert_equal(ours(weight_decay=0.1, optim="sgd", optim_args=text)[0], theirs(reference))


@pytest.mark.parametrize(
    ("text", "options"),
    [(None, {}), ("alpha=0.9,momentum=0.5,centered=true,eps=1e-6", {"alpha": 0.9, "momentum": 0.5})],
)
def test_rmsprop_equals_torch(text, options):
    options = options | ({"centered": True, "eps": 1e-6} if text else {})
    reference = lambda named: torch.optim.RMSprop(groups(named, 0.1), **options)
    # Of a centred second moment little is left at first: the difference of two nearly equal numbers.
    assert_equal(ours(weight_decay=0.1, optim="rmsprop", optim_args=text)[0], theirs(reference), rtol=1e-4)


def test_adagrad_equals_torch():
    reference = lambda named: torch.optim.Adagrad(groups(named, 0.1), lr_decay=0.1)
    assert_equal(ours(weight_decay=0.1, optim="adagrad", optim_args="lr_decay=0.1")[0], theirs(reference))


class Formula:
    """A torch-like optimizer of a formula: `rule(name, p, g, state, t) -> direction`, numpy in float64."""

    def __init__(self, named, rule, decay=0.0, decays=decays, factor=lambda name, p: 1.0):
        self.named, self.rule, self.decay, self.decays, self.factor = named, rule, decay, decays, factor
        self.state = {name: {} for name in named}
        self.param_groups, self.t = [{"lr": LR}], 0

    def step(self):
        self.t += 1
        for name, p in self.named.items():
            x, g = p.detach().numpy(), p.grad.numpy().astype(np.float64)
            direction = self.rule(name, x, g, self.state[name], self.t)
            direction = direction + (self.decay * x if self.decays(name) else 0)
            x -= (self.param_groups[0]["lr"] * self.factor(name, x) * direction).astype(np.float32)


def adam_rule(name, p, g, state, t, raw_epsilon=True, square=np.square):
    beta1, beta2 = BETAS
    state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * g
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * square(g)
    root = math.sqrt(1 - beta2**t)
    return state["m"] / (np.sqrt(state["v"]) + 1e-8 * (1 if raw_epsilon else root)) * root / (1 - beta1**t)


def lion_rule(name, p, g, state, t):
    m = state.get("m", 0)
    state["m"] = BETAS[1] * m + (1 - BETAS[1]) * g
    return np.sign(BETAS[0] * m + (1 - BETAS[0]) * g)


def ademamix_rule(name, p, g, state, t):
    """As bitsandbytes: arXiv:2409.03137 without its schedules."""
    state["slow"] = 0.999 * state.get("slow", 0) + 0.001 * g
    state["m"] = BETAS[0] * state.get("m", 0) + (1 - BETAS[0]) * g
    state["v"] = BETAS[1] * state.get("v", 0) + (1 - BETAS[1]) * g * g
    mixed = state["m"] / (1 - BETAS[0] ** t) + 5.0 * state["slow"]
    return mixed / (np.sqrt(state["v"] / (1 - BETAS[1] ** t)) + 1e-8)


@pytest.mark.parametrize(
    ("optim", "rule", "options"),
    [("lion_32bit", lion_rule, None), ("ademamix", ademamix_rule, "beta3=0.999")],
)
def test_lion_and_ademamix_equal_their_formulas(optim, rule, options):
    expected = theirs(lambda named: Formula(named, rule, decay=0.1))
    assert_equal(ours(weight_decay=0.1, optim=optim, optim_args=options)[0], expected)


# ---------------------------------------------------------------------- 8 bits


def dynamic_map(signed):
    """bitsandbytes' create_dynamic_map, from its definition: seven decades, each of twice as many bins."""
    numbers = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2 ** (i + (0 if signed else 1)) + 1)
        middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        numbers += [*middles, *(-middles if signed else ())]
    assert len(numbers) == 256
    return np.sort(np.array(numbers, np.float32))


@pytest.mark.parametrize("signed", [True, False])
def test_the_8_bit_code_is_bitsandbytes_nearest(signed):
    known = dynamic_map(signed)
    rng = np.random.default_rng(0)
    x = (10 ** rng.uniform(-8, 0, 4000) * (rng.choice([-1, 1], 4000) if signed else 1)).astype(np.float32)
    x = np.concatenate([x, [0.0, 1.0, -1.0 if signed else 0.5], known])
    codes = blocks.encode(jnp.asarray(x), signed)
    assert codes.dtype == (jnp.int8 if signed else jnp.uint8)
    nearest = known[np.abs(x[:, None].astype(np.float64) - known).argmin(1)]
    np.testing.assert_allclose(blocks.decode(codes, signed), nearest, rtol=1e-6)
    assert len(set(np.asarray(codes[-256:]).tolist())) == 256


def in_8_bits(name, x, signed):
    """What is left of a moment `[out, in]`: the nearest codes, relative to the largest number of its block."""
    embed = 1 if "o_proj" in name or "down_proj" in name else 0
    found = blocks.blocks(x.T.shape, 0, embed)
    assert found is not None
    assert found[0] != embed
    y = x.T if found[0] == 1 else x  # blocks along the last axis now
    cut = y.reshape(-1, found[1])
    scale = np.abs(cut).max(1, keepdims=True)
    scale[scale == 0] = 1
    known = dynamic_map(signed).astype(np.float64)
    middles = (known[1:] + known[:-1]) / 2
    kept = (known[np.searchsorted(middles, cut / scale)] * scale).reshape(y.shape)
    return kept.T if found[0] == 1 else kept


def eight_bit(rule, *signed):
    """`rule` with its moments stored in 8 bits where they are large, as bitsandbytes' are, and no embedding's."""

    def coded(name, p, g, state, t):
        direction = rule(name, p, g, state, t)
        if g.size >= 4096 and "embed" not in name:
            for key, sign in zip("mv", signed):
                state[key] = in_8_bits(name, state[key], sign)
        return direction

    return coded


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_lion_8bit"])
def test_8_bit_optimizers_equal_bitsandbytes_formula(optim):
    adam = lambda *args: adam_rule(*args, raw_epsilon=False)
    rule = eight_bit(adam, True, False) if "adam" in optim else eight_bit(lion_rule, True)
    params, state = ours(weight_decay=0.1, optim=optim)
    kept = state[0].moments["layers"]["mlp"]["experts"]["up_proj"]["kernel"].arrays
    assert kept["mu"].dtype == jnp.int8
    assert kept["mu_scale"].size * 32 <= kept["mu"].size
    small = state[0].moments["layers"]["self_attn"]["v_proj"]["kernel"].arrays
    assert small["mu"].dtype == jnp.float32  # 2048 numbers
    # Ties between codes and the last bit of a float32 moment fall either way: a few numbers of a block differ by one.
    expected = theirs(lambda named: Formula(named, rule, decay=0.1))
    found, start = tensors(params), tensors(full())
    for name, want in expected.items():
        off = np.abs(found[name] - want) / np.abs(want - start[name]).max()
        assert np.mean(off > 1e-5) < 2e-3, name
        assert off.max() < 0.1, name


# ---------------------------------------------------------------------- matrices


def test_muon_equals_llama_factorys():
    """LLaMA-Factory's third_party/muon in float32: its bfloat16 leaves two digits to compare."""

    def rule(name, p, g, state, t):
        if g.ndim != 2 or "embed" in name or "lm_head" in name:
            return adam_rule(name, p, g, state, t)
        state["m"] = 0.95 * state.get("m", 0) + g
        x = g + 0.95 * state["m"]
        x = x.T if (tall := g.shape[0] > g.shape[1]) else x
        x = x / (np.linalg.norm(x) + 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return 0.2 * math.sqrt(max(g.shape)) * (x.T if tall else x)

    for tree in ("full", "lora"):
        expected = theirs(lambda named: Formula(named, rule, decay=0.1, decays=lambda name: True), tree)
        given = {"use_muon": True, "weight_decay": 0.1, "finetuning_type": tree}
        assert_equal(ours(tree, **given)[0], expected, tree, rtol=5e-5)


def test_muon_in_bfloat16_comes_close():
    exact, coarse = (jax.tree.leaves(ours(use_muon=True, bf16=low, steps=1)[0]) for low in (False, True))
    for a, b, start in zip(exact, coarse, jax.tree.leaves(full())):
        assert np.abs(a - b).mean() < 0.1 * np.abs(a - start).mean()


def aligned(u):
    """Columns with their largest number positive."""
    return u * np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])


@pytest.mark.parametrize("kind", ["std", pytest.param("reverse_std", marks=pytest.mark.slow)])
def test_galore_equals_its_formula(kind, monkeypatch):
    """galore_torch's AdamW, with the signs of singular vectors fixed; three subspaces in ten updates."""

    def rule(name, p, g, state, t):
        if g.ndim != 2 or not any(word in name for word in ("q_proj", "up_proj")):
            return adam_rule(name, p, g, state, t)
        right = {"std": g.shape[0] >= g.shape[1], "reverse_std": g.shape[0] < g.shape[1]}[kind]
        if (t - 1) % 4 == 0:
            u, s, vt = np.linalg.svd(g, full_matrices=False)
            found = (vt.T if right else u)[:, :4]
            # What is compared is determined: no two singular values or largest numbers of a vector nearly meet.
            assert (s[1:5] < 0.9 * s[:4]).all()
            largest = np.sort(np.abs(found), axis=0)
            assert (largest[-2] < (1 - 1e-5) * largest[-1]).all()
            state["p"] = aligned(found)
        low = adam_rule(name, p, g @ state["p"] if right else state["p"].T @ g, state, t)
        return 0.25 * (low @ state["p"].T if right else state["p"] @ low)

    steps = optimizers.separated(optimizers.gradients("full"))
    monkeypatch.setattr(optimizers, "gradients", lambda tree: steps)
    given = {"galore_rank": 4, "galore_update_interval": 4, "galore_scale": 0.25, "galore_proj_type": kind}
    found, state = ours(use_galore=True, weight_decay=0.1, galore_target=("q_proj", "up_proj"), **given)
    # Adam divides by the root of what may be next to nothing: what float32 leaves of singular vectors is seen in it.
    assert_equal(found, theirs(lambda named: Formula(named, rule, decay=0.1)), rtol=1e-4)
    kept = state[0].moments["layers"]["mlp"]["experts"]["up_proj"]["kernel"].arrays
    assert sorted(kept["mu"].shape[2:]) == [4, 128 if kind == "std" else 64]


@pytest.mark.parametrize("optim", ["adafactor", "adamw_8bit"])
def test_galore_goes_with_other_moments(optim):
    """The same subspace, and in it the other optimizer; 8 bits of it come close to 32."""
    given = {"use_galore": True, "galore_rank": 16, "galore_target": ("up_proj",)}
    params, state = ours(optim=optim, steps=3, **given)
    kept = state[0].moments["layers"]["mlp"]["experts"]["up_proj"]["kernel"].arrays
    expected = {"adafactor": {"nu_row", "nu_column"}, "adamw_8bit": {"mu", "nu"}}[optim]
    assert {name for name in kept if not name.endswith("_scale")} == expected | {"projection"}
    exact = ours(steps=3, **given)[0] if optim == "adamw_8bit" else params
    a, b, start = (x["layers"]["mlp"]["experts"]["up_proj"]["kernel"] for x in (params, exact, full()))
    assert np.abs(a - start).max() > 0
    assert np.abs(a - b).mean() < 0.1 * np.abs(b - start).mean()


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_apollo_equals_its_formula(scale_type):
    """apollo_torch's AdamW, with our random projections; three of them in ten updates."""
    key = jax.random.key(42)
    paths = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(full()):
        paths[".".join(k.key for k in path[:-1])] = path, leaf.shape

    def projection(name, t, right):
        module, _, index = name.partition(".weight.")
        path, shape = paths[module]
        stack = tuple(map(int, index.split(".")))
        drawn = jax.random.fold_in(leaf_key(key, path), (t - 1) // 4)
        side = shape[-2] if right else shape[-1]
        whole = jax.random.normal(drawn, (*shape[: len(stack)], side, 8)) / math.sqrt(8)
        return np.asarray(whole, np.float64)[stack]

    def rule(name, p, g, state, t):
        if "_proj" not in name or "experts" in name:  # `all` leaves experts and their router out
            return adam_rule(name, p, g, state, t)
        right = g.shape[0] >= g.shape[1]
        low = g @ projection(name, t, right) if right else projection(name, t, right).T @ g
        step = math.sqrt(1 - BETAS[1] ** t) / (1 - BETAS[0] ** t)
        whole = adam_rule(name, p, low, state, t) / step
        axis = (1 if right else 0) if scale_type == "channel" else None
        norm = lambda x: np.sqrt(np.sum(x * x, axis=axis, keepdims=True))
        scaled = g * norm(whole) / (norm(low) + 1e-8)
        length = np.sqrt(np.sum(scaled * scaled))
        if t > 1:
            limit = max(length / (state["norm"] + 1e-8), 1.01) / 1.01
            scaled, length = scaled / limit, length / limit
        state["norm"] = length
        return step * math.sqrt(32) * scaled

    expected = theirs(lambda named: Formula(named, rule, decay=0.1))
    given = {"apollo_rank": 8, "apollo_update_interval": 4, "apollo_scale_type": scale_type}
    found, state = ours(use_apollo=True, weight_decay=0.1, **given)
    assert_equal(found, expected, rtol=2e-5)
    kept = state[0].moments["layers"]["self_attn"]["q_proj"]["kernel"].arrays
    assert {name: x.shape for name, x in kept.items()} == {"mu": (2, 8, 64), "nu": (2, 8, 64), "norm": (2,)}


def test_adam_mini_equals_its_formula():
    """adam_mini 1.1.1: a second moment for each head of q and k, each row of other matrices, each other tensor."""

    def rule(name, p, g, state, t):
        if any(word in name for word in ("q_proj", "k_proj")):
            mean = lambda x: np.repeat(np.mean((x * x).reshape(-1, 16 * x.shape[1]), axis=1), 16)[:, None]
        elif "norm" in name:
            mean = lambda x: np.mean(x * x)
        else:
            mean = lambda x: np.mean(x * x, axis=1, keepdims=True)
        return adam_rule(name, p, g, state, t, raw_epsilon=False, square=mean)

    found, state = ours(use_adam_mini=True, weight_decay=0.1)
    assert_equal(found, theirs(lambda named: Formula(named, rule, decay=0.1)))
    second = jax.tree.map(lambda m: m.arrays["nu"].size, state[0].moments, is_leaf=lambda x: hasattr(x, "arrays"))
    assert sum(jax.tree.leaves(second)) < 0.02 * sum(x.size for x in jax.tree.leaves(full()))


def test_a_target_that_matches_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"galore_target: 'q_prj' matches no module.*did you mean 'q_proj'"):
        optimizer_of(*arguments(use_galore=True, galore_target=("q_prj",)), full(), DECODER)


# ---------------------------------------------------------------------- LoRA+


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_loraplus_has_llama_factorys_groups(optim):
    """`_create_loraplus_optimizer`: b and vectors at ratio times the rate, their weight decay with it."""
    from transformers.optimization import Adafactor

    def reference(named):
        fast = lambda name, p: "lora_B" in name or p.ndim == 1
        groups = [
            {"params": [p for n, p in named.items() if not fast(n, p)], "lr": LR, "weight_decay": 0.1},
            {"params": [p for n, p in named.items() if fast(n, p) and decays(n)], "lr": 16 * LR, "weight_decay": 0.1},
            {"params": [p for n, p in named.items() if fast(n, p) and not decays(n)], "lr": 16 * LR, "weight_decay": 0},
        ]
        if optim == "sgd":
            return torch.optim.SGD(groups)
        if optim == "adafactor":
            return Adafactor(groups, scale_parameter=False, relative_step=False)
        return torch.optim.AdamW(groups, betas=BETAS)

    given = {"finetuning_type": "lora", "loraplus_lr_ratio": 16.0, "learning_rate": LR, "optim": optim}
    assert_equal(ours("lora", weight_decay=0.1, **given)[0], theirs(reference, "lora"), "lora")


def test_an_embedding_adapters_b_has_its_own_rate():
    from jtune.train.optimizer import loraplus
    from jtune.tuning.lora import LoRA

    tree = {"embed_tokens": {"embedding": LoRA(None, jnp.ones((8, 2)), jnp.ones((2, 4)), 1.0)}}
    moved, _ = loraplus(16.0, 0.5).update(tree, loraplus(16.0, 0.5).init(tree), tree)
    node = moved["embed_tokens"]["embedding"]
    assert (float(node.a[0, 0]), float(node.b[0, 0])) == (1.0, 0.5)


def test_lora_trains_with_8_bit_moments():
    params, _ = ours("lora", optim="adamw_8bit", steps=2, finetuning_type="lora")
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), params, adapters())))
