"""A base in few bits: the numbers of bitsandbytes, no copy of it in floats, and training as without."""

from functools import cache, partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jtune import tuning
from jtune.commands.train import train
from jtune.config import FinetuningArguments, ModelArguments, load_config
from jtune.errors import CheckpointError, ConfigError
from jtune.interop import hf
from jtune.loading import inference
from jtune.loading.model import form_of, placement, read_base
from jtune.loading.source import decoder_of, read_bare_source
from jtune.models import CausalLM, DecoderConfig, init_params
from jtune.models.config import Experts
from jtune.models.decoder import hidden_states
from jtune.sharding import batch_sharding, make_mesh
from jtune.tuning import lora, quantize
from jtune.tuning.quantize import Form
from jtune.tuning.show import show

DENSE = DecoderConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
MIXTURE = DecoderConfig(**{**vars(DENSE), "family": "mixtral", "experts": Experts(4, 2, 128), "layers": ()})
IDS = np.arange(32, dtype=np.int32).reshape(4, 8)
FORMS = [Form("nf4"), Form("nf4", True), Form("fp4"), Form("fp4", True), Form("int8"), Form("fp8")]


@cache
def weights(config=DENSE):
    return jax.jit(lambda: init_params(config, jax.random.key(0)))()


def logits(params, config=DENSE, **options):
    return np.asarray(jax.jit(lambda p: CausalLM(config, **options).apply({"params": p}, IDS))(params))


def kernel(*shape):
    return jax.random.normal(jax.random.key(5), shape) * 0.02


# ------------------------------------------------------------------ numbers

# bitsandbytes 0.48, csrc/kernels.cu (dDequantizeNF4, dDequantizeFP4Tree) and functional.py (get_4bit_type).
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12


def theirs(w, table, double=False):
    """What bitsandbytes makes of a weight `[out, in]`: blocks of 64 in memory, the nearest of the table."""
    table = np.array(table, np.float32)
    flat = w.reshape(-1, 64)
    absmax = np.abs(flat).max(1)
    nearest = table[np.abs((flat / absmax[:, None])[..., None] - table).argmin(-1)]
    if double:
        # functional.py: the mean goes, then create_dynamic_map(): 8-bit floats, in blocks of 256.
        steps = [10.0 ** (i - 6) * (0.1 + 0.9 * (np.arange(2**i) + 0.5) / 2**i) for i in range(7)]
        code = np.sort(np.concatenate([*steps, *(-x for x in steps), [0, 1]])).astype(np.float32)
        groups = (absmax - absmax.mean()).reshape(-1, 256)
        largest = np.abs(groups).max(1, keepdims=True)
        rounded = code[np.abs((groups / largest)[..., None] - code).argmin(-1)] * largest
        absmax = rounded.reshape(-1) + absmax.mean()
    return (nearest * absmax[:, None]).reshape(w.shape)


@pytest.mark.parametrize(("kind", "table"), [("nf4", NF4), ("fp4", FP4)])
def test_four_bits_are_those_of_bitsandbytes(kind, table):
    w = kernel(2, 256, 96)
    node = quantize.quantize(w, Form(kind))
    expected = np.stack([theirs(np.asarray(x).T, table).T for x in w])
    np.testing.assert_allclose(node.merged(), expected, rtol=1e-6)
    assert (node.codes.shape, node.codes.dtype, node.absmax.shape) == ((2, 128, 96), jnp.uint8, (2, 4, 96))
    assert (node.shape, node.dtype, node.size) == (w.shape, w.dtype, w.size)


def test_double_quantisation_is_as_near_as_that_of_bitsandbytes():
    w = kernel(512, 512)
    error = lambda x, of: np.linalg.norm(x - of) / np.linalg.norm(of)
    single = quantize.quantize(w, Form("nf4")).merged()
    node = quantize.quantize(w, Form("nf4", True))
    assert error(node.merged(), single) < error(theirs(np.asarray(w).T, NF4, True).T, single) < 0.01
    bits = 8 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(node)) / w.size
    assert bits == pytest.approx(4 + 8 / 64 + 64 / 64 / 256)


