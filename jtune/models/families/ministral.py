"""Ministral: Mistral with windows on some layers."""

from jtune.models.families.mistral import FAMILY

__all__ = ["FAMILY"]
