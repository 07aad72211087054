"""The report job: run directories -> one self-contained HTML file. No torch."""
