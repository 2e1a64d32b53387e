"""The loss given contexts: its gradient is the stock one, or that of constant contexts."""

import inspect
import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)
from transformers.cache_utils import Cache, DynamicLayer

import sgp
from sgp import context
from sgp.tolerance import relative_error

V, T = 61, 23
SIZE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZE),
    "qwen3": Qwen3Config(**SIZE),
    "gemma2": Gemma2Config(**SIZE, sliding_window=6),  # and a softcap on logits
    "gemma3": Gemma3TextConfig(**SIZE, sliding_window=6),
    "mistral": MistralConfig(**SIZE, sliding_window=5),
    "gpt2": GPT2Config(
        vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
}  # fmt: skip
CONTEXTS = torch.tensor([6, 1, 14, 0])
LENGTHS = torch.tensor([20, 23, 15, 9])


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]).train()


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS["llama"]).train()


@pytest.fixture
def input_ids():
    return torch.randint(V, (4, T), generator=torch.Generator().manual_seed(3))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def stock(model, input_ids, *, cache=None, reduction="mean", contexts=CONTEXTS, lengths=LENGTHS):
    """One forward pass over everything."""
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    given = {} if cache is None else {context._takes_cache(model)[0]: cache}
    logits = model(
        input_ids=input_ids, attention_mask=mask, use_cache=cache is not None, **given
    ).logits
    selection = sgp.Selection.from_context_lengths(input_ids, contexts, lengths=lengths)
    return sgp.cross_entropy(logits, selection, reduction=reduction)


def assert_same(found, expected, tolerance):
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        error = relative_error(found[name].reshape(1, -1), gradient.reshape(1, -1))
        assert error <= tolerance, (name, error)


@pytest.mark.core
@pytest.mark.parametrize("mode", ["exact", "replay"])
def test_exact_and_replay_are_the_stock_loss_and_gradients(model, input_ids, mode):
    """A ragged batch: no context, one token of context, no output but one, padding."""
    expected = stock(model, input_ids)
    loss = sgp.context_loss(model, input_ids, CONTEXTS, lengths=LENGTHS, context_grad=mode)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(model, loss), gradients(model, expected), 1e-5)


class DetachedContext(Cache):
    """Keys and values of context positions are constants, in one pass over everything."""

    def __init__(self, model, constant):
        super().__init__(layers=[DynamicLayer() for _ in range(model.config.num_hidden_layers)])
        self.constant = constant[:, None, :, None]

    def update(self, keys, values, layer_idx, *args, **kwargs):
        keys = torch.where(self.constant, keys.detach(), keys)
        values = torch.where(self.constant, values.detach(), values)
        return super().update(keys, values, layer_idx, *args, **kwargs)


def test_detach_is_attention_to_constant_keys_and_values(model, input_ids):
    constant = torch.arange(T) < (CONTEXTS - 1)[:, None]
    expected = stock(model, input_ids, cache=DetachedContext(model, constant))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = sgp.context_loss(model, input_ids, CONTEXTS, lengths=LENGTHS, context_grad="detach")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found, true = gradients(model, loss), gradients(model, expected)
    assert_same(found, true, 1e-4)
    exact = gradients(model, stock(model, input_ids))
    name = max(exact, key=lambda n: (exact[n] - found[n]).norm() / exact[n].norm())
    assert (exact[name] - found[name]).norm() > 1e-2 * exact[name].norm(), "it is another gradient"