@pytest.mark.parametrize(
    ("form", "bound"), [(FORMS[0], 0.095), (FORMS[1], 0.095), (FORMS[2], 0.125), (FORMS[4], 0.009), (FORMS[5], 0.027)]
)
def test_relative_errors_of_normal_weights(form, bound):
    w = kernel(512, 256)
    error = np.linalg.norm(quantize.quantize(w, form).merged() - w) / np.linalg.norm(w)
    assert bound / 2 < error < bound


@pytest.mark.parametrize("table", quantize.TABLES.values(), ids=quantize.TABLES)
def test_gpus_look_up_the_same_entries(table):
    codes = jnp.arange(len(table)) + jnp.array([[0], [32], [-16]])  # what is above the low four bits does not matter
    expected = np.tile(np.array(table, np.float32), (3, 1))
    np.testing.assert_array_equal(quantize._read(table, codes), expected)
    np.testing.assert_array_equal(quantize._look_up(table, codes, 3), expected)


@pytest.mark.parametrize("form", FORMS)
def test_zeros_stay_zeros(form):
    node = quantize.quantize(jnp.zeros((64, 8)), form)
    np.testing.assert_array_equal(node.merged(), 0)


def test_int8_is_the_nearest_step_of_each_output():
    w = np.asarray(kernel(40, 6))
    step = np.abs(w).max(0) / 127
    np.testing.assert_allclose(quantize.quantize(jnp.asarray(w), Form("int8")).merged(), np.round(w / step) * step)


def test_blocks_divide_the_inputs():
    assert [quantize.quantize(kernel(n, 4), Form("nf4")).block for n in (64, 96, 80, 2880, 6)] == [64, 32, 16, 64, 2]
    with pytest.raises(ConfigError, match="a kernel has 5, an odd number: quantization_bit: 8"):
        quantize.quantize(kernel(5, 4), Form("nf4"))


@pytest.mark.parametrize("form", [FORMS[1], FORMS[4]])
def test_how_a_kernel_is_split_changes_no_bit(form):
    """Weights in bfloat16 are full of ties; of 8 shards, some are smaller than a block or a group."""
    w = kernel(2, 256, 512).astype(jnp.bfloat16)
    mesh = make_mesh(devices=jax.devices()[:8], fsdp=4, tensor=2)
    one = quantize.quantize(w, form)
    for where in (P(None, "fsdp", "tensor"), P(None, None, ("fsdp", "tensor")), P(None, ("fsdp", "tensor"))):
        several = jax.jit(partial(quantize.quantize, form=form))(jax.device_put(w, NamedSharding(mesh, where)))
        jax.tree.map(np.testing.assert_array_equal, several, one)


# ------------------------------------------------------------------ products


def moved(params):
    """With the adapters off their start."""
    noise = lambda x, m: x + 0.1 * jax.random.normal(jax.random.key(3), x.shape) if m else x
    return jax.tree.map(noise, params, tuning.adapter_mask(params))


@pytest.mark.parametrize("form", [FORMS[1], FORMS[5]])
def test_products_and_gradients_are_those_of_the_kernel(form):
    node, x = quantize.quantize(kernel(64, 32), form), jax.random.normal(jax.random.key(1), (3, 5, 64))
    whole = node.merged()
    of = lambda f: jax.value_and_grad(lambda x: jnp.sum(jnp.sin(f(x))))(x)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        jax.jit(lambda: of(lambda x: node.project(x, None, None)))(),
        of(lambda x: x @ whole),
    )


@pytest.mark.parametrize(("config", "form"), [(DENSE, FORMS[1]), (MIXTURE, FORMS[4])])
def test_a_quantised_model_is_the_model_of_its_merged_kernels(config, form):
    params = quantize.apply(weights(config), form)
    np.testing.assert_allclose(logits(lora.merge(params), config), logits(params, config), atol=1e-5)
    assert np.abs(logits(params, config) - logits(weights(config), config)).max() > 1e-4
    assert tuning.count(params) == tuning.count(weights(config))
    held = {names[-1] for names, x in tuning.kernels(params) if tuning.is_node(x)}
    assert held == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}  # no head, no router


