"""Drawings: timelines and memory, as SVG, in the terminal, in one HTML file."""
