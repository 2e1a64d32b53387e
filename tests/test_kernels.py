import torch
import sgp
from bench.interpreter import watch_accesses
def test_smoke(backend):
    x=torch.randn(4,100,requires_grad=True)
    y=torch.tensor([1,-100,3,99])
    sgp.cross_entropy(x,y).backward()
def test_count(monkeypatch):
    monkeypatch.setenv("SGP_BACKEND","triton")
    x=torch.randn(4,20000,requires_grad=True)
    y=torch.tensor([1,-100,3,99])
    with watch_accesses(distinct=True) as a:
        l=sgp.cross_entropy(x,y)
        l.backward()
    print(a.launches, a.of(x.detach()), a.rows_loaded(x.detach()), a.distinct(x.detach()))
    print(a.regions)
