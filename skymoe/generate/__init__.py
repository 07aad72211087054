"""The generate job: text from a model directory, token by token."""
