"""TrainReport: the answer of `skymoe train`. No torch."""

from __future__ import annotations

from dataclasses import dataclass

INTERRUPTED = 75  # EX_TEMPFAIL: interrupted, and the same command resumes


@dataclass(frozen=True)
class TrainReport:
    """How a run ended.

    Attributes:
        dir: the run directory.
        model: the final Hugging Face directory, or None when the run was interrupted.
        files, bytes_written: what is in it; empty and 0 when the run was interrupted.
        step, steps: done and asked.
        tokens: trained on, over all parts of the run.
        seconds: of this call, everything included.
        tokens_per_s: over the training steps of all parts of the run.
        loss: of the last line of metrics, nats per token; None when there was none.
        bits_per_byte: of the last evaluation, by domain and `all`; empty without a tokenizer or held-out data.
        valid_loss: the same in nats per token.
        skipped: batches that the guard passed over.
        resumed_from: the step this call began with, None for a fresh run.
        stopped_by: name of the signal that interrupted the run, or "".
        note: what to do next.
    """

    dir: str
    model: str | None
    files: tuple[str, ...]
    bytes_written: int
    step: int
    steps: int
    tokens: int
    seconds: float
    tokens_per_s: float
    loss: float | None
    bits_per_byte: dict[str, float]
    valid_loss: dict[str, float]
    skipped: int
    resumed_from: int | None
    stopped_by: str
    note: str

    @property
    def exit_code(self) -> int:
        """0 when all steps are done, 75 when the run was interrupted and can be resumed."""
        return INTERRUPTED if self.step < self.steps else 0
