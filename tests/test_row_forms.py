"""The forms of the row kernel: which line of the table a row gets, and what every form computes.

Interpreted, the threads of a program and the programs of a cluster are one: blocks, pieces, lanes
and masks are those of a GPU, what they exchange is not seen here (tests/test_resources.py reads it
in the compiled code).
"""

import itertools

import pytest
import torch

import sgp
from bench.proof.interpreter import watch_accesses
from sgp.kernels import launch, layout, table
from sgp.kernels.table import Row, Target
from sgp.rows import by_triton
from sgp.rows.by_torch import Wanted, new_outputs
from sgp.rows.recipe import Recipe
from tests.oracle import assert_no_worse, check_cross_entropy, relative_error

IGNORE = -100
H100 = Target("cuda", 90, 132, (3, 9))
H200 = H100._replace(memory=141 << 30)
B200 = Target("cuda", 100, 148, (3, 9), 180 << 30)
WITHOUT_CLUSTERS = {
    "A100": Target("cuda", 80, 108, (3, 9)),
    "RTX 5090": Target("cuda", 120, 170, (3, 9)),
    "H100, Triton 3.7": H100._replace(triton=(3, 7)),
    "MI300": Target("hip", 0, 304, (3, 9)),
}
KINDS = [
    Row(0, light, quiet, wide, edges, True, itemsize, halving, gradient, argmax)
    for light, (quiet, argmax), (wide, edges), (itemsize, halving), gradient in itertools.product(
        (True, False),
        ((True, False), (False, False), (False, True)),
        ((True, False), (True, True), (False, False)),
        ((2, False), (4, False), (4, True)),
        (True, False),
    )
    if gradient or not halving
]
SIZES = (1, 255, 257, 4_096, 4_097, 8_193, 32_000, 50_257, 65_536, 99_999, 128_256, 151_936)
SIZES = (*SIZES, 163_840, 163_841, 196_609, 248_320, 256_000, 262_144, 262_145, 1_000_000)


# -- the table -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", table.FORMS)
@pytest.mark.parametrize("target", [H100, H200, B200, *WITHOUT_CLUSTERS.values()], ids=str)
def test_every_row_has_a_line(target, form):
    """One whose threads have whole lanes and registers that there are; or resident is refused."""
    for kind, V in itertools.product(KINDS, SIZES):
        row = kind._replace(V=V)
        try:
            line = table.choose(row, target, form)
        except ValueError as error:
            refused = {
                "resident": f"cannot hold rows of {V} columns",
                "staying": "no lines for AMD"
                if target.backend == "hip"
                else "(nothing is refused)",
            }
            assert refused[form] in str(error)  # noqa: PT017
            continue
        assert line.registers <= 255
        assert line.registers * line.threads * line.per_multiprocessor <= 65_536
        for block in (line.BV, line.BV_2 or line.BV):
            assert block % (line.threads * line.programs) == 0, "every thread has whole lanes"
        if line.form == "resident":
            assert line.BV * line.pieces >= V, (row, line)
            pieces = (1,) if line.programs == 1 else table.PIECES
            fewer = max((k for k in pieces if k < line.pieces), default=0)
            assert line.BV * fewer < V, "no piece is all empty lanes"
        assert line.stays == (form == "staying")


@pytest.mark.parametrize("target", WITHOUT_CLUSTERS.values(), ids=WITHOUT_CLUSTERS)
def test_no_clusters_where_there_are_none(target):
    for kind, V in itertools.product(KINDS, SIZES):
        assert table.choose(kind._replace(V=V), target, "auto").programs == 1
    head = Row(151_936, itemsize=4, halving=True)
    assert table.choose(head, target, "auto").form == "streaming"
    with pytest.raises(ValueError, match=f"4096 is the most.*no clusters.* {target.backend} "):
        table.choose(head, target, "resident")


