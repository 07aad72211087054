"""The entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes.

SkyMoE is served by vLLM's own transformers backend: attention and experts are vLLM's, the gate stays the module of
`skymoe.hf_model`, with its normalization. The gate carries a buffer besides its weight, so that the backend does not
take it for a plain softmax router and fuse the normalization away (tests/integrations/test_vllm.py).
"""

from __future__ import annotations

ARCHITECTURE = "SkyMoeForCausalLM"
BACKEND = "vllm.model_executor.models.transformers:TransformersMoEForCausalLM"


def register() -> None:
    """Make transformers and vLLM know SkyMoE. Harmless twice."""
    # Imported here because vLLM asks its plugins to: it loads them while it is itself being imported.
    from vllm import ModelRegistry

    from skymoe.integrations.transformers import register as register_transformers

    register_transformers()
    ModelRegistry.register_model(ARCHITECTURE, BACKEND)
