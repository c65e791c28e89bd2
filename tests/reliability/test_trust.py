"""What a user's files are trusted with: nothing in them is run, unless the user asks for it by a flag."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import megatron_bdpo
from megatron_bdpo.data.store import PairStore
from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.checkpoint import HuggingFaceCheckpoint, read_json
from megatron_bdpo.model.hf.directory import model_directory, tokenizer_directory
from megatron_bdpo.model.hf.export import copy_companions
from megatron_bdpo.platform.safe_pickles import restrict_pickles
from megatron_bdpo.training.reference.cache import KINDS, ScoreCache, open_scores
from megatron_bdpo.user_files import MOST_HEADER_BYTES, MOST_JSON_BYTES, MOST_SIDE_FILE_BYTES
from tests.distributed.test_bad_input import refusal
from tests.harness.jobs import train

PACKAGE = Path(megatron_bdpo.__file__).parent

#: Names that run what they read, and where one of them may stand.
RUNS_WHAT_IT_READS = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "eval", "exec", "compile", "unsafe_load",
    "full_load", "UnsafeLoader", "allow_pickle", "import_module", "os.system", "shell",
}  # fmt: skip
#: --loss-file runs the file that it names.
ALLOWED = {
    ("platform/safe_pickles.py", "pickle"), ("losses/loss_file.py", "exec"), ("losses/loss_file.py", "compile"),
}  # fmt: skip


def suspicious(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and name of whatever may run a file's content."""
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        match node:
            case ast.Import() | ast.ImportFrom():
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            case ast.Name():
                names = [node.id]
            case ast.Attribute(value=ast.Name()) if node.attr in ("load", "save", "system", "compile"):
                owner = f"{node.value.id}.{node.attr}"
                names = {"torch.load": ["pickle"], "numpy.load": ["pickle"], "np.load": ["pickle"]}.get(owner, [owner])
                names = [] if owner in ("re.compile", "torch.compile") else names
            case ast.keyword(arg="trust_remote_code") if not is_false(node.value):
                names = ["exec"]
            case ast.keyword(arg="weights_only") if is_false(node.value):
                names = ["pickle"]
            case ast.keyword():
                names = [node.arg or ""]
        found += [(getattr(node, "lineno", 0), name) for name in names if name.split(".")[0] in RUNS_WHAT_IT_READS
                  or name in RUNS_WHAT_IT_READS]  # fmt: skip
    return found


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_no_code_that_runs_what_it_reads():
    found = {
        (path.relative_to(PACKAGE).as_posix(), name)
        for path in PACKAGE.rglob("*.py")
        for _, name in suspicious(ast.parse(path.read_text("utf-8")))
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from pickle import loads", "torch.load(x)", "np.load(x, allow_pickle=True)", "eval(x)",
     "f(trust_remote_code=True)", "f(trust_remote_code=given)", "f(weights_only=False)", "yaml.load(x, UnsafeLoader)",
     "subprocess.run(x, shell=True)", "os.system(x)"],
)  # fmt: skip
def test_the_scan_sees(code):
    assert suspicious(ast.parse(code))


class Trap:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    """What a trap leaves, which is not there at the end."""
    place = tmp_path / "sprung"
    yield place
    assert not place.exists()


@pytest.fixture
def trap(mark):
    """A malicious pickle."""
    return pickle.dumps(Trap(mark))


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["meta.json", "tokens.bin", "lengths.bin"])
def test_a_pickle_in_a_token_store(ranks, tmp_path, trap, name):
    train_once(ranks, tmp_path)
    (store,) = (tmp_path / "cache").glob("*/meta.json")
    (store.parent / name).write_bytes(trap)
    with pytest.raises(UserError, match=rf"is damaged: .*{re.escape(name)}.*Delete the directory"):
        PairStore.open(store.parent)


def train_once(ranks, directory: Path) -> None:
    flags = ["--num-layers", "1", "--train-iters", "1", "--preference-loss", "simpo"]
    ranks(1)(train, flags, pair_cache_dir=str(directory / "cache"), max_pairs=8)


@pytest.mark.parametrize("name", ["part-00000.safetensors", "manifest.json"])
def test_a_pickle_among_scores(tmp_path, trap, name):
    cache = ScoreCache.open(tmp_path / "scores", {}, {})
    cache.finish(1, dict.fromkeys(KINDS, 1), {})
    (tmp_path / "scores" / name).write_bytes(trap)
    with pytest.raises(UserError, match=rf"{name} (is damaged|cannot be read)"):
        open_scores(tmp_path / "scores")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_for_weights(tmp_path, trap, name):
    (tmp_path / name).write_bytes(trap)
    expected = r"Weights are read from safetensors files\. .*save_pretrained" if name.endswith("bin") else "truncated"
    with pytest.raises(UserError, match=expected):
        HuggingFaceCheckpoint.open(tmp_path)


