"""Router kit ablation: gate normalization on/off x adaptive/fixed/no balance loss, at the same tokens.

    skymoe demo --out demo
    python benchmarks/router_ablation.py --demo demo [--steps 120] [--seeds 7 8 9]

Starts from the demo's dense parent, upcycles it with and without gate normalization (the same router weights), trains
the six variants by recipes/router_ablation.yaml and compares what the paper speaks of: loss, drop rate, Max1/Max2 and
Max2/Max3. docs/router_ablation.md discusses the result. The plots need matplotlib (extra `bench`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from skymoe.base.config import read_config
from skymoe.base.log import setup_logging
from skymoe.train.config import TrainConfig
from skymoe.train.run import run as train
from skymoe.upcycle.config import UpcycleConfig
from skymoe.upcycle.run import run as upcycle

RECIPE = Path(__file__).parent.parent / "recipes" / "router_ablation.yaml"
GATES = {"on": True, "off": False}
BALANCES = {"adaptive": [], "fixed": ["balance.adaptive=false"], "none": ["balance.aux=none"]}
COLORS = {"adaptive": "#2563eb", "fixed": "#d97706", "none": "#6b7280"}


def run_all(demo: Path, steps: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Train what is not trained yet; returns the lines of metrics of each variant."""
    root = demo / f"ablation-{seed}"
    lines = {}
    for gate, norm in GATES.items():
        start = root / gate
        if not start.exists():
            upcycle(UpcycleConfig(sources=(demo / "dense-pretrain" / "model",), out=start, gate_norm=norm, seed=seed))
        for balance, options in BALANCES.items():
            directory = root / f"{gate}-{balance}"
            train(read_config(TrainConfig, RECIPE, _overrides(demo, start, directory, steps, seed) + options))
            text = (directory / "metrics.jsonl").read_text(encoding="utf-8")
            lines[f"{gate}-{balance}"] = [json.loads(line) for line in text.splitlines()]
    return lines


def _overrides(demo: Path, model: Path, directory: Path, steps: int, seed: int) -> list[str]:
    sources = [
        f"data.{side}.{index}.path={demo / 'corpus' / side / name}"
        for side in ("train", "valid")
        for index, name in enumerate(("prose", "docs", "code"))
    ]
    places = [f"run.dir={directory}", f"model.path={model}", f"data.tokenizer={demo / 'corpus' / 'tokenizer'}"]
    return [*places, *sources, f"steps={steps}", f"run.seed={seed}"]


def summarise(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Means over layers; gate figures over the last quarter of training, held-out loss at its end."""
    steps = [line for line in lines if line["kind"] == "train"]
    late = steps[-max(1, len(steps) // 4) :]
    final = [line for line in lines if line["kind"] == "eval"][-1]
    figures = {name: mean([mean(line["layers"][name]) for line in late]) for name in late[0]["layers"]}
    loss = mean([line["loss"] for line in late])
    return {"bits_per_byte": final["bits_per_byte"]["all"], "train_loss": loss, **figures}


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def draw(lines: dict[str, list[dict[str, Any]]], directory: Path) -> None:
    """One figure per quantity: both gates side by side, the three balances as curves (mean over layers)."""
    directory.mkdir(parents=True, exist_ok=True)
    quantities = {"drop_rate": "drop rate", "alpha": "alpha", "max1_max2": "Max1 / Max2", "max2_max3": "Max2 / Max3"}
    for name, label in quantities.items():
        figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, constrained_layout=True)
        for axis, gate in zip(axes, GATES, strict=True):
            for balance, color in COLORS.items():
                steps = [line for line in lines[f"{gate}-{balance}"] if line["kind"] == "train"]
                values = [mean(line["layers"][name]) for line in steps]
                axis.plot([line["step"] for line in steps], values, color=color, label=f"aux {balance}")
            axis.set_title(f"gate normalization {gate}")
            axis.set_xlabel("step")
            axis.grid(alpha=0.25)
        axes[0].set_ylabel(label)
        axes[0].legend(frameon=False)
        figure.savefig(directory / f"router_ablation_{name}.svg", metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    """Run, print the table, write JSON and plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[7])
    parser.add_argument("--json", type=Path, default=Path("docs/assets/router_ablation.json"))
    parser.add_argument("--plots", type=Path, default=Path("docs/assets"))
    arguments = parser.parse_args()
    setup_logging()
    results = {}
    for seed in arguments.seeds:
        lines = run_all(arguments.demo, arguments.steps, seed)
        results[seed] = {variant: summarise(content) for variant, content in lines.items()}
        if seed == arguments.seeds[0]:
            draw(lines, arguments.plots)
    table = {
        variant: {key: mean([results[seed][variant][key] for seed in results]) for key in figures}
        for variant, figures in results[arguments.seeds[0]].items()
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    content = {"steps": arguments.steps, "seeds": results, "mean": table}
    arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    columns = ("bits_per_byte", "train_loss", "drop_rate", "max1_max2", "max2_max3", "load_cov", "dead_experts")
    print("| gate norm | aux | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 2))
    for variant, figures in table.items():
        gate, balance = variant.split("-")
        print(f"| {gate} | {balance} | " + " | ".join(f"{figures[name]:.4f}" for name in columns) + " |")


if __name__ == "__main__":
    main()
