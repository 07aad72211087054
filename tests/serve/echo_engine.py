"""An engine without a model, for tests of the server: a real process that speaks the real messages, without torch.

Token i of an answer is token (i + prompt's sum) % length of the prompt, so answers differ and are known beforehand.
Requests share a pool of pages, 16 tokens each, that is counted as the real engine counts its own; as many requests as
fit run at once, each step draws one token for each and takes `step_s`. What a test wants to go wrong stands in
ECHO_ENGINE, as JSON: `fail` a token whose prompts end in an error, `die` a token at which the process dies, `load_s`
how long it loads, `fail_load` what it says instead of ready, `most` how many tokens it writes at most.
"""

from __future__ import annotations

import json
import math
import os
import select
import socket
import sys
import time

from skymoe.base.errors import SkymoeError
from skymoe.engine.messages import (
    Abort,
    Add,
    AskStats,
    Command,
    Failed,
    Inbox,
    Loading,
    News,
    Outputs,
    Ready,
    Start,
    Stats,
    Stop,
    pack,
    read_command,
)  # fmt: skip
from skymoe.engine.output import EngineInfo, EngineStats, Finish, TokenLogprobs, TokenOutput
from skymoe.parallel.lifeline import die_with_launcher

PAGE = 16
MAX_BATCH = 64


class EchoEngine:
    def __init__(self, connection: socket.socket, options: dict[str, float | int | str]) -> None:
        self.socket = connection
        self.inbox: Inbox[Command] = Inbox(read_command)
        self.options = options
        self.num_pages = int(options.get("pages", 4096))
        self.vocab_size = int(options.get("vocab", 300))
        self.max_model_len = int(options.get("context", 2048))
        self.waiting: list[Add] = []
        self.max_queue = 0
        self.running: dict[str, tuple[Add, list[int]]] = {}
        self.prompt_tokens = self.generation_tokens = self.steps = 0

    def say(self, news: News) -> None:
        self.socket.sendall(pack(news))

    def pages(self, add: Add, written: int) -> int:
        return math.ceil((len(add.prompt) + written) / PAGE)

    def free(self) -> int:
        return self.num_pages - sum(self.pages(add, len(tokens)) for add, tokens in self.running.values())

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.running), num_waiting=len(self.waiting), num_pages=self.num_pages,
            free_pages=self.free(), prompt_tokens=self.prompt_tokens, generation_tokens=self.generation_tokens,
            num_steps=self.steps, step_seconds=self.steps * float(self.options.get("step_s", 0)),
            expert_tokens=((self.generation_tokens, 0, 1, 2),),
        )  # fmt: skip

    def info(self) -> EngineInfo:
        return EngineInfo(
            name="echo", vocab_size=self.vocab_size, max_model_len=self.max_model_len, eos_ids=(0,), bos_id=None,
            num_ranks=1, num_pages=self.num_pages, page_size=PAGE, num_layers=1, num_experts=4, moe_layers=(0,),
            weights="fp32", kv_dtype="fp32", split={"heads": (1,)},
        )  # fmt: skip

    def obey(self, command: Command) -> None:
        match command:
            case Start():
                self.max_queue = command.config.max_queue
                self.load()
            case Add() if len(self.waiting) >= self.max_queue:
                self.say(Outputs((TokenOutput(request_id=command.id, finish=Finish.ERROR, error="full"),)))
            case Add():
                self.waiting.append(command)
            case Abort():
                there = self.running.pop(command.id, None) is not None
                there = there or any(add.id == command.id for add in self.waiting)
                self.waiting = [add for add in self.waiting if add.id != command.id]
                if there:
                    self.say(Outputs((TokenOutput(request_id=command.id, finish=Finish.ABORT),)))
            case AskStats():
                self.say(Stats(self.stats()))
            case Stop():
                raise SystemExit(0)

    def load(self) -> None:
        self.say(Loading(1, 2))
        time.sleep(float(self.options.get("load_s", 0)))
        if "fail_load" in self.options:
            self.say(Failed(str(self.options["fail_load"]), exit_code=2))
            raise SystemExit(2)
        self.say(Ready(self.info()))

    def step(self) -> None:
        while self.waiting and len(self.running) < MAX_BATCH and self.pages(self.waiting[0], 1) <= self.free():
            add = self.waiting.pop(0)
            self.running[add.id] = (add, [])
            self.prompt_tokens += len(add.prompt)
        time.sleep(float(self.options.get("step_s", 0)))
        self.steps += 1
        outputs = [self.draw(add, tokens) for add, tokens in list(self.running.values())]
        if outputs:
            self.say(Outputs(tuple(outputs)))

    def draw(self, add: Add, tokens: list[int]) -> TokenOutput:
        if self.options.get("die") in add.prompt:
            os.abort()
        if self.options.get("fail") in add.prompt:
            del self.running[add.id]
            return TokenOutput(request_id=add.id, finish=Finish.ERROR, error="not a number")
        token = add.prompt[(sum(add.prompt) + len(tokens)) % len(add.prompt)]
        tokens.append(token)
        self.generation_tokens += 1
        first = len(tokens) == 1
        stops = add.params.stop_token_ids if add.params.ignore_eos else (0, *add.params.stop_token_ids)
        finish = None
        if token in stops and len(tokens) > add.params.min_tokens:
            finish = Finish.STOP
        elif len(tokens) in (add.params.max_tokens, self.max_model_len - len(add.prompt), self.options.get("most")):
            finish = Finish.LENGTH
        if finish is not None:
            del self.running[add.id]
        prompt_logprobs = None
        if first and (most := add.params.prompt_logprobs) is not None:
            prompt_logprobs = tuple(self.logprobs(prompt_token, most) for prompt_token in add.prompt[1:])
        return TokenOutput(
            request_id=add.id, token_id=token, finish=finish, prompt_logprobs=prompt_logprobs,
            logprobs=None if add.params.logprobs is None else self.logprobs(token, add.params.logprobs),
            num_cached_tokens=0 if first else None,
        )  # fmt: skip

    def logprobs(self, token: int, most: int) -> TokenLogprobs:
        tops = [(token, -0.5), *(((token + i) % self.vocab_size, -1.0 - i) for i in range(1, most))]
        return TokenLogprobs(-0.5, 1, tuple(tops[:most]))

    def run(self) -> None:
        while True:
            busy = self.running or self.waiting
            while select.select([self.socket], [], [], 0 if busy else None)[0]:
                data = self.socket.recv(1 << 18)
                if not data:
                    return
                for command in self.inbox.feed(data):
                    self.obey(command)
                busy = True
            self.step()


if __name__ == "__main__":
    die_with_launcher()
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        try:
            EchoEngine(connection, json.loads(os.environ.get("ECHO_ENGINE", "{}"))).run()
        except (BrokenPipeError, ConnectionResetError, SkymoeError):
            sys.exit(1)
