"""Three made-up domains from a seed: the corpus where no other text is, the same on every machine and Python.

Each domain has words of its own and something to learn beyond word frequencies, so that a model gains by depth and an
expert by specialising:

    prose   each text has a topic, a few nouns and verbs that keep coming back; verbs agree in number
    docs    a signature first, then each parameter described under its name
    code    functions whose names and variables are used after they are defined; indentation, balanced brackets

Only `Random.random` and `Random.choices` decide; Python keeps their results stable from version to version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from random import Random

_ONSETS = ("b", "br", "d", "dr", "f", "g", "gl", "h", "k", "l", "m", "n", "p", "pl", "r", "s", "st", "t", "tr", "v")
_NUCLEI = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
_CODAS = ("", "l", "m", "n", "r", "s", "t", "nd", "rk", "st")
_KINDS = ("int", "str", "float", "bool", "list", "dict")
_OPERATORS = ("+", "-", "*", "//", "%")
_LINKS = ("because", "while", "so", "and", "until", "although")


class Lexicon:
    """Invented words, the first ones common and the last ones rare (Zipf)."""

    def __init__(self, rng: Random, size: int, syllables: int = 2) -> None:
        words: dict[str, None] = {}  # a set that keeps its order
        while len(words) < size:
            words["".join(_syllable(rng) for _ in range(syllables))] = None
        self._words = tuple(words)
        self._weights = tuple(accumulate(1 / (rank + 3) for rank in range(size)))

    def draw(self, rng: Random, count: int) -> list[str]:
        """`count` words, with repetition."""
        return rng.choices(self._words, cum_weights=self._weights, k=count)


def generate(domain: str, seed: int, max_bytes: int) -> list[str]:
    """Texts of `domain` ("prose", "docs" or "code"), `max_bytes` in all, the last text over the limit included."""
    rng = Random(f"{domain} {seed}")
    makers: dict[str, Callable[[Random], Callable[[], str]]] = {"prose": _prose, "docs": _docs, "code": _code}
    make = makers[domain](rng)
    texts: list[str] = []
    size = 0
    while size < max_bytes:
        texts.append(make())
        size += len(texts[-1])
    return texts


def _prose(rng: Random) -> Callable[[], str]:
    nouns, verbs, adjectives = Lexicon(rng, 400), Lexicon(rng, 200), Lexicon(rng, 150, 1)

    def clause(topic: Sequence[str], actions: Sequence[str]) -> str:
        plural = rng.random() < 0.4
        subject, other = rng.choices(topic, k=2)
        adjective, verb = adjectives.draw(rng, 1)[0], rng.choices(actions)[0]
        start = f"the {adjective} {subject}s {verb}" if plural else f"a {adjective} {subject} {verb}s"
        return f"{start} the {other}" if rng.random() < 0.7 else start

    def text() -> str:
        topic, actions = nouns.draw(rng, 6), verbs.draw(rng, 4)
        sentences = []
        for _ in range(8 + int(rng.random() * 24)):
            sentence = clause(topic, actions)
            if rng.random() < 0.4:
                sentence += f" {rng.choices(_LINKS)[0]} {clause(topic, actions)}"
            sentences.append(sentence.capitalize() + ".")
        return "\n".join(" ".join(sentences[i : i + 6]) for i in range(0, len(sentences), 6)) + "\n"

    return text


def _docs(rng: Random) -> Callable[[], str]:
    verbs, nouns = Lexicon(rng, 80), Lexicon(rng, 250)

    def entry() -> Iterator[str]:
        verb, (subject, result) = verbs.draw(rng, 1)[0], nouns.draw(rng, 2)
        parameters = list(dict.fromkeys(nouns.draw(rng, 1 + int(rng.random() * 4))))
        kinds = rng.choices(_KINDS, k=len(parameters) + 1)
        yield f"{verb}_{subject}({', '.join(parameters)}) -> {kinds[-1]}\n"
        yield f"    {verb.capitalize()} the {subject} and return its {result} ({kinds[-1]}).\n\n"
        for parameter, kind in zip(parameters, kinds[:-1], strict=True):
            yield f"    {parameter} ({kind}): the {parameter} of the {subject}.\n"
        yield f"    Raises ValueError when {parameters[0]} is not of type {kinds[0]}.\n\n"

    return lambda: "".join(line for _ in range(3 + int(rng.random() * 6)) for line in entry())


def _code(rng: Random) -> Callable[[], str]:
    names = Lexicon(rng, 300)

    def expression(variables: Sequence[str], depth: int) -> str:
        if depth == 0 or rng.random() < 0.3:
            return rng.choices(variables)[0] if rng.random() < 0.8 else str(int(rng.random() * 100))
        left, right = expression(variables, depth - 1), expression(variables, depth - 1)
        return f"({left} {rng.choices(_OPERATORS)[0]} {right})"

    def function(known: list[str]) -> Iterator[str]:
        name, *variables = dict.fromkeys(names.draw(rng, 4))
        variables = variables or ["x"]
        yield f"def {name}({', '.join(variables)}):\n"
        for target in names.draw(rng, 2 + int(rng.random() * 4)):
            value = expression(variables, 2)
            if rng.random() < 0.3:
                yield f"    if {rng.choices(variables)[0]} > {int(rng.random() * 10)}:\n        {target} = {value}\n"
                yield f"    else:\n        {target} = {rng.choices(variables)[0]}\n"
            elif known and rng.random() < 0.3:
                yield f"    {target} = {rng.choices(known)[0]}({expression(variables, 1)})\n"
            else:
                yield f"    {target} = {value}\n"
            variables.append(target)
        yield f"    return {expression(variables, 2)}\n\n\n"
        known.append(name)

    def module() -> str:
        known: list[str] = []
        return "".join(line for _ in range(2 + int(rng.random() * 6)) for line in function(known))

    return module


def _syllable(rng: Random) -> str:
    return rng.choices(_ONSETS)[0] + rng.choices(_NUCLEI)[0] + rng.choices(_CODAS)[0]