def test_an_output_token_reaches_context_embeddings_unless_detached(llama):
    """The worked example: a context token that the output does not repeat."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 4, 6, 7, 8, 9, 4]])
    for mode, reached in (("exact", True), ("replay", True), ("detach", False)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = sgp.context_loss(llama, ids, torch.tensor([6]), context_grad=mode)
        embedding = gradients(llama, loss)["model.embed_tokens.weight"]
        assert bool(embedding[2].any()) == reached, mode
        assert embedding[4].any(), "the last context token predicts the first output"


@pytest.mark.parametrize("mode", ["exact", "replay", "detach"])
def test_a_shared_context_is_a_repeated_batch(llama, mode):
    generator = torch.Generator().manual_seed(5)
    contexts = torch.tensor([7, 7, 7, 3, 3, 3])
    ids = torch.randint(V, (6, T), generator=generator)
    for b in range(6):
        ids[b, : contexts[b]] = ids[b - b % 3, : contexts[b]]
    lengths = torch.tensor([T, 12, 9, T, 5, 8])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = sgp.context_loss(llama, ids, contexts, lengths=lengths, context_grad=mode)
        expected = gradients(llama, alone)
        shared = sgp.context_loss(
            llama, ids, contexts, lengths=lengths, context_grad=mode, num_outputs_per_context=3
        )
    assert shared.item() == pytest.approx(alone.item(), rel=1e-6)
    assert_same(gradients(llama, shared), expected, 1e-5)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "sequence_sum", "sequence_mean"])
def test_reductions_are_those_of_the_whole(llama, input_ids, reduction):
    expected = stock(llama, input_ids, reduction=reduction)
    loss = sgp.context_loss(llama, input_ids, CONTEXTS, lengths=LENGTHS, reduction=reduction)
    assert loss.shape == expected.shape
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_denominator(llama, input_ids):
    whole = sgp.context_loss(llama, input_ids, CONTEXTS, lengths=LENGTHS, reduction="sum")
    loss = sgp.context_loss(llama, input_ids, CONTEXTS, lengths=LENGTHS, denominator=7)
    assert loss.item() == pytest.approx(whole.item() / 7)


def test_dropout_is_replayed():
    """The context's second forward draws the same dropout."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.randint(V, (2, T))
    found = []
    for mode in ("exact", "replay"):
        torch.manual_seed(7)
        loss = sgp.context_loss(model, ids, torch.tensor([9, 9]), context_grad=mode)
        found.append(gradients(model, loss))
    assert_same(found[1], found[0], 1e-5)


def test_the_model_is_left_as_it_was(model, input_ids):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = stock(model, input_ids).item()
    sgp.context_loss(model, input_ids, CONTEXTS, lengths=LENGTHS).backward()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert model.training
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())
    assert stock(model, input_ids).item() == before


def test_the_context_stops_after_the_last_layers_keys_and_values(llama, input_ids):
    seen = []
    last = llama.model.layers[-1]
    last.mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    llama.lm_head.register_forward_hook(lambda *_: seen.append("head"))
    sgp.context_loss(llama, input_ids, CONTEXTS, lengths=LENGTHS)
    assert seen == ["mlp", "head"], "of the rest alone"


@pytest.mark.parametrize("mark", context.SHARDED)
def test_a_sharded_model_runs_to_its_end(llama, input_ids, mark):
    """What frees its weights waits for the end of the forward pass."""
    expected = sgp.context_loss(llama, input_ids, CONTEXTS, lengths=LENGTHS)
    setattr(llama.lm_head.weight, mark, True)
    seen = []
    llama.model.layers[-1].mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    llama.lm_head.register_forward_hook(lambda *_: seen.append("head"))
    assert sgp.context_loss(llama, input_ids, CONTEXTS, lengths=LENGTHS) == expected
    assert seen == ["mlp", "head"] * 2, "of the context too"


def test_detached_contexts_train_all_weights_under_autocast(llama, input_ids):
    """A bfloat16 copy of a weight that was made without a graph is not used with one.

    Autocast itself sees to that in newer releases of PyTorch, not in all that are supported.
    """
    found = []
    for autocast in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = sgp.context_loss(
                llama, input_ids, CONTEXTS, lengths=LENGTHS, context_grad="detach"
            )
        found.append(gradients(llama, loss))
    assert_same(found[0], found[1], 0.1)


def test_contexts_of_a_group_have_one_length(llama):
    """The tokens are the same, so that nothing else tells the contexts apart."""
    ids = torch.arange(T).expand(4, T)
    with pytest.raises(ValueError, match=r"row 3 has another context than row 2 \(lengths 6 and 5"):
        sgp.context_loss(llama, ids, torch.tensor([4, 4, 5, 6]), num_outputs_per_context=2)


def test_without_gradients_there_is_a_loss(llama, input_ids):
    with torch.no_grad():
        found = [
            sgp.context_loss(llama, input_ids, CONTEXTS, lengths=LENGTHS, context_grad=mode)
            for mode in ("exact", "replay")
        ]
    assert found[0] == found[1]
    assert not found[0].requires_grad


