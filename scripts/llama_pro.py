"""Block expansion (LLaMA Pro, arXiv:2401.02415): a Hugging Face checkpoint with layers added, which computes the same.

    python scripts/llama_pro.py --model_name_or_path meta-llama/Llama-3.1-8B --output_dir llama3-pro --num_expand 8

What it writes transformers loads as well. It is trained with `finetuning_type: freeze` (or lora), `use_llama_pro: true`
and `freeze_trainable_layers` as many as were added. The arguments are those of LLaMA-Factory's script.
"""

import argparse
import logging
import sys
from pathlib import Path

from jtune.data import load_tokenizer
from jtune.errors import ConfigError, JtuneError
from jtune.files import whole_or_absent
from jtune.interop import hf
from jtune.models import abstract_params, logical_axes
from jtune.models.families import decoder_config
from jtune.sharding import make_mesh, tree_shardings
from jtune.tuning.expand import expand, expand_config


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="a folder in Hugging Face form, or a hub id")
    parser.add_argument("--output_dir", required=True, help="where the expanded model is written")
    parser.add_argument("--num_expand", type=int, required=True, help="how many layers are added, evenly spaced")
    parser.add_argument("--shard_size", type=int, default=5, help="gigabytes in one weight file")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run(args.model_name_or_path, Path(args.output_dir), args.num_expand, shard_bytes=args.shard_size * 10**9)
    except JtuneError as error:
        print(f"llama_pro: {error}", file=sys.stderr)
        return error.exit_code
    print(
        "Train it with:\n"
        f"  model_name_or_path: {args.output_dir}\n"
        "  finetuning_type: freeze\n"
        f"  freeze_trainable_layers: {args.num_expand}\n"
        "  use_llama_pro: true"
    )
    return 0


def run(model: str, output_dir: Path, num_expand: int, *, shard_bytes: int = 5 * 10**9) -> None:
    """Read `model`, add layers, write it to `output_dir`: weights in the dtype they came in, config and tokenizer."""
    folder = hf.fetch(model)
    if output_dir.resolve() == folder.resolve():
        raise ConfigError(f"output_dir: {output_dir} is the folder of the model itself: give another one")
    source = hf.read_config(folder)
    grown = expand_config(source, num_expand)  # what cannot be is refused before weights are read
    decoder = decoder_config(source)
    shardings = tree_shardings(logical_axes(decoder), abstract_params(decoder), make_mesh())
    params, decoder = expand(hf.load_params(folder, decoder, shardings=shardings), decoder, num_expand)
    with whole_or_absent(output_dir) as unfinished:
        load_tokenizer(str(folder)).save_pretrained(unfinished)
        hf.copy_generation_config(folder, unfinished)
        hf.save_model(params, decoder, grown, unfinished, base=folder, max_shard_bytes=shard_bytes)
    print(f"{source['model_type']}: {decoder.num_hidden_layers} layers, {num_expand} of them new, in {output_dir}")


if __name__ == "__main__":
    sys.exit(main())
