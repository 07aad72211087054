"""Floor 6, job: train a model, dense or a mixture of experts, on one process; `run(config)` is the door."""
