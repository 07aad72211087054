"""A plan file says for which batch it was made; a recipe with another one is trained, but not as fast as foretold."""

from __future__ import annotations

from skymoe.base.errors import printable
from skymoe.base.log import logger
from skymoe.spec.layout import Layout
from skymoe.spec.plan_file import read_plan
from skymoe.train.config import TrainConfig
from skymoe.train.ranks import micro_batches


def warn_of_other_batch(config: TrainConfig, layout: Layout) -> None:
    """Warn where sequences, their length or their number in a micro-batch are not those of `parallel.plan`.

    Raises:
        FormatError: the plan cannot be read.
    """
    if config.parallel.plan is None:
        return
    expected, batch = read_plan(config.parallel.plan).expected, config.batch
    own = {
        "sequence_length": ("data.sequence_length", config.data.sequence_length),
        "sequences": ("batch.sequences", batch.sequences),
        "micro_sequences": ("batch.micro_sequences", batch.sequences // (layout.dp * micro_batches(batch, layout))),
    }
    other = [
        f"{key} is {value}, planned was {printable(str(expected[name]), 40)}"
        for name, (key, value) in own.items()
        if name in expected and expected[name] != value
    ]
    if other:
        logger.warning(
            "%s was made for another batch, so that its memory and speed do not hold: %s",
            printable(config.parallel.plan), "; ".join(other),
        )  # fmt: skip
