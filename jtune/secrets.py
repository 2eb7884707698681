"""Secrets must not be printed or written: tokens, keys and passwords in arguments and in URLs."""

import re
from collections.abc import Sequence

# `token` but not `tokens` or `tokenizer`, `key` as a word of its own.
_SECRET = re.compile(
    r"token(?!s|iz)|secret|passw|passphrase|api_?key|credential|webhook|(?:^|[_.-])(?:key|pwd|auth)(?:$|[_.-])", re.I
)
_USER = re.compile(r"(?<=://)[^/\s@'\"]+@")  # user:password@ of a URL
_QUERY = re.compile(r"([?&][\w.-]*(?:token|key|secret|passw\w*|sig|signature|credential)=)[^&\s'\"#]+", re.I)
_HUB = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
HIDDEN = "***"
SHORTEST = 6  # characters; a shorter value is no secret, and may be part of any word
_known: set[str] = set()  # values that are redacted wherever they appear


def is_secret(name: str) -> bool:
    """Whether the value of an argument of this name is never shown.

    >>> [is_secret(x) for x in ("hf_hub_token", "--swanlab-api-key", "add_tokens", "tokenized_path", "max_new_tokens")]
    [True, True, False, False, False]
    """
    return _SECRET.search(name) is not None


def remember(name: str, value: object) -> None:
    """From now on, redact the value of an argument wherever it appears, if the argument's name marks it as secret."""
    if is_secret(name) and isinstance(value, str) and len(value) >= SHORTEST:
        _known.add(value)


def redact(text: str) -> str:
    """`text` without secrets: remembered values, tokens of the hub, users in URLs, keys in the queries of URLs.

    >>> redact("cannot read https://me:pw@host/x?token=1&b=2 with hf_abcdefghijklmnopqrst")
    'cannot read https://***@host/x?token=***&b=2 with ***'
    """
    for value in _known:
        text = text.replace(value, HIDDEN)
    return _QUERY.sub(rf"\1{HIDDEN}", _HUB.sub(HIDDEN, _USER.sub(f"{HIDDEN}@", text)))


def words_to_show(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command line without its secrets, and the names of the secret arguments.

    >>> words_to_show(["case.yaml", "--hf_hub_token", "abc", "seed=1", "hub_token=x"])
    (['case.yaml', 'seed=1'], ['hf_hub_token', 'hub_token'])
    """
    shown, left_out, queue = [], [], list(words)
    while queue:
        word = queue.pop(0)
        name, equals, value = word.partition("=")
        plain = name.removeprefix("--").replace("-", "_")
        if is_secret(name) and re.fullmatch(r"(--)?[A-Za-z_][\w.-]*", name) and (equals or name.startswith("--")):
            left_out.append(plain)
            if not equals and queue and not queue[0].startswith("--"):
                value = queue.pop(0)
            remember(name, value)
        else:
            shown.append(redact(word))
    return shown, left_out
