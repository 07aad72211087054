"""What the user asks of `skymoe train`: one recipe, one section per part of the program.

Each part receives only its own section. Nothing here is decided or derived: a recipe says what was asked, and the
copy in the run directory says it in full. See docs/training.md for the choices behind the defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from skymoe.base.config import Config
from skymoe.base.dtype import DType
from skymoe.parallel.config import ParallelConfig
from skymoe.train.model_config import ModelConfig
from skymoe.train.upkeep_config import CheckpointConfig, EvaluateConfig, GuardConfig, LogConfig, TrackConfig


class RunConfig(Config):
    """Where the run lives and what makes it repeatable.

    Attributes:
        dir: the run directory: recipe, metrics, checkpoints and the final model. The same command on the same
            directory resumes.
        seed: of the initial weights and of the order of the data.
        deterministic: ask torch for deterministic kernels only, which bit-exact resume needs.
        device: `cpu`, `cuda`, `cuda:1`.
    """

    dir: Path
    seed: int = Field(default=0, ge=0, lt=2**31)
    deterministic: bool = True
    device: str = "cpu"


class SourceConfig(Config):
    """One tokenized dataset, by the common prefix of its `.bin` and `.idx` files.

    Attributes:
        path: the prefix.
        weight: share of the training samples, relative to the other sources.
        name: the domain in metrics; the last part of the path if empty.
    """

    path: Path
    weight: float = Field(default=1.0, gt=0)
    name: str = ""

    @property
    def domain(self) -> str:
        """The name under which metrics speak of this source."""
        return self.name or self.path.name


class DataConfig(Config):
    """What is read.

    Attributes:
        train: the mixture to train on.
        valid: what evaluation reads, one domain each; empty means no evaluation.
        tokenizer: directory with `tokenizer.json`: gives exact bits per byte and is copied beside the final model.
            If None, the tokenizer of `model.path`, when there is one.
        sequence_length: tokens per sample.
        isolate_documents: attention does not cross document boundaries, and no target is in the next document.
    """

    train: tuple[SourceConfig, ...] = Field(min_length=1)
    valid: tuple[SourceConfig, ...] = ()
    tokenizer: Path | None = None
    sequence_length: int = Field(default=512, ge=2)
    isolate_documents: bool = False

    @model_validator(mode="after")
    def _domains_are_distinct(self) -> Self:
        for key in ("train", "valid"):
            domains = [source.domain for source in getattr(self, key)]
            if len(set(domains)) < len(domains):
                raise ValueError(f"{key}: two sources have the same name: give each a `name`")
        return self


class BatchConfig(Config):
    """How much one optimizer step sees.

    Attributes:
        sequences: sequences per step (the global batch).
        micro_sequences: sequences per forward and backward; None means all of them. It changes memory and speed, not
            the gradients, except where `balance.scope` is `micro`.
    """

    sequences: int = Field(default=8, ge=1)
    micro_sequences: int | None = Field(default=None, ge=1)


class OptimizerConfig(Config):
    """AdamW.

    Attributes:
        lr: the peak learning rate of the dense parent (or of this run, with `schedule.peak_ratio` 1).
        betas, eps: of Adam.
        weight_decay: decoupled, on every matrix but the router's; never on norms and biases.
        router_lr_ratio: learning rate of the routers as a ratio. Under gate normalization the routers' scale has no
            effect, so their step relative to their norm is what counts.
        router_weight_decay: 0, because decay only shrinks a scale-free weight and so raises its effective rate,
            silently.
        clip: largest gradient norm over all parameters; 0 does not clip.
    """

    lr: float = Field(default=3e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    router_lr_ratio: float = Field(default=1.0, gt=0)
    router_weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _betas_are_fractions(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        return self


class ScheduleConfig(Config):
    """The learning rate over steps; see schedule.py for the formulas.

    Attributes:
        kind: `cosine`, `wsd` (warm-up, steady, cool-down) or `constant`.
        warmup_steps: linear rise from `start_ratio` to the peak.
        decay_steps: cosine: length of the fall after warm-up, None up to the last step; wsd: length of the cool-down at
            the end, None means a fifth of all steps.
        min_ratio: the floor as a ratio of the peak.
        peak_ratio: re-warming after upcycling: the peak as a ratio of `optimizer.lr`; 0.5 to 1 of the dense peak is
            what works (a small constant rate was the worst curve of the Skywork-MoE study).
        start_ratio: where warm-up begins, as a ratio of the peak.
    """

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    decay_steps: int | None = Field(default=None, ge=1)
    min_ratio: float = Field(default=0.1, ge=0, le=1)
    peak_ratio: float = Field(default=1.0, gt=0)
    start_ratio: float = Field(default=0.0, ge=0, le=1)


class BalanceConfig(Config):
    """Keeping the experts busy; of no effect in a dense model.

    Attributes:
        aux: form of the auxiliary loss: `skywork` (Eq. 4), `switch` or `none`.
        coefficient: initial alpha of every layer, and its value for ever when `adaptive` is off.
        adaptive: Eq. 7-9: alpha follows each layer's drop rate.
        xi, alpha_max, beta: of Eq. 7-9.
        capacity_factor: CF in C = ceil(CF k T / n).
        capacity: `virtual` measures the drop rate and drops nothing; `real` drops, per micro-batch.
        scope: statistics of the auxiliary loss over the `global` batch or each `micro`-batch. With more than one
            micro-batch `global` costs one more forward pass of each without gradient; `micro` spares it and pushes
            every few sequences towards uniform load.
        z_loss: coefficient of the router z-loss; must be 0 under gate normalization, where it has nothing to act on.
        expert_bias_rate: step of DeepSeek's loss-free bias; needs a model with `expert_bias`.
    """

    aux: Literal["skywork", "switch", "none"] = "skywork"
    coefficient: float = Field(default=0.01, ge=0)
    adaptive: bool = True
    xi: float = Field(default=0.2, gt=0)
    alpha_max: float = Field(default=0.01, gt=0)
    beta: float = Field(default=0.99, ge=0, lt=1)
    capacity_factor: float = Field(default=1.25, gt=0)
    capacity: Literal["virtual", "real"] = "virtual"
    scope: Literal["global", "micro"] = "global"
    z_loss: float = Field(default=0.0, ge=0)
    expert_bias_rate: float = Field(default=1e-3, ge=0)


class PrecisionConfig(Config):
    """Number formats.

    Attributes:
        weights: the master copy that the optimizer updates.
        compute: what matmuls multiply; narrower than `weights` means autocast. Router, norms and loss stay in fp32.
        peak_flops: the machine's matmul rate for MFU, FLOP/s; None measures it once at start.
    """

    weights: DType = DType.FLOAT32
    compute: DType = DType.BFLOAT16
    peak_flops: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _formats_are_floats(self) -> Self:
        allowed = (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT64)
        for key in ("weights", "compute"):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} must be one of {', '.join(allowed)}")
        if self.compute not in (self.weights, DType.BFLOAT16):
            raise ValueError(f"compute must be bfloat16 or that of the weights, {self.weights}; got {self.compute}")
        return self


class TrainConfig(Config):
    """The recipe of one run.

    Attributes:
        steps: optimizer steps in all. The same command with more steps goes on from the last one.
        recompute: activations recomputed in the backward pass: `none`, `all` layers, the first N layers, or on many
            ranks a number of layers for each stage, [2, 1, 0, 0].
        parallel: how the work is divided over ranks; of no effect on one process.
        threads: CPU threads; None leaves torch's choice. Bit-exact repetition needs the same number.
    """

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    steps: int = Field(ge=1)
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    balance: BalanceConfig = BalanceConfig()
    precision: PrecisionConfig = PrecisionConfig()
    recompute: Literal["none", "all"] | int | tuple[int, ...] = "none"
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    guard: GuardConfig = GuardConfig()
    track: TrackConfig = TrackConfig()
    log: LogConfig = LogConfig()
    threads: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _recompute_counts_layers(self) -> Self:
        counts = self.recompute if isinstance(self.recompute, tuple) else (self.recompute,)
        if any(isinstance(count, int) and count < 0 for count in counts):
            raise ValueError(f"recompute must be none, all or a number of layers, got {self.recompute}")
        return self
