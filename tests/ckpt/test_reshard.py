"""`skymoe ckpt reshard` and `export`: any layout into any other keeps every bit; any generation becomes a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel.checkpoints import SPEC, state_of

from skymoe.base.errors import CheckpointError, ConfigError
from skymoe.ckpt.config import DiffConfig, ExportConfig, LsConfig, ReshardConfig, VerifyConfig
from skymoe.ckpt.export import run_export
from skymoe.ckpt.reshard import run_reshard
from skymoe.ckpt.run import run_diff, run_ls, run_verify
from skymoe.ckpt.table import show
from skymoe.cli import main
from skymoe.model.load import assemble, load
from skymoe.model.save import save_pretrained
from skymoe.spec.model import Architecture, ModelSpec
from skymoe.spec.plain import spec_from_plain
from skymoe.spec.presets import PRESETS
from skymoe.weights.generation import latest_generation, save_generation
from skymoe.weights.manifest import read_manifest
from skymoe.weights.names import parameter_shapes
from skymoe.weights.stored import catalogue

TARGETS: dict[str, dict[str, Any]] = {
    "1": {},
    "PP2": {"pp": 2},
    "EDP2": {"tp": 2},
    "DP2": {"dp": 2},
    "PP2xEDP2": {"pp": 2, "tp": 2, "schedule": "zbv"},
    "ETP2xDP2": {"dp": 2, "tp": 2, "expert": "etp"},
    "EP4": {"dp": 2, "tp": 2, "expert": "ep", "zero_shards": False},
    "PP3xDP2": {"pp": 3, "dp": 2, "split": (0.5, 1.5, 1), "expert": "ep"},
}


def save(root: Path, step: int = 6, spec: ModelSpec = SPEC, **state: Any) -> Path:
    """As `skymoe train` on one process does."""
    plain = json.loads(json.dumps(asdict(spec)))
    return save_generation(
        root,
        step,
        tensors=state_of(step),
        documents={"state": {"model": plain, "alpha": [0.1, 1 / 3], **state}},
        layout={},
    )


def reshard(source: Path, out: Path, **keys: Any) -> Path:
    report = run_reshard(ReshardConfig.model_validate(keys | {"source": source, "out": out}, strict=False))
    assert report.exit_code == 0 and (report.step, Path(report.out).parent) == (6, out)
    return Path(report.out)


def hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every whole tensor, however it is stored."""
    stored = catalogue(path, read_manifest(path)[0].files)
    return {f"{stem}:{name}": tensor.sha256() for stem, content in stored.items() for name, tensor in content.items()}


def test_between_all_pairs_every_whole_tensor_keeps_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nobody pulls the plug on 64 of them
    source = save(tmp_path / "source")
    expected = hashes(source)
    assert len(expected) == sum(map(len, state_of(6).values()))
    made = {name: reshard(source, tmp_path / name, **keys) for name, keys in TARGETS.items()}
    assert all(hashes(path) == expected for path in made.values())
    for first, second in permutations(TARGETS, 2):
        path = reshard(made[first], tmp_path / f"{first}-{second}", **TARGETS[second])
        names = sorted(one.name for one in made[second].iterdir())
        assert sorted(one.name for one in path.iterdir()) == names
        for name in set(names) - {"MANIFEST.json"}:  # where a piece comes from leaves no trace
            assert (path / name).read_bytes() == (made[second] / name).read_bytes(), (first, second)


def test_one_process_reads_what_was_resharded(tmp_path: Path) -> None:
    path = reshard(save(tmp_path / "source"), tmp_path / "run" / "checkpoints", **TARGETS["PP2xEDP2"])
    assert len([one for one in path.iterdir() if one.name.startswith("model-")]) == 4
    manifest, source = read_manifest(path)[0], read_manifest(tmp_path / "source" / "step-00000006")[0]
    assert manifest.run == source.run and manifest.torch == source.torch and manifest.num_tensors == source.num_tensors
    assert manifest.layout["stages"] == [1, 1, 0.5, 0.5] or sum(manifest.layout["stages"]) == 3
    generation = latest_generation(tmp_path / "run" / "checkpoints")
    assert generation is not None and generation.document("state")["alpha"] == [0.1, 1 / 3]
    for stem, expected in state_of(6).items():
        loaded = generation.tensors(stem)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    back = reshard(path, tmp_path / "back")
    assert hashes(back) == hashes(tmp_path / "source" / "step-00000006")
    assert sorted(one.name for one in back.iterdir()) == sorted(one.name for one in (tmp_path / "source").glob("*/*"))


