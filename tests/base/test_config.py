from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from skymoe.base.config import Config, check_config, dump_config, read_config
from skymoe.base.errors import ConfigError


class Method(StrEnum):
    COPY = "copy"
    SPLIT = "split"


class Optimizer(Config):
    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: int | None = None
    fused: bool = False


class Source(Config):
    path: Path
    weight: float = 1.0


class Recipe(Config):
    steps: int
    """Optimizer steps."""
    name: str = ""
    method: Method = Method.COPY
    recompute: Literal["none", "all"] | int = "none"
    optimizer: Optimizer = Optimizer()
    sources: tuple[Source, ...] = ()
    note: str | None = None

    @model_validator(mode="after")
    def _even(self) -> Recipe:
        if self.steps == 13:
            raise ConfigError("13 steps bring bad luck", hint="take 14")
        return self


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def refused(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(Recipe, path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_reads_what_yaml_1_1_gets_wrong(recipe) -> None:
    config = read_config(Recipe, recipe("steps: 1_000\nname: on\nnote: 12:30\noptimizer:\n  lr: 1e-5\n  warmup: 010\n"))
    assert (config.steps, config.name, config.note) == (1000, "on", "12:30")
    assert (config.optimizer.lr, config.optimizer.warmup) == (1e-5, 10)


def test_text_that_is_a_number_is_a_float_wherever_a_float_stands(recipe) -> None:
    text = 'steps: 1\noptimizer: {lr: "1e-5", betas: ["0.8", .9]}\nsources: [{path: a, weight: "2"}]\n'
    config = read_config(Recipe, recipe(text))
    assert config.optimizer == Optimizer(lr=1e-5, betas=(0.8, 0.9))
    assert config.sources == (Source(path=Path("a"), weight=2.0),)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("steps: '10'", "steps: expected a whole number, got '10'"),
        ("steps: 1.0", "steps: expected a whole number, got 1.0"),
        ("steps: true", "steps: expected a whole number, got True"),
        ("steps: 1\nname: 5", "name: expected text, got 5"),
        ("steps: 1\noptimizer: {fused: 1}", "optimizer.fused: expected true or false, got 1"),
        ("steps: 1\noptimizer: {fused: yes}", "optimizer.fused: expected true or false, got 'yes'"),
        ("steps: 1\noptimizer: {lr: true}", "optimizer.lr: expected a number, got True"),
        ("steps: 1\noptimizer: {lr: fast}", "optimizer.lr: expected a number, got 'fast'"),
        ("steps: 1\noptimizer: {lr: .nan}", "optimizer.lr: expected a finite number, got nan"),
        ("steps: 1\noptimizer: {lr: -.inf}", "optimizer.lr: expected a finite number, got -inf"),
        ("steps: 1\noptimizer: 3", "optimizer: expected a section with keys, got 3"),
        ("steps: 1\nsources: {a: 1}", "sources: expected a list, got {'a': 1}"),
        ("steps: 1\nmethod: cpoy", "method: expected 'copy' or 'split', got 'cpoy'; did you mean \"copy\"?"),
        ("steps: 1\nrecompute: some", "recompute: expected 'none' or 'all', got 'some' or expected a whole number"),
        ("steps: 13", "13 steps bring bad luck (take 14)"),
        ("name: x", "steps: this key is required"),
        ("", "steps: this key is required"),
    ],
)
def test_wrong_values_are_refused(recipe, text: str, told: str) -> None:
    assert told in refused(recipe(text))


def test_every_problem_is_told_with_its_line_and_the_nearest_key(recipe) -> None:
    path = recipe("steps: ten\noptimizer:\n  warmpu: 3\nlr: 1\nsources:\n  - path: a\n    wieght: 2\n")
    message = refused(path, "optimizer.betta=1")
    assert "5 problems" in message
    assert f"{path}:1: steps: expected a whole number, got 'ten'" in message
    assert f'{path}:3: optimizer.warmpu: unknown key; did you mean "warmup"?' in message
    assert f'{path}:4: lr: unknown key; did you mean "optimizer.lr"?' in message
    assert f'{path}:7: sources.0.wieght: unknown key; did you mean "weight"?' in message
    assert 'command line: optimizer.betta: unknown key; did you mean "betas"?' in message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("steps: 1\nsteps: 2\n", ":2: the key 'steps' is given twice"),
        ("optimizer:\n  lr: 1\n  lr: 2\n", ":3: the key 'lr' is given twice"),
        ("steps: !!python/object:os.system 1\n", ":1: the YAML tag"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n", ":3: merge keys"),
        ("a: &a [*a]\n", "too large or too deep"),
        ("- 1\n", "expected `key: value` lines"),
        ("steps: [1\n", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("? [1, 2]\n: 3\n", ":1: a key must be a word"),
    ],
)
def test_broken_and_hostile_yaml_is_refused(recipe, text: str, told: str) -> None:
    assert told in refused(recipe(text))


def test_a_file_of_aliases_does_not_expand(recipe) -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    assert "too large or too deep" in refused(recipe(bomb))


