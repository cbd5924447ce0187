"""The command `maetok-fast`."""

from __future__ import annotations


def main() -> None:
    """Entry point."""
