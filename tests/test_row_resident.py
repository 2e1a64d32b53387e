"""Rows that stay on chip: which line of the table a row gets, and what its pieces compute.

Interpreted, the programs of a cluster are one: pieces, lanes and masks are those of a GPU, the
exchange between programs is not seen here (tests/test_resources.py reads it in the compiled code).
"""

import itertools

import pytest
import torch

import sgp
from bench.interpreter import watch_accesses
from sgp.kernels import launch, layout, table
from sgp.kernels.table import Line, Row, Target
from tests.oracle import assert_no_worse, check_cross_entropy, relative_error

IGNORE = -100
H100 = Target("cuda", 90, 132, (3, 9))
B200 = Target("cuda", 100, 148, (3, 9))
H20 = H100._replace(multiprocessors=78)  # Hopper with fewer multiprocessors in a group
OLD = H100._replace(triton=(3, 8))
WITHOUT_CLUSTERS = {
    "A100": Target("cuda", 80, 108, (3, 9)),
    "RTX 5090": Target("cuda", 120, 170, (3, 9)),
    "H100, Triton 3.7": H100._replace(triton=(3, 7)),
    "MI300": Target("hip", 0, 304, (3, 9)),
}
KINDS = [
    Row(0, light=light, plain=plain, wide=wide, itemsize=itemsize, halving=halving, gradient=grad)
    for light, plain, wide, (itemsize, halving), grad in itertools.product(
        (True, False),
        (True, False),
        (True, False),
        ((2, False), (4, False), (4, True)),
        (True, False),
    )
    if light or not plain
]
SIZES = (1, 255, 257, 4_096, 4_097, 8_193, 12_288, 12_289, 32_000, 50_257, 65_536, 128_256, 151_936)
SIZES = (*SIZES, 163_840, 163_841, 196_609, 248_320, 256_000, 262_144, 262_145, 1_000_000)


# -- the table -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [H100, B200, H20, OLD, *WITHOUT_CLUSTERS.values()], ids=str)
def test_a_row_fits_its_line(target):
    """And has no piece that is all empty lanes; what no line holds is streamed."""
    for kind, V in itertools.product(KINDS, SIZES):
        row = kind._replace(V=V)
        line = table.choose(row, target, "auto")
        if line.form == "resident":
            assert line.BV * line.pieces >= V, (row, line)
            assert line.pieces in table.PIECES
            fewer = max((k for k in table.PIECES if k < line.pieces), default=0)
            assert line.BV * fewer < V, (row, line)
        else:
            assert all(known.columns < V for known in table.resident_lines(row, target))


@pytest.mark.parametrize("target", WITHOUT_CLUSTERS.values(), ids=WITHOUT_CLUSTERS)
def test_no_clusters_where_there_are_none(target):
    for kind, V in itertools.product(KINDS, SIZES):
        assert table.choose(kind._replace(V=V), target, "auto").programs == 1
    assert table.choose(Row(151_936), target, "auto").form == "streaming"
    assert table.choose(Row(8_000), target, "auto").form == "resident"
    with pytest.raises(ValueError, match=f"8192 is the most.* {target.backend} .*Triton 3"):
        table.choose(Row(8_193), target, "resident")


def test_the_programs_that_share_a_row():
    """One where a row fits it with room; then as few as hold it; 16 only where a GPU can."""

    def programs(V, target=H100, **kind):
        return table.choose(Row(V, **kind), target, "auto").programs

    assert [programs(V) for V in (1_000, 8_192, 16_384, 65_536, 151_936)] == [1, 1, 2, 4, 8]
    assert programs(151_936, light=False, plain=False) == 16
    assert table.choose(Row(151_936, light=False, plain=False), H20, "auto").form == "streaming"
    assert programs(151_936, H20) == 8


@pytest.mark.parametrize("target", [H100, B200], ids=["H100", "B200"])
@pytest.mark.parametrize(("itemsize", "halving"), [(2, False), (4, False), (4, True)], ids=str)
def test_vocabularies_that_must_be_read_once(itemsize, halving, target):
    """Light rows up to 262 144 columns, every option up to 151 936."""
    for V, light in itertools.product((V for V in SIZES if V % 8 == 0), (True, False)):
        row = Row(V, light=light, plain=False, itemsize=itemsize, halving=halving)
        if (262_144 if light else 151_936) >= V:
            assert table.choose(row, target, "auto").form == "resident", row


def test_triton_3_8_has_clusters_for_plain_rows_of_few_pieces():
    """Its compiler fails on more; seen with 3.8.0."""
    assert table.choose(Row(151_936), OLD, "auto") == Line("resident", 32_768, 512, 5, 8)
    assert table.choose(Row(151_936, plain=False), OLD, "auto").form == "streaming"
    assert table.choose(Row(10_000, plain=False, light=False), OLD, "auto").form == "resident"


