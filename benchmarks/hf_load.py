r"""How long a Hugging Face checkpoint takes to read into a layout, and how much host memory each rank needs for it.

    python benchmarks/hf_load.py write 3b /tmp/llama-3b            # random weights, bf16
    torchrun --nproc-per-node 4 benchmarks/hf_load.py read /tmp/llama-3b \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

A rank's peak is its resident memory at the highest, mapped pages of the files included, less that before reading.
"""

import json
import sys
import time
from pathlib import Path

SIZES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
    },
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
LLAMA_3 = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "dtype": "bfloat16",
}


def write(size: str, directory: Path) -> None:
    """A random checkpoint in files of some 2 GiB."""
    import torch

    from megatron_bdpo.model.hf.config import read_config
    from megatron_bdpo.model.hf.export import write_file, write_json
    from megatron_bdpo.model.hf.file_layout import FILE_BYTES

    config = LLAMA_3 | SIZES[size]
    shapes = read_config(config).weights.shapes()
    directory.mkdir(parents=True)
    places, file, waiting = {}, "model-00001.safetensors", {}
    for number, (name, shape) in enumerate(shapes.items(), 1):
        waiting[name] = torch.randint(15_000, 16_000, shape, dtype=torch.int16).view(torch.bfloat16)
        places[name] = file
        if number == len(shapes) or sum(tensor.nbytes for tensor in waiting.values()) > 0.9 * FILE_BYTES:
            write_file(directory / file, waiting)
            file, waiting = f"model-{number + 1:05d}.safetensors", {}
    write_json(directory / "model.safetensors.index.json", {"weight_map": places})
    write_json(directory / "config.json", config)


def read(directory: Path, flags: list[str]) -> None:
    """Read it on this rank and report."""
    from megatron_bdpo.platform.boot import prepare_platform

    prepare_platform()
    from megatron_bdpo.model.hf import load
    from megatron_bdpo.training import distributed
    from megatron_bdpo.training.flags.arguments import Arguments
    from megatron_bdpo.training.hf import start as hf_model
    from megatron_bdpo.training.hf.importing import model_in_memory

    figures = {}

    def measured(*args) -> None:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts again from here
        start = time.perf_counter()
        load.load_weights(*args)
        figures["seconds"] = time.perf_counter() - start
        figures["peak_gib"] = resident("VmHWM") - before

    hf_model.load_weights = measured  # type: ignore[assignment]
    arguments = Arguments.parse(["--bf16", "--hf-model", str(directory), *flags])
    with distributed.process_groups(arguments.settings.process), model_in_memory(arguments) as model:
        own = sum(parameter.nbytes for chunk in model for parameter in chunk.parameters()) / 2**30
        largest = max(file.stat().st_size for file in directory.glob("*.safetensors")) / 2**30
        for rank, (shard, found) in enumerate(distributed.gather((own, figures))):
            distributed.say(
                f"rank {rank}: {found['seconds']:.1f} s, own shard {shard:.2f} GiB, peak {found['peak_gib']:.2f} GiB, "
                f"allowed {1.5 * largest + shard:.2f} GiB (1.5 x the largest file of {largest:.2f} GiB, and the shard)"
            )


def resident(kind: str) -> float:
    """VmRSS (now) or VmHWM (the highest), in GiB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind)]
    return int(line.split()[1]) / 2**20


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    command, *rest = sys.argv[1:]
    if command == "write":
        write(rest[0], Path(rest[1]))
        print(json.dumps({"written": rest[1]}))
    else:
        read(Path(rest[0]), rest[1:])
