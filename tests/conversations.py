"""Chat templates in the manner of well-known models, a tokenizer that has their tokens, and conversations."""

from tokenizers import AddedToken

from rlpost.data.params import Tokenizer, TokenizerKind
from rlpost.data.tokenizers import make_tokenizer

CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{%- else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{%- if m.role == 'assistant' %}{% generation %}{{- m.content | trim }}{% endgeneration %}"
    "{%- else %}{{- m.content | trim }}{% endif %}{{- '<|eot_id|>' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{- bos_token }}{%- for m in messages %}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{%- if m.role == 'user' %}{{- ' [INST] ' + m.content + ' [/INST]' }}"
    "{%- else %}{{- ' ' }}{% generation %}{{- m.content + eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' }}"
    "{% if role == 'model' %}{% generation %}{{ m.content | trim + '<end_of_turn>' }}{% endgeneration %}"
    "{{ '\n' }}"
    "{% else %}{{ m.content | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Reasoning of turns before the last question is taken out, as reasoning models' templates do.
THINKING = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- set text = m.content.split('</think>')[-1] if loop.index0 < ns.last else m.content %}"
    "{%- if m.role == 'assistant' %}{% generation %}{{- text + '<|im_end|>' }}{% endgeneration %}{{- '\n' }}"
    "{%- else %}{{- text + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"
)
STOPS = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama": (LLAMA, "<|eot_id|>"),
    "mistral": (MISTRAL, "<eos>"),
    "gemma": (GEMMA, "<end_of_turn>"),
}
SPECIALS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
]


def without_markers(template):
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def make(template):
    words = ["user assistant model system Hello, how are you? I am fine\n\nthank you [INST] [/INST]"]
    tokenizer = make_tokenizer(Tokenizer(kind=TokenizerKind.bpe, vocab_size=300), words)
    tokenizer.add_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def talk(*contents, system=None):
    roles = ("user", "assistant") * len(contents)
    turns = [{"role": role, "content": c} for role, c in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}, *turns] if system else turns


THOUGHT = talk("a", "<think>b</think>c", "d", "<think>e</think>f")
