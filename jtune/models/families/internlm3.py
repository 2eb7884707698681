"""InternLM3: Llama, with one word for all its biases."""

from jtune.models.families import llama
from jtune.models.families.base import Family

FAMILY = Family(llama.read)