@pytest.mark.parametrize("form", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_an_adapter_on_a_quantised_base(form):
    base = quantize.apply(weights(), Form("nf4", True))
    params = lora.add(base, "all", rank=3, form=form)
    np.testing.assert_allclose(logits(params), logits(base), atol=1e-5)
    trained = moved(params)
    np.testing.assert_allclose(logits(lora.merge(trained)), logits(trained), atol=2e-5)
    plain, adapters = lora.split(trained)
    jax.tree.map(np.testing.assert_array_equal, plain, base)
    assert len(jax.tree.leaves(adapters)) == 7 * (3 if form == "dora" else 2)


def gradient(config, mesh, module, params, ids=IDS):
    """The gradient of a loss by the adapters, compiled, and what it takes."""
    params = quantize.placed(params, config, mesh)
    params = jax.device_put(params, placement(params, config, mesh))
    trainable, frozen = tuning.partition(params, tuning.adapter_mask(params))

    def loss(trainable, frozen, ids):
        hidden = hidden_states(module, tuning.combine(trainable, frozen), ids).x
        return jnp.sum(jnp.sin(hidden.astype(jnp.float32)))

    args = trainable, frozen, jax.device_put(ids, batch_sharding(mesh, accumulated=False))
    return jax.jit(jax.grad(loss)).lower(*args).compile(), args


@pytest.mark.parametrize(
    ("config", "sizes", "form"),
    [
        (DENSE, {"fsdp": 4, "tensor": 2}, FORMS[1]),
        (MIXTURE, {"fsdp": 2, "tensor": 2}, FORMS[4]),
        pytest.param(MIXTURE, {"fsdp": 2, "tensor": 2}, FORMS[0], marks=pytest.mark.slow),
        pytest.param(MIXTURE, {"fsdp": 2, "expert": 2}, FORMS[1], marks=pytest.mark.slow),
        pytest.param(MIXTURE, {"fsdp": 4}, FORMS[5], marks=pytest.mark.slow),
    ],
)
def test_sharded_equals_one_device(config, sizes, form):
    base = quantize.apply(weights(config), form)
    targets = "all" if config is DENSE else "q_proj,gate_proj,down_proj"
    params = moved(lora.add(base, targets, rank=4))
    found = []
    several = jax.devices()[: np.prod([*sizes.values()])]
    for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(devices=several, **sizes)):
        step, args = gradient(config, mesh, CausalLM(config, mesh=mesh), params)
        found.append(step(*args))
    for one, several in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(several, one, rtol=1e-3, atol=1e-4)


def test_scales_that_cannot_be_split_with_their_codes_are_refused():
    base = quantize.apply(weights(MIXTURE), Form("nf4", True))
    mesh = make_mesh(devices=jax.devices()[:8], tensor=8, fsdp=1)
    with pytest.raises(ConfigError, match="mesh_tensor"):
        gradient(MIXTURE, mesh, CausalLM(MIXTURE, mesh=mesh), lora.add(base, "q_proj"))


def test_codes_travel_not_kernels():
    mesh = make_mesh(devices=jax.devices()[:4], fsdp=4)
    params = lora.add(quantize.apply(weights(), Form("nf4")), "all", rank=1)
    step, _ = gradient(DENSE, mesh, CausalLM(DENSE, mesh=mesh), params)
    gathers = [line for line in step.as_text().splitlines() if " all-gather(" in line or "all-gather-start(" in line]
    assert any("u8[" in line for line in gathers)
    assert not any(shape in line for line in gathers for shape in ("f32[64,128]", "f32[128,64]", "f32[64,64]"))


