"""What the tests of the audit look at: tiny models and a batch that is right."""

import tokenizers
import torch
from tokenizers import models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

V, B, T = 61, 3, 17
SIZE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZE),
    "tied": LlamaConfig(**SIZE, tie_word_embeddings=True, pad_token_id=0),
    "qwen3": Qwen3Config(**SIZE),
    "gemma3": Gemma3TextConfig(**SIZE, query_pre_attn_scalar=8),
    "gpt2": GPT2Config(
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        vocab_size=V,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
CONTEXTS, LENGTHS = (6, 2, 11), (17, 12, 14)
EOS = 2


class Tokenizer:
    """What the audit asks of one."""

    eos_token_id = EOS
    all_special_ids = (0, 1, EOS)

    def decode(self, ids):
        return f"<{ids[0]}>"


CHAT = (  # ids 0 to 8, then words
    "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "user", "assistant", "system", "<image>",
)  # fmt: skip
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def chat_tokenizer(template=CHATML, **options):
    """Of whole words: 9 is w9; <|im_end|> ends a turn, </s> a text."""
    vocabulary = {word: n for n, word in enumerate([*CHAT, *(f"w{n}" for n in range(9, V))])}
    model = models.WordLevel(vocabulary, unk_token=CHAT[0])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [CHAT[3], CHAT[4], CHAT[8]]
    given = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | options
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        extra_special_tokens=special,
        **given,
    )


def make_chat(*turns, scored=("assistant",)):
    """A row of <|im_start|> role words <|im_end|>; of `scored` roles, words and end carry loss."""
    ids, labels = [], []
    for role, words in turns:
        header, rest = [3, CHAT.index(role)], [*words, 4]
        ids += header + rest
        labels += [-100] * 2 + (rest if role in scored else [-100] * len(rest))
    return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}


def make(name):
    """A model with the weights of seed 0."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def make_batch():
    """Three rows of context, output with an end of text, padding on the right."""
    ids = torch.randint(3, V, (B, T), generator=torch.Generator().manual_seed(1))
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for b, (context, length) in enumerate(zip(CONTEXTS, LENGTHS, strict=True)):
        ids[b, length - 1] = EOS
        ids[b, length:] = 0
        labels[b, context:length] = ids[b, context:length]
        mask[b, :length] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def codes(report):
    return {finding.code for finding in report.findings}