def test_files_that_cannot_be_read(recipe, tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none.yaml")
    assert "cannot read" in refused(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: \xe9".encode("latin-1"))
    assert "not UTF-8" in refused(tmp_path / "latin.yaml")
    assert "more than" in refused(recipe("# " + "x" * 1_100_000))


def test_later_sources_win(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    base = "steps: 1\nname: base\noptimizer: {lr: 0.1, warmup: 1, fused: true}\nsources: [{path: a}, {path: b}]"
    recipe(base, "b.yaml")
    path = recipe("extends: b.yaml\nname: file\noptimizer: {lr: 0.2, warmup: 2}\nsources: [{path: c}]")
    monkeypatch.setenv("SKYMOE__OPTIMIZER__LR", "0.3")
    monkeypatch.setenv("SKYMOE__NOTE", "env")
    config = read_config(Recipe, path, ["note=cli", "sources.0.weight=5"], defaults={"steps": 9, "recompute": 3})
    assert config == Recipe(
        steps=1, name="file", note="cli", recompute=3, optimizer=Optimizer(lr=0.3, warmup=2, fused=True),
        sources=(Source(path=Path("c"), weight=5.0),),
    )  # fmt: skip


def test_where_a_value_came_from(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    base = recipe("steps: x", "b.yaml")
    assert refused(recipe("extends: b.yaml")).startswith(f"{base}:1: steps")
    assert refused(recipe("extends: b.yaml\n\nsteps: y")).startswith(f"{base.parent / 'recipe.yaml'}:3: steps")
    monkeypatch.setenv("SKYMOE__STEPS", "z")
    assert refused(recipe("steps: 1")).startswith("environment SKYMOE__STEPS: steps")
    assert refused(recipe("steps: 1"), "steps=w").startswith("command line: steps")


def test_extends_has_one_level(recipe) -> None:
    recipe("steps: 1", "a.yaml")
    recipe("extends: a.yaml", "b.yaml")
    assert "b.yaml:1: a recipe that is extended" in refused(recipe("extends: b.yaml"))
    assert "recipe.yaml:1: extends: expected a file name" in refused(recipe("extends: [a]"))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("steps", "expected key=value"),
        ("=3", "expected key=value"),
        ("optimizer..lr=3", "expected key=value"),
        ("optimizer.betas=[1", "not valid YAML"),
        ("optimizer.betas.7=1", "the list has items 0 to 1"),
    ],
)
def test_broken_overrides(recipe, override: str, told: str) -> None:
    assert told in refused(recipe("steps: 1\noptimizer: {betas: [0.5, 0.5]}"), override)


def test_overrides_speak_yaml() -> None:
    overrides = ["steps=7", "optimizer.betas=[0.5, 0.6]", "note=", "name=a=b", "sources=[{path: /x}]"]
    config = read_config(Recipe, None, overrides)
    assert config == Recipe(
        steps=7, optimizer=Optimizer(betas=(0.5, 0.6)), name="a=b", sources=(Source(path=Path("/x")),), note=None
    )


def test_toml(recipe) -> None:
    message = refused(recipe("steps = 3\n[optimizer]\nlr = 1e-4\nwamrup = 1\n", "recipe.toml"))
    assert 'recipe.toml:4: optimizer.wamrup: unknown key; did you mean "warmup"?' in message
    assert read_config(Recipe, recipe("steps = 3\noptimizer.lr = 1e-4", "recipe.toml")).optimizer.lr == 1e-4
    assert "not valid TOML" in refused(recipe("steps = 1\nsteps = 2", "recipe.toml"))


def test_options_are_located_on_the_command_line() -> None:
    with pytest.raises(ConfigError, match='command line: stepz: unknown key; did you mean "steps"'):
        check_config(Recipe, {"steps": 1, "stepz": 2})
    assert check_config(Source, {"path": Path("a/b")}) == Source(path=Path("a/b"))


def test_a_config_is_frozen_and_replaced_with_checks() -> None:
    config = Recipe(steps=1)
    with pytest.raises(ValidationError):
        config.steps = 2  # type: ignore[misc]
    assert config.replace(steps=2) == Recipe(steps=2)
    with pytest.raises(ValidationError):
        config.replace(steps="2")
    assert Recipe.model_json_schema()["properties"]["steps"]["description"] == "Optimizer steps."


TRAPS = ["", "on", "no", "1e-5", "12:30", "010", "~", ".inf", "- a", "a: b", "0x1f"]
texts = st.text(max_size=30) | st.sampled_from(TRAPS)
finite = st.floats(min_value=1e-300, allow_infinity=False)


@settings(max_examples=100, deadline=None)
@given(
    name=texts,
    note=st.none() | texts,
    steps=st.integers(-(2**60), 2**60).filter(lambda n: n != 13),
    lr=finite,
    weights=st.lists(finite, max_size=3),
    method=st.sampled_from(Method),
    recompute=st.sampled_from(["none", "all"]) | st.integers(0, 99),
)
def test_what_is_dumped_reads_back_equal(tmp_path_factory, name, note, steps, lr, weights, method, recompute) -> None:
    config = Recipe(
        steps=steps, name=name, note=note, method=method, recompute=recompute, optimizer=Optimizer(lr=lr),
        sources=tuple(Source(path=Path("p"), weight=weight) for weight in weights),
    )  # fmt: skip
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert read_config(Recipe, path) == config


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("stepname:optizr lw-[]{}&*!|>'\"%@`#?,.\n\t019eE+~<"), max_size=60))
def test_any_text_gives_a_config_or_a_config_error(tmp_path_factory, text) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        read_config(Recipe, path)
    except ConfigError as error:
        assert str(path) in str(error)
