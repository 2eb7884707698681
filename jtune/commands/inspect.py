"""`jtune inspect CASE.yaml`: the parameter tree of a run."""

from jtune.config import Config
from jtune.loading.model import load_model
from jtune.loading.source import read_source
from jtune.sharding.mesh import mesh_of
from jtune.tuning.show import show


def inspect_model(config: Config) -> None:
    """Print the parameter tree that `config` trains: paths, shapes, dtypes, bytes, sharding, what trains."""
    source = read_source(config)
    model = load_model(source.config, source, mesh_of(config.training))
    show(model.params, model.mask)