def test_no_copy_in_floats_is_kept():
    """More products need memory for their inputs, here next to none, and not for their kernels."""

    def temporaries(count):
        nodes = [quantize.quantize(kernel(256, 256), FORMS[0])] * count
        loss = lambda x, nodes: jnp.sum(reduce(lambda x, node: jnp.sin(node.project(x, None, None)), nodes, x))
        return jax.jit(jax.grad(loss)).lower(jnp.ones((2, 256)), nodes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(6) - temporaries(2) < 256 * 256  # a copy of each in bfloat16 would be eight times that


def test_dots_keeps_what_products_with_quantised_kernels_give(monkeypatch):
    monkeypatch.setattr("jtune.models.decoder.THIN", 8)  # the model is narrow

    def kept(params, remat):
        def residuals(trainable, frozen, ids):
            model = CausalLM(DENSE, remat=remat)
            logits = lambda t: model.apply({"params": tuning.combine(t, frozen)}, ids)
            return jax.vjp(logits, trainable)[1]

        parts = tuning.partition(params, tuning.adapter_mask(params))
        leaves = jax.tree.leaves(jax.eval_shape(residuals, *parts, jax.ShapeDtypeStruct((2, 24), jnp.int32)))
        return sum(x.size == DENSE.num_hidden_layers * 2 * 24 * DENSE.intermediate_size for x in leaves)

    plain = jax.eval_shape(lambda: lora.add(weights(), "all", rank=4))
    quantised = jax.eval_shape(lambda: lora.add(quantize.apply(weights(), FORMS[0]), "all", rank=4))
    assert kept(quantised, "dots") == kept(plain, "dots") == 2  # gate_proj, up_proj
    assert kept(quantised, "full") == 0


# ------------------------------------------------------------------ reading


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    return small.write_model(folder / "model"), small.write_data(folder / "data")


@pytest.mark.parametrize(("form", "sizes"), [(FORMS[5], {}), (FORMS[1], {"fsdp": 4, "tensor": 2})])
def test_what_is_quantised_while_it_is_read_is_what_is_quantised_later(form, sizes, parts, monkeypatch):
    folder, _ = parts
    decoder = decoder_of(hf.read_config(folder), ModelArguments())
    expected = quantize.apply(hf.load_params(folder, decoder), form)
    monkeypatch.setattr(hf, "PIECE_BYTES", 5000)  # a layer at a time
    if not sizes:
        jax.tree.map(np.testing.assert_array_equal, hf.load_params(folder, decoder, form=form), expected)
        return
    mesh = make_mesh(devices=jax.devices()[:8], **sizes)
    places = placement(jax.eval_shape(lambda: expected), decoder, mesh)
    found = hf.load_params(folder, decoder, form=form, shardings=places)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    node = found["layers"]["mlp"]["up_proj"]["kernel"]
    assert node.codes.sharding.spec == P(None, "fsdp", "tensor")
    assert node.codes.addressable_shards[0].data.size * 8 == node.codes.size


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 4, "tensor": 2}])
def test_what_is_stored_in_bfloat16_is_quantised_too(sizes, parts, tmp_path):
    stored = hf.read_config(parts[0])
    decoder = decoder_of(stored, ModelArguments())
    hf.save_model(hf.load_params(parts[0], decoder), decoder, stored, tmp_path, dtype=jnp.bfloat16)
    mesh = make_mesh(devices=jax.devices()[: 8 if sizes else 1], **sizes)
    config = load_config([f"model_name_or_path={tmp_path}", "quantization_bit=4"], command="inspect")
    source = read_bare_source(config, tmp_path)
    found = read_base(config.model, source, mesh, seed=0)
    expected = quantize.apply(hf.load_params(tmp_path, decoder), form_of(config.model))
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert found["layers"]["mlp"]["up_proj"]["kernel"].dtype == jnp.bfloat16


# ------------------------------------------------------------------ runs