def test_clusters_only_where_they_won():
    """On an H100, the head's float32 rows from 100 000 columns on; bf16 rows lose by a third."""
    for V in SIZES:
        line = table.choose(Row(V, itemsize=4, halving=True), H100, "auto")
        assert (line.programs > 1) == (100_000 <= V <= 262_144), V
        predicted = Row(V, quiet=False, itemsize=4, halving=True, argmax=True)
        assert table.choose(predicted, H100, "auto").programs == 1, "its registers would spill"
        assert table.choose(Row(V), H100, "auto").programs == 1
        assert table.choose(Row(V, itemsize=4), H100, "auto").programs == 1
    odd = Row(151_936, light=False, itemsize=4, halving=True)
    assert table.choose(odd, H100, "auto").form == "streaming"


def test_what_triton_3_8_makes_of_clusters():
    """It fails on the sums of smoothing and statistics, and on ten pieces; seen with 3.8.0."""
    old = H100._replace(triton=(3, 8))
    for V, pieces in ((131_072, 8), (151_936, 6), (262_144, 8)):
        line = table.choose(Row(V, itemsize=4, halving=True), old, "auto")
        assert (line.programs, line.pieces) == (8, pieces)
    reported = Row(151_936, quiet=False, itemsize=4, halving=True)
    assert table.choose(reported, old, "auto").form == "streaming"
    assert table.choose(reported, H100, "auto").form == "resident"
    with pytest.raises(ValueError, match=r"smoothing or statistics with Triton 3\.8"):
        table.choose(reported, old, "resident")
    with pytest.raises(ValueError, match="262144 is the most on cuda 90"):
        table.choose(Row(300_000, itemsize=4, halving=True), H100, "resident")


def test_what_was_timed():
    """The lines that the measurements of an H100 and an H200 chose; bench/results/gpu-*."""

    def line(V, target=H100, **kind):
        found = table.choose(Row(V, **kind), target, "auto")
        second = found.BV_2 or found.BV
        return found.threads, found.BV // found.threads, second // found.threads, found.descends

    assert line(32_000) == line(50_264) == (512, 32, 16, False)
    assert line(128_256) == line(151_936) == (1_024, 32, 32, False)
    assert line(262_144) == (1_024, 32, 16, True)
    assert line(32_000, H200) == (256, 32, 16, False)
    assert line(50_257, H200, edges=True) == line(50_264, H200) == (512, 32, 16, False)
    assert line(128_256, H200) == line(262_144, H200) == (1_024, 32, 16, False)
    head = {"itemsize": 4, "halving": True}
    assert line(32_000, **head) == (1_024, 16, 8, False)
    old = H100._replace(triton=(3, 7))
    assert line(151_936, old, **head) == (1_024, 16, 8, True)
    assert line(151_936, H200._replace(triton=(3, 7)), **head) == (1_024, 16, 16, False)


@pytest.mark.parametrize("V", [65_544, 65_545, 65_548])
@pytest.mark.parametrize("first", [0, 1, 8])
def test_which_rows_have_wide_accesses(V, first):
    """All that begin at 16 bytes and lie alike, gradient and logits; V need not be a multiple."""
    base = torch.empty(3, V + 8, dtype=torch.bfloat16)
    logits = layout.matrix(base[:, first : first + V])
    own = layout.matrix(torch.empty(3, V, dtype=torch.bfloat16))
    target = torch.tensor([0, 1, 2])

    def call(dlogits):
        return launch.row_forward(
            logits, dlogits, target, torch.empty(3), None, None, launch.Options(),
            V=V, ignore_index=IGNORE, form="auto",
        ).constants  # fmt: skip

    begins = first in (0, 8)
    assert call(logits)["VECTOR"] == (8 if begins else 1)
    assert call(logits)["EDGES"] == (begins and V % 8 != 0)
    # Rows of the gradient lie V columns apart, those of the logits V + 8: alike, modulo 8.
    assert call(own)["VECTOR"] == (8 if begins else 1)
    wider = layout.matrix(torch.empty(3, V + 1, dtype=torch.bfloat16)[:, :V])
    assert call(wider)["VECTOR"] == 1, "rows that drift apart"