# Megatron's checkpoints ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(ranks, tmp_path_factory):
    """A run of one step with its checkpoint, without digests: those show accidents, not malice."""
    run = tmp_path_factory.mktemp("trust") / "run"
    ranks(1)(train, ["--num-layers", "1", "--train-iters", "1", "--save", str(run), "--save-interval", "1",
                     "--no-checkpoint-checksums"], max_pairs=8)  # fmt: skip
    return run


@pytest.fixture
def poisoned(checkpoint, tmp_path):
    """A copy of the run, and the directory of its checkpoint."""
    shutil.copytree(checkpoint, tmp_path / "run")
    return tmp_path / "run", tmp_path / "run" / "iter_0000001"


def poison_metadata(directory: Path, trap: bytes) -> None:
    (directory / ".metadata").write_bytes(trap)


def poison_arguments(directory: Path, trap: bytes) -> None:
    """Put the trap where Megatron's arguments are, in the middle of a file of tensors."""
    metadata = filesystem.FileSystemReader(str(directory)).read_metadata()
    poisoned = io.BytesIO()
    torch.save(TrapIn(trap), poisoned)
    for index, kept in metadata.state_dict_metadata.items():
        if isinstance(kept, BytesStorageMetadata):
            place = next(value for key, value in metadata.storage_data.items() if key.fqn == index)
            file = directory / place.relative_path
            place.offset, place.length = file.stat().st_size, len(poisoned.getvalue())
            place.transform_descriptors = None
            file.write_bytes(file.read_bytes() + poisoned.getvalue())
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


class TrapIn:
    """Pickles as what another pickle has been made of: loading it loads that."""

    def __init__(self, trap: bytes) -> None:
        self.trap = trap

    def __reduce__(self):
        return pickle.loads, (self.trap,)


@pytest.mark.parametrize(
    ("poison", "expected"),
    [(poison_metadata, r"\.metadata asks for pathlib\.Path\.mkdir|asks for builtins\.getattr"),
     (poison_arguments, "weights_only|Unsupported global")],
)  # fmt: skip
@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
def test_a_pickle_in_a_megatron_checkpoint(ranks, poisoned, trap, mark, poison, expected, flag):
    run, directory = poisoned
    poison(directory, trap)
    flags = ["--num-layers", "1", "--train-iters", "2", flag, str(run), "--no-checkpoint-checksums"]
    (message,) = ranks(1)(refusal, flags, max_pairs=8)
    assert re.search(expected, message, re.DOTALL), message


@pytest.mark.parametrize("poison", [poison_metadata, poison_arguments])
def test_what_an_export_reads_of_it(ranks, poisoned, trap, mark, poison, tmp_path):
    _, directory = poisoned
    poison(directory, trap)
    (message,) = ranks(1)(refusal_to_read, directory)
    assert re.search("asks for|weights_only|Unsupported global", message), message


def refusal_to_read(directory: Path) -> str:
    """What this rank says of a checkpoint's arguments."""
    from megatron_bdpo.training.identity import stored_arguments

    try:
        stored_arguments(directory)
    except UserError as error:
        return str(error)
    return "read"


def test_torchs_switch_that_opens_all_pickles_is_refused(monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(UserError, match=r"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set: .* Unset it"):
        restrict_pickles()


# Code that comes with a tokenizer ------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer_with_code(tmp_path, mark):
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    (directory / "own.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).mkdir()\nclass Own: ...\n")
    about = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(about))
    (directory / "config.json").write_text('{"model_type": "own"}')
    return directory


def refusal_to_build(directory: str) -> str:
    """What this rank says of a tokenizer."""
    from megatron_bdpo.training.flags.arguments import Arguments
    from megatron_bdpo.training.token_stores import build_tokenizer

    arguments = Arguments.parse(["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", directory])
    assert not arguments.megatron.trust_remote_code
    try:
        build_tokenizer(arguments)
    except UserError as error:
        return str(error)
    return "built"


def test_a_tokenizers_own_code_is_not_run(ranks, tokenizer_with_code):
    (message,) = ranks(1)(refusal_to_build, str(tokenizer_with_code))
    assert "code of its own, which is not run unless you trust it: --trust-remote-code" in message


# Files that are none --------------------------------------------------------------------------------------------------


