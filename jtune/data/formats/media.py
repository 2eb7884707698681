"""Images, videos and audio in rows. jtune trains on text: a row that has anything else stops the run."""

from collections.abc import Iterable, Mapping
from typing import Any

from jtune.data.formats.messages import TEXT_ONLY, FaultyRow
from jtune.data.sources.columns import MEDIA_COLUMNS
from jtune.data.sources.registry import Entry

WORDS = {"image": "an image", "video": "a video", "audio": "audio"}
PLACEHOLDERS = tuple(f"<{kind}>" for kind in WORDS)
# A column of one of these names is looked at where no entry names it, too.
ONE_EACH = tuple(WORDS)


def media_columns(names: Iterable[str], entry: Entry) -> list[str]:
    """The columns that may hold something else than text.

    >>> from jtune.data.sources.registry import Columns
    >>> media_columns(["q", "image", "pics"], Entry("a", "file", "a.json", columns=Columns(images="pics")))
    ['image', 'pics']
    """
    listed = {column for kind in MEDIA_COLUMNS if (column := getattr(entry.columns, kind))}
    return [name for name in names if name in listed | {*MEDIA_COLUMNS, *ONE_EACH}]


def refuse_media(row: Mapping[Any, Any], messages: Iterable[Mapping[str, Any]], entry: Entry) -> None:
    """Raise a FaultyRow if a row has an image or the like.

    What an entry names counts, and in a set without an entry `images`, `videos` and `audios`. A column that the entry
    leaves out, or one of a similar name, counts only where a text refers to it with a placeholder.

    Args:
      messages: of the row, aligned.
    """
    for column in media_columns(row, entry):
        if _is_empty(row[column]):
            continue
        kind = next((k for k in WORDS if column == getattr(entry.columns, f"{k}s")), None)
        asked = next((k for k in WORDS if any(f"<{k}>" in message["content"] for message in messages)), None)
        if kind or asked:
            raise FaultyRow(f"{WORDS[kind or asked or column]} in column {column!r}{TEXT_ONLY}")


def _is_empty(value: Any) -> bool:
    return value in (None, "", [], {}) or (isinstance(value, list) and all(map(_is_empty, value)))
