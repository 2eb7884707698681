"""Rules of optimizers that optax does not have as their references compute them, each of one parameter at a time."""