def in_time(action, seconds: int = 10):
    """What an action returns or raises; a hang becomes an error."""

    def ring(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        return action()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Hugging Face model of one tensor, in a file that its index names."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    directory.mkdir()
    save_file({"a": torch.zeros(2)}, directory / "part.safetensors")
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part.safetensors"}}')
    (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of it."""
    return shutil.copytree(tiny, tmp_path / "model")


def test_an_export_holds_the_models_own_files_alone(model, tmp_path, capfd):
    secret = tmp_path / ".netrc"
    secret.write_text("machine host password swordfish")
    (model / "LICENSE").symlink_to(secret)
    (model / "tokenizer.json").symlink_to(model / "config.json")
    os.mkfifo(model / "vocab.txt")
    with (model / "merges.txt").open("wb") as file:
        file.truncate(MOST_SIDE_FILE_BYTES + 1)
    (tmp_path / "out").mkdir()
    in_time(lambda: copy_companions(model, tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tokenizer.json"]
    said = capfd.readouterr().err
    assert f"LICENSE is a link to {secret}, outside of the directory: it is not in the export" in said
    assert "vocab.txt is no regular file" in said and "merges.txt has 268,435,457 bytes" in said


def test_an_export_of_a_hubs_snapshot_is_whole(tmp_path, capfd):
    """It links into the blobs of its own repository; blobs that are a link themselves are elsewhere."""
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "f00d").write_text("terms")
    (snapshot / "LICENSE").symlink_to("../../blobs/f00d")
    (tmp_path / "out").mkdir()
    copy_companions(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"
    assert not capfd.readouterr().err
    (repository / "blobs").rename(tmp_path / "elsewhere")
    (repository / "blobs").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "second").mkdir()
    copy_companions(snapshot, tmp_path / "second")
    assert "outside of the directory" in capfd.readouterr().err and not list((tmp_path / "second").iterdir())


@pytest.mark.parametrize("name", ["../model2/part.safetensors", "/etc/passwd", "..", "sub/part.safetensors"])
def test_an_index_names_files_of_its_directory(model, name):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match=rf"model\.safetensors\.index\.json names no files: weight_map\.a is '{name}'"):
        HuggingFaceCheckpoint.open(model)


def test_weights_that_are_a_fifo_or_a_link_elsewhere(model, tiny):
    part = model / "part.safetensors"
    part.unlink()
    part.symlink_to(tiny / "part.safetensors")
    with pytest.raises(UserError, match=r"part\.safetensors is a link to .*outside of the directory\. Weights are"):
        HuggingFaceCheckpoint.open(model)
    part.unlink()
    os.mkfifo(part)
    for read in (HuggingFaceCheckpoint.open, lambda directory: HuggingFaceCheckpoint.of_file(directory / part.name)):
        with pytest.raises(UserError, match=r"part\.safetensors is no regular file"):
            in_time(lambda read=read: read(model))


def test_a_header_larger_than_the_format_allows(model):
    with (model / "part.safetensors").open("wb") as file:
        file.write((MOST_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(2 * MOST_HEADER_BYTES)
    with pytest.raises(UserError, match=r"part\.safetensors .*header has 100,000,001 bytes.* allows 100,000,000"):
        HuggingFaceCheckpoint.open(model)


def test_a_configuration_without_end(model):
    with (model / "config.json").open("wb") as file:
        file.truncate(MOST_JSON_BYTES + 1)
    with pytest.raises(UserError, match=r"config\.json cannot be read: it has more than 100,000,000 bytes"):
        read_json(model / "config.json")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("find", [model_directory, tokenizer_directory])
def test_a_fifo_that_a_tokenizers_library_would_read(model, name, find):
    os.mkfifo(model / name)
    with pytest.raises(UserError, match=rf"{name} is no regular file\. Put the file itself there"):
        find(str(model))


@pytest.mark.parametrize("name", ["manifest.json", "part-00000.safetensors"])
def test_a_fifo_among_scores(tmp_path, name):
    cache = ScoreCache.open(tmp_path / "scores", {}, {})
    cache.finish(1, dict.fromkeys(KINDS, 1), {})
    (tmp_path / "scores" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "scores" / name)
    with pytest.raises(UserError, match=rf"{name} (is damaged|cannot be read) \(.*no regular file"):
        in_time(lambda: open_scores(tmp_path / "scores"))


@pytest.mark.parametrize("name", ["meta.json", "tokens.bin"])
def test_a_fifo_in_a_token_store(ranks, tmp_path, name):
    train_once(ranks, tmp_path)
    (store,) = (tmp_path / "cache").glob("*/meta.json")
    (store.parent / name).unlink()
    os.mkfifo(store.parent / name)
    with pytest.raises(UserError, match=rf"{re.escape(name)} cannot be read.*it is no regular file"):
        in_time(lambda: PairStore.open(store.parent))
