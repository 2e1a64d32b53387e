"""Tiny random models of many families: dense and MoE, tied and untied, scaled and capped."""

import torch
import transformers
from transformers import AutoModelForCausalLM

V = 73
SIZE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
AUXILIARY = {"output_router_logits": True, "router_aux_loss_coef": 0.05}
FAMILIES = {  # name: (configuration class, what it has beyond SIZE)
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "cohere2": ("Cohere2Config", {"logit_scale": 0.25}),
    "falcon": ("FalconConfig", {"head_dim": None}),
    "falcon_h1": ("FalconH1Config", {
        "lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
        "mamba_d_state": 8,
    }),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {"final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", {"final_logit_softcapping": 2.0}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2} | AUXILIARY),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0}),
    "granitemoe": ("GraniteMoeConfig", {"logits_scaling": 4.0, "num_local_experts": 4} | AUXILIARY),
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4} | AUXILIARY),
    "nanochat": ("NanoChatConfig", {"final_logit_softcapping": 2.0}),
    "olmo2": ("Olmo2Config", {}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2_moe": ("Qwen2MoeConfig", MOE | AUXILIARY | {"shared_expert_intermediate_size": 16}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3_moe": ("Qwen3MoeConfig", MOE | AUXILIARY),
    "smollm3": ("SmolLM3Config", {}),
    "stablelm": ("StableLmConfig", {}),
    "starcoder2": ("Starcoder2Config", {}),
}  # fmt: skip


def make(family, **more):
    """A model of the family with weights of seed 0 that make logits worth capping."""
    kind, beyond = FAMILIES[family]
    options = {k: v for k, v in (SIZE | beyond | more).items() if v is not None}
    config = getattr(transformers, kind)(**options)
    for name in (name for name in vars(config) if "drop" in name):
        setattr(config, name, 0.0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model.train()


def make_batch(B=3, T=12):
    """Ragged rows of context and output, padded on the right; a hole in one."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V - 1, (B, T), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    for b in range(B):
        labels[b, : 3 + 2 * b] = -100
        if b:
            labels[b, T - b :] = -100
            mask[b, T - b :] = 0
    labels[0, 7] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}
