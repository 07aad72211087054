"""Bytes: what a rank holds, for good and for a moment."""
