"""The export job: a model directory in, the same function in the format that another tool reads out."""