def test_a_program_that_stays_takes_more_than_one_row():
    logits = layout.matrix(torch.empty(300, 32_000, dtype=torch.bfloat16))

    def call(N, form, on=H100):
        target = torch.zeros(N, dtype=torch.int64)
        return launch.row_forward(
            logits, logits, target, torch.empty(N), None, None, launch.Options(),
            V=32_000, ignore_index=IGNORE, on=on, form=form,
        )  # fmt: skip

    assert call(300, "staying").grid == (264,)  # two a multiprocessor
    assert call(300, "staying", H200).grid == (300,)  # four
    assert call(5, "staying").grid == (5,)
    assert call(300, "auto").grid == (300,)


@pytest.mark.parametrize("target", [H100, B200, *WITHOUT_CLUSTERS.values()], ids=str)
def test_no_more_threads_than_a_program_may_have(target):
    """1024, in warps of 32 on NVIDIA and of 64 on AMD; of every kernel and line."""
    rows = torch.zeros(2, dtype=torch.int64)
    warp = 64 if target.backend == "hip" else 32
    for V, form in itertools.product((4_096, 128_256, 262_144), ("auto", "streaming", "blockwise")):
        logits = layout.matrix(torch.empty(2, V, dtype=torch.bfloat16, device="meta"))
        options, shared = launch.Options(), {"V": V, "ignore_index": IGNORE, "on": target}
        for call in (
            launch.row_forward(
                logits, logits, rows, torch.empty(2), None, None, options, form=form, **shared
            ),
            launch.row_gradient(logits, logits, rows, torch.empty(2, 3), options, **shared),
            launch.multiply(logits, rows, torch.ones(()), N=2, **shared),
        ):
            assert call.constants["num_warps"] * warp <= 1_024, (V, form, call.kernel)


# -- what they compute -----------------------------------------------------------------------------


@pytest.fixture(autouse=True, params=["streaming", "staying"])
def form(request, monkeypatch):
    torch.manual_seed(31)
    monkeypatch.setenv("SGP_BACKEND", "triton")
    monkeypatch.setenv("SGP_ROW_FORM", request.param)
    with watch_accesses():
        yield request.param


ONCE = pytest.mark.parametrize("form", ["staying"], indirect=True)  # the test names its own form


def options_of(name, N, V):
    weight, token_weight = torch.rand(V) + 0.5, torch.rand(N)
    return {
        "plain": {},
        "softcap": {"softcap": 8.0},
        "negative scale": {"logit_scale": -0.7, "lse_square_scale": 1e-3},
        "smoothing": {"label_smoothing": 0.1},
        "class weight": {"weight": weight},
        "light": {
            "label_smoothing": 0.1,
            "logit_scale": 0.7,
            "lse_square_scale": 1e-3,
            "token_weight": token_weight,
        },
        "all": {
            "label_smoothing": 0.1,
            "logit_scale": -1.3,
            "lse_square_scale": 1e-3,
            "softcap": 8.0,
            "weight": weight,
            "token_weight": token_weight,
        },
    }[name]


