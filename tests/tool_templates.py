"""Chat templates with tools in the manner of well-known models, and a tokenizer that has their tokens."""

from tokenizers import AddedToken

from rlpost.data.params import Tokenizer, TokenizerKind
from rlpost.data.tokenizers import make_tokenizer

HERMES = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- "# Tools\\n\\n<tools>" }}{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
{{- "\\n</tools>\\n\\n<tool_call>\\n{\\"name\\": <n>, \\"arguments\\": <o>}\\n</tool_call><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' + THOUGHT + message.content }}
{%- for tool_call in message.tool_calls or [] %}
{%- if not loop.first or message.content %}{{- '\\n' }}{%- endif %}
{{- '<tool_call>\\n{"name": "' + tool_call.function.name + '", "arguments": ' }}
{{- tool_call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
QWEN2_5 = HERMES.replace("THOUGHT", "''")
QWEN3 = HERMES.replace("THOUGHT", "'<think>\\n\\n</think>\\n\\n'")
LLAMA3 = """\
{{- bos_token }}{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools %}{{- 'Respond in the format {"name": function name, "parameters": dictionary of arguments}.\\n\\n' }}
{%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}{%- endif %}{{- '<|eot_id|>' }}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}{{- message.content | tojson }}{{- '<|eot_id|>' }}
{%- elif message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{- raise_exception('only single tool-calls at once') }}{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
MISTRAL = """\
{{- bos_token }}{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools and message == asked[-1] %}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{{- '[INST] ' + message.content + '[/INST]' }}
{%- elif message.tool_calls %}{{- CALLS }}{{- eos_token }}
{%- elif message.role == 'assistant' %}{{- ' ' + message.content + eos_token }}
{%- elif message.role == 'tool' %}
{%- if message.tool_call_id | length != 9 %}{{- raise_exception('ids have nine characters') }}{%- endif %}
{{- '[TOOL_RESULTS] {"content": ' + message.content | tojson + ', "call_id": "' + message.tool_call_id + '"}' }}
{{- '[/TOOL_RESULTS]' }}
{%- endif %}{%- endfor %}
"""
MISTRAL_3 = MISTRAL.replace(
    "{{- CALLS }}",
    """{{- '[TOOL_CALLS] [' }}{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{- raise_exception('ids have nine characters') }}{%- endif %}
{%- set out = call.function | tojson %}{{- out[:-1] }}{{- ', "id": "' + call.id + '"}' }}
{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- ']' }}""",
)
MISTRAL_11 = MISTRAL.replace(
    "{{- CALLS }}",
    """{%- for call in message.tool_calls %}
{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}{%- endfor %}""",
)
DEEPSEEK = """\
{{- bos_token }}{%- for tool in tools or [] %}{{- tool | tojson + '\\n' }}{%- endfor %}{%- for message in messages %}
{%- if message.role == 'user' %}{{- '<|user|>' + message.content }}
{%- elif message.role == 'assistant' %}{{- '<|assistant|>' + message.content }}
{%- for call in message.tool_calls or [] %}
{%- if loop.first %}{{- '<|calls|>' }}{%- else %}{{- '\\n' }}{%- endif %}
{{- '<|call|>function<|sep|>' + call.function.name + '\\n```json\\n' + ARGUMENTS + '\\n```<|end_call|>' }}
{%- if loop.last %}{{- '<|end_calls|>' }}{%- endif %}{%- endfor %}{{- eos_token }}
{%- elif message.role == 'tool' %}{{- '<|output|>' + message.content + '<|end_output|>' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
""".replace("ARGUMENTS", "call.function.arguments")
QUOTED = QWEN2_5.replace("arguments | tojson }}", "arguments | tojson | tojson }}")
XML = QWEN2_5.replace(
    """{{- '<tool_call>\\n{"name": "' + tool_call.function.name + '", "arguments": ' }}
{{- tool_call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}""",
    """{{- '<tool_call>\\n<function=' + tool_call.function.name + '>\\n' }}
{%- for key, value in tool_call.function.arguments.items() %}
{{- '<parameter=' + key + '>\\n' + (value if value is string else value | tojson) + '\\n</parameter>\\n' }}
{%- endfor %}{{- '</function>\\n</tool_call>' }}""",
)
XML_RESPONSES = {
    "defaults": {"role": "assistant", "content": ""},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "content": {"repeats": True, "join": ""},
        "tool_calls": {
            "open_pattern": r"<tool_call>\s*<function=(?P<name>[^>]+)>\s*",
            "close_pattern": r"</function>\s*</tool_call>",
            "content": "xml-inline",
            "repeats": True,
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>]+)>\n(?P<value>.*?)\n</parameter>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
    },
}
TEMPLATES = {
    "qwen2.5": QWEN2_5,
    "qwen3": QWEN3,
    "llama3": LLAMA3,
    "mistral v3": MISTRAL_3,
    "mistral v11": MISTRAL_11,
    "deepseek": DEEPSEEK,
    "json in json": QUOTED,
}
CONTROL = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]"),
    *("[TOOL_CALLS]", "[ARGS]", "<|calls|>", "<|call|>", "<|sep|>", "<|end_call|>", "<|end_calls|>", "<|user|>"),
]
PLAIN = ["<tool_call>", "</tool_call>"]


def with_tools(template):
    """A tokenizer with that chat template, of bytes and the tokens of all of these."""
    words = ['user assistant tool system {"name": "arguments": "parameters": [1, 2]} hello there']
    tokenizer = make_tokenizer(Tokenizer(kind=TokenizerKind.bpe, vocab_size=300), words)
    tokenizer.add_tokens([AddedToken(s, special=True, normalized=False) for s in CONTROL], special_tokens=True)
    tokenizer.add_tokens([AddedToken(s, special=False, normalized=False) for s in PLAIN])
    tokenizer.chat_template = template
    return tokenizer
