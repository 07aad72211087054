"""Whole runs: what they leave behind, that they repeat, that they resume bit for bit, and what they refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from train.tiny import DENSE, MOE, assert_same_state, recipe, untimed_lines, write_tokens

from skymoe.base.config import read_config
from skymoe.base.errors import ConfigError, MachineError
from skymoe.spec.model import GateNormSpec
from skymoe.train.config import TrainConfig
from skymoe.train.metrics import read_metrics
from skymoe.train.run import run
from skymoe.train.settings import run_directory
from skymoe.weights.generation import latest_generation

MIXTRAL = {**MOE, "architecture": "mixtral", "moe": {**MOE["moe"], "gate_norm": False}}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The run directory of twelve steps without interruption."""
    root = tmp_path_factory.mktemp("straight")
    run(recipe(root, spec=MIXTRAL))
    return root / "run"


def test_what_a_run_leaves_behind(straight):
    assert {"recipe.yaml", "environment.json", "metrics.jsonl", "checkpoints", "model"} <= {
        p.name for p in straight.iterdir()
    }
    lines = read_metrics(straight / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [3, 6, 9, 12]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [0, 6, 12]
    header, last = lines[0], [line for line in lines if line["kind"] == "train"][-1]
    assert (header["kind"], header["schema"], header["moe_layers"], header["parent"]) == ("run", 1, [0, 1], None)
    assert last["tokens"] == 12 * 5 * 19
    assert [line["step"] for line in lines if line.get("event") == "save"] == [4, 8, 12]
    assert last["flops"] == pytest.approx(last["tokens"] * header["flops_per_token"])
    assert {name: len(values) for name, values in last["layers"].items()} == dict.fromkeys(
        ["drop_rate", "alpha", "max1_max2", "max2_max3", "load_cov", "dead_experts", "gate_entropy"], 2
    )
    assert last["mfu_full"] > last["mfu_causal"] > 0
    assert last["world_size"] == 1 and last["tokens_per_s_per_device"] == last["tokens_per_s"]
    hardware = header["flops_per_token_hardware"] / header["flops_per_token"]
    assert last["hfu"] == pytest.approx(hardware * last["mfu_causal"]) and hardware > 1  # the statistics pass
    assert sorted(p.name for p in (straight / "checkpoints").glob("step-*")) == [f"step-{s:08}" for s in (4, 8, 12)]


def test_the_recipe_in_the_run_directory_is_the_recipe(straight):
    config = read_config(TrainConfig, straight / "recipe.yaml")
    assert config == recipe(straight.parent, spec=MIXTRAL)


def test_the_exported_model_is_the_trained_one(straight):
    from skymoe.model.load import load

    exported = load(straight / "model").state_dict()
    trained = latest_generation(straight / "checkpoints").tensors("model")
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[name], trained[name]) for name in trained)


def test_it_learns(tmp_path):
    report = run(recipe(tmp_path, spec=DENSE, steps=60, evaluate={"every": 0}, checkpoint={"every": 0}))
    lines = [line["loss"]["all"] for line in read_metrics(tmp_path / "run/metrics.jsonl") if line["kind"] == "eval"]
    assert lines[1] < lines[0] - 0.3
    assert report.valid_loss["all"] == lines[1] and report.exit_code == 0 and report.step == 60


def test_the_same_recipe_twice_is_bit_equal(tmp_path, straight):
    run(recipe(tmp_path, spec=MIXTRAL, data={"train": [{"path": str(straight.parent / "data/train")}]}))
    assert_same_state(straight, tmp_path / "run")


@pytest.mark.parametrize("stops", [(4,), (5, 7), (1, 2, 3, 11)])
def test_interrupted_and_resumed_is_bit_equal_to_straight(tmp_path, straight, stops):
    """Stops by a smaller number of steps would change the cosine, so a constant rate is used for both."""
    constant = {"kind": "constant", "warmup_steps": 2}
    for steps in (*stops, 12):
        report = run(recipe(tmp_path, spec=MIXTRAL, steps=steps, schedule=constant))
        assert report.step == steps
    run(recipe(tmp_path, spec=MIXTRAL, schedule=constant, run={"dir": str(tmp_path / "other")}))
    assert_same_state(tmp_path / "run", tmp_path / "other")


