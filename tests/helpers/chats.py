"""Checkpoints that make text and tokens of messages, with templates of the shapes that published ones have."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from micota_fast.chat.encoding import Chat
from micota_fast.config.generation import ChatConfig

# Each in our words, with the structure of the published one: (template, special tokens, bos, eos).
QWEN25 = """
{%- if tools %}
    {%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a default.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) or message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN3 = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == 'user' and message.content is string %}
        {%- set ns.searching = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thinking = '' %}
        {%- if '</think>' in content %}
            {%- set thinking = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query and (loop.last or thinking) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thinking.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA3 = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now('%d %b %Y') %}
    {%- else %}
        {%- set date_string = '26 Jul 2024' %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Today Date: ' + date_string + '\\n\\n' + system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
SMOLLM2 = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a small default<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
R1_DISTILL_HEAD = """
{%- set ns = namespace(system_prompt='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{% break %}{% endif %}
{%- endfor %}
{{- bos_token }}{{ ns.system_prompt }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{- '<|User|>' + message['content'] }}{% endif %}
    {%- if message['role'] == 'assistant' %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
        {{- '<|Assistant|>' + content + '<|end_of_sentence|>' }}
    {%- endif %}
{%- endfor %}
"""
R1_DISTILL_OLD = R1_DISTILL_HEAD + "{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
R1_DISTILL = R1_DISTILL_HEAD + "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
MISTRAL = """
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{{ raise_exception('Only user and assistant, please') }}{% endif %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{% continue %}{% endif %}
    {%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}{{ ' ' + message['content'] + eos_token }}{% endif %}
{%- endfor %}
"""
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
R1_TOKENS = ["<|begin_of_sentence|>", "<|end_of_sentence|>", "<|User|>", "<|Assistant|>"]
CHECKPOINTS: dict[str, tuple[str, list[str], str | None, str]] = {
    "qwen2.5": (QWEN25, CHATML, None, "<|im_end|>"),
    "qwen2.5-base": (QWEN25, CHATML, None, "<|endoftext|>"),  # its template's end-of-turn token is not its eos_token
    "qwen3": (QWEN3, CHATML, None, "<|im_end|>"),
    "llama3": (LLAMA3, LLAMA_TOKENS, "<|begin_of_text|>", "<|eot_id|>"),
    "smollm2": (SMOLLM2, CHATML, "<|im_start|>", "<|im_end|>"),
    "r1-distill-old": (R1_DISTILL_OLD, R1_TOKENS, "<|begin_of_sentence|>", "<|end_of_sentence|>"),
    "r1-distill": (R1_DISTILL, R1_TOKENS, "<|begin_of_sentence|>", "<|end_of_sentence|>"),
    "mistral": (MISTRAL, ["<s>", "</s>"], "<s>", "</s>"),
    "phi3": (PHI3, ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"], None, "<|endoftext|>"),
}
END_OF_TURN = {
    **dict.fromkeys(("qwen2.5", "qwen2.5-base", "qwen3", "smollm2"), "<|im_end|>"),
    **dict.fromkeys(("r1-distill-old", "r1-distill"), "<|end_of_sentence|>"),
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "phi3": "<|end|>",
}
NO_SYSTEM = {"mistral"}
TRAINABLE = [name for name in CHECKPOINTS if name != "r1-distill"]


def make_chat_checkpoint(
    folder: Path,
    template: Any = QWEN25,
    special: list[str] = CHATML,
    bos: str | None = None,
    eos: Any = "<|im_end|>",
    adds_bos: bool = False,
    **more: Any,
) -> Path:
    """The files of a checkpoint that make text of messages: no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["system user assistant the answer is \\boxed{42} because 1 + 2 = 3"] * 4, trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_config(folder, bos_token=bos, eos_token=eos, chat_template=template, **more)
    return folder


def write_config(folder: Path, **keys: Any) -> None:
    keys = {"tokenizer_class": "PreTrainedTokenizerFast", **keys}
    (folder / "tokenizer_config.json").write_text(json.dumps(keys), encoding="utf-8")


def chat_of(path: Path, **config: Any) -> Chat:
    return Chat.from_checkpoint(path, ChatConfig(**{"system": None, **config}))


def conversation(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


# Nothing that is tried at load looks like this.
LATE_TEMPLATE = "{% if 'BOOM' in messages[0].content %}{{ lipsum(10**7) }}{% endif %}" + QWEN25
LATE_PATTERN = "zebra[0-9](a|a)*b"
LATE_TEXT = "zebra5" + "a" * 64 + "!b"


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def sequence(kind: str, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: list(parts)}


def with_parts(folder: Path, **parts: Any) -> Path:
    """A checkpoint whose tokenizer has these parts."""
    path = make_chat_checkpoint(folder) / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))
    return path


def with_late_pattern(folder: Path) -> Path:
    byte_level = json.loads(pre_tokenizers.ByteLevel(add_prefix_space=False).__getstate__())
    return with_parts(folder, pre_tokenizer=sequence("pretokenizers", split(LATE_PATTERN), byte_level))
