"""Tokens -> text, and stop strings. No torch."""
