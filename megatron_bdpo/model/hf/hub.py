"""From what the user calls a model to the directory that holds it. The only file that reaches for the hub."""

from __future__ import annotations

from pathlib import Path

from megatron_bdpo.errors import UserError

#: Weights, configuration, tokenizer. Not the copies of the weights in other formats that many repositories hold.
_WEIGHTS = ["*.safetensors"]
_DESCRIPTION = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


def is_model_directory(path: Path) -> bool:
    """Whether a directory holds a Hugging Face model (and not, say, a Megatron checkpoint)."""
    return (path / "config.json").is_file()


def model_directory(path_or_name: str, *, weights: bool = True) -> Path:
    """The directory of a model: a path, or a name on the hub, which is downloaded or found in its cache.

    Args:
        weights: download them too; without, configuration and tokenizer only.

    Raises:
        UserError: there is no such model.
    """
    path = Path(path_or_name)
    if path.is_dir():
        if not is_model_directory(path):
            raise UserError(f"--hf-model: {path} has no config.json, so it is no Hugging Face model.")
        return path.resolve()
    if path.exists() or path_or_name.count("/") != 1 or path_or_name.startswith((".", "/", "~")):
        raise UserError(f"--hf-model: there is no directory {path_or_name}, nor can this be a name on the hub.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            "--hf-model by name needs huggingface_hub: pip install 'megatron_bdpo[hf]', or give a directory."
        ) from error
    try:
        return Path(snapshot_download(path_or_name, allow_patterns=_DESCRIPTION + _WEIGHTS * weights))
    except Exception as error:  # of the hub, of HTTP, of the file system
        raise UserError(
            f"--hf-model: {path_or_name} is no directory and cannot be fetched: {type(error).__name__}: {error}"
        ) from error
