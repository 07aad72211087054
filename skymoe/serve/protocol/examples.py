"""Requests as people send them, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

_CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a mixture of experts?"},
]

COMPLETIONS: dict[str, Any] = {
    "text": {"prompt": "A mixture of experts is", "max_tokens": 8, "temperature": 0},
    "tokens": {"prompt": [[1, 2, 3], [4, 5]], "max_tokens": 4, "n": 2, "seed": 7, "stop": ["\n"]},
    "score": {"prompt": "A mixture of experts is", "max_tokens": 0, "echo": True, "logprobs": 1},
    "stream": {"prompt": "A mixture", "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}},
}
CHATS: dict[str, Any] = {
    "chat": {"messages": _CONVERSATION, "max_completion_tokens": 8},
    "stream": {"messages": _CONVERSATION, "max_tokens": 8, "stream": True, "top_p": 0.9},
    "logprobs": {"messages": _CONVERSATION, "max_tokens": 4, "logprobs": True, "top_logprobs": 2, "seed": 1},
}
TEXTS: dict[str, Any] = {
    "text": {"prompt": "A mixture of experts", "return_token_strs": True},
    "chat": {"messages": _CONVERSATION},
}
TOKENS: dict[str, Any] = {"tokens": {"tokens": [1, 2, 3]}}