def test_rows_that_do_not_begin_at_16_bytes_are_narrow():
    """A wide row's line has no registers for accesses of one element."""
    base = torch.randn(2, 131_080, dtype=torch.bfloat16)
    for first, lines in ((0, table.LIGHT), (8, table.LIGHT), (1, ())):
        logits = layout.matrix(base[:, first : first + 65_536 + 8])
        call = launch.row_forward(
            logits, logits, torch.tensor([0, 1]), torch.empty(2), None, None, launch.Options(),
            V=65_544, ignore_index=IGNORE, form="auto",
        )  # fmt: skip
        assert (call.kernel is launch.row_resident) == bool(lines), first


def test_no_thread_has_more_registers_than_there_are():
    lines = [line for kind in KINDS for line in table.resident_lines(kind, H100)]
    for line in lines:
        threads = line.threads * line.per_multiprocessor
        assert line.registers * threads <= 65_536
        assert line.registers <= 255
        assert line.BV % (line.threads * line.programs) == 0, "every thread has whole lanes"


# -- what they compute -----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def resident(monkeypatch):
    torch.manual_seed(31)
    monkeypatch.setenv("SGP_BACKEND", "triton")
    monkeypatch.setenv("SGP_ROW_FORM", "resident")
    with watch_accesses():
        yield


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
        (12_280, torch.float32),  # three pieces, or six with softcap; eight lanes of the last empty
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
        (50_257, torch.float16),  # GPT-2: accesses of one element
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


@pytest.mark.parametrize("option", ["plain", "light", "all"])
def test_the_streaming_form_says_the_same(option, monkeypatch):
    """Loss, gradient and statistics; and each form the same bits from run to run."""
    V = 32_000
    logits = 3 * torch.randn(3, V)
    target = torch.tensor([5, IGNORE, V - 1])
    options = options_of(option, 3, V)
    results = {}
    for form in ("resident", "streaming", "resident", "streaming"):
        monkeypatch.setenv("SGP_ROW_FORM", form)
        leaf = logits.clone().requires_grad_()
        loss, stats = sgp.cross_entropy(leaf, target, reduction="sum", return_stats=True, **options)
        loss.backward()
        values = (loss.detach(), leaf.grad, stats.log_prob, stats.entropy, stats.lse)
        if form in results:
            assert all(torch.equal(a, b) for a, b in zip(values, results[form], strict=True)), form
        results[form] = values
    for a, b in zip(results["resident"], results["streaming"], strict=True):
        assert relative_error(a, b.double()) < 1e-6


@pytest.mark.parametrize("position", [0, 2_047, 2_048, 4_095, 8_199])
@pytest.mark.parametrize("p", ["certain", "even", "impossible"])
def test_the_target_at_the_edge_of_a_piece(position, p):
    """It is left out of one lane's sum, and its gradient is stored after the others."""
    logits = torch.randn(1, 8_200)
    logits[0, position] = {"certain": 30.0, "even": 0.0, "impossible": -80.0}[p]
    check_cross_entropy(logits, torch.tensor([position]))


def test_pieces_of_minus_infinity():
    """Whole pieces, the target's among them in the second row, whose loss is infinite."""
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
def test_a_nan_in_any_piece_is_seen(where):
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


def test_the_chunks_of_a_linear_head_are_resident():
    """float32 logits of a bf16 head, the gradient in the first half of each row: read once."""
    from sgp import row_triton

    seen = []
    launch = row_triton.launch.row_forward

    def spy(*arguments, **options):
        call = launch(*arguments, **options)
        seen.append(call.kernel)
        return call

    V, D = 12_288, 8
    hidden = torch.randn(4, D, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, D, dtype=torch.bfloat16, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_triton.launch, "row_forward", spy)
        sgp.linear_cross_entropy(hidden, weight, torch.tensor([0, IGNORE, 5, V - 1])).backward()
    assert seen == [row_triton.launch.row_resident]


# -- the softcap -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["resident", "streaming"])
@pytest.mark.parametrize("softcap", [30.0, 32.0, 0.5], ids=str)
def test_infinite_logits_have_the_score_of_the_softcap(softcap, form, monkeypatch):
    """As in PyTorch."""
    monkeypatch.setenv("SGP_BACKEND", "triton")
    monkeypatch.setenv("SGP_ROW_FORM", form)
    logits = 40.0 * torch.randn(4, 500, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([3, 0, 1, 2])
    logits[1, 7] = float("inf")
    logits[2, 7] = -float("inf")
    logits[3, 2] = float("inf")
    with watch_accesses():
        loss, gradient = check_cross_entropy(logits, target, softcap=softcap)
    assert loss.isfinite()
    assert gradient.isfinite().all()
