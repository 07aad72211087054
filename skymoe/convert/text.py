"""What the receipt reads: a fixed English text where there is a tokenizer for it, and random tokens.

The text gives a loss that means something, and routers the kind of token that they will see; random tokens reach the
parts of the vocabulary that no text of this length does. The text was written for this purpose. Changing it changes
the figures of every receipt.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from skymoe.base.errors import MissingExtraError, printable
from skymoe.base.log import logger
from skymoe.convert.streamed import NOT_SCORED, next_tokens
from skymoe.data.tokenizer import load_tokenizer
from skymoe.ops.reproducible import uniform

_TEXT_SEQUENCES = 3
_RANDOM_SEQUENCES = 1  # beside the text; without it, two


class Sample(NamedTuple):
    """Tokens for a receipt.

    Attributes:
        tokens_BT: int64, sequences of one length.
        targets_BT: the next token where it is scored, else `NOT_SCORED`.
        told: what they are, in words.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    told: str


def sample_tokens(directory: Path, vocab_size: int, *, num_tokens: int, seed: int) -> Sample:
    """Sequences of `num_tokens` tokens for the model in `directory`, whose tokenizer.json is used if it can be.

    Where it cannot (none there, a broken one, more tokens than the model has, the extra `text` not installed) all is
    random, and `told` says why. The loss of random tokens is scored then: it says little, but it is the same twice.
    """
    ids, why = _text_ids(directory, vocab_size)
    if why:
        tokens_BT = _random((_RANDOM_SEQUENCES + 1, num_tokens), vocab_size, seed)
        return Sample(tokens_BT, next_tokens(tokens_BT), f"{tokens_BT.numel()} random tokens ({why})")
    length = min(num_tokens, len(ids))
    rows = min(_TEXT_SEQUENCES, len(ids) // length)
    text_BT = torch.tensor(ids[: rows * length]).view(rows, length)
    random_BT = _random((_RANDOM_SEQUENCES, length), vocab_size, seed)
    targets_BT = torch.cat([next_tokens(text_BT), torch.full_like(random_BT, NOT_SCORED)])
    told = f"{text_BT.numel()} tokens of a fixed English text (scored), {random_BT.numel()} random tokens"
    return Sample(torch.cat([text_BT, random_BT]), targets_BT, told)


def _text_ids(directory: Path, vocab_size: int) -> tuple[list[int], str]:
    """The text in tokens; or none of it and why."""
    if not (directory / "tokenizer.json").is_file():
        return [], "the model has no tokenizer.json"
    try:
        ids = load_tokenizer(directory).encode(TEXT)
    except MissingExtraError:
        return [], "the extra `text` is not installed"
    except Exception as error:  # the library raises nothing narrower, and a receipt can do without it
        logger.debug("no text for the receipt: %s", printable(error))
        return [], "its tokenizer.json cannot be used"
    if not ids or max(ids) >= vocab_size:
        return [], "its tokenizer.json is of another vocabulary"
    return ids, ""


def _random(shape: tuple[int, int], vocab_size: int, seed: int) -> Tensor:
    between_0_and_1 = (uniform(shape, 1.0, f"{seed}/receipt").double() + 1) / 2
    return (between_0_and_1 * vocab_size).long().clamp(max=vocab_size - 1)


TEXT = """\
The harbour town woke slowly that morning. Fog lay on the water, and the gulls, which usually shouted from first \
light, sat quietly along the wall as if they were waiting for somebody to begin. Anna carried the last crate of \
apples to the end of the pier, set it down beside the scales, and counted the coins in her pocket twice. Seven. \
Yesterday there had been nine, but the bread had gone up again, and the baker, who was otherwise a kind man, did \
not give credit.

"You are early," said the captain. He was an old man with a short white beard and a blue jacket that had lost two \
of its buttons. "The ferry does not leave before eight."

"I know," she said. "I wanted to see it come in."

A lighthouse is a simple machine. A lamp burns in the middle of a lens, the lens turns once every ten seconds, and \
the ships far out at sea know from the rhythm of the flashes which coast they are looking at. Nothing about it has \
to be clever. It only has to be reliable: the same light, the same interval, in every storm, for a hundred years.

Water boils at 100 degrees Celsius at sea level, but on a high mountain, where the pressure of the air is lower, it \
boils earlier. That is why an egg needs more time in a hut at 3,000 metres than it does on the beach. In the same \
way, if a train covers 240 kilometres in three hours, its average speed is 80 kilometres per hour; and if it then \
stands still for one hour, the average over the four hours falls to 60.

The function below returns the largest of a list of numbers, or nothing at all when the list is empty:

    def largest(numbers):
        best = None
        for number in numbers:
            if best is None or number > best:
                best = number
        return best

There are two common ways to settle a disagreement about facts. The first is to ask someone who knows, and the \
second is to measure. Asking is quicker, and most of the time it is good enough; but a measurement can be repeated \
tomorrow by a person who trusts neither of us, and this is the reason why laws, contracts and scientific papers \
prefer it. When the result is surprising, measure again, write down how it was done, and only then begin to explain \
it.

By the time the ferry arrived, the fog had lifted. The engine stopped, the ropes were thrown, and one after another \
eleven passengers, a dog and a bicycle came down the narrow bridge. Anna looked at every face. Then she smiled, \
left the apples where they were, and ran.
"""
