"""Tokens -> text, piece by piece, up to the first stop string. No torch.

The engine says tokens, clients read text. Three things come between them. A character may take several tokens, so what
is decoded lags behind (`skymoe.data.text_stream`). A stop string may begin in one token and end in another, so text
that could still become one is held back until it cannot. And the token that ends a text is no part of it.

Which stop string is the first does not depend on how the text was cut into tokens: it is the one that is complete
first, character by character; of two that end together, the longer one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from skymoe.data.text_stream import TextStream
from skymoe.data.tokenizer import TextTokenizer
from skymoe.engine.output import Finish, TokenLogprobs, TokenOutput
from skymoe.engine.params import SamplingParams
from skymoe.engine.token_text import LogprobText, TokenTexts

_PROMPT_CONTEXT = 256  # tokens of the prompt that may matter to how the first ones after it decode


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """News of one request as text.

    Attributes:
        text: what is certain now; often a word, sometimes nothing, sometimes more than the last token's.
        token_ids: the token drawn, if any. The one that ended the text is among them.
        logprobs: of `token_ids`, where asked for.
        prompt_logprobs: of the prompt's tokens, where asked for, once; the first has no log-probability.
        num_cached_tokens: as in `TokenOutput`.
        finish: why it ended, in the last delta.
        stopped_by: the stop string, or the token of `stop_token_ids`, that ended it; None for end-of-text tokens.
        error: with Finish.ERROR.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[LogprobText, ...] = ()
    prompt_logprobs: tuple[LogprobText, ...] | None = None
    num_cached_tokens: int | None = None
    finish: Finish | None = None
    stopped_by: str | int | None = None
    error: str = ""


class TextOutput:
    """The text of one request.

    A stop string is found here and not in the engine: when `finish` is set by one (`stopped`), the caller aborts the
    request in the engine. News that still arrive after the end become empty deltas.

    Args:
        tokenizer: of the model.
        prompt_ids: the prompt, which is never part of the text.
        params: of the request.
        offset: where the text begins, for `LogprobText.offset`: the length of the prompt's text if that is echoed.
    """

    def __init__(
        self, tokenizer: TextTokenizer, prompt_ids: Sequence[int], params: SamplingParams, *, offset: int = 0
    ) -> None:
        self._params = params
        self._prompt_ids = tuple(prompt_ids)
        self._stream = TextStream(tokenizer.decode, prompt_ids[-_PROMPT_CONTEXT:])
        self._stops = StopFinder(params.stop)
        self._texts = TokenTexts(tokenizer)
        self._line = self._texts.line(offset)
        self._num_tokens = 0
        self.finish: Finish | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text, of which the engine knows nothing."""
        return self.finish is Finish.STOP and self._stops.found is not None

    def push(self, output: TokenOutput) -> TextDelta:
        """What `output` adds."""
        if self.finish is not None:
            return TextDelta()
        text = self._text(output)
        if self._stops.found is not None:
            self.finish = Finish.STOP
        else:
            self.finish = output.finish
            if output.finish is not None:
                text += self._rest(output.finish)
        return TextDelta(
            text=text,
            token_ids=() if output.token_id is None else (output.token_id,),
            logprobs=self._logprobs(output),
            prompt_logprobs=self._prompt_logprobs(output.prompt_logprobs),
            num_cached_tokens=output.num_cached_tokens,
            finish=self.finish,
            stopped_by=self._stopped_by(output),
            error=output.error if self.finish is Finish.ERROR else "",
        )

    def _text(self, output: TokenOutput) -> str:
        if output.token_id is None or output.finish is Finish.STOP:
            return ""  # the token that ended the text is no part of it
        self._num_tokens += 1
        piece = self._stream.push(output.token_id)
        if self._num_tokens <= self._params.min_tokens:
            return piece
        return self._stops.push(piece)

    def _rest(self, finish: Finish) -> str:
        """What was held back, at the end. A character that never became whole can still complete a stop string."""
        piece = self._stream.finish()
        if self._num_tokens <= self._params.min_tokens:
            return piece
        text = self._stops.push(piece)
        if self._stops.found is not None:
            self.finish = Finish.STOP
            return text
        return text + self._stops.rest()

    def _stopped_by(self, output: TokenOutput) -> str | int | None:
        if self._stops.found is not None:
            return self._stops.found
        by_token = output.finish is Finish.STOP and output.token_id in self._params.stop_token_ids
        return output.token_id if by_token else None

    def _logprobs(self, output: TokenOutput) -> tuple[LogprobText, ...]:
        if output.token_id is None or output.logprobs is None:
            return ()
        return (self._line.push(output.token_id, output.logprobs),)

    def _prompt_logprobs(self, found: Sequence[TokenLogprobs] | None) -> tuple[LogprobText, ...] | None:
        if found is None:
            return None
        line = self._texts.line(0)
        return tuple(line.push(*each) for each in zip(self._prompt_ids, (None, *found), strict=True))


class StopFinder:
    """Finds the first stop string in a text that comes in pieces, and holds back what could become one.

    Args:
        stops: none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that is certain now; it ends before the stop string once `found` is set."""
        if not self._stops or self.found is not None:
            return piece if self.found is None else ""
        text = self._held + piece
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            self._held = ""
            return text[:at]
        num_held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def rest(self) -> str:
        """What is held back, when nothing more comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins, shorter than `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
