"""The command that a person types to go on with a run that ended."""

from collections.abc import Iterable

_command = ["the same command"]
_secrets: list[str] = []  # names of its arguments that are not shown
_extra: list[str] = []  # words that it needs besides, to go on with what this run has saved


def remember_command(command: str, secrets: Iterable[str] = ()) -> None:
    """Keep what was typed, for messages.

    Args:
      command: without its secrets; empty: "the same command".
      secrets: names of the arguments that are not shown in it.
    """
    _command[0], _secrets[:] = command or _command[0], secrets


def add_words(*words: str) -> None:
    """From now on the command needs `words` besides, to go on with what this run has saved."""
    _extra[:] = words


def how_to_go_on() -> str:
    where = "" if "--simulate" in _command[0] else " on every host"
    return f"What is saved is whole. To go on from the last checkpoint, start it again{where}: {command_to_go_on()}"


def command_to_go_on() -> str:
    """The command that goes on with what this run has saved: without secrets, which are named."""
    missing = f"\n(not shown, to be given again: {', '.join(_secrets)})" if _secrets else ""
    return " ".join([_command[0], *_extra]) + missing
