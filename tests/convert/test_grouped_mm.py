"""What the remark says is what transformers does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from skymoe.base.dtype import DType
from skymoe.convert.grouped_mm import grouped_mm_remarks
from skymoe.spec.hf import spec_from_directory
from skymoe.spec.model import Architecture
from skymoe.spec.presets import PRESETS

WIDTH = {"mixtral": "intermediate_size", "qwen3_moe": "moe_intermediate_size"}


@pytest.mark.parametrize("model_type", WIDTH)
@pytest.mark.parametrize(
    ("width", "hidden_size", "dtype", "told"),
    [
        (40, 48, torch.bfloat16, ""),
        (44, 48, torch.float32, ""),
        (44, 48, torch.bfloat16, "experts of width 44 (48 would do): transformers wants multiples of 8 in bfloat16"),
        (42, 48, torch.float32, "experts of width 42 (44 would do): transformers wants multiples of 4 in float32"),
        (40, 36, torch.bfloat16, "hidden size 36 (40 would do)"),
        (41, 36, torch.float16, "experts of width 41 (48 would do) and hidden size 36 (40 would do)"),
    ],
)
def test_told_exactly_where_transformers_raises(model_type, width, hidden_size, dtype, told, oracle, tmp_path):
    from transformers import AutoModelForCausalLM

    changes = {WIDTH[model_type]: width, "hidden_size": hidden_size, "dtype": dtype}
    path = oracle.make(tmp_path / "moe", model_type, num_hidden_layers=1, **changes)
    remarks = grouped_mm_remarks(spec_from_directory(path), DType(str(dtype).removeprefix("torch.")))
    tokens = torch.arange(20).view(2, 10)

    def finite(**options: str) -> bool:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options).eval()
        with torch.no_grad():
            return bool(model(tokens).logits.isfinite().all())

    if not told:
        assert remarks == ()
        assert finite()
        return
    with pytest.raises(RuntimeError, match="strides should be multiple of 16 bytes"):
        finite()
    assert finite(experts_implementation="eager")
    assert remarks[0].startswith(told)
    assert remarks[0].endswith('experts_implementation="eager") takes any')


def test_what_transformers_has_no_class_for_is_not_spoken_of():
    odd = replace(PRESETS["mixtral-8x7b"], hidden_size=4097)
    assert len(grouped_mm_remarks(odd, DType.BFLOAT16)) == 1
    assert grouped_mm_remarks(replace(odd, architecture=Architecture.SKYMOE), DType.BFLOAT16) == ()
    assert grouped_mm_remarks(PRESETS["llama-3-8b"], DType.BFLOAT16) == ()
