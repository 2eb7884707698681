"""What can go wrong for a reason the user can act on. Each class carries the exit status of the command line."""


class JtuneError(Exception):
    """A fault with a message written for the person at the terminal: what, where, what was expected, what to do."""

    exit_code = 1


class ConfigError(JtuneError):
    """An argument is unknown, mistyped, contradictory, or asks for what jtune does not do."""

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
    """Another process of the run has died, or does not answer. Of one that failed for a reason, it has its status."""

    exit_code = 70


class Preempted(JtuneError):
    """The run was asked to stop (SIGTERM, Ctrl-C), has saved its state, and wants to be started again."""

    exit_code = 75
