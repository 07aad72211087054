"""Upcycle or train from scratch: the rule, its evidence, what to watch, and what it costs."""
