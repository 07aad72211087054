"""The best division of a pipeline: exact, with a certificate; and what a step of it looks like."""
