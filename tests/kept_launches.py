"""Random launches put twice: by Triton's own way and as kept. Run in a process of its own.

    python tests/kept_launches.py CALLS SEED [MISSING ...]

What reaches Triton's launcher is recorded: which binary, grid, stream, metadata and every argument,
tuples flattened. Each call is made once with nothing kept and once with what earlier calls left;
both must put the same. A case is often an earlier one with one thing changed, so that whatever is
missing in a key shows. Nothing is compiled: Triton's own code decides which binary a call needs,
and here a binary is only who it is.

Prints a line of JSON for all calls, and one for each MISSING ("recipe", "options", "strides",
"alignment"), for a quarter of them with that left out of every key: the number of calls, of
launches, of those that were kept ones, of what is kept, and the differences.
"""

import json
import os
import random
import sys
from typing import Any, ClassVar, NamedTuple

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction

from bench.proof import standin
from sgp.rows import by_torch
from sgp.rows.recipe import Recipe

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# What a field of a case may be. Ints beside floats, because they compare as equal and compile
# otherwise; 1 and 16, because Triton compiles in a 1 and what 16 divides.
FIELDS: dict[str, tuple[Any, ...]] = {
    "operation": ("forward", "forward", "backward", "multiply", "mean_scale", "probabilities"),
    "N": (1, 3, 16, 64),
    "V": (1, 16, 64, 100, 264, 2_048),
    "dtype": DTYPES,
    "layout": ("rows", "rows", "wide", "shifted", "slice", "strided", "three levels"),
    "gradient": ("none", "in place", "rows", "wide", "shifted", "strided", "half of each row"),
    # Where a vector begins in its memory: at 16 bytes for the most part, or little is kept.
    "target": (0, 0, 0, 0, 2, 1),
    "weight": (None, None, None, 0, 4, 1),
    "row_weight": (None, None, 0, 0, 4, 1),
    "scale": (None, None, 0, 0, 4, 1),
    "saved": (0, 0, 0, 0, 4, 1),
    "statistics": (False, False, True),
    "argmax": (False, True),  # together with these
    "need_saved": (False, True),
    "lse": (None, None, 0, 0, 1),
    "entropy": (None, None, 0, 0, 1),
    "form": (None, None, "auto", "streaming"),
    "hook": (False, False, True),  # a profiler's, before every launch
    "ignore_index": (-100, -100, 1, 0, 16),
    "label_smoothing": (0.0, 0.0, 0, 0.1, 1, 1.0),
    "softcap": (None, None, 30, 30.0, 20.0, 1, 1.0),
    "logit_scale": (1.0, 1, 2, 2.0, 0.5),
    "lse_square_scale": (0.0, 0, 1, 1.0, 1e-4),
    "temperature": (1.0, 1, 2, 2.0, 0.5),
}


VECTORS = ("target", "weight", "row_weight", "scale", "saved", "lse", "entropy")
CONSTANTS = [name for name in Recipe._fields if name != "ignore_index"]


class Uncompiled(CompiledKernel):
    """A binary that is only who it is."""

    def __init__(self, src, options):
        self.src, self.hash, self.name = src, "", src.fn.__name__
        self.metadata, self.metadata_group = Metadata(self.name), {}
        self.packed_metadata = (self.name, id(self), str(options))
        self.kernel = b""
        self.module = self.function = self._run = None
        self._module_pid = None

    def __del__(self):
        """There is nothing to unload."""


class Metadata(NamedTuple):
    """What is asked of a binary before its first launch."""

    name: str
    shared: int = 0
    num_warps: int = 1
    warp_size: int = 32
    tmem_size: None = None


def compiled(src, target=None, options=None, **_):
    """In the place of `triton.compiler.compile`."""
    assert target is not None
    return Uncompiled(src, options)


class Utilities:
    """What Triton asks of its module in C."""

    handles = 0

    def load_binary(self, *_):
        """(module, function, registers, spills, most threads); each a handle of its own."""
        Utilities.handles += 1
        return Utilities.handles, Utilities.handles, 64, 0, 1024

    def get_device_properties(self, _):
        """Of an H100."""
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132}


class Recorder:
    """In the place of a launcher: one for each binary."""

    launches: ClassVar[list[tuple[Any, ...]]] = []
    known: ClassVar[dict[int, str]] = {}  # where the tensors of a case begin

    def __init__(self, src, metadata):
        del src, metadata

    def __call__(
        self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments
    ):
        del leave
        flat = tuple(_flattened(arguments))
        if enter is not None:
            enter(launch_metadata)
        Recorder.launches.append((id(self), (x, y, z), stream, function, packed, flat))


