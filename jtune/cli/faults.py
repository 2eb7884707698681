"""Faults as messages on stderr, and the exit statuses they stand for."""

import sys

import click

from jtune.errors import ConfigError, JtuneError
from jtune.secrets import redact

SAVE_MEMORY = (
    "These arguments save memory; try them in this order: per_device_train_batch_size=1 with "
    "gradient_accumulation_steps raised to match; remat=full; a smaller cutoff_len; finetuning_type=lora; "
    "more devices (mesh_fsdp)."
)


def report_fault(command: str, error: BaseException) -> int:
    """Print on stderr what went wrong, without secrets.

    Args:
      command: name of the command, "" if there is none of that name.

    Returns:
      The exit status.

    Raises:
      The error itself if it is unexpected, so that its traceback is seen.
    """
    who = f"jtune {command}".rstrip()
    if isinstance(error, click.UsageError):
        error = ConfigError(f"{describe_usage_error(error)} `{who} --help` shows its options.")
    if isinstance(error, JtuneError):
        print(redact(f"{who}: {error}"), file=sys.stderr)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    print(redact(f"{who}: out of memory: {str(error).splitlines()[0]}\n{SAVE_MEMORY}"), file=sys.stderr)
    return 1


def describe_usage_error(error: click.UsageError) -> str:
    """One sentence about an option that click refuses."""
    option = error.param if isinstance(error, click.BadParameter) else None
    if isinstance(error, click.MissingParameter) and option is not None:
        return f"{option.opts[0]} {option.metavar} is missing."
    if option is not None:
        return f"{option.opts[0]}: {error.message.rstrip('.')}."
    if isinstance(error, click.BadOptionUsage):
        return f"{error.option_name} {'takes no' if 'not take' in error.message else 'needs a'} value."
    return error.message if error.message.endswith("?") else f"{error.message.rstrip('.')}."
