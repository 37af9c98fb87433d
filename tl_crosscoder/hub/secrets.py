"""What must not leave this machine with a publication: tokens, keys, and the paths and names of whoever made it."""

import getpass
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

KEYS = {
    "a Hugging Face token": rb"hf_[A-Za-z0-9]{30,}",
    "an API key": rb"\bsk-[A-Za-z0-9_-]{20,}|\bAIza[A-Za-z0-9_-]{35}|\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a GitHub token": rb"\bgh[pousr]_[A-Za-z0-9]{36}|\bgithub_pat_[A-Za-z0-9_]{22,}",
    "an AWS key": rb"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}


def find_secrets(folder: Path, allow: Sequence[str] = ()) -> list[str]:
    """One line for each thing found: the file, what it is, and its beginning.  Exactly the texts of ``allow`` are let pass."""
    patterns = {what: re.compile(pattern) for what, pattern in (KEYS | _own()).items()}
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        for what, pattern in patterns.items():
            texts = {
                hit[0].decode("utf-8", "replace")
                for part in (name.encode(), *_text(path))
                for hit in pattern.finditer(part)
            }
            found += [f"{name}: {what}, {_beginning(text)}" for text in sorted(texts - set(allow))]
    return found


def _own() -> dict[str, bytes]:
    """Patterns of what is particular to this machine and its user."""
    from huggingface_hub import get_token

    home, here, user = str(Path.home()), str(Path.cwd()), _user()
    own = {
        "the home folder": _path(home),
        "the working folder": _path(here) if len(Path(here).parts) > 2 else b"",
        "the user's folder": rb"(?i:[\\/](?:home|users)[\\/]+)" + re.escape(user.encode()) + rb"\b"
        if user
        else b"",
        "the user at this machine": re.escape(f"{user}@{socket.gethostname()}".encode()) if user else b"",
        "the token in use": re.escape(get_token() or "").encode(),
    }
    return {what: pattern for what, pattern in own.items() if pattern}


def _path(path: str) -> bytes:
    """The path in whichever way its parts are divided, JSON's doubled backslashes included; nothing for a root."""
    divided, parts = r"[\\/]+", [re.escape(part) for part in re.split(r"[\\/]+", path) if part]
    if not parts:
        return b""
    root = "" if ":" in path[:2] else divided
    return (r"(?<![\w./])" + root + divided.join(parts) + r"(?![\w.-])").encode()


def _user() -> str:
    try:
        return getpass.getuser()
    except OSError:  # a number without a name, as in some containers
        return ""


def _text(path: Path) -> Iterator[bytes]:
    """What a file says in words: of weights the header, of a table all but its numbers, of anything else all."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            yield file.read(int.from_bytes(file.read(8), "little"))
    elif path.suffix == ".parquet":
        from pyarrow import parquet, types

        table = parquet.read_table(path)
        yield b"\n".join(part for pair in (table.schema.metadata or {}).items() for part in pair)
        for field in table.schema:
            kind = field.type
            plain = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
            values = () if plain else {str(value) for value in table[field.name].to_pylist()}
            yield "\n".join((field.name, *values)).encode()
    else:
        yield path.read_bytes()


def _beginning(text: str) -> str:
    return text if "/" in text or "\\" in text else f"{text[:6]}…"