class Driver(standin.Device):
    """Records instead of launching."""

    utils = Utilities()
    launcher_cls = Recorder


def _flattened(arguments):
    for value in arguments:
        if isinstance(value, tuple):
            yield from _flattened(value)
        elif isinstance(value, torch.Tensor):
            # A tensor made on the way lies elsewhere each time; Triton sees where modulo 16.
            name = Recorder.known.get(value.data_ptr(), f"new, {value.data_ptr() % 16}")
            yield name, str(value.dtype), tuple(value.shape), value.stride()
        else:
            yield type(value).__name__, repr(value)


def rows(layout, N, V, dtype):
    """(..., V), N rows, none of them read or written."""
    if layout == "wide":
        return torch.empty(N, V + 8, dtype=dtype)[:, :V]
    if layout == "shifted":
        return torch.empty(N * V + 1, dtype=dtype)[1:].view(N, V)
    if layout == "slice":
        return torch.empty(2, N + 1, V, dtype=dtype)[:, :-1]
    if layout == "strided":
        return torch.empty(V, N, dtype=dtype).t()
    if layout == "three levels":  # no two strides between rows: it is copied
        return torch.empty(3, 2, N + 1, V, dtype=dtype)[:, :, :-1].transpose(0, 1)
    return torch.empty(N, V, dtype=dtype)


def vector(N, start, dtype=torch.float32):
    """(N,) from `start` elements on in its memory; None for None."""
    return None if start is None else torch.ones(N + 4, dtype=dtype)[start : start + N]


class Case(NamedTuple):
    """The tensors and constants of one call."""

    operation: str
    logits: torch.Tensor
    dlogits: torch.Tensor | None
    target: torch.Tensor
    weight: torch.Tensor | None
    row_weight: torch.Tensor | None
    scale: torch.Tensor | None
    saved: torch.Tensor
    upstream: by_torch.Upstream
    recipe: Recipe
    out: by_torch.RowOutputs

    @staticmethod
    def of(f):
        """From its fields."""
        logits = rows(f["layout"], f["N"], f["V"], f["dtype"])
        N = logits.numel() // f["V"]
        kind, g = f["gradient"], None
        if kind == "in place":
            g = logits
        elif kind == "half of each row":
            wide = logits = torch.empty(N, f["V"])
            g = wide.view(torch.bfloat16)[:, : f["V"]]
        elif kind != "none":
            g = rows(kind, N, f["V"], f["dtype"])
        entropy = vector(N, f["entropy"])
        upstream = by_torch.Upstream(vector(N, f["lse"]), entropy, vector(N, f["entropy"]))
        factor = vector(1, f["scale"])
        argmax = f["statistics"] and f["argmax"]
        wanted = by_torch.Wanted(saved=f["need_saved"], stats=f["statistics"], argmax=argmax)
        out = by_torch.new_outputs(logits, N, wanted)
        return Case(
            operation=f["operation"],
            logits=logits,
            dlogits=g,
            target=vector(N, f["target"], torch.int64),
            weight=vector(f["V"], f["weight"]),
            row_weight=vector(N, f["row_weight"]),
            scale=None if factor is None else factor.view(()),
            saved=vector(3 * N, f["saved"]).view(N, 3),
            upstream=upstream,
            recipe=Recipe(*(f[name] for name in Recipe._fields)),
            out=out,
        )

    def call(self):
        """What by_triton puts for it."""
        from sgp.rows import by_triton

        c, r = self, self.recipe
        if c.operation == "forward":
            by_triton.forward(
                c.logits, c.dlogits, c.target, c.weight, c.row_weight, c.scale, r, c.out
            )
        elif c.operation == "probabilities":
            spread = c.logits if c.dlogits is None else c.dlogits  # of any layout
            dlogits = torch.empty(c.logits.shape, dtype=c.logits.dtype)
            backward = c.out.saved is None
            by_triton.probabilities(
                c.logits, spread, dlogits, torch.empty(spread.shape) if backward else None,
                None if backward else c.out.loss, c.saved, c.weight, c.row_weight, c.scale, r,
            )  # fmt: skip
        elif c.operation == "mean_scale":
            by_triton.mean_scale(c.target, c.weight, c.row_weight, r.ignore_index, torch.float32)
        elif c.dlogits is None:
            return
        elif c.operation == "backward":
            by_triton.backward(
                c.logits, c.dlogits, c.target, c.saved, c.weight, c.row_weight, r, c.upstream
            )
        else:
            factor = torch.ones(()) if c.scale is None else c.scale
            target = c.target if c.row_weight is None else None
            by_triton.multiply(c.dlogits, target, factor, r.ignore_index)

    def tensors(self):
        """{where a tensor begins: its name}."""
        found = {}
        for name, value in (*self._asdict().items(), *self.out._asdict().items()):
            parts = enumerate(value) if name == "upstream" else [("", value)]
            for label, tensor in parts:
                if isinstance(tensor, torch.Tensor):
                    found[tensor.data_ptr()] = f"{name} {label}".strip()
        return found


