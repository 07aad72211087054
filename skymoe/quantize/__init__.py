"""The quantize job: a model directory in, the same model with FP8 weights out, and an audit of what that costs."""
