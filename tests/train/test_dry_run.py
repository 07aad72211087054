"""A rank of a large run on paper: what it prints is what the ranks of a real one have."""

from __future__ import annotations

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel.ranks import run_ranks
from rich.console import Console
from train.tiny import MOE, recipe

from skymoe.base.config import read_config
from skymoe.base.errors import ConfigError
from skymoe.parallel.adamw import AdamWSettings, GroupSettings
from skymoe.parallel.config import layout_of
from skymoe.parallel.memory import ZeroBytes
from skymoe.parallel.mesh import build_mesh
from skymoe.parallel.options import PartOptions
from skymoe.parallel.spread import build_parts
from skymoe.parallel.zero import ZeroOptimizer
from skymoe.spec.flops import count_parameters
from skymoe.spec.layout import Layout, ScheduleKind
from skymoe.spec.model import ModelSpec
from skymoe.spec.split import Split
from skymoe.train.build import resolve_spec
from skymoe.train.config import TrainConfig
from skymoe.train.dry_run import bubble, dry_run
from skymoe.train.dry_run_table import show

SKYWORK = Path(__file__).parents[2] / "recipes" / "skywork_moe_1536.yaml"
SPEC: dict[str, Any] = {
    **MOE, "num_layers": 5, "num_heads": 6, "num_kv_heads": 3, "head_dim": 4, "qkv_bias": True, "o_bias": True,
    "qk_norm": "full", "tie_embeddings": True, "moe": {**MOE["moe"], "shared_ffn_size": 12, "layers": [1, 2, 4]},
}  # fmt: skip
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (6, {"pp": 3, "tp": 2}),
    (12, {"pp": 2, "tp": 3, "expert": "etp", "schedule": "zbv"}),
    (4, {"tp": 2, "expert": "ep", "dispatch": "A"}),
    (4, {"pp": 2, "tp": 2, "schedule": "interleaved", "split": [1.5, 1, 0.5, 2], "gradients": "bfloat16"}),
    (6, {"pp": 2, "expert": "etp", "dispatch": "R"}),
]


def small(root: Path, parallel: dict[str, Any], **changes: Any) -> TrainConfig:
    batch = {"sequences": 12, "micro_sequences": 1}
    return recipe(root, **{"model": {"spec": SPEC}, "batch": batch, "parallel": parallel, **changes})


@pytest.mark.parametrize(("rank", "place"), [(0, (0, 0, 0)), (1535, (11, 31, 3)), (701, (5, 15, 1))])
def test_skywork_moe_on_1536_ranks(rank: int, place: tuple[int, int, int]) -> None:
    report = dry_run(read_config(TrainConfig, SKYWORK), world_size=1536, rank=rank)
    own = report.rank
    assert (own.rank, own.pp, own.dp, own.tp) == (rank, *place)
    assert report.parameters == 146_356_167_168 == sum(row.parameters for row in report.stages)
    assert report.mean_parameters / 1e9 == pytest.approx(3.05, abs=0.01)
    assert own.weights == pytest.approx(2 * own.parameters, rel=1e-5)
    assert own.gradients == 2 * own.weights
    assert own.moments == pytest.approx(8 * own.parameters / 32, rel=1e-5)
    assert own.master == pytest.approx(4 * own.parameters / 32, rel=1e-5)
    groups = {group.kind: group.ranks for group in own.groups}
    pp, dp, tp = place
    assert groups["pp"] == tuple(stage * 128 + dp * 4 + tp for stage in range(12))
    assert groups["dp"] == tuple(pp * 128 + replica * 4 + tp for replica in range(32))
    assert groups["tp"] == groups["expert (edp)"] == tuple(pp * 128 + dp * 4 + other for other in range(4))
    assert groups["ends"] == ((rank,) if pp == 5 else (dp * 4 + tp, 11 * 128 + dp * 4 + tp))
    assert (report.num_micro, report.bubble) == (64, pytest.approx(11 / 75))
    assert sum(row.flops_share for row in report.stages) == pytest.approx(1.0)
    assert sum(row.layers for row in report.stages) == 52
    assert report.stages[4].holds == "feed-forward of 16, 17-20"
    assert (report.stages[0].holds, report.stages[11].holds) == ("embedding, 0-3", "48-51, norm, head")


@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS)
def test_all_ranks_together_have_the_model_once(tmp_path: Path, world_size: int, parallel: dict[str, Any]) -> None:
    config = small(tmp_path, parallel)
    reports = [dry_run(config, world_size=world_size, rank=rank) for rank in range(world_size)]
    spec = resolve_spec(config)
    assert {report.parameters for report in reports} == {count_parameters(spec).total}
    ranks = [report.rank for report in reports]
    assert [own.rank for own in ranks] == list(range(world_size))
    assert sum(own.parameters for own in ranks) / world_size == pytest.approx(reports[0].mean_parameters)
    assert max(own.parameters for own in ranks) == reports[0].most_parameters
    for own in ranks:
        assert all(own.rank in group.ranks for group in own.groups)
        owners = {row.stage: row.owner for row in reports[0].stages}
        assert own.stages == tuple(stage for stage, owner in owners.items() if owner == own.pp)
    copies = [row.parameters for row in reports[0].stages]
    table = spec.vocab_size * spec.hidden_size if len(copies) > 1 else 0  # tied, so at both ends
    assert sum(copies) - table == count_parameters(spec).total