def test_the_cache_is_called_what_the_model_calls_it(llama, input_ids):
    """`past_key_values` until transformers 5.23, `cache` since; a wrapper names neither."""

    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.module, self.config = model, model.config

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    name = context._takes_cache(llama)[0]
    other = next(other for other in context.CACHE_NAMES if other != name)
    expected = sgp.context_loss(llama, input_ids, CONTEXTS, lengths=LENGTHS)
    assert sgp.context_loss(Wrapper(llama), input_ids, CONTEXTS, lengths=LENGTHS) == expected
    forward = llama.forward

    def renamed(input_ids, attention_mask, position_ids, use_cache, **rest):
        assert set(rest) == {other}
        return forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            use_cache=use_cache, **{name: rest[other]},
        )  # fmt: skip

    signature = inspect.signature(forward)
    named = [p.replace(name=other) if p.name == name else p for p in signature.parameters.values()]
    renamed.__signature__ = signature.replace(parameters=named)
    llama.forward = renamed
    assert sgp.context_loss(llama, input_ids, CONTEXTS, lengths=LENGTHS) == expected


def test_batches_without_context_or_output(llama, input_ids):
    for contexts in (torch.zeros(4, dtype=torch.int64), LENGTHS):
        expected = stock(llama, input_ids, contexts=contexts)
        loss = sgp.context_loss(llama, input_ids, contexts, lengths=LENGTHS)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        loss.backward()


def test_the_warning_of_detach_comes_once(llama, input_ids):
    context._warn_of_detached.cache_clear()
    with pytest.warns(UserWarning, match="not the gradient of the loss") as said:
        sgp.context_loss(llama, input_ids, CONTEXTS, lengths=LENGTHS, context_grad="detach")
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sgp.context_loss(llama, input_ids, CONTEXTS, lengths=LENGTHS, context_grad="detach")


def test_what_is_refused(llama, input_ids):
    def loss(**changed):
        arguments = {"context_lengths": CONTEXTS, "lengths": LENGTHS} | changed
        return sgp.context_loss(changed.pop("model", llama), input_ids, **arguments)

    with pytest.raises(ValueError, match="context_grad = 'none'; expected one of"):
        loss(context_grad="none")
    with pytest.raises(
        ValueError, match="num_outputs_per_context = 3; expected a divisor of the 4"
    ):
        loss(num_outputs_per_context=3)
    with pytest.raises(ValueError, match="row 1 has another context than row 0"):
        loss(num_outputs_per_context=2)
    with pytest.raises(ValueError, match="row 2 has context length 24"):
        loss(context_lengths=torch.tensor([1, 1, 24, 1]))
    with pytest.raises(TypeError, match="model is a Linear without a config"):
        sgp.context_loss(torch.nn.Linear(2, 2), input_ids, CONTEXTS)
    llama.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing is on"):
        loss()


@pytest.mark.parametrize("kind", ["mamba", "qwen3_5"])
def test_architectures_with_other_states_are_refused_by_name(kind, input_ids):
    from transformers import MambaConfig, Qwen3_5TextConfig

    config = {
        "mamba": lambda: MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1),
        "qwen3_5": lambda: Qwen3_5TextConfig(**SIZE | {"num_hidden_layers": 4}),
    }[kind]()
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"the cache of {kind}.* more than keys and values"):
        sgp.context_loss(model, input_ids, CONTEXTS)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("BertConfig", {}, "bert is an encoder here"),
        ("RobertaConfig", {"is_decoder": True}, "roberta counts positions itself"),
        ("BartConfig", {"decoder_layers": 1}, "bart counts positions itself"),
        ("OpenAIGPTConfig", {}, "openai-gpt takes no cache"),
    ],
)
def test_architectures_that_two_passes_would_change_are_refused_by_name(
    kind, options, message, input_ids
):
    """Each of these gave a wrong loss, or an error from inside the model."""
    import transformers

    config = getattr(transformers, kind)(vocab_size=V, hidden_size=32, num_attention_heads=4)
    config.update({"d_model": 32, "decoder_attention_heads": 4, "num_hidden_layers": 1, **options})
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=message):
        sgp.context_loss(model, input_ids, CONTEXTS, lengths=LENGTHS)


def test_a_forward_that_something_waits_for_runs_to_its_end(llama, input_ids):
    """Accelerate's hooks move weights before and after a module; FSDP's gather and free them."""
    expected = gradients(llama, sgp.context_loss(llama, input_ids, CONTEXTS, lengths=LENGTHS))

    class Balance(ModelHook):
        count = 0

        def pre_forward(self, _, *args, **kwargs):
            Balance.count += 1
            return args, kwargs

        def post_forward(self, _, output):
            Balance.count -= 1
            return output

    for layer in llama.model.layers:
        add_hook_to_module(layer, Balance())
    found = gradients(llama, sgp.context_loss(llama, input_ids, CONTEXTS, lengths=LENGTHS))
    assert Balance.count == 0
    assert_same(found, expected, 1e-5)
