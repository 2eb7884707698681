"""`jtune inspect CASE.yaml`: the parameter tree of a run."""

from jtune.config import Config
from jtune.interop import hf
from jtune.loading import vocabulary
from jtune.loading.model import compute_dtype, decoder_of, fetch_model, load_model
from jtune.sharding.mesh import mesh_of
from jtune.tuning.show import show


def inspect_model(config: Config) -> None:
    """Print the parameter tree that `config` trains: paths, shapes, dtypes, bytes, sharding, what trains."""
    folder = fetch_model(config.model)
    source = hf.read_config(folder)
    resolved = vocabulary.resolve_vocabulary(config, folder, decoder_of(source, config.model))
    mesh = mesh_of(config.training)
    dtype = compute_dtype(config.training, config.finetuning.pure_bf16, hf.stored_dtype(source))
    model = load_model(
        folder,
        config.model,
        resolved.config.finetuning,
        resolved.decoder,
        resolved.source(source),
        mesh,
        dtype=dtype,
        seed=config.training.seed,
        change=resolved.change,
    )
    show(model.params, model.mask)
