"""`import skymoe` and transformers, in every order, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

CLASS = "skymoe.hf_model.modeling_skymoe.SkyMoeForCausalLM"
KNOWN = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
tiny = dict(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            moe_intermediate_size=4, num_local_experts=3, gate_norm=True)
config = AutoConfig.for_model("skymoe", **tiny)
model = AutoModelForCausalLM.from_config(config)
assert f"{type(model).__module__}.{type(model).__name__}" == "skymoe.hf_model.modeling_skymoe.SkyMoeForCausalLM"
assert type(AutoModel.from_config(config)).__name__ == "SkyMoeModel"
"""


MORE_ORDERS = [
    "import skymoe",
    "import transformers, skymoe",
    "from transformers import AutoModelForCausalLM; import skymoe",
    "import skymoe, importlib; importlib.reload(skymoe)",
    "import skymoe.integrations.transformers as t, importlib; t.register_config(); importlib.reload(t); t.register()",
    "import skymoe, transformers.models.auto.modeling_auto",
    "from transformers.models.auto import modeling_auto; import skymoe, importlib; importlib.reload(modeling_auto)",
    "import skymoe.integrations.hook as hook, importlib; importlib.reload(hook); hook.install(); hook.install()",
    "from skymoe.integrations.transformers import register; register(); register()",
]


def run(code: str, *arguments: object, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    import os

    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **env})
    assert done.returncode == 0 or not check, done.stderr
    return done


@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoConfig; import skymoe",
        "import skymoe; from transformers import LlamaForCausalLM",  # in the middle of which the auto classes load
        *[pytest.param(order, marks=pytest.mark.slow) for order in MORE_ORDERS],
    ],
)
def test_transformers_knows_skymoe_in_every_order(first):
    done = run(first + KNOWN)
    assert "Warning" not in done.stderr


def test_import_skymoe_loads_nothing_and_leaves_the_loader_as_it_was():
    run("""
import sys
import skymoe
assert not [name for name in sys.modules if name.split(".")[0] in ("transformers", "torch")]
assert sum(type(finder).__name__ == "_SkymoeFinder" for finder in sys.meta_path) == 1
from transformers.models.auto import configuration_auto as module
usual = type(sys.modules["transformers.configuration_utils"].__loader__)
assert type(module.__loader__) is type(module.__spec__.loader) is usual
import inspect
assert "class AutoConfig" in inspect.getsource(module)
assert "transformers.models.qwen2_moe.modeling_qwen2_moe" not in sys.modules  # models come with the first config
""")


def test_without_transformers_nothing_happens(tmp_path):
    run("""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
import skymoe, skymoe.model.load
from skymoe.spec.presets import preset
assert callable(skymoe.load)
try:
    from transformers.models.auto import modeling_auto
except ModuleNotFoundError as error:
    assert error.name.startswith("transformers")
else:
    raise AssertionError
""")


def test_a_transformers_we_cannot_register_with_still_loads(tmp_path):
    """Another package of that name, without what we need: a warning, no failure."""
    package = tmp_path / "transformers" / "models" / "auto"
    package.mkdir(parents=True)
    for directory in (package, package.parent, package.parent.parent):
        (directory / "__init__.py").write_text("")
    (package / "configuration_auto.py").write_text("WHO = 'a stand-in'\n")
    done = run(
        "import skymoe; from transformers.models.auto import configuration_auto as c; print(c.WHO)",
        PYTHONPATH=f"{tmp_path}:{Path(__file__).parent.parent.parent}",
    )
    assert done.stdout == "a stand-in\n"
    assert "RuntimeWarning: skymoe could not register" in done.stderr


def test_an_error_in_the_awaited_module_is_the_users_own(tmp_path):
    package = tmp_path / "transformers" / "models" / "auto"
    package.mkdir(parents=True)
    for directory in (package, package.parent, package.parent.parent):
        (directory / "__init__.py").write_text("")
    (package / "configuration_auto.py").write_text("raise KeyError('theirs')\n")
    done = run(
        "import skymoe; import transformers.models.auto.configuration_auto",
        check=False,
        PYTHONPATH=f"{tmp_path}:{Path(__file__).parent.parent.parent}",
    )
    assert done.returncode == 1
    assert "KeyError: 'theirs'" in done.stderr


@pytest.mark.slow
def test_threads_that_import_at_once_agree():
    run(
        """
import threading, importlib, skymoe
names = ["transformers.models.auto.modeling_auto", "transformers.models.auto.configuration_auto",
         "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"]
errors = []
def load(name):
    try:
        importlib.import_module(name)
    except BaseException as error:
        errors.append(error)
threads = [threading.Thread(target=load, args=(name,)) for name in names]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not errors, errors
"""
        + KNOWN
    )
