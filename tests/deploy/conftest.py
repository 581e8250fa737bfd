"""Bundles run on the same engines whatever the processor."""

from support.processors import without_bf16  # noqa: F401