@pytest.mark.parametrize("option", ["plain", "softcap", "negative scale", "smoothing", "all"])
@pytest.mark.parametrize(
    ("V", "dtype"),
    [
        (12_280, torch.float32),  # some blocks, or one; the last eight lanes are empty
        (128_256, torch.bfloat16),  # Llama 3
        (151_936, torch.float32),  # Qwen 3
    ],
    ids=str,
)
def test_options(V, dtype, option):
    logits = (3 * torch.randn(2, V)).to(dtype)
    target = torch.tensor([V - 1, V // 2])
    check_cross_entropy(logits, target, reduction="mean", **options_of(option, 2, V))


@pytest.mark.parametrize("option", ["plain", "light"])
@pytest.mark.parametrize(
    ("V", "dtype"),
    [
        (50_257, torch.float16),  # GPT-2: rows begin and end between two accesses
        (50_257, torch.bfloat16),
        (248_320, torch.float32),  # Qwen 3.5
        (248_320, torch.bfloat16),
    ],
    ids=str,
)
def test_odd_and_large_vocabularies(V, dtype, option):
    logits = (3 * torch.randn(3, V)).to(dtype)
    target = torch.tensor([0, IGNORE, V - 1])
    check_cross_entropy(logits, target, reduction="mean", **options_of(option, 3, V))


@pytest.mark.parametrize(
    ("N", "V"),
    [(0, 8_200), (1, 8_200), (64, 8_200), (1, 151_936), (20, 50_264)],
)
def test_few_and_many_rows(N, V):
    logits = 3 * torch.randn(N, V)
    target = torch.randint(V, (N,))
    target[1::2] = IGNORE
    check_cross_entropy(logits, target, torch.randn(N), reduction="none")


@ONCE
@pytest.mark.parametrize("option", ["plain", "light", "all"])
@pytest.mark.parametrize("V", [3_001, 20_008])
def test_every_form_says_the_same(option, V, form, monkeypatch):
    """Loss, gradient and statistics; and each form the same bits from run to run."""
    logits = 3 * torch.randn(3, V)
    target = torch.tensor([5, IGNORE, V - 1])
    options = options_of(option, 3, V)
    results = {}
    for form in ("auto", "streaming", "staying", "blockwise") * 2:  # noqa: PLR1704
        monkeypatch.setenv("SGP_ROW_FORM", form)
        leaf = logits.clone().requires_grad_()
        loss, stats = sgp.cross_entropy(leaf, target, reduction="sum", return_stats=True, **options)
        loss.backward()
        values = (loss.detach(), leaf.grad, stats.log_prob, stats.entropy, stats.lse)
        if form in results:
            assert all(torch.equal(a, b) for a, b in zip(values, results[form], strict=True)), form
        results[form] = values
    for name in ("auto", "staying", "blockwise"):
        for a, b in zip(results[name], results["streaming"], strict=True):
            assert relative_error(a, b.double()) < 1e-6
    for a, b in zip(results["staying"], results["streaming"], strict=True):
        assert torch.equal(a, b), "they differ in when a block is loaded alone"


@pytest.mark.parametrize("V", [8_200, 8_203])
@pytest.mark.parametrize("p", ["certain", "even", "impossible"])
def test_the_target_anywhere(V, p):
    """It is left out of one lane's sum, and its gradient is stored after the others.

    With 8203 columns every row begins at another place between two accesses, and the target stands
    before the first, in one, or after the last.
    """
    positions = torch.tensor([0, 1, 3, 4, 7, 8, 2_047, 2_048, 4_095, 4_096, 8_191, 8_192, 8_195])
    positions = torch.cat([positions, torch.arange(V - 8, V)])
    logits = torch.randn(len(positions), V)
    value = {"certain": 30.0, "even": 0.0, "impossible": -80.0}[p]
    logits[torch.arange(len(positions)), positions] = value
    check_cross_entropy(logits, positions, torch.randn(len(positions)), reduction="none")


@pytest.mark.parametrize("V", range(1, 20))
def test_rows_shorter_than_two_accesses(V):
    logits = 3 * torch.randn(9, V)
    target = torch.arange(9) % V
    target[3] = IGNORE
    check_cross_entropy(logits, target, torch.randn(9), reduction="none")


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("top", [1e3, 1e9, 2e12, 2.5e38, 3.3e38])
def test_logits_of_any_size(top, sign):
    """Where max * log2(e) rounds, where float32 has no fraction left, where it would overflow."""
    logits = torch.full((3, 5_000), sign * top)
    logits[:, 1:] *= 1 - sign * torch.rand(3, 4_999).clamp(min=1e-7)
    logits[1, 17] = logits[1, 0]
    logits[2] = sign * top
    check_cross_entropy(logits, torch.tensor([0, 17, 5]), torch.randn(3), reduction="none")


def test_blocks_of_minus_infinity():
    """Whole lanes, the target's among them in the second row, whose loss is infinite."""
    logits = torch.randn(2, 10_000)
    logits[:, :4_096] = -torch.inf
    logits[:, 6_144:] = -torch.inf
    target = torch.tensor([5_000, 0])
    loss = sgp.cross_entropy(logits, target, reduction="none")
    truth = sgp.reference.cross_entropy(logits.double(), target, reduction="none")
    torch.testing.assert_close(loss, truth.float())
    assert loss[1] == torch.inf
    check_cross_entropy(logits[:1], target[:1])


@pytest.mark.parametrize("where", [100, 5_000, 9_999])
def test_a_nan_anywhere_is_seen(where):
    logits = torch.randn(2, 10_000)
    logits[0, where] = torch.nan
    leaf = logits.requires_grad_()
    loss = sgp.cross_entropy(leaf, torch.tensor([7, 7]), reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [True, False]
    assert leaf.grad[0].isnan().all()
    assert leaf.grad[1].isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities(temperature):
    """Statistics alone, and their gradient from what was saved."""
    V = 32_000
    logits = 3 * torch.randn(3, V)
    target = torch.tensor([1, IGNORE, V - 1])

    def run(function, x):
        leaf = x.detach().clone().requires_grad_()
        result = function(leaf, target, temperature=temperature)
        (result.log_prob.sum() + 0.1 * result.entropy.sum()).backward()
        return (leaf.grad, *(value.detach() for value in result[:3]))

    truth = run(sgp.reference.token_log_probs, logits.double())
    plain = run(sgp.reference.token_log_probs, logits)
    for values in zip(run(sgp.token_log_probs, logits), plain, truth, strict=True):
        assert_no_worse(*values, interpreted=True)


@ONCE
@pytest.mark.parametrize("option", ["plain", "light"])
def test_a_cluster_says_the_same(option, form, monkeypatch):
    """Float32 rows of a head, the gradient in bf16 over them: read once."""
    V = 100_008
    logits, target = 3 * torch.randn(3, V), torch.tensor([5, IGNORE, V - 1])
    smoothing = 0.1 if option == "light" else 0.0
    recipe = Recipe(IGNORE, smoothing)
    results = []
    for form in ("auto", "streaming"):  # noqa: PLR1704
        monkeypatch.setenv("SGP_ROW_FORM", form)
        rows = logits.clone()
        out = new_outputs(rows, 3, Wanted(stats=True))
        place = rows.view(torch.bfloat16)[:, :V]
        with watch_accesses() as seen:
            by_triton.forward(rows, place, target, None, None, None, recipe, out)
        read = seen.of(rows).loaded / (2 * V * 4)
        assert read == pytest.approx(1 if form == "auto" else 2, abs=0.01)
        values = [x for x in (*out[:-1], place.float()) if x is not None and x.numel()]
        results.append([x.clone() for x in values])
    for name, a, b in zip(("loss", "log_prob", "entropy", "lse"), *results, strict=False):
        assert relative_error(a, b.double()) < 1e-6, name
    assert relative_error(results[0][-1], results[1][-1].double()) < 2**-7, "bf16, truncated"


# -- the softcap -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["resident", "streaming"], indirect=True)
@pytest.mark.parametrize("softcap", [30.0, 32.0, 0.5], ids=str)
def test_infinite_logits_have_the_score_of_the_softcap(softcap):
    """As in PyTorch."""
    logits = 40.0 * torch.randn(4, 500, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([3, 0, 1, 2])
    logits[1, 7] = float("inf")
    logits[2, 7] = -float("inf")
    logits[3, 2] = float("inf")
    with watch_accesses():
        loss, gradient = check_cross_entropy(logits, target, softcap=softcap)
    assert loss.isfinite()
    assert gradient.isfinite().all()
