"""What is measured: sizes of real models, in the order in which they matter.

A case is one problem; every rival solves it (rivals.py) and `measure.py` times it. The list for a
GPU is meant to be cut short by a time budget, the list for a CPU fits two cores and minutes.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

import sgp

SEQUENCE = 1_024  # tokens, of which the first are context
# A loss of reinforcement learning through the head: CISPO, on policy and with an advantage of 1,
# where its value and gradients are those of the mean.
OWN = "linear own loss"
# A student's head beside a teacher's, of the same width.
KL, JSD = "linear distillation (KL)", "linear distillation (JSD)"
DIVERGENCES = {KL: "forward_kl", JSD: "jsd"}


class Model(NamedTuple):
    """A head: vocabulary and width, from the model's own config.json."""

    name: str
    V: int
    D: int


LLAMA_2 = Model("Llama 2 7B", 32_000, 4_096)
TINY_LLAMA = Model("TinyLlama 1.1B", 32_000, 2_048)
LLAMA_3 = Model("Llama 3.1 8B", 128_256, 4_096)
QWEN_3 = Model("Qwen3 8B", 151_936, 4_096)
LLAMA_3_SMALL = Model("Llama 3.2 1B", 128_256, 2_048)
QWEN_3_5 = Model("Qwen3.5 9B", 248_320, 4_096)
GEMMA_3 = Model("Gemma 3 1B", 262_144, 1_152)
MODELS = (LLAMA_2, LLAMA_3, QWEN_3, QWEN_3_5, GEMMA_3)
KEPT = (1.0, 0.5, 0.25, 0.1, 0.05)


class Case(NamedTuple):
    """N tokens, of which the fraction `kept` carries loss."""

    # "logits" | "linear" | "log-probs" (from logits) | "linear log-probs" | OWN | KL | JSD
    form: str
    model: Model
    N: int
    kept: float
    dtype: str = "bfloat16"
    pattern: str = "prefix"  # context comes first in each sequence; or "scattered"

    @property
    def M(self) -> int:  # noqa: N802  (the field's name)
        """Tokens that carry loss."""
        return max(1, round(self.N * self.kept))

    @property
    def has_head(self) -> bool:
        """Whether the case begins with hidden states."""
        return self.form.startswith("linear")

    @property
    def divergence(self) -> str:
        """From a teacher, as `sgp.linear_distillation` calls it; "" without one."""
        return DIVERGENCES.get(self.form, "")

    @property
    def flops(self) -> float:
        """Of forward and backward on the kept rows, at the least.

        With a head 2 M V D for each of three matmuls, and for one more with a teacher's, plus what
        logits take: about 8 for each, counted from the formulas (maximum, difference, exponential,
        sum; exponential again, two multiplications and a subtraction).
        """
        rows = 8.0 * self.M * self.model.V * (2 if self.divergence else 1)
        matmuls = 3 + bool(self.divergence) if self.has_head else 0
        return rows + 2.0 * matmuls * self.M * self.model.V * self.model.D

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return int(getattr(torch, self.dtype).itemsize)

    @property
    def name(self) -> str:
        """What the case is called in tables, files and `--only`."""
        size = f"{self.model.name.replace(' ', '-')}, V={self.model.V}, N={self.N}"
        return f"{self.form}, {size}, kept={self.kept:g}, {self.dtype}, {self.pattern}"


def gpu_cases() -> list[Case]:
    """Every axis, the sizes of training runs first."""
    found = [
        Case(form, model, 8_192, kept)
        for kept, model, form in itertools.product((1.0, 0.25), MODELS, ("logits", "linear"))
    ]
    forms = ("logits", "linear")
    found += [Case(form, QWEN_3, 8_192, kept) for form in forms for kept in KEPT]
    found += [
        Case(form, QWEN_3, 8_192, kept)
        for form, kept in itertools.product(
            ("log-probs", "linear log-probs", OWN, KL, JSD), (1.0, 0.25)
        )
    ]
    found += [Case(form, QWEN_3, 8_192, 0.25, pattern="scattered") for form in forms]
    sizes = (2_048, 16_384, 32_768, 65_536)
    found += [Case(form, QWEN_3, N, 0.25) for N, form in itertools.product(sizes, forms)]
    found += [
        Case("logits", QWEN_3, 8_192, kept, dtype)
        for dtype, kept in itertools.product(("float32", "float16"), (1.0, 0.25))
    ]
    found += [Case("linear", QWEN_3, 8_192, 0.25, dtype) for dtype in ("float16", "float32")]
    return list(dict.fromkeys(found))


