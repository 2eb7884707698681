"""FLOPs of a token: against counts by hand, and against published accounting of real models."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jtune import tuning
from jtune.losses.units import UnitObjective
from jtune.models import DecoderConfig, abstract_params
from jtune.models.config import Delta, Experts, Indexer, Latent, Layer, ShortConv
from jtune.models.families import decoder_config
from jtune.models.value_head import draw_value_head
from jtune.planning.chips import peak_flops
from jtune.planning.flops import flops_per_token, mean_attended, program_flops, recomputed_per_token
from jtune.tuning.freeze import freeze

MODELS = Path(__file__).parents[2] / "configs" / "models"
TINY = DecoderConfig(
    vocab_size=100,
    hidden_size=8,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=2,
)
# Weights of the products of one layer of TINY: q, k, v, o; gate, up, down.
Q, K, V, O = 64, 32, 32, 64
GATE = UP = DOWN = 192
LAYER = Q + K + V + O + GATE + UP + DOWN
HEAD = 800
ATTENTION = 4 * 8 * 2.5  # of one layer, for a segment of 4 tokens: two products, 8 = heads * head_dim, 2.5 seen


def tuned(config: DecoderConfig, method: str, **options):
    params = abstract_params(config)
    if method == "full":
        return params, tuning.full_mask(params)
    if method == "lora":
        params = jax.eval_shape(lambda p: tuning.lora.add(p, **options), params)
        return params, tuning.adapter_mask(params)
    masks = []

    def cut(params):
        params, mask = freeze(params, **options)
        masks.append(mask)
        return params

    return jax.eval_shape(cut, params), masks[0]


@pytest.mark.parametrize(
    ("model", "full", "lora", "freeze"),
    [
        ("Qwen2.5-0.5B", 3.4924, 2.5552, 1.5830),
        ("Llama-3.2-1B", 8.2200, 5.8035, 3.8064),
        ("Llama-3.1-8B", 48.2500, 33.4420, 18.9627),
    ],
)
def test_gflops_of_a_token_of_real_models_at_4096(model, full, lora, freeze):
    config = decoder_config(json.loads((MODELS / model / "config.json").read_text()))
    count = lambda *tuned: flops_per_token(config, *tuned, lengths=[4096]) / 1e9
    assert count(*tuned(config, "full")) == pytest.approx(full, rel=1e-4)
    assert count(*tuned(config, "lora", rank=16)) == pytest.approx(lora, rel=1e-4)
    assert count(*tuned(config, "freeze", layers=2, modules=("all",), extra=())) == pytest.approx(freeze, rel=1e-4)


def test_packed_rows_and_few_labels_cost_less():
    config = decoder_config(json.loads((MODELS / "Llama-3.1-8B" / "config.json").read_text()))
    params, mask = tuned(config, "lora", rank=16)
    packed = flops_per_token(config, params, mask, lengths=[512], label_share=0.5)
    assert packed / 1e9 == pytest.approx(29.5727, rel=1e-4)


def test_full_is_three_forward_passes():
    params, mask = tuned(TINY, "full")
    forward = 3 * (2 * LAYER + ATTENTION) + 2 * HEAD
    assert flops_per_token(TINY, params, mask, lengths=[4]) == 3 * forward


def test_a_value_head_stands_in_the_place_of_the_head():
    params, mask = tuned(TINY, "full")
    head = draw_value_head(8, jax.random.key(0))
    both = {**params, "v_head": head}, {**mask, "v_head": jax.tree.map(lambda _: True, head)}
    forward = 3 * (2 * LAYER + ATTENTION) + 2 * 8 * 0.5
    assert flops_per_token(TINY, *both, lengths=[4], label_share=0.5) == 3 * forward


def test_nothing_that_trains_is_one_forward_pass():
    params, _ = tuned(TINY, "full")
    nothing = jax.tree.map(lambda _: False, params)
    assert flops_per_token(TINY, params, nothing, lengths=[4]) == 3 * (2 * LAYER + ATTENTION) + 2 * HEAD
    assert recomputed_per_token(TINY, params, lengths=[4]) == 3 * (2 * LAYER + ATTENTION)


def test_lora_has_no_gradients_of_frozen_kernels_and_none_below_the_lowest_adapter():
    params, mask = tuned(TINY, "lora", targets=("v_proj",), rank=2)
    a, b = 8 * 2, 2 * 4
    expected = (
        4 * (3 * LAYER + HEAD)
        - 2 * (Q + K + V)
        + 3 * 3 * ATTENTION
        + 3 * 6 * (a + b)
        - 2 * a  # the gradient by the input of the lowest adapter
    )
    assert flops_per_token(TINY, params, mask, lengths=[4]) == expected


def test_freeze_runs_backward_through_what_trains_and_what_is_above():
    params, mask = tuned(TINY, "freeze", layers=1, modules=("all",), extra=())
    backward = 2 * LAYER + 2 * (O + GATE + UP + DOWN) + 2 * ATTENTION + 2 * HEAD
    assert flops_per_token(TINY, params, mask, lengths=[4]) == 3 * (2 * LAYER + ATTENTION) + 2 * HEAD + backward
    # The first layer: everything above it passes gradients on.
    params, mask = tuned(TINY, "freeze", layers=-1, modules=("mlp",), extra=())
    backward = 2 * (GATE + UP + DOWN) + 2 * DOWN + 2 * 2 * LAYER + 2 * 2 * ATTENTION + 2 * HEAD
    assert flops_per_token(TINY, params, mask, lengths=[4]) == 3 * (2 * LAYER + ATTENTION) + 2 * HEAD + backward


def test_of_a_mixture_only_the_experts_of_a_token_count():
    config = DecoderConfig(**{**vars(TINY), "experts": Experts(4, 2, 24), "layers": ()})
    params, _ = tuned(config, "full")
    nothing = jax.tree.map(lambda _: False, params)
    layer = Q + K + V + O + 2 * (GATE + UP + DOWN) + 8 * 4
    assert flops_per_token(config, params, nothing, lengths=[4]) == 3 * (2 * layer + ATTENTION) + 2 * HEAD


def test_an_indexer_that_chooses_nothing_costs_nothing_and_does_not_train():
    latent = Latent(4, 4, 4, 4, 4)
    config = replace(TINY, num_key_value_heads=4, latent=replace(latent, indexer=Indexer(2, 8, 64)))
    params, mask = tuned(config, "full")
    without = replace(config, latent=latent)
    cost = flops_per_token(without, *tuned(without, "full"), lengths=[4])
    assert flops_per_token(config, params, mask, lengths=[4]) == cost
    assert not any(jax.tree.leaves(mask["layers"]["self_attn"]["indexer"]))


def test_a_delta_layer_costs_the_same_in_rows_of_any_length():
    delta = Delta(key_heads=2, value_heads=4, key_dim=2, value_dim=3, taps=4, joined=True)
    layers = (Layer(linear=True), Layer(linear=True), Layer())
    config = DecoderConfig(**{**vars(TINY), "delta": delta, "layers": layers})
    params, mask = tuned(config, "full")
    # q, k, v and their gate; beta and decay; out. The state of 4 heads, three times; 4 taps of q, k, v.
    into, out, rule = 8 * (4 + 4 + 12 + 12) + 8 * 8, 12 * 8, 3 * 4 * 2 * 3 + 4 * 20
    linear = 2 * (into + out + GATE + UP + DOWN + rule)
    count = lambda mask, n: flops_per_token(config, params, mask, lengths=[n])
    assert count(mask, 4) == 3 * (2 * linear + 2 * LAYER + ATTENTION + 2 * HEAD)
    assert count(mask, 8) - count(mask, 4) == 3 * 4 * 8 * (4.5 - 2.5)
    # Nothing below the last layer's attention has a gradient if only that layer trains.
    frozen, last = tuned(config, "freeze", layers=1, modules=("all",), extra=())
    nothing = jax.tree.map(lambda _: False, params)
    backward = 2 * LAYER + 2 * (O + GATE + UP + DOWN) + 2 * ATTENTION + 2 * HEAD
    assert flops_per_token(config, frozen, last, lengths=[4]) == count(nothing, 4) + backward
    # The lowest adapter stands on what leaves the first layer's rule, which needs no backward pass then.
    adapted, adapters = tuned(config, "lora", targets=("out_proj",), rank=2)
    a, b = 12 * 2, 2 * 8
    trained = 2 * (2 * (a + b) + 2 * (a + b) + 2 * b) + 2 * a
    backward = 2 * (GATE + UP + DOWN) + linear + 2 * rule + 2 * LAYER + 2 * ATTENTION + 2 * HEAD
    assert flops_per_token(config, adapted, adapters, lengths=[4]) == count(nothing, 4) + trained + backward


def test_a_layer_with_a_convolution_has_two_products_and_a_product_for_each_tap():
    layers = (Layer(conv=True), Layer(), Layer())
    config = DecoderConfig(**{**vars(TINY), "short_conv": ShortConv(taps=3), "layers": layers})
    params, mask = tuned(config, "full")
    convolved = 2 * (8 * 24 + 8 * 8 + 3 * 8 + GATE + UP + DOWN)
    found = flops_per_token(config, params, mask, lengths=[4])
    assert found == 3 * (convolved + 2 * (2 * LAYER + ATTENTION) + 2 * HEAD)


def test_how_far_tokens_see():
    assert mean_attended([10]) == 5.5
    assert mean_attended([10, 2]) == (55 + 3) / 12
    assert mean_attended([10], window=3) == (1 + 2 + 3 * 8) / 10
    assert mean_attended([2], window=3) == 1.5
    assert mean_attended([10, 2], window=4, chunked=True) == (10 + 10 + 3 + 3) / 12


def test_peaks_by_kind():
    assert peak_flops("TPU v5") == 459e12  # what jax calls a v5p
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("cpu") is None


def test_a_reference_is_one_more_forward_pass_of_the_model_without_its_adapter():
    """Mismatched answers are one more of both, and where the batches bring the reference of the model alone."""
    params = abstract_params(TINY)
    given = {"lengths": [4], "label_share": 0.5}
    forward = lambda tree: flops_per_token(TINY, tree, jax.tree.map(lambda _: False, tree), **given)
    adapted = jax.eval_shape(lambda p: tuning.lora.add(p, ("all",), rank=2), params)
    plain = forward(params)
    loss = UnitObjective("some", loss=lambda units: (units.policy, {}))
    for tree in (params, adapted):
        mask = tuning.trainable_mask(tree)
        program = lambda tree=tree, mask=mask, **changes: SimpleNamespace(
            module=SimpleNamespace(config=TINY), objective=loss._replace(**changes), params=tree, mask=mask, second=None
        )
        own = flops_per_token(TINY, tree, mask, **given)
        assert program_flops(program(), **given) == own
        assert program_flops(program(anchored=True), **given) == own + plain
        assert program_flops(program(anchored=True, mismatched=True), **given) == own + plain + forward(tree) + plain
        assert program_flops(program(mismatched=True), **given) == own + forward(tree)
