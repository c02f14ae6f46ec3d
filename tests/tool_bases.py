"""Tiny bases whose chat templates write tools and calls as those of well-known families do, in short."""

import json
from pathlib import Path

from tests.conftest import CHATML, build_tiny_base

_SAY = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

HERMES = (
    "{% if tools %}{{ '<|im_start|>system\\n<tools>' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "{{ '</tools>\\nWrite <tool_call>{...}</tool_call><|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}{{ '<|im_start|>assistant\\n' + m.content }}"
    '{% for c in m.tool_calls %}{{ \'<tool_call>\\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>' + m.content + '</tool_response>' }}"
    "{{ '<|im_end|>\\n' }}"
    "{% else %}" + _SAY + "{% endif %}{% endfor %}" + _ASK
)
MISTRAL = (
    "{% if tools %}{{ '[AVAILABLE_TOOLS]' }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('Tool call IDs should be 9 letters long!') }}{% endif %}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}{% endfor %}"
    "{{ ']<|im_end|>' }}"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('9 letters!') }}{% endif %}"
    "{{ '[TOOL_RESULTS]' + m.content + m.tool_call_id + '[/TOOL_RESULTS]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + '<|im_end|>' }}{% else %}" + _SAY + "{% endif %}{% endfor %}"
)  # fmt: skip
LLAMA = (
    '{% if tools %}{{ \'Answer {"name": ..., "parameters": ...}\\n\' }}{% for t in tools %}{{ t | tojson }}'
    "{% endfor %}{% endif %}{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('Only single calls!') }}{% endif %}"
    '{{ \'<|im_start|>assistant\\n{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '}<|im_end|>\\n' }}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>ipython\\n' + m.content + '<|im_end|>\\n' }}"
    "{% else %}" + _SAY + "{% endif %}{% endfor %}" + _ASK
)
TEMPLATES = {"hermes": HERMES, "mistral": MISTRAL, "llama": LLAMA, "json": CHATML}
MARKS = {
    "hermes": {"<tool_call>": False, "</tool_call>": False}, "mistral": {"[TOOL_CALLS]": True},
    "llama": {"<|python_tag|>": True}, "json": {},
}  # fmt: skip
"""Marks that are tokens of their own, and whether they are special, as in the families' tokenizers."""


def build_tool_base(folder: Path, family: str) -> Path:
    """Write a tiny base of a family, with a context of 2,048 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    build_tiny_base(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for mark, special in MARKS[family].items():
        tokenizer.add_tokens([mark], special_tokens=special)
    tokenizer.chat_template = TEMPLATES[family]
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    return folder
