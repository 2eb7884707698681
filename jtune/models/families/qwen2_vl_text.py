"""Qwen2-VL, its text model: Qwen2, whose rotation for images is the ordinary one where there are none."""

from jtune.models.families import qwen2
from jtune.models.families.base import Family

FAMILY = Family(qwen2.read)
