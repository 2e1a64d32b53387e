"""examples/trl_distillation.py against TRL's own trainers, and the operations of both losses."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import sgp
from tests.families import SIZE, V, make
from tests.test_linear import flops
from tests.toy_trl import COMMON, numbers_as_text, quiet

EXAMPLES = Path(__file__).parent.parent / "examples"
B, PROMPT, C = 4, 5, 7
ROWS = 8  # a multiple of the rows that matmuls take at once
WIDE = SIZE["hidden_size"] * 2


@pytest.fixture(scope="module")
def trl():
    """It takes seconds to import."""
    return pytest.importorskip("trl")


@pytest.fixture(scope="module")
def recipe():
    """The example, which imports TRL, and `common` beside it."""
    pytest.importorskip("trl")
    spec = importlib.util.spec_from_file_location("of_trl", EXAMPLES / "trl_distillation.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


def make_trainer(trl, kind, family, folder, **more):
    """A student of the family and a wider teacher of it."""
    tokenizer, rows = numbers_as_text()
    options = {"max_completion_length": 6, "gradient_checkpointing": False, "temperature": 0.8}
    config = quiet(
        lambda: trl.DistillationConfig(output_dir=str(folder), **COMMON | options | more)
    )
    student, teacher = make(family), make(family, hidden_size=WIDE)
    return quiet(
        lambda: kind(
            student, teacher, config, train_dataset=rows.select_columns(["prompt"]),
            processing_class=tokenizer,
        )
    )  # fmt: skip


def make_inputs(tool):
    """A batch as a trainer hands it to its loss: ragged on both sides."""
    generator = torch.Generator().manual_seed(4)
    masks = torch.ones(B, PROMPT, dtype=torch.int64), torch.ones(B, C, dtype=torch.int64)
    for b in range(B):
        masks[0][b, :b] = 0
        masks[1][b, C - b :] = 0
    inputs = {
        "prompt_ids": torch.randint(3, V, (B, PROMPT), generator=generator),
        "prompt_mask": masks[0],
        "completion_ids": torch.randint(3, V, (B, C), generator=generator),
        "completion_mask": masks[1],
    }
    if tool:
        column = torch.tensor([2])
        inputs["tool_mask"] = torch.ones(B, C, dtype=torch.int64).index_fill(1, column, 0)
    return inputs


def of_a_batch(trainer, inputs, count):
    """Loss, entropy, number of tokens, and every gradient."""
    trainer.model.zero_grad()
    loss, entropy, number = trainer._compute_loss(trainer.model, inputs, count)
    loss.backward()
    return [loss.detach(), entropy.detach(), number], [p.grad for p in trainer.model.parameters()]


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "phi"])
def test_loss_and_gradient_are_trls(family, trl, recipe, tmp_path):
    """With a softcap, with scales, with a head that has a bias."""
    pair = [
        make_trainer(trl, kind, family, tmp_path)
        for kind in (trl.DistillationTrainer, recipe.DistillationTrainer)
    ]
    for beta, tool, count in ((0.0, False, None), (0.3, True, torch.tensor(17.0)), (1.0, True, 9)):
        found = []
        for trainer in pair:
            trainer.beta = beta
            found.append(of_a_batch(trainer, make_inputs(tool), count))
        (expected, expected_grads), (numbers, grads) = found
        assert numbers[2] == expected[2] == make_inputs(tool)["completion_mask"].sum() - 4 * tool
        torch.testing.assert_close(numbers[:2], expected[:2], rtol=1e-4, atol=1e-6)
        largest = max(g.abs().max() for g in expected_grads)
        assert largest > 1e-3, "there is something to compare"
        for gradient, wanted in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4 * largest.item())


def test_a_training_is_trls(trl, recipe, tmp_path):
    """Both draw the same completions, log the same and arrive at the same weights."""
    logs, weights = [], []
    for kind in (trl.DistillationTrainer, recipe.DistillationTrainer):
        trainer = make_trainer(trl, kind, "llama", tmp_path, beta=0.5, max_steps=3)
        quiet(trainer.train)
        steps = [x for x in trainer.state.log_history if "loss" in x]
        logs.append([(x["loss"], x["entropy"], x["grad_norm"]) for x in steps])
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert len(logs[0]) == 3
    for ours, theirs in zip(logs[1], logs[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    assert len({loss for loss, *_ in logs[1]}) == 3, "it trains"
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("count", [None, 40.0])
def test_the_function_of_gkd_is_trls(beta, count, recipe):
    gkd = quiet(lambda: pytest.importorskip("trl.experimental.gkd")).GKDTrainer
    student, teacher = torch.randn(2, B, C, V).unbind()
    labels = torch.randint(V, (B, C)).masked_fill(torch.rand(B, C) < 0.4, -100)
    found = []
    for function in (gkd.generalized_jsd_loss, recipe.generalized_jsd_loss):
        logits = student.clone().requires_grad_()
        loss = function(logits, teacher, labels, beta, 0.7, num_items_in_batch=count)
        found.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_what_the_function_of_gkd_does_not_do_is_said(recipe):
    logits = torch.zeros(1, 2, V)
    with pytest.raises(NotImplementedError, match="labels have to be given"):
        recipe.generalized_jsd_loss(logits, logits)


# -- what docs/how-to/distillation.md says of the cost ---------------------------------------------


def tensors(frozen):
    """Hidden states and a head of the student, of width 8, and of the teacher, of width 12."""
    found = [torch.randn(shape) for shape in ((ROWS, 8), (V, 8), (ROWS, 12), (V, 12))]
    for name, x in zip(("hidden", "head"), found, strict=False):
        x.requires_grad_(name != frozen)
    return found


@pytest.mark.parametrize(
    ("of_student", "of_teacher", "options"),
    [
        (6, 2, {}),
        (6, 2, {"divergence": "jsd", "chunk_rows": 4}),
        (4, 2, {"frozen": "head"}),
        (4, 2, {"frozen": "hidden"}),
        (2, 2, {"no_grad": True}),
        (6, 0, {"top_k": 4}),
        (8, 4, {"reduction": "none"}),
    ],
    ids=str,
)
def test_operations(of_student, of_teacher, options):
    options = dict(options)
    hidden, head, known, known_head = tensors(options.pop("frozen", None))
    teacher = known, known_head
    if "top_k" in options:
        log_probs, indices = (known @ known_head.T).log_softmax(-1).topk(options.pop("top_k"))
        teacher = (sgp.TopK(indices, log_probs),)
    learns = not options.pop("no_grad", False)

    def work():
        with torch.set_grad_enabled(learns):
            labels = torch.zeros(ROWS, dtype=torch.int64)
            loss = sgp.linear_distillation(hidden, head, labels, *teacher, **options)
        if learns:
            loss.sum().backward()

    assert flops(work) == ROWS * V * (of_student * 8 + of_teacher * 12)


@pytest.mark.parametrize(("beta", "of_student", "of_teacher"), [(0, 8, 4), (1, 8, 4), (0.5, 10, 6)])
def test_operations_of_trl(beta, of_student, of_teacher):
    kernels = pytest.importorskip("trl.kernels.chunked_divergence")
    hidden, head, known, known_head = tensors(None)

    def work():
        divergence, _ = kernels.ChunkedDivergenceFunction.apply(
            hidden, head, None, known, known_head, None, float(beta)
        )
        divergence.sum().backward()

    assert flops(work) == ROWS * V * (of_student * 8 + of_teacher * 12)
