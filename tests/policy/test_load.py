"""From a folder, a checkpoint or a name to a policy; every failure is one line that helps."""

import json
import shutil

import pytest
import torch
from exactness import alone_logp
from families import FALLBACK, EndTokenOnly, tiny
from tiny_folders import save, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from rlpost.errors import ModelError
from rlpost.policy import adapters, load
from rlpost.policy.adapter_files import base_of
from rlpost.policy.load import decide_bfloat16, load_policy, remove_dropout, width_of
from rlpost.policy.params import Attention, Lora, Model, Precision
from rlpost.policy.policy import Policy, end_ids
from rlpost.policy.reference import reference_policy
from rlpost.policy.value_head import ValueHeadModel, load_value_head_model


@torch.no_grad()
def score(policy, groups):
    return policy(policy.batch(groups)).logp_N


def refusal(path, settings=None, **more) -> str:
    with pytest.raises(ModelError) as caught:
        load_policy(path, settings or Model(), **more)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_full_model(llama_folder, groups):
    policy = load_policy(llama_folder, Model())
    assert (policy.flat, policy.tiled, policy.has_adapter, policy.training) == (True, True, False, False)
    assert all(p.requires_grad for p in policy.parameters())
    assert policy.tokenizer.eos_token_id == 0
    assert (score(policy, groups) - alone_logp(tiny("llama"), groups)).abs().max() <= 1e-5


def test_a_file_that_is_written_anew_changes_no_weight_of_a_loaded_model(llama_folder, tmp_path):
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    policy = load_policy(folder, Model(lora=Lora(r=2)))
    (file,) = folder.glob("*.safetensors")
    with file.open("r+b") as opened:
        header = 8 + int.from_bytes(opened.read(8), "little")
        opened.seek(header)
        opened.write(bytes(file.stat().st_size - header))
    expected = load_policy(llama_folder, Model(lora=Lora(r=2)))
    found, known = policy.state_dict(), expected.state_dict()
    assert [n for n in known if "lora_" not in n and not torch.equal(found[n], known[n])] == []


def test_a_new_adapter(llama_folder, groups):
    policy = load_policy(llama_folder, Model(lora=Lora(r=2)))
    assert policy.has_adapter
    assert {n.split(".")[-2] for n, p in policy.named_parameters() if p.requires_grad} == {adapters.POLICY}
    assert torch.equal(score(policy, groups), score(load_policy(llama_folder, Model()), groups))


def test_a_frozen_model_trains_nothing(llama_folder, adapter_folder):
    for path, lora in ((llama_folder, None), (llama_folder, Lora()), (adapter_folder, None)):
        policy = load_policy(path, Model(lora=lora), trainable=False)
        assert not any(p.requires_grad for p in policy.parameters())


def test_a_saved_adapter_brings_its_base(adapter_folder, llama_folder, groups):
    policy = load_policy(adapter_folder, Model(lora=Lora(r=2, alpha=4.0)))
    assert base_of(adapter_folder) == str(llama_folder)
    assert any(p.requires_grad for p in policy.parameters())
    base = score(load_policy(llama_folder, Model()), groups)
    assert (score(policy, groups) - base).abs().max() > 0.1
    with policy.acting_as(None):
        assert torch.allclose(score(policy, groups), base, rtol=0, atol=1e-6)


def test_a_saved_adapter_is_merged_to_train_all_weights(adapter_folder, groups, capsys):
    policy = load_policy(adapter_folder, Model(gradient_checkpointing=True))
    assert "is merged" in capsys.readouterr().err
    assert not policy.has_adapter
    assert all(p.requires_grad for p in policy.parameters()), "nothing would train"
    assert policy.causal_lm.is_gradient_checkpointing
    adapted = load_policy(adapter_folder, Model(lora=Lora(r=2, alpha=4.0)))
    assert torch.allclose(score(policy, groups), score(adapted, groups), rtol=0, atol=1e-4)


