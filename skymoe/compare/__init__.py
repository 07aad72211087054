"""The compare job (`skymoe merge-check`): two model directories, tensor by tensor and field by field."""
