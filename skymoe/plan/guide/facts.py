"""What is published about upcycling, each statement with its source. Numbers here are others' measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Fact:
    """A statement and where it is from."""

    says: str
    source: str


SKYWORK: Final = "Skywork-MoE report, arXiv:2406.06563"
NVIDIA: Final = "He et al. 2024, arXiv:2410.07524"
KOMATSUZAKI: Final = "Komatsuzaki et al. 2022 (Sparse Upcycling), arXiv:2212.05055"
OLMOE: Final = "OLMoE, arXiv:2409.02060"
LIEW: Final = "Liew et al. 2025 (scaling laws for upcycling), arXiv:2502.03009"
DROP: Final = "Drop-Upcycling, arXiv:2502.19261"
EXPERT_UPCYCLING: Final = "Expert Upcycling, arXiv:2604.19835"

FROM_SCRATCH_FROM: Final = 2.0
"""C_MoE / C_dense from which the rule says from scratch (Skywork)."""

UPCYCLE_UP_TO: Final = 0.25
"""Our reading of "C_MoE << C_dense", which the rule leaves open: the smallest published budget at which a model from
scratch caught up with an upcycled one (OLMoE)."""

RULE: Final = (
    Fact("C_MoE much smaller than C_dense: upcycle, the dense model's cost is already paid", SKYWORK),
    Fact("C_MoE at least 2 C_dense: train from scratch", SKYWORK),
    Fact("much smaller is read here as at most a quarter", f"our choice, by the catch-up point of {OLMOE}"),
)

FOR_UPCYCLING: Final = (
    Fact("from scratch caught up only after about 120 % of the dense model's pretraining budget (as quoted later)",
         KOMATSUZAKI),
    Fact("15B dense, 1T tokens: upcycled 1.306 against 1.377 of dense training on the same tokens (loss)", NVIDIA),
    Fact("with copied experts and weights that sum to 1, step 0 is the dense model: nothing is lost to begin with",
         "one line of algebra; skymoe upcycle measures it"),
)  # fmt: skip

FOR_FROM_SCRATCH: Final = (
    Fact("from scratch caught up after about 25 % of the dense budget (1.3B, trained on 2T tokens; as quoted later)",
         OLMOE),
    Fact("the more the dense model is trained, the slower the upcycled one improves", LIEW),
    Fact("copied experts begin alike and have to become different first; similarity falls slowly", SKYWORK),
)  # fmt: skip

LEARNING_RATE: Final = (
    Fact("re-warm to 0.5 to 1 times the dense model's peak, then decay: the choice that matters most", SKYWORK),
    Fact("50 to 100 % of the peak, cosine to the minimum; no catastrophic forgetting was seen", NVIDIA),
    Fact("a constant small rate was the worst curve", SKYWORK),
    Fact("a constant small rate looks better early, then flattens; experts stay close to the dense model", NVIDIA),
    Fact("the optimizer starts anew; keeping its state gave nothing for language models", KOMATSUZAKI),
)  # fmt: skip

WATCH: Final = (
    Fact("expert similarity (mean pairwise cosine of expert weights) starts at 1 and must fall; the run in which it "
         "stayed highest was the worst model", SKYWORK),
    Fact("cosine of experts with the dense feed-forward falls to 0.6 to 0.7; stays near 1 under a small rate", NVIDIA),
    Fact("drop rate per layer: 0 to 6 % in the report's figures; from 5 % on the balance coefficient is at its cap",
         SKYWORK),
)  # fmt: skip

NEGATIVE: Final = (
    Fact("a learning rate of experts scaled by k/n or its root: no benefit", f"{SKYWORK}, appendix C.1"),
    Fact("experts trained on separate corpora first: less than 0.01 nats after 90B tokens", f"{SKYWORK}, appendix C.2"),
    Fact("z-loss of 1e-3: no effect", NVIDIA),
    Fact("20 ways to make copied experts differ: none beats plain copies by more than 0.001", EXPERT_UPCYCLING),
)

COPY: Final = Fact("plain copies: nothing that is cheap beats them at this budget", EXPERT_UPCYCLING)
DROP_HELPS: Final = Fact(
    "--method drop is worth a trial: half re-initialized neurons won at hundreds of billions of tokens", DROP
)
DROP_FROM_TOKENS: Final = 100e9
DATA: Final = Fact("the report's data are 7:2:1 of English, Chinese and code", SKYWORK)
HOURS: Final = Fact(
    "a top-2 token took about 1.7 times the dense model's compute, about 2 times its GPU hours", SKYWORK
)
COMPUTE_RATIO: Final = 1.7