def test_an_adapter_of_another_rank_is_refused_with_the_remedy(adapter_folder):
    message = refusal(adapter_folder, Model(lora=Lora(r=16, alpha=32.0)))
    assert "r=2, alpha=4" in message
    assert "model.lora.r=2 model.lora.alpha=4" in message
    frozen = load_policy(adapter_folder, Model(lora=Lora(r=16, alpha=32.0)), trainable=False)
    assert frozen.model.peft_config[adapters.POLICY].r == 2  # it is used as it is


def test_the_checkpoint_file_names_the_base_first(adapter_folder, tmp_path):
    folder = shutil.copytree(adapter_folder, tmp_path / "copy")
    (folder / "checkpoint.json").write_text(json.dumps({"base": "elsewhere"}))
    assert base_of(folder) == "elsewhere"


def test_an_adapter_without_a_base_is_refused(adapter_folder, tmp_path):
    folder = shutil.copytree(adapter_folder, tmp_path / "copy")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    assert "names no base model" in refusal(folder)


def test_an_adapter_for_another_model_is_refused(adapter_folder, tmp_path, gpt2_folder):
    folder = shutil.copytree(adapter_folder, tmp_path / "copy")
    (folder / "checkpoint.json").write_text(json.dumps({"base": str(gpt2_folder)}))
    assert "does not fit its base model" in refusal(folder, Model(lora=Lora(r=2, alpha=4.0)))


def test_a_model_of_scalars_is_no_policy(llama_folder, adapter_folder, tmp_path):
    """Its trunk would load, and sample what nobody taught it to say."""
    for number, folder in enumerate((llama_folder, adapter_folder)):
        path = shutil.copytree(folder, tmp_path / str(number))
        ValueHeadModel(load_policy(folder, Model())).save(path)
        message = refusal(path)
        assert message == (
            f"{path}: a model that scores (scalar_head.safetensors), not a policy; name the stage it was trained from"
        )
        assert message == refusal(path, trainable=False) == refusal(path, Model(lora=Lora(r=2, alpha=4.0)))
        assert load_value_head_model(path, Model(), bfloat16=False, device="cpu").head.in_features == 32
    with pytest.raises(ModelError, match=r"a model that scores"):
        reference_policy(load_policy(llama_folder, Model()), tmp_path / "0", llama_folder, Model())


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "~/nowhere"])
def test_a_missing_folder(path):
    assert refusal(path).startswith(f"{path}: no such folder")


@pytest.mark.parametrize("path", ["nobody/no-such-model", "no-such-model", "runs/a/b/final", "not a name"])
def test_a_name_that_cannot_be_reached(path):
    message = refusal(path)
    assert message.startswith(f"{path}: neither a local folder nor reachable on the hub")
    assert "check the name, or the connection" in message


def test_an_empty_folder(tmp_path):
    assert "cannot be loaded" in refusal(tmp_path)


def test_a_damaged_weights_file(llama_folder, tmp_path):
    folder = shutil.copytree(llama_folder, tmp_path / "copy")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in refusal(folder)


