"""Which process this is, of how many."""

from typing import Any


def index() -> int:
    """This process's number, from 0."""
    return jax_state().process_id


def count() -> int:
    """How many processes the program has."""
    return jax_state().num_processes


def is_first() -> bool:
    """Whether this is process 0, which writes files and talks to the user."""
    return index() == 0


def jax_state() -> Any:
    # jax.process_index() starts the devices; this state is known before.
    from jax._src.distributed import global_state

    return global_state