def test_ls_verify_and_diff_know_slices(tmp_path: Path) -> None:
    one = save(tmp_path / "source")
    other = reshard(one, tmp_path / "other", **TARGETS["ETP2xDP2"])
    (row,) = run_ls(LsConfig(path=tmp_path / "other")).generations
    assert (row.status, row.num_tensors) == ("ok", sum(map(len, state_of(6).values())))
    assert run_verify(VerifyConfig(path=tmp_path / "other")).exit_code == 0
    report = run_diff(DiffConfig(left=one, right=other))
    assert report.exit_code == 0 and not report.differences and report.num_tensors == row.num_tensors
    state = state_of(6)
    state["optimizer"]["layers.1.moe.experts.gate_up/exp_avg"][3, 7, 2] += 1
    documents = {"state": json.loads((one / "state.json").read_text())}
    save_generation(tmp_path / "changed", 6, tensors=state, documents=documents, layout={})
    (difference,) = run_diff(DiffConfig(left=other, right=tmp_path / "changed")).differences
    assert difference.name == "optimizer.safetensors:layers.1.moe.experts.gate_up/exp_avg"
    assert difference.num_elements == 1 and difference.max_abs == pytest.approx(1.0)
    raw = bytearray((other / "model-00003.safetensors").read_bytes())
    raw[-1] ^= 1
    (other / "model-00003.safetensors").write_bytes(raw)
    (problem,) = run_verify(VerifyConfig(path=tmp_path / "other")).problems
    assert problem.file == "step-00000006/model-00003.safetensors" and "head.weight" in problem.tensor
    with pytest.raises(CheckpointError, match="model-00003.safetensors"):
        run_reshard(ReshardConfig(source=other, out=tmp_path / "never"))
    assert not (tmp_path / "never").exists()