def test_weights_that_do_not_cover_the_model_are_not_made_up(llama_folder, tmp_path):
    """transformers would fill the gap with random numbers and a warning."""
    folder = shutil.copytree(llama_folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    message = refusal(folder)
    assert "model.layers.2" in message
    assert "missing" in message


def test_tied_weights_are_not_missing(gpt2_folder):
    policy = load_policy(gpt2_folder, Model())
    assert policy.causal_lm.lm_head.weight is policy.causal_lm.transformer.wte.weight


def test_a_tokenizer_without_an_end(tmp_path):
    folder = save(tmp_path, tiny("llama"), tiny_tokenizer(end=None))
    assert "no end token" in refusal(folder)


def test_a_tokenizer_larger_than_the_embedding(tmp_path):
    folder = save(tmp_path, tiny("llama"), tiny_tokenizer(size=70))
    message = refusal(folder)
    assert "knows 70 tokens but the model embeds 64" in message


def test_no_tokenizer_at_all(llama_folder, tmp_path):
    folder = shutil.copytree(llama_folder, tmp_path / "copy")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer" in refusal(folder)


def test_a_chat_template_from_a_file(llama_folder, tmp_path):
    template = tmp_path / "chat.jinja"
    text = "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}"
    text += "{% if add_generation_prompt %}assistant: {% endif %}"
    template.write_text(text)
    assert load_policy(llama_folder, Model(chat_template=str(template))).tokenizer.chat_template == text
    assert "model.chat_template" in refusal(llama_folder, Model(chat_template=str(tmp_path / "gone.jinja")))


def test_padded_rows_by_choice_and_by_need(llama_folder, tmp_path, groups, capsys):
    chosen = load_policy(llama_folder, Model(attention=Attention.padded))
    assert not chosen.flat
    assert (score(chosen, groups) - alone_logp(tiny("llama"), groups)).abs().max() <= 1e-5
    model = tiny("bloom")
    folder = save(tmp_path, model)
    capsys.readouterr()
    needed = load_policy(folder, Model())
    assert "Bloom" in capsys.readouterr().err
    assert (score(needed, groups) - alone_logp(model, groups)).abs().max() <= 1e-5
    assert "model.attention=flat" in refusal(folder, Model(attention=Attention.flat))


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "llama"])
def test_dropout_is_removed(family, groups):
    rates = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
        "opt": {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "dropout": 0.5,
            "attention_dropout": 0.5,
            "layerdrop": 0.5,
        },
        "bloom": {**FALLBACK["bloom"], "hidden_dropout": 0.5, "attention_dropout": 0.5},
        "llama": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "attention_dropout": 0.5,
        },
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**rates[family], "vocab_size": 64})
    model = AutoModelForCausalLM.from_config(config).train()
    policy = Policy(model, EndTokenOnly(), flat=False).train()
    assert not torch.equal(score(policy, groups), score(policy, groups)), "there was no dropout to remove"
    remove_dropout(model)
    first = score(policy, groups)
    assert torch.equal(score(policy, groups), first)
    assert torch.equal(score(policy.eval(), groups), first)


def test_loaded_models_have_no_dropout_in_training(gpt2_folder, groups):
    policy = load_policy(gpt2_folder, Model()).train()  # its configuration says 0.1
    assert policy.causal_lm.config.resid_pdrop == 0.1
    assert torch.equal(score(policy, groups), score(policy, groups))


def test_precision_by_wish():
    assert decide_bfloat16(Precision.bfloat16, "cpu") is True
    assert decide_bfloat16(Precision.float32, "cpu") is False
    assert isinstance(decide_bfloat16(Precision.auto, "cpu"), bool)


@pytest.mark.parametrize(
    ("made_for_it", "without", "width", "expected"),
    [(True, "", 256, True), (True, "", 255, False), (True, "no compiler", 256, False), (False, "", 256, False)],
)
def test_auto_on_a_cpu_depends_on_the_machine_and_the_models_width_alone(
    monkeypatch, made_for_it, without, width, expected
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: made_for_it)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(load, "why_none", lambda: without)
    assert decide_bfloat16(Precision.auto, "cpu", width) is expected


def test_the_width_is_the_bases_of_an_adapter(llama_folder, adapter_folder):
    hidden = AutoConfig.from_pretrained(llama_folder).hidden_size
    assert width_of(adapter_folder) == width_of(llama_folder) == hidden


@pytest.mark.parametrize(
    ("lora", "trainable", "expected"),
    [(Lora(r=2), True, torch.bfloat16), (None, True, torch.float32), (None, False, torch.float32)],
)
def test_a_base_under_adapters_is_halved_and_all_other_weights_stay_in_float32(llama_folder, lora, trainable, expected):
    policy = load_policy(llama_folder, Model(lora=lora), bfloat16=True, trainable=trainable)
    assert policy.causal_lm.get_input_embeddings().weight.dtype == expected
    assert all(p.dtype == torch.float32 for p in policy.parameters() if p.requires_grad)


def test_every_end_token_is_known():
    model = tiny("llama")
    model.generation_config.eos_token_id = [5, 0, 9]
    assert end_ids(model, EndTokenOnly()) == (0, 5, 9)
    model.generation_config.eos_token_id = 7
    assert end_ids(model, EndTokenOnly()) == (0, 7)
