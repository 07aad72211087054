"""transformers and our classes: `register()` is all there is to call.

`import skymoe` arranges it by itself (`hook.py`); programs that want it said, and processes that import nothing of ours
(vLLM's workers, by `vllm.py`), call `register()`. It may be called any number of times.

Two steps, because of when they happen. The hook comes in the middle of an import of transformers, so it registers the
configuration only, which needs nothing that is not loaded by then; the models' modules import half of transformers and
would meet unfinished ones. They are registered when the first `SkyMoeConfig` is made: nobody finds a model
without a config, and who never loads a `skymoe` model does not pay for it.

The classes are those of `skymoe.hf_model`, the very files that an export carries beside its weights. They are
registered for saving too: `save_pretrained` writes those files again, so that a model trained with transformers goes
on to load with `trust_remote_code` where skymoe is not installed. Imports stand inside the functions: importing this
module must not import transformers.
"""

from __future__ import annotations

from functools import cache
from typing import Any


def register() -> None:
    """Make AutoConfig, AutoModel and AutoModelForCausalLM know `model_type: "skymoe"`."""
    register_config()
    register_models()


def register_config() -> None:
    """AutoConfig's part; the models follow with the first config."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from skymoe.hf_model.configuration_skymoe import SkyMoeConfig

    _let_models_follow()
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


@cache
def _let_models_follow() -> None:
    from skymoe.hf_model.configuration_skymoe import SkyMoeConfig

    own = SkyMoeConfig.__post_init__

    def and_register_models(config: Any, **options: Any) -> None:
        own(config, **options)
        register_models()  # with every config: a dictionary entry each, and right also after a module was reloaded

    SkyMoeConfig.__post_init__ = and_register_models