def test_metrics_of_a_resumed_run_are_those_of_a_straight_one(tmp_path):
    """Killed after step 8 was saved and step 9 logged: what the resumed run writes is what would have been written."""
    run(recipe(tmp_path))
    reference = untimed_lines(tmp_path / "run")
    (tmp_path / "run/checkpoints/step-00000012").rename(tmp_path / "gone")
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"kind":"train","step":13,"loss":0.0}\n{"kind":"tra')
    (tmp_path / "run/checkpoints/LATEST").unlink()
    report = run(recipe(tmp_path))
    assert report.resumed_from == 8
    assert untimed_lines(tmp_path / "run") == reference


def test_a_finished_run_says_so_and_changes_nothing(straight):
    before = {path.name: path.read_bytes() for path in (straight / "model").iterdir()}
    report = run(recipe(straight.parent, spec=MIXTRAL))
    assert (report.step, report.resumed_from, report.exit_code) == (12, 12, 0)
    assert report.valid_loss["all"] > 0
    assert {path.name: path.read_bytes() for path in (straight / "model").iterdir()} == before


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"run": {"seed": 5}}, "run.seed: was 0, now 5"),
        ({"optimizer": {"lr": 1e-4}}, "optimizer.lr: was 0.003, now 0.0001"),
        ({"batch": {"sequences": 6}}, "batch.sequences: was 5, now 6"),
        ({"spec": {**MIXTRAL, "num_layers": 3}}, "model.spec.num_layers: was 2, now 3"),
    ],
)
def test_another_recipe_on_the_same_directory_is_refused_by_key(straight, changes, named):
    before = (straight / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError) as caught:
        run(recipe(straight.parent, **{"spec": MIXTRAL, "steps": 14, **changes}))
    assert named in str(caught.value)
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_fewer_steps_than_are_done_are_refused(straight):
    with pytest.raises(ConfigError, match="at step 12 already"):
        run(recipe(straight.parent, spec=MIXTRAL, steps=7))


def test_other_data_behind_the_same_path_is_refused(tmp_path):
    run(recipe(tmp_path, steps=4))
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"data/train{suffix}").unlink()
    write_tokens(tmp_path / "data/train", seed=77)
    with pytest.raises(ConfigError, match="fingerprint"):
        run(recipe(tmp_path, steps=8))


def test_moved_run_and_data_resume(tmp_path):
    run(recipe(tmp_path / "a", steps=4))
    (tmp_path / "a").rename(tmp_path / "b")
    assert run(recipe(tmp_path / "b", steps=6)).resumed_from == 4


def test_an_unfinished_directory_without_a_checkpoint_is_compared_by_its_recipe(tmp_path):
    config = recipe(tmp_path, steps=3)
    run(config)
    (tmp_path / "run/checkpoints").rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        run(recipe(tmp_path, steps=3, optimizer={"lr": 0.5}))
    assert run(config).resumed_from is None


def test_a_directory_in_use_is_refused(tmp_path):
    with run_directory(tmp_path / "run"), pytest.raises(MachineError, match="another process"):
        run(recipe(tmp_path))


@pytest.mark.parametrize(
    "changes, where",
    [
        ({"data": {"sequence_length": 65}}, "data.sequence_length"),
        ({"balance": {"z_loss": 1e-3}}, "balance.z_loss"),
        ({"recompute": 3}, "recompute"),
        ({"spec": DENSE, "model": {"spec": DENSE, "gate_norm": True}}, "model.gate_norm"),
        ({"spec": {**MOE, "moe": {**MOE["moe"], "top_k": 9}}}, "model.spec: top_k 9 is more than the 5 experts"),
    ],
)
def test_contradictions_are_found_before_anything_is_written(tmp_path, changes, where):
    with pytest.raises(ConfigError) as caught:
        run(recipe(tmp_path, **changes))
    assert where in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_trained_model_can_be_the_parent(tmp_path, straight):
    config = recipe(tmp_path, model={"spec": None, "path": str(straight / "model")}, evaluate={"every": 0})
    run(config)
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    parent = read_metrics(straight / "metrics.jsonl")
    assert lines[0]["parent"] == str(straight / "model")
    first, last = ([line for line in which if line["kind"] == "eval"] for which in (lines, parent))
    assert first[0]["loss"]["all"] == pytest.approx(last[-1]["loss"]["all"], rel=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": {"compute": "bfloat16"}},
        {"precision": {"weights": "bfloat16", "compute": "bfloat16"}},
        {"recompute": "all", "data": {"isolate_documents": True}},
        {"balance": {"capacity": "real", "capacity_factor": 1.0, "aux": "switch", "scope": "micro"}},
        {
            "spec": {
                **MOE,
                "moe": {**MOE["moe"], "expert_bias": True, "shared_ffn_size": 8, "layers": [1]},
                "ffn_size": 24,
            }
        },
        {"spec": {**DENSE, "tie_embeddings": True, "qk_norm": "head", "qkv_bias": True}},
    ],
    ids=["autocast", "bf16", "recompute-isolated", "real-capacity", "bias-shared-mixed", "dense-tied"],
)
def test_every_kind_of_recipe_resumes_bit_equal(tmp_path, changes):
    common = {"schedule": {"kind": "wsd", "decay_steps": 1, "min_ratio": 1.0}, "evaluate": {"every": 0}, **changes}
    if "spec" not in common:
        common["spec"] = MIXTRAL
    for steps in (3, 6):
        run(recipe(tmp_path, steps=steps, **common))
    run(recipe(tmp_path, steps=6, **common, run={"dir": str(tmp_path / "other")}))
    assert_same_state(tmp_path / "run", tmp_path / "other")


