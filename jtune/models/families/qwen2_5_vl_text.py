"""Qwen2.5-VL, its text model: that of Qwen2-VL."""

from jtune.models.families.qwen2_vl_text import FAMILY as FAMILY
