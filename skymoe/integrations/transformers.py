"""transformers and our classes: `register()` is all there is to call.

`import skymoe` does it by itself when transformers is loaded (`hook.py`). Programs that want it said, and processes
that import nothing of ours (vLLM's workers, by `vllm.py`), call `register()`. It may be called any number of times.

The classes are those of `skymoe.hf_model`, the very files that an export carries beside its weights. They are
registered for saving too: `save_pretrained` writes those files again, so that a model trained with transformers goes
on to load with `trust_remote_code` where skymoe is not installed.

Imports stand inside the functions: the hook comes here in the middle of an import of transformers, and a config alone
must not cost the seconds that the models' modules take.
"""

from __future__ import annotations

def register() -> None:
    """Make AutoConfig, AutoModel and AutoModelForCausalLM know `model_type: "skymoe"`."""
    register_config()
    register_models()


def register_config() -> None:
    """AutoConfig's part; needs no more of transformers than AutoConfig does."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from skymoe.hf_model.configuration_skymoe import SkyMoeConfig

    SkyMoeConfig.register_for_auto_class()
    AutoConfig.register(SkyMoeConfig.model_type, SkyMoeConfig, exist_ok=True)


def register_models() -> None:
    """The models' part."""
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM

    from skymoe.hf_model.configuration_skymoe import SkyMoeConfig
    from skymoe.hf_model.modeling_skymoe import SkyMoeForCausalLM, SkyMoeModel

    SkyMoeModel.register_for_auto_class("AutoModel")
    SkyMoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    AutoModel.register(SkyMoeConfig, SkyMoeModel, exist_ok=True)
    AutoModelForCausalLM.register(SkyMoeConfig, SkyMoeForCausalLM, exist_ok=True)
