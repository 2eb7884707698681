"""The command that resumes a run that ended."""

from collections.abc import Iterable

_command = ["the same command"]
_secrets: list[str] = []  # names of its secret arguments
_extra: list[str] = []  # words that it also needs to resume from the files of this run


def remember_command(command: str, secrets: Iterable[str] = ()) -> None:
    """Remember the command that was typed, for messages.

    Args:
      command: without its secrets; empty: messages say "the same command".
      secrets: names of its secret arguments.
    """
    _command[0], _secrets[:] = command or _command[0], secrets


def add_words(*words: str) -> None:
    """From now on the command also needs `words` to resume from the files of this run."""
    _extra[:] = words


def how_to_go_on() -> str:
    where = "" if "--simulate" in _command[0] else " on every host"
    return f"The checkpoints are complete. To resume from the last one, start it again{where}: {command_to_go_on()}"


def command_to_go_on() -> str:
    """The command that resumes this run, without its secrets; it names the secret arguments."""
    missing = f"\n(not shown, to be given again: {', '.join(_secrets)})" if _secrets else ""
    return " ".join([_command[0], *_extra]) + missing
