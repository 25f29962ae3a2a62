import json
from pathlib import Path

import pytest

from rlpost.data.codec import make_codec
from rlpost.data.params import Tokenizer, TokenizerKind
from rlpost.data.tokenizers import make_tokenizer


@pytest.fixture(scope="session")
def digits():
    """Characters 0-9 + = and some letters: ids 4, 5, ... in that order after <pad> <bos> <eos> <unk>."""
    return make_tokenizer(Tokenizer(kind=TokenizerKind.characters, alphabet="0123456789+=abcdef \n"))


@pytest.fixture(scope="session")
def codec(digits):
    return make_codec(digits)


@pytest.fixture
def write(tmp_path):
    def write_rows(rows, name="rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write_rows
