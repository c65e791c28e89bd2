import numpy as np, pytest
from tests.harness.jobs import train, last_stage
from safetensors.numpy import load_file
def show(c):
    for p in c.glob("reference-*/*"): print(p.name, {k:(v.shape,int(np.isnan(v).any(1).sum())) for k,v in load_file(p).items()})
@pytest.mark.parametrize("flags", [["--no-pack-pairs"], [], ["--long-pairs","drop","--seq-length","160"]])
def test_longer(ranks, tmp_path, flags):
    for n in (1,6,1):
        ranks(1)(train, flags, pair_cache_dir=str(tmp_path), train_iters=n, max_pairs=96, pairs_per_step=4)
        show(tmp_path)
@pytest.mark.parametrize("seed", ["0","1","2"])
def test_resident_weight(ranks, tmp_path, seed):
    from tests.harness.jobs import DATA
    f=["--pair-data","2.0",str(DATA/"train.jsonl"),"--seed",seed,"--reference"]
    a=[last_stage(ranks(1)(train, [*f,m], pair_cache_dir=str(tmp_path/m), train_iters=6, max_pairs=20, pairs_per_step=16, seq_length=176)).steps for m in ("precomputed","resident")]
    for x,y in zip(*a):
        print([ (k,x[k],y[k]) for k in x if not k.startswith("thr") and abs(x[k]-y[k])>1e-4])

def test_drop_then_keep(ranks, tmp_path):
    for fl in (["--long-pairs","drop","--seq-length","160"],[],["--long-pairs","drop","--seq-length","160"],):
        ranks(1)(train, fl, pair_cache_dir=str(tmp_path), train_iters=1, max_pairs=96, pairs_per_step=4)
        show(tmp_path)