def test_alpha_moves_by_equations_7_to_9_once_per_step(tmp_path):
    run(recipe(tmp_path, steps=5, log={"every": 1}))
    lines = [line for line in read_metrics(tmp_path / "run/metrics.jsonl") if line["kind"] == "train"]
    alpha_L = [0.01, 0.01]
    for line in lines:
        assert line["layers"]["alpha"] == alpha_L
        drops = line["layers"]["drop_rate"]
        alpha_L = [0.99 * a + (1 - 0.99) * min(0.2 * d, 0.01) for a, d in zip(alpha_L, drops, strict=True)]
    state = latest_generation(tmp_path / "run/checkpoints").document("state")
    assert state["alpha"]["alpha_L"] == alpha_L


def test_environment_names_versions_and_nobody(straight):
    content = json.loads((straight / "environment.json").read_text())
    assert content["packages"]["torch"] == torch.__version__
    assert "hostname" not in content and "user" not in content


def test_a_stale_or_damaged_model_is_exported_again(tmp_path, monkeypatch):
    """Prolonged, and stopped between the last checkpoint and the export: the old model must not pass for the new."""
    constant = {"schedule": {"kind": "constant"}}
    run(recipe(tmp_path, steps=4, **constant))
    longer = recipe(tmp_path, steps=6, **constant)

    def full_disk(*args, **kwargs):
        raise MachineError("no space")

    with monkeypatch.context() as patch:
        patch.setattr("skymoe.train.run.save_pretrained", full_disk)
        with pytest.raises(MachineError):
            run(longer)
    assert run(longer).resumed_from == 6
    straight = recipe(tmp_path, steps=6, run={"dir": str(tmp_path / "straight")}, **constant)
    run(straight)
    name = "model/model.safetensors"
    again = (longer.run.dir / name).read_bytes()
    assert again == (straight.run.dir / name).read_bytes()
    (longer.run.dir / name).unlink()
    run(longer)
    assert (longer.run.dir / name).read_bytes() == again


def test_the_same_parent_under_another_spelling_of_its_path_resumes(tmp_path, monkeypatch):
    first = recipe(tmp_path)
    run(first)
    monkeypatch.chdir(tmp_path)
    where = {"dir": str(tmp_path / "child")}
    model = {"path": str(first.run.dir / "model"), "spec": None}
    run(recipe(tmp_path, model=model, run=where))
    relative = {"path": os.path.relpath(first.run.dir / "model"), "spec": None}
    assert run(recipe(tmp_path, model=relative, run=where)).resumed_from is not None


def test_loads_are_those_of_the_whole_step(tmp_path):
    """Expert loads do not depend on how the step is cut into micro-batches."""
    figures = []
    for micro in (None, 1):
        config = recipe(
            tmp_path, run={"dir": str(tmp_path / f"run-{micro}")}, batch={"micro_sequences": micro}, log={"every": 1}
        )
        run(config)
        lines = read_metrics(config.run.dir / "metrics.jsonl")
        figures.append(next(line["layers"] for line in lines if line["kind"] == "train"))
    assert figures[0]["load_cov"] == pytest.approx(figures[1]["load_cov"])
    assert figures[0]["dead_experts"] == figures[1]["dead_experts"]


@pytest.mark.parametrize("precision", [{"compute": "float64"}, {"weights": "bfloat16", "compute": "float32"}])
def test_formats_that_autocast_does_not_know_are_refused(tmp_path, precision):
    with pytest.raises(ConfigError, match="compute must be bfloat16"):
        recipe(tmp_path, precision=precision)


def test_a_recipe_can_say_rope_scaling_and_the_form_of_the_gate(tmp_path):
    rope = {"theta": 5e5, "scaling": "llama3", "factor": 8.0, "original_max_position": 16}
    released = {"scale": 2.0, "eps": 0.0, "subtract_mean": False}
    spec = {**MOE, "rope": rope, "moe": {**MOE["moe"], "gate_norm": released}}
    built = recipe(tmp_path, spec=spec).model.spec.to_spec()
    assert (built.rope.scaling, built.rope.factor, built.rope.original_max_position) == ("llama3", 8.0, 16)
    assert built.moe.gate_norm == GateNormSpec(scale=2.0, eps=0.0, subtract_mean=False)
    assert recipe(tmp_path).model.spec.to_spec().moe.gate_norm == GateNormSpec()
    run(recipe(tmp_path, spec=spec, steps=2))