def real_rank(layout: Layout, spec: ModelSpec) -> tuple[int, ZeroBytes]:
    mesh = build_mesh(layout, torch.device("cpu"))
    parts = build_parts(spec, mesh, PartOptions(num_tokens=19), dtype=torch.bfloat16)
    stages = {stage: {n: (p, part.slices[n]) for n, p in part.named_parameters()} for stage, part in parts.items()}
    zero = ZeroOptimizer(stages, mesh, AdamWSettings(), lambda name, p: GroupSettings(), tied={"embed.weight"})
    distinct = {parameter for own in stages.values() for parameter, _ in own.values()}
    return sum(parameter.numel() for parameter in distinct), zero.allocated()


@pytest.mark.parametrize("parallel", [{"tp": 2, "expert": "ep"}, {"pp": 2, "tp": 2, "schedule": "zbv"}, {"pp": 2}])
def test_it_is_what_a_real_world_of_ranks_allocates(tmp_path: Path, parallel: dict[str, Any]) -> None:
    config = small(tmp_path, parallel, precision={"weights": "bfloat16", "compute": "bfloat16"})
    spec = resolve_spec(config)
    real = run_ranks(4, real_rank, layout_of(config.parallel, spec, world_size=4), spec)
    for rank, (parameters, held) in enumerate(real):
        own = dry_run(config, world_size=4, rank=rank).rank
        assert own.parameters == parameters
        assert ZeroBytes(own.weights, own.gradients, own.moments, own.master) == held


def test_the_options_belong_together(tmp_path: Path) -> None:
    for options, told in ((["--world-size", "2"], "belongs to --dry-run"), (["--dry-run", "--rank", "1"], "how many")):
        command = [sys.executable, "-m", "skymoe", "train", str(SKYWORK), f"run.dir={tmp_path / 'run'}", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and told in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "world_size", "rank", "told"),
    [
        ({"parallel": {"pp": 2}}, 3, 0, "is not the number of ranks, 3"),
        ({"parallel": {"pp": 2}}, 4, 4, "rank 4 is outside a layout of 4 ranks"),
        ({"parallel": {"dp": 5}}, 5, 0, "12 sequences a step do not make equal micro-batches"),
        ({"parallel": {"pp": 4}, "batch": {"sequences": 3, "micro_sequences": 1}}, 4, 0, "at least 4 micro-batches"),
        ({"parallel": {"tp": 4}}, 4, 0, "tp 4 is more than the 3 key/value heads"),
        ({"parallel": {"tp": 3, "expert": "ep"}}, 6, 0, "5 experts over 6 ranks"),
        ({"parallel": {"pp": 2}, "recompute": [9, 0]}, 2, 0, "9 layers of 3 in stage 0"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    tmp_path: Path, changes: dict[str, Any], world_size: int, rank: int, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        dry_run(small(tmp_path, **changes), world_size=world_size, rank=rank)


def test_bubbles_of_equal_stages() -> None:
    """By hand: 4 ranks, 8 micro-batches: 3 of 11 slots; with two chunks each 3 of 19."""
    assert bubble(Layout(pp=4, stages=Split((2, 2, 2, 2))), 8) == pytest.approx(3 / 11)
    halves = Split((1,) * 8)
    assert bubble(Layout(pp=4, stages=halves, schedule=ScheduleKind.INTERLEAVED), 8) == pytest.approx(3 / 19)
    assert bubble(Layout(stages=Split((8,))), 8) == 0.0


def test_the_command_needs_no_data_little_memory_and_says_it_all(tmp_path: Path) -> None:
    code = """if True:
        import resource, sys
        from skymoe import cli
        try:
            options = ["--dry-run", "--world-size", "1536", "--rank", "5", "--json"]
            cli.main(["train", sys.argv[1], "recompute=all", *options])
        except SystemExit as end:
            assert not end.code, end.code
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(SKYWORK)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert int(done.stderr.splitlines()[-1]) < 2e6  # kB
    found = json.loads(done.stdout)
    assert found["parameters"] == 146_356_167_168 and found["rank"]["rank"] == 5
    assert found["layout"]["recompute"] == [4, 4, 4, 5, 5, 5, 5, 5, 5, 5, 5, 4]
    assert not list(tmp_path.iterdir())


def test_the_table(tmp_path: Path) -> None:
    report = dry_run(small(tmp_path, {"pp": 2, "tp": 3, "schedule": "zbv"}), world_size=12, rank=7)
    console = Console(width=160, file=StringIO())
    show(report, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "12 ranks: pp 2 x dp 2 x tp 3" in text and "rank 7: pp 1, dp 0, tp 1; stage 1, 2" in text
    assert f"{report.parameters:,}" in text and f"{report.rank.gradients:,}" in text
    assert "bubble" not in text  # zbv: no formula
    assert all(row.holds in text for row in report.stages)
