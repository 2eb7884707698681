"""Gemma 4 without towers of its own for images and sound: its text model is that of the larger sizes."""

from jtune.models.families import gemma4_text
from jtune.models.families.base import Family

FAMILY = Family(gemma4_text.read, gemma4_text.names)
