"""Models of random weights, adapters and data for the benchmarks, written once into a folder.

python scripts/bench/make.py FOLDER [--model 22M] [--tokenizer FOLDER]
"""

import argparse
import json
import random
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this checkout, also where another one is installed
# LLaMA-Factory's demo data and a tokenizer, where they are at hand beside the checkout.
REFERENCES = [parent / "shared" / "reference" for parent in ROOT.parents[:2]]

# As small as Llamas get, with the vocabulary that they have: the head is more than half of the work.
LLAMA_22M = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "dtype": "float32",
}

# The other end: nearly all of the work is in the layers.
LLAMA_28M = LLAMA_22M | {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
SHAPES = {"22M": LLAMA_22M, "28M": LLAMA_28M}


def reference(part: str) -> Path | None:
    """A file or folder of the reference data beside the checkout, if it is there."""
    return next((folder / part for folder in REFERENCES if (folder / part).exists()), None)


def write_tokenizer(folder: Path, given: Path | None = None) -> None:
    """The tokenizer of a folder, or the quickstart's."""
    from jtune.quickstart.make_model import FOLDER

    folder.mkdir(parents=True, exist_ok=True)
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    for name in names:
        if ((given or FOLDER) / name).exists():
            shutil.copyfile((given or FOLDER) / name, folder / name)


def template_of(folder: Path) -> str:
    """The chat template whose tokens a tokenizer has."""
    return "llama3" if "<|eot_id|>" in (folder / "tokenizer.json").read_text() else "chatml"


def write_model(folder: Path, config: dict, *, seed: int = 0, weights: bool = True) -> None:
    """config.json and safetensors with random weights, by jtune's own code."""
    import jax

    from jtune.interop import hf
    from jtune.models import init_params
    from jtune.models.families import decoder_config

    if not weights:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        return
    decoder = decoder_config(config)
    params = jax.jit(lambda: init_params(decoder, jax.random.key(seed), config["dtype"]))()
    hf.save_model(params, decoder, config, folder)
    print(f"{folder}: {sum(x.size for x in jax.tree.leaves(params)) / 1e6:.1f}M parameters")


def write_adapter(folder: Path, model: Path, *, rank: int, seed: int = 1) -> None:
    """A LoRA adapter on every linear layer. Its B is not zero, so that all gradients count from the first update on,
    and both sides start from it, as each would draw another one.
    """
    import jax

    from jtune.interop import hf, peft
    from jtune.models.families import decoder_config
    from jtune.tuning import adapter_mask, lora

    decoder = decoder_config(hf.read_config(model))
    params = lora.add(hf.load_params(model, decoder), ("all",), rank=rank)

    mask = adapter_mask(params)

    def fill(path, x, trains):
        name = jax.tree_util.keystr(path)
        key = jax.random.fold_in(jax.random.key(seed), sum(map(ord, name)))
        return 0.02 * jax.random.normal(key, x.shape, x.dtype) if trains else x

    params = jax.tree_util.tree_map_with_path(fill, params, mask)
    peft.save_adapter(params, mask, decoder, folder, base=str(model))


def write_data(folder: Path) -> None:
    """A dataset_dir with one alpaca set `rows`: LLaMA-Factory's demo set where it is at hand, else made up."""
    demo = reference("data/alpaca_en_demo.json")
    write_rows(folder, json.loads(demo.read_text()) if demo else make_rows(1000))
    print(f"{folder}: {demo or 'made-up rows'}")


def write_rows(folder: Path, rows: list[dict[str, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))


def make_rows(count: int, *, mean: int = 60, question: int = 15, seed: int = 0) -> list[dict[str, str]]:
    """Alpaca rows of random words, so many on average of an answer and of a question; the lengths are log-normal, as
    those of instruction sets are."""
    draw = random.Random(seed)
    words = made_up_words(draw)
    text = lambda n: " ".join(draw.choices(words, k=max(1, round(n * draw.lognormvariate(-0.3, 0.8)))))
    return [{"instruction": text(question), "input": "", "output": text(mean)} for _ in range(count)]


def make_long_rows(count: int, *, words: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of a short question and an answer of so many words."""
    draw = random.Random(seed)
    known = made_up_words(draw)
    text = lambda n: " ".join(draw.choices(known, k=n))
    return [{"instruction": text(10), "input": "", "output": text(words)} for _ in range(count)]


def made_up_words(draw: random.Random) -> list[str]:
    return ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 8))) for _ in range(2000)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=reference("tokenizer"))
    parser.add_argument("--model", choices=SHAPES, default="22M")
    args = parser.parse_args()
    model = args.folder / "model"
    write_tokenizer(model, args.tokenizer)
    write_model(model, SHAPES[args.model])
    write_adapter(args.folder / "adapter", model, rank=8)
    write_data(args.folder / "data")


if __name__ == "__main__":
    main()
