"""Leaks across seams: found where the model attends across them, and nowhere else."""

import itertools

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import sgp
from sgp.auditing import look
from sgp.auditing.view import read
from tests import families
from tests.audited import EOS, Tokenizer, V, chat_tokenizer, codes, make

CODE = "attends-across-boundary"
T, AT = 18, (7, 12)  # where the second and the third sequence begin


def positions(at=AT, length=T):
    bounds = [0, *at, length]
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    return torch.cat([torch.arange(n) for n in lengths])[None]


def make_packed(at=AT, length=T, vocabulary=V):
    """One row of three sequences, each of context and output, position_ids beside it."""
    ids = torch.randint(3, vocabulary, (1, length), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    for begin in (0, *at):
        labels[0, begin : begin + 2] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": positions(at, length)}


def pairs(at=AT, length=T):
    number = positions(at, length)[0].eq(0).cumsum(0)
    kept = (number[:, None] == number) & torch.ones(length, length, dtype=torch.bool).tril()
    return torch.where(kept, 0.0, torch.finfo(torch.float32).min)[None, None]


def ways():
    """What a batch says: what is said beside tokens and labels; whether llama keeps them apart."""
    number = positions()[0].eq(0).cumsum(0)[None]
    ones = torch.ones(1, T, dtype=torch.long)
    seams = torch.tensor([0, *AT, T], dtype=torch.int32)
    return {
        "positions": ({"position_ids": positions()}, True),
        "positions beside ones": ({"position_ids": positions(), "attention_mask": ones}, False),
        "numbers": ({"attention_mask": number}, False),
        "numbers and positions": (
            {"attention_mask": number, "position_ids": positions()}, False,
        ),
        "pairs": ({"attention_mask": pairs()}, True),
        "pairs and positions": ({"attention_mask": pairs(), "position_ids": positions()}, True),
        "cu_seqlens": ({"cu_seqlens": seams}, False),
        "seq_idx": ({"seq_idx": number.int()}, False),
        "seq_idx and positions": (
            {"seq_idx": number.int(), "position_ids": positions()}, True,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("way", ways())
def test_a_leak_is_found_where_there_is_one(way):
    said, apart = ways()[way]
    batch = make_packed()
    del batch["position_ids"]
    report = sgp.audit(make("llama"), {**batch, **said})
    assert codes(report) == (set() if apart else {CODE})
    if not apart:
        (found,) = report.errors
        assert found.where == (
            "row 0, the loss of sequence 2 (tokens 12 to 17) has gradient at the tokens of "
            "sequences 0 to 1"
        )
        assert (found.row, found.tokens) == (0, tuple(range(12)))


def test_begins_of_text_are_seams_where_nothing_else_says_any():
    batch = make_packed()
    del batch["position_ids"]
    batch["input_ids"][0, [0, *AT]] = 1
    tokenizer = Tokenizer()
    tokenizer.bos_token_id = 1
    assert CODE in codes(sgp.audit(make("llama"), batch, tokenizer=tokenizer))
    wrong = {**batch, "labels": batch["labels"].clone()}
    wrong["labels"][0, AT[0]] = 1
    assert "crosses-boundary" in {f.code for f in look(wrong, tokenizer=tokenizer)}
    numbered = {**batch, "position_ids": positions((5,))}  # what says more is believed
    starts = read(numbered, tokenizer=tokenizer).starts[0].nonzero()[:, 0].tolist()
    assert starts == [0, 5]
    tokenizer.bos_token_id = EOS  # an end, as GPT-2's is
    assert read(batch, tokenizer=tokenizer).starts.sum() == 1


@pytest.mark.parametrize(("several", "starts"), [(True, 1), (False, 3)])
def test_begins_of_text_that_a_template_writes_are_no_seams(several, starts):
    """Llama 2 begins every turn of a chat with one."""
    of_each = "{% for m in messages %}{% if m.role == 'user' %}<s>{% endif %}"
    rest = "[INST] {{ m.content }} [/INST]</s>{% endfor %}"
    template = of_each + rest if several else "<s>{% for m in messages %}" + rest
    batch = make_packed()
    del batch["position_ids"]
    batch["input_ids"][0, [0, *AT]] = 1
    assert read(batch, tokenizer=chat_tokenizer(template)).starts.sum() == starts
    batch["input_ids"][0, 1] = 1  # doubled: one seam is one
    batch["input_ids"][0, AT[0] + 1] = 1
    assert read(batch, tokenizer=chat_tokenizer(template)).starts.sum() == starts


@pytest.mark.parametrize("kind", ["packed", "beside ones"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_what_is_found_is_what_the_family_does(family, kind):
    """Brute force: whether the second sequence's logits depend on the first sequence's tokens."""
    model, batch = families.make(family), make_packed((5,), 12, families.V)
    if kind == "beside ones":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    report = sgp.audit(model, batch)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, :5] = 7
    with torch.no_grad():
        logits = [model(**x, use_cache=False).logits[:, 5:] for x in (batch, other)]
    apart = torch.allclose(*logits, atol=1e-4, rtol=1e-4)
    assert {f.code for f in report.errors} == (set() if apart else {CODE})
    assert apart == (kind == "packed" and family not in LEAKING)


LEAKING = {"bloom", "falcon_h1", "gpt_oss", "opt"}
"""In transformers 5.24, with position_ids and no mask: without positions, with a state, unasked."""


def test_a_gradient_at_every_token_is_no_leak():
    """As a mixture's auxiliary loss has it, and other losses that a model adds."""
    model = make("llama")

    def spread(_module, _args, result):
        if result.loss is not None:
            result.loss = result.loss + sum(h.square().mean() for h in result.hidden_states)
        return result

    model.register_forward_hook(spread)
    assert CODE not in codes(sgp.audit(model, make_packed()))
    leaking = {**make_packed(), "attention_mask": torch.ones(1, T, dtype=torch.long)}
    assert CODE in codes(sgp.audit(model, leaking))


def test_a_leak_and_a_label_that_crosses_are_both_found():
    batch = {**make_packed(), "attention_mask": torch.ones(1, T, dtype=torch.long)}
    batch["labels"][0, list(AT)] = batch["input_ids"][0, list(AT)]
    assert codes(sgp.audit(make("llama"), batch)) == {CODE, "crosses-boundary"}
    del batch["attention_mask"]
    assert codes(sgp.audit(make("llama"), batch)) == {"crosses-boundary"}


def test_a_further_pass_is_made_where_there_is_doubt():
    """And without labels, of which a model might make another loss."""
    model, calls = make("llama"), []
    model.register_forward_pre_hook(
        lambda *call: calls.append("labels" in call[-1]), with_kwargs=True
    )
    sgp.audit(model, make_packed())
    assert calls == [True]
    calls.clear()
    sgp.audit(model, {**make_packed(), "attention_mask": torch.ones(1, T, dtype=torch.long)})
    assert calls == [True, False]


def leaking(count, pairs_of, size=4):
    """Sequences of four tokens, kept apart but for the pairs (who sees, who is seen)."""
    batch = make_packed(tuple(range(size, count * size, size)), count * size)
    number = torch.arange(count * size) // size
    seen = number[:, None] == number
    for sees, other in pairs_of:
        seen |= (number[:, None] == sees) & (number == other)
    seen &= torch.ones_like(seen).tril()
    batch["attention_mask"] = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    return batch


@pytest.mark.parametrize("sees", range(1, 5))
@pytest.mark.parametrize("other", range(4))
def test_one_sequence_that_sees_one_other_is_found(sees, other):
    """Wherever they stand: nothing else leaks, and the batch's last sequence is innocent."""
    report = sgp.audit(make("llama"), leaking(5, [(sees, other)] if sees > other else []))
    if sees <= other:
        assert report.findings == []
        return
    (found,) = report.errors
    assert found.code == CODE
    assert found.where == (
        f"row 0, the loss of sequence {sees} (tokens {4 * sees} to {4 * sees + 3}) has gradient at "
        f"the tokens of sequence {other}"
    )
    assert found.tokens == tuple(range(4 * other, 4 * other + 4))


@pytest.mark.parametrize("sees", range(1, 12))
def test_what_three_passes_cannot_tell_apart_is_told_together(sees):
    model, calls = make("llama"), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = leaking(12, [(sees, 0)])
    (found,) = sgp.audit(model, batch).errors
    assert len(calls) == 4
    group = next(g for g in ((1, 2), (3, 5), (6, 8), (9, 11)) if g[0] <= sees <= g[1])
    assert f"the loss of one of the sequences {group[0]} to {group[1]} " in found.where
    assert found.where.endswith("of sequence 0")


@pytest.mark.parametrize("way", ["auxiliary", "crossing"])
def test_leaks_of_a_middle_sequence_where_the_first_pass_tells_nothing(way):
    """A loss that has gradient everywhere; labels that leave no token behind the last predictor."""
    model, batch = make("llama"), leaking(5, [(3, 2), (3, 1)])

    def spread(_module, _args, result):
        if result.loss is not None:
            result.loss = result.loss + sum(h.square().mean() for h in result.hidden_states)
        return result

    if way == "auxiliary":
        model.register_forward_hook(spread)
    else:
        batch["labels"] = batch["input_ids"].clone()
    (found,) = [f for f in sgp.audit(model, batch).findings if f.code == CODE]
    assert "the loss of sequence 3 (tokens 12 to 15)" in found.where
    assert found.where.endswith("sequences 1 to 2")


def test_the_rows_that_leak_are_named():
    """Two rows, of which one is packed and leaks; numbers without a seam are no sequences."""
    batch = make_packed()
    batch = {k: v.repeat(2, 1) for k, v in batch.items()}
    batch["position_ids"][0] = torch.arange(T)
    batch["attention_mask"] = torch.ones(2, T, dtype=torch.long)
    report = sgp.audit(make("llama"), batch)
    assert [f.row for f in report.errors] == [1]


def test_padding_behind_packed_sequences_is_no_sequence():
    """The Collator counts positions anew in it."""
    examples = [
        {"input_ids": [5, 6, 7, EOS], "completion_mask": [0, 0, 1, 1]},
        {"input_ids": [8, 9, EOS], "completion_mask": [0, 1, 1]},
    ]
    collate = sgp.Collator(packed=True, pad_to_multiple_of=16)
    batch = collate(examples)
    del batch["selection"]
    assert sgp.audit(make("llama"), batch).findings == []
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    (found,) = sgp.audit(make("llama"), batch).errors
    assert found.where.endswith("sequence 1 (tokens 4 to 6) has gradient at the tokens of "
                                "sequence 0")  # fmt: skip


def test_a_leak_that_nothing_could_show_is_said():
    """Nothing before the last layer is trained: no hidden state has a gradient."""
    model = make("llama").requires_grad_(False)
    model.lm_head.requires_grad_(True)
    batch = {**make_packed(), "attention_mask": torch.ones(1, T, dtype=torch.long)}
    said = [f.message for f in sgp.audit(model, batch).findings if f.code == "not-measured"]
    assert any("packed sequences attend" in message for message in said)
    whole = {k: batch[k] for k in ("input_ids", "labels")}
    said = [f.message for f in sgp.audit(model, whole).findings if f.code == "not-measured"]
    assert len(said) == 1
    assert "packed" not in said[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_leaks_in_16_bits(dtype):
    batch, model = make_packed(), make("llama")
    assert codes(sgp.audit(model, batch, autocast=dtype)) == set()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert codes(sgp.audit(model, batch, autocast=dtype)) == {CODE}
    assert CODE in codes(sgp.audit(model.to(torch.bfloat16), batch))


# -- positions of vision models --------------------------------------------------------------------


def vision():
    text = {
        "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"},
    }  # fmt: skip
    of_images = {
        "depth": 1, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48,
        "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = dict(zip(names, range(V - 4, V), strict=True))
    config = Qwen2_5_VLConfig(text_config=text, vision_config=of_images, **ids)
    return Qwen2_5_VLForConditionalGeneration(config)


def with_image():
    """(3, 1, T) of a text of two tokens, an image of 2 x 3 patches, a text; twice that."""
    t = [0, 1, *[2] * 6, 5]
    h = [0, 1, 2, 2, 2, 3, 3, 3, 5]
    w = [0, 1, 2, 3, 4, 2, 3, 4, 5]
    return torch.tensor([t * 2, h * 2, w * 2])[:, None]


def video():
    """(3, 1, T) of two frames of 2 x 2 patches after a token, and before one; twice that."""
    t = [0, *[1] * 4, *[2] * 4, 4]
    h = [0, *[1, 1, 2, 2] * 2, 4]
    w = [0, *[1, 2, 1, 2] * 2, 4]
    return torch.tensor([t * 2, h * 2, w * 2])[:, None]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (positions(), [0, *AT]),
        (positions()[None].repeat(3, 1, 1), [0, *AT]),
        (positions()[None].repeat(4, 1, 1), [0, *AT]),
        (with_image(), [0, 9]),
        (video(), [0, 10]),
        (torch.cat([torch.arange(18)[None, None], with_image()]), [0]),  # the text's axis goes on
        (torch.cat([positions((9,))[None], with_image()]), [0, 9]),
        (torch.arange(T)[None, None].repeat(3, 1, 1), [0]),
        (torch.zeros(3, 1, 4, dtype=torch.long), [0, 1, 2, 3]),
        (torch.tensor([4, 5, 6, 2, 3, 4]).repeat(3, 1, 1), [0, 3]),  # it was cut at its start
        (torch.cat([positions((9,))[None], torch.arange(T).repeat(3, 1, 1)]), [0, 9]),
    ],
    ids=["1,T", "3,B,T", "4,B,T", "image", "video", "text-axis", "text-axis-seam", "one", "ones",
         "cut", "text-axis-alone"],
)  # fmt: skip
def test_seams_of_every_layout(given, expected):
    length = given.shape[-1]
    ids = torch.arange(3, 3 + length).repeat(2, 1)
    for layout in (given, given.repeat(*[1] * (given.dim() - 2), 2, 1)):
        batch = {"input_ids": ids, "labels": ids, "position_ids": layout}
        starts = read(batch).starts
        assert starts[1].nonzero()[:, 0].tolist() == expected
        assert torch.equal(starts[0], starts[1])


@pytest.mark.parametrize("axes", [1, 3, 4])
def test_a_vision_models_leaks_and_crossings(axes):
    batch = make_packed(vocabulary=V - 4)
    if axes > 1:
        batch["position_ids"] = batch["position_ids"][None].repeat(axes, 1, 1)
    model = vision()
    apart = axes == 4  # transformers reads seams off the text's axis alone
    assert (CODE in codes(sgp.audit(model, batch))) == (not apart)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert CODE in codes(sgp.audit(model, batch))
    batch["labels"][0, AT[0]] = batch["input_ids"][0, AT[0]]
    assert "crosses-boundary" in codes(sgp.audit(model, batch))


def test_a_vision_models_positions_are_as_before():
    """It keeps what it has found of a batch, and would use it for the next."""
    model = vision()
    assert model.model.rope_deltas is None
    batch = make_packed(vocabulary=50)
    sgp.audit(model, {k: batch[k] for k in ("input_ids", "labels")}, generate=1)
    assert model.model.rope_deltas is None
