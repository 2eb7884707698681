"""Training: from a run's arguments to what it writes. Read `jtune.train.run` first."""
