"""Which files travel with a model; tests/convert/test_documents.py holds what happens to hostile ones."""

from __future__ import annotations

import pytest

from skymoe.base.errors import FormatError
from skymoe.weights import companions
from skymoe.weights.companions import copy_tokenizer, licence_names, read_companion, tokenizer_names


@pytest.mark.parametrize(
    "name",
    [
        "LICENSE", "LICENSE.txt", "license.md", "LICENCE", "MODEL_LICENSE", "LICENSE-2.0.txt", "LICENSE_APACHE-2.0",
        "Skywork Community License.pdf", "Tongyi Qianwen LICENSE AGREEMENT", "NOTICE", "Notices.txt", "USE_POLICY.md",
        "third_party_notice.txt", "COPYING", "Acceptable Use Policy.pdf",
    ],
)  # fmt: skip
def test_licences(name, tmp_path):
    (tmp_path / name).write_bytes(b"terms\r\n")
    assert licence_names(tmp_path) == (name,)
    assert read_companion(tmp_path, name) == b"terms\r\n"


@pytest.mark.parametrize(
    "name",
    [
        "license.py", "LICENSE.exe", "relicense.txt", "x_license.sh", ".LICENSE", "license.html", "a license b.py",
        "README.md",
    ],
)  # fmt: skip
def test_no_licences(name, tmp_path):
    (tmp_path / name).touch()
    assert licence_names(tmp_path) == ()


def test_tokenizers_in_a_fixed_order(tmp_path):
    names = ("tokenizer.json", "merges.txt", "tokenizer.model", "tekken.json", "chat_template.jinja", "qwen.tiktoken")
    for name in reversed(names):
        (tmp_path / name).touch()
    (tmp_path / "tokenization_qwen.py").touch()
    assert tokenizer_names(tmp_path) == names
    (tmp_path / "out").mkdir()
    assert copy_tokenizer(tmp_path, tmp_path / "out") == names


def test_a_directory_that_is_gone_has_none(tmp_path):
    assert tokenizer_names(tmp_path / "gone") == ()
    assert licence_names(tmp_path / "gone") == ()


def test_a_directory_of_very_many_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(companions, "_MAX_ENTRIES", 3)
    for number in range(4):
        (tmp_path / str(number)).touch()
    with pytest.raises(FormatError, match="more than 3 files"):
        tokenizer_names(tmp_path)