def test_what_cannot_be_done_is_told_before_anything_is_written(tmp_path: Path) -> None:
    source = save(tmp_path / "source")
    with pytest.raises(ConfigError, match="key/value heads"):
        reshard(source, tmp_path / "out", tp=4)
    with pytest.raises(ConfigError, match="stages"):
        reshard(source, tmp_path / "out", pp=2, split=(1, 1, 1))
    with pytest.raises(ConfigError, match="the source"):
        run_reshard(ReshardConfig(source=source, out=tmp_path / "source", overwrite=True))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ConfigError):
        reshard(source, tmp_path / "full")
    with pytest.raises(ConfigError):
        run_export(ExportConfig(source=source, out=tmp_path / "full"))
    plain = save_generation(tmp_path / "x", 1, tensors=state_of(1), documents={"state": {"a": 1}}, layout={})
    with pytest.raises(CheckpointError, match="does not say which model"):
        reshard(plain, tmp_path / "out")
    with pytest.raises(CheckpointError, match="does not say which model"):
        run_export(ExportConfig(source=plain, out=tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == ["full", "source", "x"]


def test_specs_return_from_plain_data() -> None:
    for spec in (SPEC, *PRESETS.values()):
        assert spec_from_plain(json.loads(json.dumps(asdict(spec)))) == spec
    with pytest.raises(CheckpointError, match="vocab_size"):
        spec_from_plain(asdict(SPEC) | {"vocab_size": "many"})
    with pytest.raises(CheckpointError, match="no model"):
        spec_from_plain(asdict(SPEC) | {"surprise": 1})


@pytest.mark.parametrize("name", ["1", "PP3xDP2"])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_export_is_what_save_pretrained_writes(tmp_path: Path, name: str, dtype: str | None) -> None:
    made = reshard(save(tmp_path / "source"), tmp_path / "run" / "checkpoints", **TARGETS[name])
    model = assemble(SPEC, dict(state_of(6)["model"]))
    expected = save_pretrained(model, tmp_path / "expected", dtype=dtype)
    for source in (made, tmp_path / "run"):
        out = tmp_path / f"out-{source.name}"
        report = run_export(ExportConfig.model_validate({"source": source, "out": out, "dtype": dtype}, strict=False))
        assert (report.step, report.architecture, report.dtype) == (6, "skymoe", dtype or "bfloat16")
        assert any("no tokenizer" in note for note in report.notes)
        assert sorted(report.files) == sorted(path.name for path in expected.iterdir())
        for path in expected.iterdir():
            if path.name != "skymoe.json":
                assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    tokens = torch.arange(11)[None]
    assert torch.equal(load(out)(tokens), load(expected)(tokens))


def test_export_takes_the_architecture_that_can_carry_the_model(tmp_path: Path) -> None:
    """Gate normalization is beyond Mixtral: the export is a `skymoe`, as a training's own is."""
    spec = replace(SPEC, architecture=Architecture.QWEN3_MOE)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text('{"a": 1}')
    save(tmp_path / "source", spec=spec, recipe={"data": {"tokenizer": str(tokenizer)}, "model": {"path": None}})
    report = run_export(ExportConfig(source=tmp_path / "source", out=tmp_path / "out"))
    assert report.architecture == "skymoe" and not report.notes
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"a": 1}'
    assert json.loads((tmp_path / "out" / "skymoe.json").read_text())["checkpoint"]["step"] == 6


def test_export_falls_back_and_refuses_other_tensors(tmp_path: Path) -> None:
    save(tmp_path, 6)
    newest = save(tmp_path, 7)
    (newest / "model.safetensors").write_bytes(b"")
    report = run_export(ExportConfig(source=tmp_path, out=tmp_path / "out"))
    assert report.step == 6 and report.notes[0].startswith("step-00000007 was passed over: model.safetensors")
    with pytest.raises(CheckpointError, match="damaged"):
        run_export(ExportConfig(source=newest, out=tmp_path / "out2"))
    other = replace(SPEC, num_layers=4, moe_layers=(1, 2, 3))
    source = save(tmp_path / "other", spec=other)
    with pytest.raises(CheckpointError, match="not those of its model"):
        run_export(ExportConfig(source=source, out=tmp_path / "out2"))
    assert not (tmp_path / "out2").exists()


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "source")
    arguments = ["--pp", "2", "--tp", "2", "--schedule", "interleaved", "--split", "1,0.5,0.5,1", "--json"]
    assert run_main(["ckpt", "reshard", str(source), str(tmp_path / "out"), *arguments]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["layout"]["stages"] == [1, 0.5, 0.5, 1] and told["layout"]["world_size"] == 4
    assert run_main(["ckpt", "export", str(tmp_path / "out"), str(tmp_path / "model"), "--dtype", "float16"]) == 0
    assert "step 6 as skymoe, float16" in capsys.readouterr().out
    assert run_main(["ckpt", "reshard", str(source), str(tmp_path / "out")]) == 2
    show(run_reshard(ReshardConfig(source=source, out=tmp_path / "out", dp=2, overwrite=True)))
    assert "step 6 for pp 1 x dp 2 x tp 1, experts by edp" in capsys.readouterr().out


def run_main(arguments: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["skymoe", *arguments])
        try:
            main()
        except SystemExit as leave:
            return int(leave.code or 0)
    return 0


def test_reshard_needs_no_torch_and_little_memory(tmp_path: Path) -> None:
    """A state of 100 MB, resharded by a process that takes less than half of that."""
    spec = replace(SPEC, vocab_size=2**19, num_layers=1, moe_layers=())
    weights = {name: torch.zeros(shape) for name, shape in parameter_shapes(spec).items()}
    moments = {"embed.weight/exp_avg": torch.randn(2**19, 12)}
    tensors = {"model": weights, "optimizer": moments | {"embed.weight/exp_avg_sq": moments["embed.weight/exp_avg"]}}
    documents = {"state": {"model": json.loads(json.dumps(asdict(spec)))}}
    source = save_generation(tmp_path / "source", 6, tensors=tensors, documents=documents, layout={})
    code = """if True:
        import resource, sys
        from pathlib import Path
        from skymoe.ckpt.config import ReshardConfig
        from skymoe.ckpt.reshard import run_reshard
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run_reshard(ReshardConfig(source=Path(sys.argv[1]), out=Path(sys.argv[2]), tp=3, dp=2))
        assert "torch" not in sys.modules
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(result.stdout) * unit < 50e6  # blocks of 8 MB, of which the verification has two at a time
    assert hashes(tmp_path / "out" / "step-00000006") == hashes(source)