def run_case(folder, parts, **changes):
    """A run on all devices, in this process."""
    sizes = {"mesh_fsdp": -1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    case = small.case(
        folder, *parts, finetuning_type="lora", lora_rank=4, learning_rate=1e-2, eval_strategy="no", **sizes | changes
    )
    train(load_config([str(case)]))
    return folder / "out"


@pytest.fixture(scope="module")
def trained(parts, tmp_path_factory):
    """The output of a short run on 4 bits."""
    return run_case(tmp_path_factory.mktemp("trained"), parts, quantization_bit=4, max_steps=6)


def losses(folder):
    return np.array([x for (x,) in small.curve(folder, "loss") if x is not None])


@pytest.mark.slow
def test_the_adapter_of_a_quantised_base_is_one_for_any(parts, trained):
    """For the base as it is stored, by PEFT and by us; and for the quantised one, where it was trained."""
    case = str(trained.parent / "case.yaml")
    words = [case, f"adapter_name_or_path={trained}"]
    asked = {
        bit: inference.load(load_config([*words, f"quantization_bit={bit}"], command="chat")) for bit in ("4", "null")
    }
    node = asked["4"].params["layers"]["mlp"]["up_proj"]["kernel"]
    assert (node.base.kind, node.base.spread.dtype) == ("nf4", jnp.float32)
    found = {bit: np.asarray(x.model.apply({"params": x.params}, IDS)) for bit, x in asked.items()}
    assert 1e-4 < np.abs(found["4"] - found["null"]).max() < 0.5
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(parts[0])
    model = peft.PeftModel.from_pretrained(base, str(trained)).eval()
    with torch.no_grad():
        np.testing.assert_allclose(found["null"], model(torch.tensor(IDS)).logits.numpy(), atol=1e-4)


@pytest.mark.slow
def test_resumed_equals_uninterrupted(parts, trained, tmp_path):
    changes = {"quantization_bit": 4, "max_steps": 6, "resume_from_checkpoint": str(trained / "checkpoint-3")}
    again = run_case(tmp_path / "again", parts, **changes)
    assert small.curve(again, "step", "loss", "grad_norm") == small.curve(trained, "step", "loss", "grad_norm")
    with pytest.raises(CheckpointError, match="quantization_type: nf4 then, fp4 now"):
        run_case(tmp_path / "other", parts, **changes | {"quantization_type": "fp4"})
    on = run_case(tmp_path / "on", parts, quantization_bit=4, adapter_name_or_path=str(trained), max_steps=1)
    assert losses(on)[0] < losses(trained)[0] - 0.1


@pytest.mark.slow
def test_a_quantised_base_trains_as_the_base_does(parts, tmp_path):
    plain = losses(run_case(tmp_path / "plain", parts))
    for bit in (4, 8):
        found = losses(run_case(tmp_path / str(bit), parts, quantization_bit=bit))
        assert 0 < np.abs(found - plain).max() < 0.02
    assert plain[0] - plain[-1] > 0.1


def test_what_is_shown(capsys):
    args = FinetuningArguments(finetuning_type="lora", lora_rank=2)
    base = quantize.apply(weights(), Form("nf4", True))
    prepared = partial(tuning.prepare, base, decoder=DENSE, load_adapter=None, key=jax.random.key(0))
    params, mask = prepared(args=args, frozen_dtype=jnp.dtype(jnp.bfloat16))
    trained = sum(x.size for x in jax.tree.leaves(tuning.partition(params, mask)[0]))
    assert f"trains {trained:,} of {tuning.count(weights()) + trained:,} parameters" in tuning.describe_trainable(
        params, mask
    )
    node = params["layers"]["self_attn"]["q_proj"]["kernel"].base
    assert node.spread.dtype == jnp.float32  # scales are not rounded with the rest
    show(params, mask)
    shown = capsys.readouterr().out
    assert "layers.self_attn.q_proj.kernel.base.codes" in shown
    assert f"{tuning.count(weights()) + trained:,} parameters" in shown
    whole = FinetuningArguments(finetuning_type="lora", lora_target=("q_proj",), additional_target=("up_proj",))
    with pytest.raises(ConfigError, match="'up_proj' is kept as nf4 in blocks of 64, which cannot train"):
        prepared(args=whole, frozen_dtype=jnp.dtype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("finetuning_type=full", "freezes the kernels, but finetuning_type: full trains them"),
        ("quantization_bit=3", "quantization_bit must be 4 or 8, not 3"),
        ("quantization_method=hqq", "hqq is not built: the nearest is bnb"),
        ("quantization_method=eetq", "eetq needs quantization_bit: 8, not 4"),
        ("pissa_init=true", "pissa_init changes the base"),
        ("adapter_name_or_path=a,b", "2 adapters, but quantization_bit: 4 allows only one: merge it first"),
        ("adapter_name_or_path=a create_new_adapter=true", "cannot be merged into: merge it first"),
    ],
)
def test_what_does_not_go_with_it(words, message):
    given = ["model_name_or_path=m", "dataset=d", "do_train=true", "quantization_bit=4", *words.split()]
    with pytest.raises(ConfigError, match=message):
        load_config(given)


def test_export_is_from_the_base_as_it_is_stored():
    export = load_config(["model_name_or_path=m", "export_dir=x", "quantization_bit=4"], command="export")
    assert export.model.quantization_bit is None
    assert "merges adapters into the stored model" in export.notes[0]
