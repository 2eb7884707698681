"""`jtune version`: what this installation is made of."""

from importlib.metadata import version

import jax

from jtune import __version__

LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")


def print_versions() -> None:
    """Print the versions of jtune and of the libraries it computes with, and the devices that jax finds."""
    print(f"{'jtune':17} {__version__}")
    for name in LIBRARIES:
        print(f"{name:17} {version(name)}")
    devices = ", ".join(f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices())
    print(f"{'devices':17} {devices}")
