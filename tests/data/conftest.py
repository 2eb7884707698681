import pytest
from small import rows

from jtune.data import get_template
from jtune.quickstart.make_model import make_tokenizer


@pytest.fixture(scope="session")
def template():
    """chatml with a byte-level tokenizer; `template.tokenizer` decodes what it encodes."""
    words = [" ".join(row.values()) for row in rows(100)]
    return get_template("chatml", make_tokenizer([*words, "<|im_start|>user\n<|im_start|>assistant\n"] * 2))
