"""From a path and arguments to a model, its vocabulary and its data."""