def twin(value):
    """An int as a float, and the other way round, where they compare as equal."""
    if type(value) is int:
        return float(value)
    return int(value) if type(value) is float and value.is_integer() else value


def draw(seen):
    """The fields of a case: often an earlier one's with one of them drawn again.

    Or its twin, or the same with one vector that begins at another place.
    """
    chance = random.random()
    if seen and chance < 0.8:
        fields = dict(random.choice(seen))
        if chance < 0.2:
            return fields | {name: twin(fields[name]) for name in CONSTANTS}
        if chance < 0.4:
            name = random.choice(VECTORS)
            return fields if fields[name] is None else fields | {name: 1}
        name = random.choice(list(FIELDS))
        fields[name] = random.choice(FIELDS[name])
        return fields
    return {name: random.choice(values) for name, values in FIELDS.items()}


def put(case, form, *, hook):
    """What the launcher is given by a call."""
    os.environ.pop("SGP_ROW_FORM", None)
    if form is not None:
        os.environ["SGP_ROW_FORM"] = form
    Recorder.launches.clear()
    hooks = triton.knobs.runtime.launch_enter_hook
    if hook:
        hooks.add(listen)
    try:
        case.call()
    finally:
        if hook:
            hooks.remove(listen)
    return list(Recorder.launches)


def listen(metadata):
    """A hook: it is told which kernel is launched."""
    assert metadata.get()["name"]


def blind(put, missing):
    """`launch.put` with something left out of every key."""

    def lacking(key, tensors, *rest):
        if missing == "alignment":
            tensors = ()
        elif missing == "recipe":
            key = tuple(part for part in key if not isinstance(part, Recipe))
        elif missing == "options":  # which of them are None
            key = tuple(x for x in key if not isinstance(x, (bool, torch.dtype, type(None))))
        elif missing == "strides":
            key = tuple(part if not isinstance(part, tuple) else part[:1] for part in key)
        return put(key, tensors, *rest)

    return lacking


def compare(count, by_triton):
    """Put `count` random calls twice; what was found."""
    from sgp.kernels import launch

    kept = launch._kept
    kept.clear()
    seen, different, launches, hits = [], [], 0, 0
    for _ in range(count):
        fields = draw(seen)
        case = Case.of(fields)
        Recorder.known = case.tensors()
        before = dict(kept)
        kept.clear()
        expected = put(case, fields["form"], hook=fields["hook"])
        if kept:  # what cannot be kept is no case to vary
            seen.append(fields)
        kept.clear()
        kept.update(before)
        by_triton.clear()
        found = put(case, fields["form"], hook=fields["hook"])
        launches += len(found)
        hits += len(found) - len(by_triton)
        if found != expected:
            shown = {name: str(value) for name, value in fields.items()}
            different.append({"case": shown, "expected": str(expected), "found": str(found)})
    result = {"calls": count, "launches": launches, "hits": hits, "kept": len(kept)}
    return result | {"different": different[:3], "how_many": len(different)}


def main():
    """Compare, and print what was found."""
    count, seed, *missing = sys.argv[1:]
    random.seed(int(seed))
    triton.compiler.compile = compiled
    standin.install(Driver())
    from sgp.kernels import launch

    own, by_triton = JITFunction.run, []

    def run(self, *arguments, **options):
        by_triton.append(self)
        return own(self, *arguments, **options)

    JITFunction.run = run
    print(json.dumps(compare(int(count), by_triton)))
    put = launch.put
    for what in missing:
        launch.put = blind(put, what)
        print(json.dumps(compare(int(count) // 4, by_triton)))


if __name__ == "__main__":
    main()
