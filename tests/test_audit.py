"""The audit: roles, norms and the two parts of the gradient are brute force's; faults are found."""

import html.parser
import inspect
import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

import sgp
from sgp.auditing import findings
from sgp.cli import main
from tests.test_context import DetachedContext

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
    "qwen3": Qwen3Config(**SIZE),
    "gpt2": GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
CONTEXTS, LENGTHS = (6, 2, 11), (17, 12, 14)
EOS = 2


class Tokenizer:
    """What the audit asks of one."""

    eos_token_id = EOS
    all_special_ids = (0, 1, EOS)

    def decode(self, ids):
        return f"<{ids[0]}>"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS["llama"]).train()


@pytest.fixture
def batch():
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


def linear_gradient(model, loss):
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    found = torch.autograd.grad(loss, weights, retain_graph=True)
    return torch.cat([g.flatten() for g in found])


# -- what is measured ------------------------------------------------------------------------------


def test_a_correct_batch_has_no_finding(model, batch):
    report = sgp.audit(model, batch, tokenizer=Tokenizer())
    assert report.findings == []
    assert report.errors == []
    assert (
        repr(report)
        == f"AuditReport(LlamaForCausalLM, 3 rows, loss={report.loss:.4f}, no findings)"
    )
    roles = [[token.role for token in row] for row in report.tokens]
    for b, (context, length) in enumerate(zip(CONTEXTS, LENGTHS, strict=True)):
        expected = ["context"] * (context - 1) + ["predictor"] + ["output"] * (length - context)
        assert roles[b] == expected + ["padding"] * (T - length)
    token = report.tokens[0][5]
    assert (token.text, token.target_id) == (f"<{token.token_id}>", int(batch["input_ids"][0, 6]))


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_norms_are_those_of_the_model(name, batch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    report = sgp.audit(model, batch)
    out = model(**batch, output_hidden_states=True)
    assert report.loss == pytest.approx(out.loss.item(), rel=1e-6)
    found = torch.autograd.grad(out.loss, [*out.hidden_states, out.logits])
    expected = torch.stack([g.norm(dim=-1) for g in found[:-1]])
    torch.testing.assert_close(report.grad_norm, expected, rtol=1e-5, atol=1e-9)
    assert torch.equal(report.dead, expected == 0)
    assert report.dead[-1, 0, :5].all(), "no loss starts at context"
    assert not report.dead[0, 0, :5].any(), "but it reaches the context's embeddings"
    logits = torch.tensor([[t.gradient for t in row] for row in report.tokens])
    torch.testing.assert_close(logits, found[-1].norm(dim=-1), rtol=1e-5, atol=1e-9)
    losses = [t.loss for row in report.tokens for t in row if t.loss is not None]
    assert sum(losses) / len(losses) == pytest.approx(report.loss, rel=1e-5)
    first = report.tokens[0][5]
    assert first.probability == pytest.approx(math.exp(-first.loss))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_two_parts_of_the_gradient_are_brute_forces(name, batch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    report = sgp.audit(model, batch)
    exact = linear_gradient(model, model(**batch).loss)
    constant = torch.arange(T) < (torch.tensor(CONTEXTS) - 1)[:, None]
    cache = DetachedContext(model, constant)
    outputs = linear_gradient(model, model(**batch, past_key_values=cache, use_cache=True).loss)
    share = (exact - outputs).norm() / exact.norm()
    cosine = torch.nn.functional.cosine_similarity(exact, outputs, dim=0)
    assert report.context_share == pytest.approx(share.item(), rel=1e-3)
    assert report.cosine_detached == pytest.approx(cosine.item(), rel=1e-3)
    assert report.context_share > 1e-3, "there is something to see"


def test_the_parts_are_not_defined_for_masks_with_holes(model, batch):
    batch["labels"][0, 9] = -100
    report = sgp.audit(model, batch)
    assert report.context_share is None
    assert report.cosine_detached is None


def test_the_parts_are_not_defined_where_not_every_layer_is_seen(batch):
    """GPT-2's layers are Conv1D; a module that is called twice has one gradient, not two parts."""
    torch.manual_seed(0)
    assert sgp.audit(AutoModelForCausalLM.from_config(CONFIGS["gpt2"]), batch).context_share is None
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    model.model.layers[1] = model.model.layers[0]
    assert sgp.audit(model, batch).context_share is None


def test_everything_is_left_as_it_was(model, batch):
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    model.lm_head.eval()
    before = {n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters()}
    gradients = {n: p.grad for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    with torch.no_grad():
        model(**batch, output_hidden_states=True)  # transformers' own hooks stay from then on
    hooks = [len(m._forward_hooks) for m in model.modules()]
    state = torch.get_rng_state()
    sgp.audit(model, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    for name, p in model.named_parameters():
        assert p.grad is gradients[name]
        assert torch.equal(p, before[name][0])
        assert torch.equal(p.grad, before[name][1])
        assert not p._post_accumulate_grad_hooks


def test_a_selection_in_place_of_labels(model, batch):
    labels = batch.pop("labels")
    selection = sgp.Selection.from_labels(labels, shift=True)
    report = sgp.audit(model, batch, selection=selection)
    batch["labels"] = labels
    expected = sgp.audit(model, batch)
    assert [[t.role for t in row] for row in report.tokens] == [
        [t.role for t in row] for row in expected.tokens
    ]
    assert report.loss == pytest.approx(expected.loss, rel=1e-6)
    assert report.findings == []


# -- findings: planted; absent from the correct batch above ----------------------------------------


def shifted_twice(c):
    c.labels[0] = torch.cat([c.labels[0, 1:], torch.tensor([-100])])


def other_labels(c):
    c.labels[1, 4] = (c.ids[1, 4] + 1) % V
    c.labels[1, 6] = (c.ids[1, 6] + 5) % V


def first_output_lost(c):
    c.batch["completion_mask"] = (c.labels != -100).long()
    c.labels[0, CONTEXTS[0]] = -100


def nothing_scored(c):
    c.labels[2] = -100


def packed(c):
    c.batch["position_ids"] = torch.arange(T).repeat(B, 1)
    c.batch["position_ids"][0, 9:] = torch.arange(T - 9)


class LossOfEverything:
    """A forward whose loss has a gradient at every position."""

    def __init__(self, forward):
        self.forward = forward
        self.__signature__ = inspect.signature(forward)

    def __call__(self, *args, **kwargs):
        out = self.forward(*args, **kwargs)
        out.loss = out.logits.logsumexp(-1).mean()
        return out


def loss_of_everything(c):
    c.model.forward = LossOfEverything(c.model.forward)


def unused_layer(c):
    c.model.unused = torch.nn.Linear(3, 3)


@torch.no_grad()
def not_a_number(c):
    c.model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")


def padding(c):
    c.labels[1, LENGTHS[1]] = c.ids[1, LENGTHS[1]] = 7


def special(c):
    c.labels[0, 8] = c.ids[0, 8] = 1


def no_end(c):
    c.labels[0, -1] = c.ids[0, -1] = 9


def context_too(c):
    c.labels[0, 1:] = c.ids[0, 1:]


PLANTS = {  # code: (the fault, the row where it is; None: everywhere)
    "labels-shifted-twice": (shifted_twice, 0),
    "labels-not-the-inputs": (other_labels, 1),
    "first-output-untrained": (first_output_lost, 0),
    "no-targets": (nothing_scored, 2),
    "crosses-boundary": (packed, 0),
    "context-logit-gradient": (loss_of_everything, 0),
    "missing-gradient": (unused_layer, None),
    "nan": (not_a_number, 0),
    "padding-scored": (padding, 1),
    "special-scored": (special, 0),
    "no-eos": (no_end, 0),
    "all-scored": (context_too, 0),
}


@pytest.mark.parametrize("code", [*findings.ERRORS, *findings.WARNINGS])
def test_a_planted_fault_is_found(code, model, batch):
    fault, row = PLANTS[code]
    fault(SimpleNamespace(model=model, ids=batch["input_ids"], labels=batch["labels"], batch=batch))
    report = sgp.audit(model, batch, tokenizer=Tokenizer())
    found = [finding for finding in report.findings if finding.code == code]
    assert found, report.findings
    assert found[0].severity == ("error" if code in findings.ERRORS else "warning")
    assert found[0].message
    assert found[0].where.startswith("" if row is None else f"row {row}")
    assert bool(report.errors) == (code in findings.ERRORS)


# -- what is shown ---------------------------------------------------------------------------------


def test_print_and_to_dict(model, batch):
    batch["labels"][2] = -100
    report = sgp.audit(model, batch, tokenizer=Tokenizer())
    console = Console(width=100, record=True, file=io.StringIO())
    report.print(console, rows=2)
    shown = console.export_text()
    assert "error: no-targets (row 2): no token carries loss" in shown
    assert "1 more rows" in shown
    assert "predictor" in shown
    assert f"{report.tokens[0][5].loss:.3f}" in shown
    assert "|g_context| / |g|" in shown or report.context_share is None
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["findings"][0]["code"] == "no-targets"
    assert len(content["grad_norm"]) == 3
    assert content["tokens"][0][5]["role"] == "predictor"


class Page(html.parser.HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "wbr", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_one_file_and_escapes_what_it_shows(model, batch, tmp_path):
    class Markup(Tokenizer):
        def decode(self, ids):
            return f"<b>{ids[0]}&\n"

    batch["labels"][2] = -100
    report = sgp.audit(model, batch, tokenizer=Markup())
    path = report.to_html(tmp_path / "audit.html")
    text = path.read_text()
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "b>"} & set(page.tags)
    assert "http" not in text
    assert not [a for a in page.attributes if a[0] in ("src", "href")]
    assert page.tags.count("td") == 3 * B * T
    shown = "".join(page.text)
    assert "error: no-targets" in shown
    assert f"<b>{report.tokens[0][0].token_id}&\\n" in shown, "a line break is seen"
    assert f"loss {report.tokens[0][5].loss:.4f} nats" in shown


@pytest.mark.parametrize("row", [0, 1])
def test_the_picture_is_written(model, batch, tmp_path, row):
    report = sgp.audit(model, batch)
    path = report.plot(tmp_path / "audit.png", row=row)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(IndexError, match="row 3 of a batch of 3"):
        report.plot(tmp_path / "audit.png", row=3)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_command(tmp_path, capsys):
    right = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]}
    twice = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 7, 8, 9, -100]}
    assert main(["audit", write(tmp_path / "right.jsonl", [right] * 3)]) == 0
    shown = capsys.readouterr().out
    assert "3 samples" in shown
    assert "random weights" in shown
    assert main(["audit", str(tmp_path / "right.jsonl"), "--model", str(tmp_path / "nope")]) == 2
    assert "nope" in capsys.readouterr().err
    long = {"input_ids": [5] * 600 + [6, 7], "labels": [-100] * 600 + [6, 7]}
    assert main(["audit", write(tmp_path / "long.jsonl", [long, right])]) == 0
    assert "no-targets" not in capsys.readouterr().out
    out = tmp_path / "out"
    data = write(tmp_path / "wrong.jsonl", [right, twice, twice])
    assert main(["audit", data, "--rows", "1", "--out", str(out)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "error: labels-shifted-twice: 2 samples, first in line 2" in shown
    assert {p.name for p in out.iterdir()} == {"audit.png", "audit.html", "audit.json"}
    found = json.loads((out / "audit.json").read_text())
    assert found["findings"] == {"labels-shifted-twice": 2}
    assert found["report"]["findings"] == [], "the first sample is right"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "has no samples"),
        ('{"text": "x"}', ":1: has ['text']; expected input_ids and labels, or prompt"),
        ('{"prompt": "x", "completion": "y"}', ":1: prompt and completion need --tokenizer"),
        ('{"input_ids": [1, 2], "labels": [1]}', ":1: columns of different lengths"),
        ("nonsense", ":1: Expecting value"),
        ('{"input_ids": "abc", "labels": [1, 2, 3]}', ":1: input_ids is 'abc'; expected a list"),
    ],
)
def test_the_command_refuses_what_it_cannot_read(lines, message, tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    path.write_text(lines)
    assert main(["audit", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert main(["audit", str(tmp_path / "missing.jsonl")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_what_is_refused(model, batch):
    with pytest.raises(TypeError, match="batch is Tensor; expected a dict"):
        sgp.audit(model, batch["input_ids"])
    with pytest.raises(TypeError, match=r"Linear\.forward takes .*; expected a causal"):
        sgp.audit(torch.nn.Linear(2, 2), batch)
    wrong = batch["labels"].clone()
    wrong[0, 9] = -1
    with pytest.raises(ValueError, match=r"labels\[0, 9\] = -1 is outside"):
        sgp.audit(model, batch | {"labels": wrong})
    wrong = batch["input_ids"].clone()
    wrong[1, 2] = 99
    with pytest.raises(ValueError, match=r"input_ids\[1, 2\] = 99 is outside \[0, 61\)"):
        sgp.audit(model, batch | {"input_ids": wrong})
    with pytest.raises(ValueError, match="expected input_ids"):
        sgp.audit(model, {"labels": batch["labels"]})
    with pytest.raises(ValueError, match="expected labels, or selection="):
        sgp.audit(model, {"input_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match=r"labels is \(3, 5\), input_ids \(3, 17\)"):
        sgp.audit(model, {**batch, "labels": batch["labels"][:, :5]})
    with pytest.raises(ValueError, match="the selection is of 17 tokens, input_ids of 51"):
        sgp.audit(model, batch, selection=sgp.Selection.from_labels(batch["labels"][0]))
