"""Chat templates in the form of the most used families, with a tiny tokenizer for each.

The templates are our own and short: what they share with a family is how turns begin and end, which
tokens are special, which of them end a generation, where tools and thoughts stand, and what of them
is erased from earlier turns. `{% generation %}` stands where a template for training has it.
"""

# ruff: noqa: RUF001  (DeepSeek's tokens have bars and blanks of their own)

import functools
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = """Where is the key? Under the mat. And the door? It is open. Be brief. What is the weather
in Rome? 18 degrees It is 18 degrees. They asked before. A door has two states. system user tool
assistant model {"name": "get_weather", "arguments": {"city": "Rome"}} USER: ASSISTANT: final"""

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = (
    ("user", "Where is the key?"),
    ("assistant", "Under the mat."),
    ("user", "And the door?"),
    ("assistant", "It is open."),
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CALL = {"name": "get_weather", "arguments": {"city": "Rome"}}
CALLED = '{"name": "get_weather", "arguments": {"city": "Rome"}}'
TRACE = [
    {"role": "user", "content": "What is the weather in Rome?"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "name": "get_weather", "content": "18 degrees"},
    {"role": "assistant", "content": "It is 18 degrees."},
]
THOUGHTS = ("They asked before.", "A door has two states.")


@dataclass(frozen=True)
class Family:
    """A template, its special tokens, and what of a chat should carry loss."""

    template: str
    special: tuple[str, ...]
    eos: str
    end: str  # what an answer ends with, as far as it carries loss
    bos: str | None = None
    pad: str | None = None  # None: the end of text
    last: str | None = None  # the end of the last answer, if it is another
    begin: str = ""  # what of an answer stands before its content
    added: tuple[str, ...] = ()  # tokens of the vocabulary's own, which are not special
    stops: tuple[str, ...] = ()  # of the model's generation_config
    listed: bool = True  # the tokenizer counts `special` among its special tokens
    adds_bos: bool = False  # to every text, as it does where no template is
    system: bool = True
    call: str | None = None  # what carries loss of a turn that calls a tool; None: knows no tools
    thoughts: tuple[str, str] | None = None  # what carries loss of the two answers of `thinking`
    thinking_key: str = "reasoning_content"

    def chat(self) -> list[dict]:
        """Two questions and two answers."""
        turns = [{"role": role, "content": content} for role, content in ASKED]
        return [SYSTEM, *turns] if self.system else turns

    def thinking(self) -> list[dict]:
        """The same, with thoughts before both answers."""
        turns = self.chat()
        answers = [turn for turn in turns if turn["role"] == "assistant"]
        for turn, thought in zip(answers, THOUGHTS, strict=True):
            turn[self.thinking_key] = thought
        return turns

    def scored(self) -> list[str]:
        """What of `chat` carries loss."""
        first, second = (self.begin + content for role, content in ASKED if role == "assistant")
        return [first + self.end, second + (self.last or self.end)]

    def scored_of_trace(self) -> list[str]:
        """What of the trace carries loss."""
        return [self.call, self.begin + TRACE[-1]["content"] + (self.last or self.end)]


FAMILIES = {}

FAMILIES["qwen2.5"] = Family(
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    added=("<tool_call>", "</tool_call>"),
    eos="<|im_end|>", pad="<|endoftext|>", stops=("<|im_end|>", "<|endoftext|>"),
    end="<|im_end|>\n",
    call=f"<tool_call>\n{CALLED}\n</tool_call><|im_end|>\n",
    template="""
{%- set ns = namespace(system='You help.') %}
{%- if messages[0].role == 'system' %}{% set ns.system = messages[0].content %}{% endif %}
{{- '<|im_start|>system\n' + ns.system }}
{%- if tools %}
{{- '\n\n# Tools\n<tools>' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}
{{- '\n</tools>' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}
{%- generation %}
{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endgeneration %}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- elif m.role == 'user' %}
{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
)  # fmt: skip

FAMILIES["qwen3"] = Family(  # thoughts stay with answers that come after the last question
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    added=("<think>", "</think>", "<tool_call>", "</tool_call>"),
    eos="<|im_end|>", pad="<|endoftext|>", stops=("<|im_end|>", "<|endoftext|>"),
    end="<|im_end|>",
    call=f"<tool_call>\n{CALLED}\n</tool_call><|im_end|>",
    thoughts=(
        "Under the mat.<|im_end|>",
        "<think>\nA door has two states.\n</think>\n\nIt is open.<|im_end|>",
    ),
    template="""
{%- if tools or messages[0].role == 'system' %}
{{- '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else '') }}
{%- if tools %}
{{- '<tools>' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{{ '\n</tools>' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}
{%- generation %}
{%- if m.reasoning_content and loop.index0 > ns.last %}
{{- '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}
{%- endif %}
{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{{- '\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- elif m.role == 'user' %}
{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think>\n\n</think>\n\n' }}
{%- endif %}
{%- endif %}""",
)  # fmt: skip

FAMILIES["llama2"] = Family(  # a begin of text before each question
    special=("<s>", "</s>", "<unk>"), bos="<s>", eos="</s>", pad="<unk>", adds_bos=True,
    end=" </s>", begin=" ",
    template="""
{%- set ns = namespace(system='') %}
{%- for m in messages %}
{%- if m.role == 'system' %}
{%- set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}
{%- elif m.role == 'user' %}
{{- bos_token + '[INST] ' + ns.system + m.content + ' [/INST]' }}
{%- set ns.system = '' %}
{%- else %}
{%- generation %}{{ ' ' + m.content + ' ' + eos_token }}{% endgeneration %}
{%- endif %}
{%- endfor %}""",
)  # fmt: skip

FAMILIES["llama3"] = Family(  # the tokenizer's end of text is not what ends a turn
    special=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
             "<|eot_id|>"),
    bos="<|begin_of_text|>", eos="<|end_of_text|>", listed=False, adds_bos=True,
    stops=("<|end_of_text|>", "<|eot_id|>"),
    end="<|eot_id|>",
    template="""
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
{%- if m.role == 'assistant' %}
{%- generation %}{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else %}
{{- m.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}""",
)  # fmt: skip

FAMILIES["llama3.1"] = Family(  # with tools: a role of its own answers them
    special=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
             "<|eom_id|>", "<|eot_id|>", "<|finetune_right_pad_id|>"),
    bos="<|begin_of_text|>", eos="<|eot_id|>", pad="<|finetune_right_pad_id|>", listed=False,
    adds_bos=True, stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    end="<|eot_id|>",
    call='{"name": "get_weather", "parameters": {"city": "Rome"}}<|eom_id|>',
    template="""
{{- bos_token }}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools %}{{ 'Environment: ipython\n' }}{% endif %}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
{%- for tool in tools or [] %}{{ '\n' + tool | tojson }}{% endfor %}
{{- '<|eot_id|>' }}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- generation %}
{%- if m.tool_calls %}
{%- set call = m.tool_calls[0].function %}
{{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}<|eom_id|>' }}
{%- else %}
{{- m.content + '<|eot_id|>' }}
{%- endif %}
{%- endgeneration %}
{%- elif m.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content | tojson + '<|eot_id|>' }}
{%- elif m.role == 'user' %}
{{- '<|start_header_id|>user<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}""",
)  # fmt: skip

FAMILIES["mistral"] = Family(  # headers that are text
    special=("<s>", "</s>", "<unk>"), bos="<s>", eos="</s>", adds_bos=True, system=False,
    end="</s>",
    template="""
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}
{{- '[INST] ' + m.content + ' [/INST]' }}
{%- else %}
{%- generation %}{{ m.content + eos_token }}{% endgeneration %}
{%- endif %}
{%- endfor %}""",
)  # fmt: skip

FAMILIES["mistral-v3"] = Family(  # headers are tokens; tools stand before the last question
    special=("<s>", "</s>", "<unk>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
             "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    bos="<s>", eos="</s>", pad="<unk>", adds_bos=True,
    end="</s>", begin=" ",
    call=f"[TOOL_CALLS] [{CALLED}]</s>",
    template="""
{{- bos_token }}
{%- set ns = namespace(system='', last=-1) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'system' %}
{%- set ns.system = m.content + '\n\n' %}
{%- elif m.role == 'user' %}
{%- if tools and loop.index0 == ns.last %}
{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST] ' + (ns.system if loop.index0 == ns.last else '') + m.content + '[/INST]' }}
{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + m.content | tojson + '}[/TOOL_RESULTS]' }}
{%- elif m.tool_calls %}
{%- generation %}
{{- '[TOOL_CALLS] [' }}
{%- for call in m.tool_calls %}
{{- '{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}' }}
{%- endfor %}
{{- ']' + eos_token }}
{%- endgeneration %}
{%- else %}
{%- generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}
{%- endif %}
{%- endfor %}""",
)  # fmt: skip

GEMMA = """
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- for m in messages %}
{%- if m.role == 'system' %}
{%- set ns.system = m.content + '\n\n' %}
{%- elif m.role == 'user' %}
{{- '<start_of_turn>user\n' + ns.system + m.content | trim + '<end_of_turn>\n' }}
{%- set ns.system = '' %}
{%- else %}
{{- '<start_of_turn>model\n' }}
{%- generation %}{{ m.content | trim + '<end_of_turn>\n' }}{% endgeneration %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

FAMILIES["gemma"] = Family(  # nothing but the template says what ends a turn
    special=("<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"),
    bos="<bos>", eos="<eos>", pad="<pad>", adds_bos=True, system=False,
    end="<end_of_turn>\n", template=GEMMA,
)  # fmt: skip

FAMILIES["gemma3"] = Family(  # the system's words are the first question's
    special=("<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"), listed=False,
    bos="<bos>", eos="<eos>", pad="<pad>", adds_bos=True, stops=("<eos>", "<end_of_turn>"),
    end="<end_of_turn>\n", template=GEMMA,
)  # fmt: skip

FAMILIES["phi3"] = Family(  # a header is among what a generation stops at; an end of text follows
    special=("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    eos="<|endoftext|>", stops=("<|endoftext|>", "<|assistant|>", "<|end|>"),
    end="<|end|>\n", last="<|end|>\n<|endoftext|>",
    template="""
{%- for m in messages %}
{{- '<|' + m.role + '|>\n' }}
{%- if m.role == 'assistant' %}
{%- generation %}
{{- m.content + '<|end|>\n' }}
{%- if loop.last and not add_generation_prompt %}{{ eos_token }}{% endif %}
{%- endgeneration %}
{%- else %}
{{- m.content + '<|end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}""",
)  # fmt: skip

FAMILIES["phi4"] = Family(
    special=("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|dummy_85|>"),
    bos="<|endoftext|>", eos="<|im_end|>", pad="<|dummy_85|>", listed=False,
    stops=("<|endoftext|>", "<|im_end|>"),
    end="<|im_end|>",
    template="""
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '<|im_sep|>' }}
{%- if m.role == 'assistant' %}
{%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}
{{- m.content + '<|im_end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}""",
)  # fmt: skip

DEEPSEEK = {
    "special": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"),
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "pad": "<｜▁pad▁｜>",
    "end": "<｜end▁of▁sentence｜>",
    "added": ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁calls▁begin｜>",
              "<｜tool▁sep｜>", "<｜tool▁calls▁end｜>", "<｜tool▁outputs▁begin｜>",
              "<｜tool▁outputs▁end｜>"),
    "adds_bos": True,
}  # fmt: skip

FAMILIES["deepseek-v3"] = Family(
    **DEEPSEEK,
    call="<｜tool▁calls▁begin｜>function<｜tool▁sep｜>get_weather\n"
    '{"city": "Rome"}<｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
    template="""
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{ m.content }}{% endif %}
{%- endfor %}
{%- for tool in tools or [] %}{{ '\n' + tool | tojson }}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{{- '<｜User｜>' + m.content + '<｜Assistant｜>' }}
{%- elif m.role == 'tool' %}
{{- '<｜tool▁outputs▁begin｜>' + m.content + '<｜tool▁outputs▁end｜>' }}
{%- elif m.role == 'assistant' %}
{%- generation %}
{%- for call in m.tool_calls or [] %}
{{- '<｜tool▁calls▁begin｜>function<｜tool▁sep｜>' + call.function.name + '\n' }}
{{- call.function.arguments | tojson + '<｜tool▁calls▁end｜>' }}
{%- endfor %}
{{- (m.content or '') + eos_token }}
{%- endgeneration %}
{%- endif %}
{%- endfor %}""",
)

FAMILIES["deepseek-r1"] = Family(  # the prompt opens the thoughts; earlier ones are erased
    **DEEPSEEK,
    thoughts=(
        "Under the mat.<｜end▁of▁sentence｜>",
        "A door has two states.\n</think>\n\nIt is open.<｜end▁of▁sentence｜>",
    ),
    template="""
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}
{{- m.content }}
{%- elif m.role == 'user' %}
{{- '<｜User｜>' + m.content }}
{%- else %}
{{- '<｜Assistant｜>' }}
{%- if loop.last and m.reasoning_content %}{{ '<think>\n' }}{% endif %}
{%- generation %}
{%- if loop.last and m.reasoning_content %}
{{- m.reasoning_content + '\n</think>\n\n' }}
{%- endif %}
{{- m.content + eos_token }}
{%- endgeneration %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}""",
)

FAMILIES["glm4"] = Family(  # an answer ends where the next message begins
    special=("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>",
             "<|observation|>"),
    eos="<|endoftext|>", stops=("<|endoftext|>", "<|user|>", "<|observation|>"),
    begin="\n", end="<|user|>",
    call='get_weather\n{"city": "Rome"}<|observation|>',
    template="""
{{- '[gMASK]<sop>' }}
{%- if tools %}
{{- '<|system|>\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'system' %}
{{- '<|system|>\n' + m.content }}
{%- elif m.role == 'user' %}
{%- if loop.first or loop.previtem.role != 'assistant' %}{{ '<|user|>' }}{% endif %}
{{- '\n' + m.content }}
{%- elif m.role == 'tool' %}
{{- '\n' + m.content }}
{%- else %}
{{- '<|assistant|>' }}
{%- generation %}
{%- if m.tool_calls %}
{%- set call = m.tool_calls[0].function %}
{{- call.name + '\n' + call.arguments | tojson + '<|observation|>' }}
{%- else %}
{{- '\n' + m.content + '<|user|>' }}
{%- endif %}
{%- endgeneration %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}""",
)  # fmt: skip

FAMILIES["command-r"] = Family(
    special=("<PAD>", "<BOS_TOKEN>", "<EOS_TOKEN>", "<|START_OF_TURN_TOKEN|>",
             "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>", pad="<PAD>", listed=False, adds_bos=True,
    end="<|END_OF_TURN_TOKEN|>",
    template="""
{{- bos_token }}
{%- set names = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'} %}
{%- for m in messages %}
{{- '<|START_OF_TURN_TOKEN|><|' + names[m.role] + '_TOKEN|>' }}
{%- if m.role == 'assistant' %}
{%- generation %}{{ m.content + '<|END_OF_TURN_TOKEN|>' }}{% endgeneration %}
{%- else %}
{{- m.content + '<|END_OF_TURN_TOKEN|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}""",
)  # fmt: skip

FAMILIES["granite"] = Family(
    special=("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
    eos="<|end_of_text|>", bos="<|end_of_text|>", pad="<|end_of_text|>",
    end="<|end_of_text|>",
    call=f"<|tool_call|>[{CALLED}]<|end_of_text|>",
    template="""
{%- if tools %}
{{- '<|start_of_role|>available_tools<|end_of_role|>' + tools | tojson + '<|end_of_text|>\n' }}
{%- endif %}
{%- for m in messages %}
{%- set role = 'tool_response' if m.role == 'tool' else m.role %}
{{- '<|start_of_role|>' + role + '<|end_of_role|>' }}
{%- if m.role == 'assistant' %}
{%- generation %}
{%- if m.tool_calls %}
{{- '<|tool_call|>[' }}
{%- for call in m.tool_calls %}
{{- '{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}' }}
{%- endfor %}
{{- ']' }}
{%- endif %}
{{- m.content + '<|end_of_text|>' }}
{%- endgeneration %}
{{- '\n' }}
{%- else %}
{{- m.content + '<|end_of_text|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}""",
)  # fmt: skip

FAMILIES["gpt-oss"] = Family(  # channels: an answer has several parts, each with special tokens
    special=("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|start|>", "<|channel|>",
             "<|message|>", "<|end|>", "<|constrain|>", "<|call|>"),
    bos="<|startoftext|>", eos="<|return|>", pad="<|endoftext|>",
    stops=("<|return|>", "<|endoftext|>", "<|call|>"),
    begin="<|channel|>final<|message|>", end="<|end|>", last="<|return|>",
    call="<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    '{"city": "Rome"}<|call|>',
    thoughts=(
        "<|channel|>final<|message|>Under the mat.<|end|>",
        (
            "<|channel|>analysis<|message|>A door has two states.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>It is open.<|return|>"
        ),
    ),
    thinking_key="thinking",
    template="""
{{- '<|start|>system<|message|>Reasoning: low<|end|>' }}
{%- if tools %}
{{- '<|start|>developer<|message|>' + tools | tojson + '<|end|>' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'system' %}
{{- '<|start|>developer<|message|>' + m.content + '<|end|>' }}
{%- elif m.role == 'user' %}
{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}
{%- elif m.role == 'tool' %}
{{- '<|start|>functions.' + m.name + ' to=assistant<|channel|>commentary<|message|>' }}
{{- m.content + '<|end|>' }}
{%- else %}
{{- '<|start|>assistant' }}
{%- generation %}
{%- if m.tool_calls %}
{%- set call = m.tool_calls[0].function %}
{{- '<|channel|>commentary to=functions.' + call.name + ' <|constrain|>json<|message|>' }}
{{- call.arguments | tojson + '<|call|>' }}
{%- else %}
{%- if m.thinking and loop.last %}
{{- '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' }}
{%- endif %}
{{- '<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
{%- endif %}
{%- endgeneration %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}""",
)  # fmt: skip

FAMILIES["olmo2"] = Family(  # one token begins and ends a text; headers are text
    special=("<|endoftext|>", "<|pad|>"), bos="<|endoftext|>", eos="<|endoftext|>", pad="<|pad|>",
    end="<|endoftext|>",
    template="""
{{- bos_token }}
{%- for m in messages %}
{{- '<|' + m.role + '|>\n' }}
{%- if m.role == 'assistant' %}
{%- generation %}{{ m.content + eos_token }}{% endgeneration %}
{%- if not loop.last %}{{ '\n' }}{% endif %}
{%- else %}
{{- m.content + '\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}""",
)  # fmt: skip

FAMILIES["smollm3"] = Family(  # thoughts are asked for in the system's turn
    special=("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"),
    added=("<think>", "</think>", "<tool_call>", "</tool_call>"),
    bos="<|begin_of_text|>", eos="<|im_end|>", pad="<|im_end|>", listed=False,
    stops=("<|im_end|>",),
    begin="<think>\n\n</think>\n", end="<|im_end|>\n",
    call=f"<tool_call>{CALLED}</tool_call><|im_end|>\n",
    thoughts=(
        "<think>\nThey asked before.\n</think>\nUnder the mat.<|im_end|>\n",
        "<think>\nA door has two states.\n</think>\nIt is open.<|im_end|>\n",
    ),
    template="""
{{- '<|im_start|>system\n## Metadata\n\nReasoning Mode: /think\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
{%- for tool in tools or [] %}{{ '\n' + tool | tojson }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- for m in messages %}
{%- if m.role == 'user' %}
{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}
{%- generation %}
{%- if m.tool_calls %}
{%- set call = m.tool_calls[0].function %}
{{- '<tool_call>{"name": "' + call.name + '", "arguments": ' + call.arguments | tojson }}
{{- '}</tool_call>' }}
{%- else %}
{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n' + m.content }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endgeneration %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
)  # fmt: skip

FAMILIES["internlm2"] = Family(
    special=("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"),
    bos="<s>", eos="</s>", pad="</s>", stops=("</s>", "<|im_end|>"), adds_bos=True,
    end="<|im_end|>\n",
    template="""
{{- bos_token }}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}
{%- generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}
{%- else %}
{{- m.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
)  # fmt: skip

FAMILIES["zephyr"] = Family(  # every turn ends with the end of text
    special=("<unk>", "<s>", "</s>"), bos="<s>", eos="</s>", pad="</s>",
    end="</s>\n",
    template="""
{%- for m in messages %}
{{- '<|' + m.role + '|>\n' }}
{%- if m.role == 'assistant' %}
{%- generation %}{{ m.content + eos_token + '\n' }}{% endgeneration %}
{%- else %}
{{- m.content + eos_token + '\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}""",
)  # fmt: skip

FAMILIES["vicuna"] = Family(
    special=("<unk>", "<s>", "</s>"), bos="<s>", eos="</s>", pad="<unk>", adds_bos=True,
    begin=" ", end="</s>",
    template="""
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}
{{- m.content + ' ' }}
{%- elif m.role == 'user' %}
{{- 'USER: ' + m.content + ' ASSISTANT:' }}
{%- else %}
{%- generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}
{%- endif %}
{%- endfor %}""",
)  # fmt: skip

FAMILIES["falcon"] = Family(  # no special token but the end of text
    special=("<|endoftext|>",), eos="<|endoftext|>",
    begin=" ", end="<|endoftext|>",
    template="""
{%- for m in messages %}
{%- if m.role == 'system' %}
{{- m.content + '\n' }}
{%- elif m.role == 'user' %}
{{- 'User: ' + m.content + '\n' }}
{%- else %}
{{- 'Falcon:' }}
{%- generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}
{{- '\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Falcon:' }}{% endif %}""",
)  # fmt: skip

FAMILIES["kimi-k2"] = Family(
    special=("[BOS]", "[EOS]", "[PAD]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>",
             "<|im_system|>", "<|im_middle|>", "<|tool_calls_section_begin|>",
             "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>",
             "<|tool_call_end|>"),
    bos="[BOS]", eos="[EOS]", pad="[PAD]", stops=("<|im_end|>",),
    end="<|im_end|>",
    call="<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
    '<|tool_call_argument_begin|>{"city": "Rome"}<|tool_call_end|><|tool_calls_section_end|>'
    "<|im_end|>",
    template="""
{%- if tools %}
{{- '<|im_system|>tool_declare<|im_middle|>' + tools | tojson + '<|im_end|>' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|im_assistant|>assistant<|im_middle|>' }}
{%- generation %}
{{- m.content or '' }}
{%- if m.tool_calls %}
{{- '<|tool_calls_section_begin|>' }}
{%- for call in m.tool_calls %}
{{- '<|tool_call_begin|>functions.' + call.function.name + ':' + loop.index0 | string }}
{{- '<|tool_call_argument_begin|>' + call.function.arguments | tojson + '<|tool_call_end|>' }}
{%- endfor %}
{{- '<|tool_calls_section_end|>' }}
{%- endif %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{%- elif m.role == 'user' %}
{{- '<|im_user|>user<|im_middle|>' + m.content + '<|im_end|>' }}
{%- else %}
{{- '<|im_system|>' + m.role + '<|im_middle|>' + m.content + '<|im_end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_assistant|>assistant<|im_middle|>' }}{% endif %}""",
)  # fmt: skip


@functools.cache
def _bytes() -> str:
    """A byte-level tokenizer of a few words."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        TEXT.splitlines() * 20,
        trainers.BpeTrainer(
            vocab_size=340,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return made.to_str()


@functools.cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The family's tokenizer."""
    family = FAMILIES[name]
    inner = Tokenizer.from_str(_bytes())
    inner.add_special_tokens([AddedToken(token, normalized=False) for token in family.special])
    inner.add_tokens([AddedToken(token, normalized=False) for token in family.added])
    if family.adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single=[family.bos, "$A"],
            special_tokens=[(family.bos, inner.token_to_id(family.bos))],
        )
    signs = {"bos_token": family.bos, "eos_token": family.eos, "pad_token": family.pad}
    more = {"extra_special_tokens": list(family.special)} if family.listed else {}
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, **{k: v for k, v in signs.items() if v is not None}, **more
    )
    made.chat_template = family.template
    return made


def stops_of(name: str) -> tuple[int, ...]:
    """What the model's generation_config has as ends."""
    return tuple(tokenizer_of(name).convert_tokens_to_ids(list(FAMILIES[name].stops)))
