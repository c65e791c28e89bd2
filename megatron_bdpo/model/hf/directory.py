"""From what the user calls a model to the directory that holds it."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub

from megatron_bdpo import hub
from megatron_bdpo.errors import UserError
from megatron_bdpo.user_files import MOST_SIDE_FILE_BYTES, near

#: Weights, configuration, tokenizer. Not the copies of the weights in other formats that many repositories hold.
_WEIGHTS = ["*.safetensors"]
_DESCRIPTION = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]

#: One of these has the tokens themselves.
_TOKENIZERS = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tokenizer*.py")


def is_model_directory(path: Path) -> bool:
    """Whether a directory holds a Hugging Face model (and not, say, a Megatron checkpoint)."""
    return (path / "config.json").is_file()


def model_directory(path_or_name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The directory of a model: a path, or a name on the hub, which is downloaded or found in its cache.

    Args:
        revision: of a name on the hub; its newest one if None.
        weights: download them too; without, configuration and tokenizer only.

    Raises:
        UserError: there is no such model.
    """
    path = Path(path_or_name)
    if path.is_dir():
        if revision is not None:
            raise UserError(
                f"--hf-revision {revision}: {path} is a directory, which holds what it holds. Leave --hf-revision out, "
                "or name a model on the hub with --hf-model."
            )
        if not is_model_directory(path):
            raise UserError(f"--hf-model: {path} has no config.json, so it is no Hugging Face model.")
        return _described(path.resolve())
    patterns = _DESCRIPTION + _WEIGHTS * weights
    return _fetched("--hf-model", path_or_name, patterns, revision, least_slashes=1)


def tokenizer_directory(path_or_name: str, revision: str | None = None) -> Path:
    """The directory of a tokenizer: a path, or a name on the hub, which is downloaded or found in its cache.

    Args:
        revision: as of :func:`model_directory`.

    Raises:
        UserError: there is no such tokenizer.
    """
    path = Path(path_or_name)
    if not path.is_dir():
        return _fetched("--tokenizer-model", path_or_name, _DESCRIPTION, revision)
    directory = _described(path.resolve())
    if not _holds_tokenizer(directory):
        held = ", ".join(sorted(each.name for each in path.iterdir())[:6]) or "nothing"
        raise UserError(
            f"{path} holds no tokenizer: none of {', '.join(_TOKENIZERS)} (it holds {held}). Copy the model's "
            "there, or name the tokenizer's directory with --tokenizer-model."
        )
    return directory


def _holds_tokenizer(directory: Path) -> bool:
    """Whether there is a file of one, or the name of one's own code."""
    settings = directory / "tokenizer_config.json"
    has_code = settings.is_file() and "auto_map" in settings.read_text("utf-8", errors="replace")
    return has_code or any(file for pattern in _TOKENIZERS for file in directory.glob(pattern))


def _described(directory: Path) -> Path:
    """The directory, after a look at what the libraries will read of it: they would wait for ever for a FIFO.

    Raises:
        UserError: a file is no regular one, or too large to be what its name says.
    """
    for file in sorted({file for pattern in _DESCRIPTION for file in directory.glob(pattern)}):
        if not file.is_file() and file.exists() and not file.is_dir():
            raise UserError(f"{file} is no regular file. Put the file itself there.")
        if file.is_file() and file.stat().st_size > MOST_SIDE_FILE_BYTES:
            raise UserError(f"{file} has more than {MOST_SIDE_FILE_BYTES:,} bytes, which no such file needs. Move it.")
    return directory


def _fetched(flag: str, name: str, patterns: list[str], revision: str | None, least_slashes: int = 0) -> Path:
    if Path(name).exists() or not least_slashes <= name.count("/") <= 1 or name.startswith((".", "/", "~")):
        told = near(Path(name).expanduser()) or "Name a directory that holds the model, or ORGANISATION/NAME."
        raise UserError(f"{flag}: there is no directory {name}, nor can this be a name on the hub. {told}")
    reachable = hub.is_reachable()
    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=patterns, local_files_only=not reachable
        )
        return Path(found)
    except Exception as error:  # of the hub, of HTTP, of the file system
        reason = f"{type(error).__name__}: {error}" if reachable else hub.ADVICE
        raise UserError(f"{flag}: {name} is no directory and cannot be fetched. {reason}") from error
