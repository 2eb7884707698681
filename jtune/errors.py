"""Errors that the user can act on. Each class carries the exit status of the command line."""


class JtuneError(Exception):
    """Its message tells the person at the terminal what is wrong, where, what was expected, and what to do."""

    exit_code = 1


class ConfigError(JtuneError):
    """An argument is unknown, mistyped, contradictory, or asks for something that jtune does not do."""

    exit_code = 2


class DataError(JtuneError):
    """A dataset, checkpoint or tokenizer on disk is missing, malformed, or leaves nothing to train on."""

    exit_code = 3


class NonFiniteError(JtuneError):
    """Training stopped because the loss or the gradients were no longer finite."""

    exit_code = 4


class CheckpointError(JtuneError):
    """A training checkpoint is damaged or does not belong to this run."""

    exit_code = 5


class PeerLost(JtuneError):
    """Another process of the run has died or does not answer. If it failed with an error, this error has its status."""

    exit_code = 70


class Preempted(JtuneError):
    """The run was asked to stop (SIGTERM, Ctrl-C) and has saved its state: start it again to finish it."""

    exit_code = 75
