"""Fixtures of the encoder tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import transformers


@pytest.fixture(scope="module")
def small_text_tower() -> Iterator[None]:
    """MedCLIP is built with a text tower of two narrow layers: what is tested here does not depend on its size. `test_fidelity.py` has it whole."""
    from transformers import BertModel, SwinModel  # noqa: F401 - transformers imports lazily, which would undo the patch

    whole = transformers.BertConfig

    def cut(**options: Any) -> transformers.BertConfig:
        return whole(**{**options, "vocab_size": 50, "num_hidden_layers": 2, "intermediate_size": 64})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers, "BertConfig", cut)
        yield
