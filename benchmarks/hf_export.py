r"""How long --save-hf takes at the end of a training run, each rank's peak in host memory, and what goes between ranks.

    python benchmarks/hf_load.py write 1b /tmp/llama-1b            # random weights, bf16
    python benchmarks/hf_export.py /tmp/llama-1b /tmp/exported --ranks 4 --against OTHER_CHECKOUT -- \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

With --against, the package of another checkout takes turns with this one's, in the same run and on the same model. The
exported model is removed each time. A rank's peak is its resident memory at the highest less that before the export.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
RESULT = "hf_export result: "


def measure(model: Path, target: Path, flags: list[str]) -> None:
    """On a rank: export and report, from rank 0."""
    from megatron_bdpo.platform.boot import prepare_platform

    prepare_platform()
    from torch import distributed as torch_distributed

    from megatron_bdpo.training import distributed
    from megatron_bdpo.training.flags.arguments import Arguments
    from megatron_bdpo.training.hf.exporting import save_live
    from megatron_bdpo.training.hf.importing import model_in_memory

    arguments = Arguments.parse(["--bf16", "--hf-model", str(model), "--save-hf", str(target), *flags])
    with distributed.process_groups(arguments.settings.process), model_in_memory(arguments) as chunks:
        arguments.set(train_iters=0)
        sent = count_sent(torch_distributed)
        distributed.gather(None)  # all have read
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts again from here
        start = time.perf_counter()
        save_live(arguments, None, chunks, {}, base="")
        own: dict[str, Any] = {
            "seconds": time.perf_counter() - start,
            "peak": resident("VmHWM") - before,
            "sent": dict(sent),
        }
        ranks = distributed.gather(own)
    if arguments.settings.process.rank == 0:
        into: Counter[int] = Counter()
        for rank in ranks:
            into.update(rank["sent"])
        found = {
            "seconds": max(rank["seconds"] for rank in ranks),
            "peaks": [round(rank["peak"], 2) for rank in ranks],
            "sent": sum(into.values()) / 1e9,
            "into_one_rank": max(into.values(), default=0) / 1e9,
            "files": sorted(round(file.stat().st_size / 1e9, 2) for file in target.glob("*.safetensors")),
        }
        print(RESULT + json.dumps(found), flush=True)


def count_sent(torch_distributed) -> Counter[int]:
    """Bytes of tensors that this rank sends from now on, by the rank that gets them."""
    sent: Counter[int] = Counter()
    send, batch = torch_distributed.send, torch_distributed.batch_isend_irecv

    def counted_send(tensor, dst=None, group=None, tag=0, group_dst=None):
        sent[dst if group_dst is None else group_dst] += tensor.nbytes
        return send(tensor, dst, group, tag, group_dst)

    def counted_batch(operations):
        for operation in operations:
            if operation.op is torch_distributed.isend:
                sent[operation.peer] += operation.tensor.nbytes
        return batch(operations)

    torch_distributed.send, torch_distributed.batch_isend_irecv = counted_send, counted_batch
    return sent


def resident(kind: str) -> float:
    """VmRSS (now) or VmHWM (the highest), in GiB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind)]
    return int(line.split()[1]) / 2**20


def contend(checkout: Path, options: argparse.Namespace) -> dict:
    """One export by the package of a checkout."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
    command = [*torchrun, str(Path(__file__).resolve()), str(options.model), str(options.target), "--", *options.flags]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    shutil.rmtree(options.target, ignore_errors=True)
    os.sync()  # what was written before is not to be paid for by this one
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    shutil.rmtree(options.target)
    (line,) = [line for line in output.splitlines() if line.startswith(RESULT)]
    return json.loads(line.removeprefix(RESULT))


def main(options: argparse.Namespace) -> None:
    """All rounds, and a table."""
    contenders = {"this checkout": HERE} | ({str(options.against): options.against} if options.against else {})
    print("| package | round | seconds | peak of each rank, GiB | sent, GB | into one rank, GB | files, GB |")
    print("|---|---|---|---|---|---|---|")
    for number in range(1, options.rounds + 1):
        for name, checkout in contenders.items():
            found = contend(checkout, options)
            peaks, files = (", ".join(map(str, found[key])) for key in ("peaks", "files"))
            print(
                f"| {name} | {number} | {found['seconds']:.1f} | {peaks} | {found['sent']:.2f} | "
                f"{found['into_one_rank']:.2f} | {files} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("target", type=Path, help="is removed")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parsed = parser.parse_args(sys.argv[1:cut])
    parsed.flags = sys.argv[cut + 1 :]  # the layout
    if "RANK" in os.environ:
        measure(parsed.model, parsed.target, parsed.flags)
    else:
        main(parsed)
