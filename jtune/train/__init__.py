"""Training: from a run's arguments to what it writes. Read `jtune.commands.train` first."""
