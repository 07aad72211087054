"""The demo's three trainings as ordinary recipes, and how large they are. No torch.

The dense parent is trained first. Then the *same* further tokens, in the same order, go to its mixture of experts and
to the parent itself: the comparison that upcycling has to win. Both re-warm to the same share of the parent's peak
rate and cool down to the same floor (upcycling facts: the learning rate matters most).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from skymoe.demo.config import DemoConfig
from skymoe.train.config import (
    BatchConfig,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    TrainConfig,
)
from skymoe.train.model_config import ModelConfig
from skymoe.train.upkeep_config import CheckpointConfig, EvaluateConfig, LogConfig

# Share of the training samples by domain: prose is a thirteenth of the text, and would be read many times over.
DOMAINS = {"prose": 0.15, "docs": 0.35, "code": 0.5}
PROMPTS = {
    "prose": "The following statement",
    "docs": "Return a list of",
    "code": "    def __init__(self, ",
}
EXPERTS, TOP_K = 8, 2
DENSE = "demo-dense"  # spec/presets.py


@dataclass(frozen=True)
class Scale:
    """How much is trained and looked at: steps of the parent and of what follows, the shape of a batch, evaluations."""

    parent_steps: int
    further_steps: int
    sequences: int = 16
    sequence_length: int = 256
    windows: int = 48
    evaluations: int = 5


FULL = Scale(parent_steps=160, further_steps=110)
QUICK = Scale(parent_steps=30, further_steps=20, windows=8, evaluations=2)


@dataclass(frozen=True)
class Places:
    """Where the demo keeps its parts."""

    root: Path

    @property
    def corpus(self) -> Path:
        """Tokenizer and token files."""
        return self.root / "corpus"

    @property
    def parent(self) -> Path:
        """Run directory of the dense parent."""
        return self.root / "dense-pretrain"

    @property
    def upcycled(self) -> Path:
        """The mixture of experts before any training, with its receipt."""
        return self.root / "moe-start"

    @property
    def dense_run(self) -> Path:
        """Run directory of the parent, continued."""
        return self.root / "dense-continue"

    @property
    def moe_run(self) -> Path:
        """Run directory of the mixture of experts."""
        return self.root / "moe-train"

    @property
    def dense(self) -> Path:
        """The continued dense model."""
        return self.root / "dense"

    @property
    def moe(self) -> Path:
        """The trained mixture of experts."""
        return self.root / "moe"


def parent_recipe(config: DemoConfig, places: Places, scale: Scale) -> TrainConfig:
    """The dense parent, from random weights."""
    schedule = ScheduleConfig(kind="cosine", warmup_steps=max(5, scale.parent_steps // 10), min_ratio=0.1)
    return _recipe(
        config, places, scale, directory=places.parent, model=ModelConfig(preset=DENSE), steps=scale.parent_steps,
        seed=config.seed, schedule=schedule,
    )  # fmt: skip


def further_recipe(config: DemoConfig, places: Places, scale: Scale, *, directory: Path, model: Path) -> TrainConfig:
    """Further training of `model`, dense or MoE: the recipe is the same but for the two paths."""
    schedule = ScheduleConfig(kind="cosine", warmup_steps=max(3, scale.further_steps // 20), min_ratio=0.05)
    return _recipe(
        config, places, scale, directory=directory, model=ModelConfig(path=model), steps=scale.further_steps,
        seed=config.seed + 1, schedule=schedule,
    )  # fmt: skip


def _recipe(
    config: DemoConfig,
    places: Places,
    scale: Scale,
    *,
    directory: Path,
    model: ModelConfig,
    steps: int,
    seed: int,
    schedule: ScheduleConfig,
) -> TrainConfig:
    def sources(side: str) -> tuple[SourceConfig, ...]:
        return tuple(SourceConfig(path=places.corpus / side / name, weight=w, name=name) for name, w in DOMAINS.items())

    return TrainConfig(
        run=RunConfig(dir=directory, seed=seed),
        model=model,
        data=DataConfig(
            train=sources("train"),
            valid=sources("valid"),
            tokenizer=places.corpus / "tokenizer",
            sequence_length=scale.sequence_length,
        ),
        steps=steps,
        batch=BatchConfig(sequences=scale.sequences),
        optimizer=OptimizerConfig(lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1),
        schedule=schedule,
        checkpoint=CheckpointConfig(every=0, keep=1),
        evaluate=EvaluateConfig(every=max(1, steps // scale.evaluations), windows=scale.windows),
        log=LogConfig(every=max(1, steps // 40)),
    )
