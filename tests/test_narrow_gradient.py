"""A bf16 or fp16 gradient in the first half of each float32 row that it is made from.

So the linear head stores it: no second buffer, and the next matmuls read it with row stride 2 V.
Columns [i, j) of the gradient lie over columns [i / 2, j / 2) of the logits, which must have been
read by then: by earlier blocks, or by the same block and, on a GPU, by all of its threads.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.proof.interpreter import watch_accesses
from sgp.rows import by_triton
from sgp.rows.by_torch import Upstream, Wanted, new_outputs
from sgp.rows.recipe import Recipe

ROOT = Path(__file__).parent.parent
IGNORE = -100
GUARD = 2  # rows before and after, which no kernel was given
VOCABULARIES = {
    7: "rows that begin anywhere, accesses of one element",
    300: "one block, with padding",
    8_192: "exactly one block, or two where options are on",
    8_193: "blocks of 4096 columns, of which the last has one",
    20_001: "five blocks: the third is stored where the second was read",
    100_008: "a cluster's, seven pieces; thirteen blocks, or more",
}
CASES = pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.bfloat16, "off"), (torch.bfloat16, "on"), (torch.float16, "on")],
    ids=str,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(24)


@pytest.fixture(params=["resident", "streaming", "staying"])
def fits(request, monkeypatch):
    """Forces a form; answers whether it can hold rows of V columns."""
    monkeypatch.setenv("SGP_ROW_FORM", request.param)
    if request.param != "resident":
        return lambda _V, _options: True
    return lambda V, options: V <= 4_096 or (options == "off" and V == 100_008)


class Rows:
    """Float32 rows between guards, and the gradient's place in the first halves."""

    def __init__(self, V, dtype):
        self.target = torch.tensor([V - 1, IGNORE, V // 2, IGNORE])
        N = self.target.numel()
        self.storage = 3 * torch.randn(N + 2 * GUARD, V)
        self.before = self.storage.clone()
        self.logits = self.storage[GUARD : GUARD + N]
        self.place = self.logits.view(dtype)[:, :V]
        assert self.place.data_ptr() == self.logits.data_ptr()
        assert self.place.stride() == (2 * V, 1)

    def assert_only_first_halves_changed(self):
        """No byte outside them, in kept rows, in ignored rows, or beyond the first and last."""
        V = self.place.shape[1]
        outside = torch.ones(self.storage.shape[0], 2 * V, dtype=torch.bool)
        outside[GUARD:-GUARD, :V] = False
        now, before = (x.view(torch.int16) for x in (self.storage, self.before))
        assert torch.equal(now[outside], before[outside]), "bytes outside the first halves changed"
        assert not torch.equal(now[~outside], before[~outside])


def options_of(name, rows):
    """(recipe, class weights, row weights, scale), everything off or on."""
    N, V = rows.place.shape
    if name == "off":
        return Recipe(IGNORE), None, None, None
    recipe = Recipe(IGNORE, 0.1, 5.0, -0.7, 1e-3, 0.8)
    return recipe, torch.rand(V), torch.rand(N), torch.tensor(0.25)


def forward(logits, place, target, recipe, weight, row_weight, scale):
    out = new_outputs(logits, target.numel(), Wanted(saved=True, stats=True))
    with watch_accesses():
        by_triton.forward(logits, place, target, weight, row_weight, scale, recipe, out)
    return out


@pytest.mark.parametrize("V", VOCABULARIES)
@CASES
def test_forward_writes_the_bits_of_a_separate_buffer(dtype, options, V, fits):
    rows = Rows(V, dtype)
    arguments = (rows.target, *options_of(options, rows))
    if not fits(V, options):
        with pytest.raises(ValueError, match=f"cannot hold rows of {V} columns: 4096 is the most"):
            forward(rows.logits, rows.place, *arguments)
        return
    separate = torch.full(rows.place.shape, torch.nan, dtype=dtype)
    expected = forward(rows.logits.clone(), separate, *arguments)
    out = forward(rows.logits, rows.place, *arguments)
    assert torch.equal(rows.place, separate)
    assert not rows.place[rows.target == IGNORE].view(torch.int16).any()
    for name, values, others in zip(out._fields, out, expected, strict=True):
        assert (values is None and others is None) or torch.equal(values, others), name
    rows.assert_only_first_halves_changed()


@pytest.mark.parametrize("V", VOCABULARIES)
@CASES
def test_backward_writes_the_bits_of_a_separate_buffer(dtype, options, V):
    rows = Rows(V, dtype)
    recipe, weight, row_weight, scale = options_of(options, rows)
    kept = forward(rows.logits.clone(), None, rows.target, recipe, weight, row_weight, scale)
    upstream = Upstream()
    if options == "on":
        N = rows.target.numel()
        upstream = Upstream(torch.randn(N), torch.randn(N), kept.entropy)
    separate = torch.full(rows.place.shape, torch.nan, dtype=dtype)
    for logits, place in ((rows.logits.clone(), separate), (rows.logits, rows.place)):
        with watch_accesses():
            by_triton.backward(
                logits, place, rows.target, kept.saved, weight, row_weight, recipe, upstream
            )
    assert torch.equal(rows.place, separate)
    rows.assert_only_first_halves_changed()


@pytest.mark.parametrize("V", [7, 8_193])
def test_the_gradient_is_that_of_float32_rounded(V):
    """The interpreter truncates to bf16: up to one unit in the last place."""
    rows = Rows(V, torch.bfloat16)
    wide = torch.empty_like(rows.logits)
    arguments = (rows.target, *options_of("on", rows))
    forward(rows.logits.clone(), wide, *arguments)
    forward(rows.logits, rows.place, *arguments)
    torch.testing.assert_close(rows.place.float(), wide, rtol=2**-7, atol=0.0)


# -- what the compiler makes of it -----------------------------------------------------------------

COMPILE = """
import json, re, sys, tempfile
import triton
from bench.proof import binary, kernel_cases

triton.runtime.driver.set_active(binary.NamedTarget(kernel_cases.TARGETS["sm_90"]))
for case in json.loads(sys.argv[1]):
    call = kernel_cases.call_of(kernel_cases.Case(*case), kernel_cases.target_of("sm_90"))
    kernel = call.kernel.warmup(*call.arguments, grid=call.grid, **call.constants)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass = binary.tool("cuobjdump", "-sass", file.name)
    name, num_warps = call.kernel.__name__, call.constants["num_warps"]
    fused = kernel.metadata.enable_fp_fusion
    print(json.dumps([name, num_warps, fused, kernel.asm["ttgir"], sass]))
"""
# (kernel, V, dtype of the logits, options, layout, form)
COMPILED = [
    ("forward", 256, "fp32", "plain", "head"),  # one warp holds the row
    ("forward", 8_192, "fp32", "logged", "head"),  # streamed
    ("forward", 151_936, "fp32", "plain", "head"),  # a cluster
    ("forward", 151_936, "bf16", "logged", "rows"),
    ("forward", 151_936, "fp32", "plain", "head", "streaming"),
    ("backward", 151_936, "fp32", "log-probs", "head"),
    ("backward", 50_257, "fp32", "plain", "head"),  # accesses of one element
]


def accesses(sass, *, wide):
    """The machine code as a word: what it does to memory, in the order of its addresses.

    L a load of logits, S a store of the gradient, T one of the target's alone (masked), B a barrier
    of the program, C of the cluster, R an exchange within a warp, X the end; ^ a jump back. Scalars
    (target, saved statistics, losses) are left out: 32 bits, without the logits' eviction hint.
    """
    word = ""
    pattern = r"/\*([0-9a-f]{4,})\*/ +(@!?U?P\w+ )? *([A-Z]\w*)([\w.]*)([^;]*);"
    for address, predicate, name, suffix, operands in re.findall(pattern, sass):
        if name == "LDG" and re.search("128|EF|EL", suffix):
            word += "L"
        elif name == "STG" and re.search("128|64|U16", suffix):
            word += "T" if predicate and "U16" in suffix and wide else "S"
        elif name == "BAR":
            word += "B"
        elif name == "UCGABAR_WAIT":
            word += "C"
        elif name == "SHFL":
            word += "R"
        elif name == "EXIT" and not predicate:
            word += "X"
        elif name == "BRA" and int(operands.split("0x")[1], 16) < int(address, 16):
            word += "^"
    return word


def test_all_is_loaded_before_anything_is_stored(tmp_path):
    """In the code for an H100, of every kernel that writes gradients.

    Where the gradient is narrower than the logits it lies over, a barrier stands between a block's
    loads and its stores (for some blocks, as `wait_for_loads` has it): without it a thread may
    store over logits that another has still to load, a race that no test on a CPU, and hardly one
    on a GPU, would see. A resident row's stores depend on a sum over all that was loaded, which all
    warps, and all programs of a cluster, have met for. The target's gradient comes after a barrier,
    over the same layout as the others.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment.pop("SGP_ROW_FORM", None)
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(COMPILED)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert {name for name, *_ in kernels} == {"row_resident", "row_streaming", "row_backward"}
    assert kernels[0][1] == 1, "the smallest row is one warp's"
    for case, (name, num_warps, fused, ttgir, sass) in zip(COMPILED, kernels, strict=True):
        assert not fused, "x * scale - max in one rounding: the largest exponent would not be 0"
        wide = case[1] % 8 == 0
        word = accesses(sass, wide=wide)
        if wide and name == "row_resident":
            assert re.search(r"B+T+S?[BC]*\^?X", word), f"{name} {case}: {word}"
        stores = re.findall(r"ttg?\.store .*tensor<(\w+)x!tt\.ptr<bf16>, (#\w+)>", ttgir)
        assert len(set(stores)) == 1, f"{name} {case}: stores of more than one layout, {stores}"
        if name == "row_resident":
            meeting = "R" if num_warps == 1 else "B"
            meeting += ".*C" if 'num-ctas" = 1 ' not in ttgir else ""
            assert re.search(rf"L+[^LS]*{meeting}[^L]*S+B+T", word), f"{name} {case}: {word}"
            assert not re.search(r"[ST].*L", word[word.index("L") :]), f"{name} {case}: {word}"
            continue
        if name == "row_backward":  # the target's logit, a scalar, is loaded before the barrier
            assert re.search(r"^(S+\^*)*XB+L", word), f"{name} {case}: a race for it, {word}"
        # The loop that stores, then a barrier, then the target's gradient, by one thread.
        assert re.search(r"S+\^+B+[ST]+", word), f"{name} {case}: {word}"
        if case[4] == "head":
            assert not re.search(r"L[^BX]*S", word), (
                f"{name} {case}: a store may pass a load, {word}"
            )
            assert re.search(r"L+B+S+", word), f"{name} {case}: no barrier in {word}"