def cpu_cases() -> list[Case]:
    """The same axes, short: fewer tokens, narrower heads."""
    found = [Case("logits", TINY_LLAMA, 256, kept, "float32") for kept in KEPT]
    found += [Case("linear", TINY_LLAMA, 256, kept, "float32") for kept in KEPT]
    found += [Case("logits", model, 64, 0.25, "float32") for model in MODELS]
    found += [Case("linear", TINY_LLAMA, N, 0.25, "float32") for N in (128, 512)]
    found += [Case("logits", TINY_LLAMA, N, 0.25, "float32") for N in (128, 512)]
    found += [Case("linear", model, 64, 0.25, "float32") for model in (TINY_LLAMA, LLAMA_3_SMALL)]
    found += [
        Case("logits", TINY_LLAMA, 256, 0.25, "float32", "scattered"),
        Case("logits", TINY_LLAMA, 256, 0.25, "bfloat16"),
        Case("log-probs", TINY_LLAMA, 256, 0.25, "float32"),
        Case("linear log-probs", TINY_LLAMA, 256, 0.25, "float32"),
        *(
            Case(form, TINY_LLAMA, 256, kept, "float32")
            for form, kept in itertools.product((OWN, KL, JSD), (1.0, 0.25))
        ),
    ]
    return list(dict.fromkeys(found))


class Problem(NamedTuple):
    """The tensors of a case. What has gradients: `logits`, or `hidden` and `weight`."""

    case: Case
    logits: Tensor | None  # (N, V)
    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D)
    labels: Tensor  # (N,) int64, -100 where ignored; not to be shifted
    selection: sgp.Selection
    rows: Tensor  # (M,) int64: the rows that are kept
    target: Tensor  # (M,) int64: their targets
    teacher: Tensor | None = None  # (N, D) hidden states of one, constant
    teacher_weight: Tensor | None = None  # (V, D)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What the gradient is asked of."""
        return tuple(x for x in (self.logits, self.hidden, self.weight) if x is not None)

    def fresh(self) -> Problem:
        """The same with logits of its own, for a rival that overwrites them."""
        if self.logits is None:
            return self
        return self._replace(logits=self.logits.detach().clone().requires_grad_())


def make(case: Case, device: torch.device, *, rows: int | None = None) -> Problem:
    """Random tensors, the same ones for the same case; of its first `rows` tokens alone.

    Logits are normal with standard deviation 2.5, which gives a freshly sampled token about 3 nats;
    where there is a head, the hidden states are scaled so that its logits are such.
    """
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    N, V, D = case.N, case.model.V, case.model.D

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype, generator=generator)

    labels = torch.randint(V, (N,), device=device, generator=generator)
    labels = torch.where(_kept(case, device), labels, -100)
    if rows is not None:  # a stretch with both kinds of token, where there is one
        first = max(0, min(N - rows, int((labels == -100).sum().clamp(max=SEQUENCE)) - rows // 2))
        labels = labels[first : first + rows]
        N = rows
    selection = sgp.Selection.from_labels(labels.cpu()).to(device)
    logits = hidden = weight = teacher = teacher_weight = None
    if case.has_head:
        hidden = normal(N, D).requires_grad_()
        weight = normal(V, D).mul_(2.5 / D**0.5).requires_grad_()
        if case.divergence:
            teacher, teacher_weight = normal(N, D), normal(V, D).mul_(2.5 / D**0.5)
    else:
        logits = normal(N, V).mul_(2.5).requires_grad_()
    return Problem(
        case, logits, hidden, weight, labels, selection, selection.rows, selection.target, teacher,
        teacher_weight,
    )  # fmt: skip


def _kept(case: Case, device: torch.device) -> Tensor:
    """(N,) bool."""
    position = torch.arange(case.N, device=device)
    if case.pattern == "scattered":
        order = torch.randperm(case.N, generator=torch.Generator().manual_seed(1)).to(device)
        return order < case.M
    length = min(case.N, SEQUENCE)
    return position % length >= length - round(length * case.kept)
