"""What a packed backbone consists of, signed: each file's path and size, and the SHA-256 of each of its chunks.

A packed backbone is a folder that any static web server can offer:

    manifest.json  manifest.sig        the list, and the Ed25519 signature of its bytes
    chunks/<sha256>                    a piece of a file, named by its content
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from fedgen_app.errors import BackboneError, SettingsError
from fedgen_app.files import write_atomic

MANIFEST, SIGNATURE, CHUNKS = "manifest.json", "manifest.sig", "chunks"
# Nothing that is executed or unpickled when it is loaded: weights, configurations, vocabularies, the card.
SUFFIXES = frozenset((".safetensors", ".json", ".txt", ".model", ".md", ".jinja"))
PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
DEPTH = 4
LARGEST_MANIFEST = 16 * 1024**2
# What is signed begins with this, so that no other thing signed with the same key passes for a manifest.
PURPOSE = b"fedgen-edge backbone manifest, version 1\n"
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def objection(path: str) -> str:
    """Why a file is not part of a backbone, or ""."""
    parts = path.split("/")
    if len(parts) > DEPTH or not all(PART.fullmatch(part) for part in parts):
        return "should be a plain relative path of letters, digits and . _ -"
    if PurePosixPath(path).suffix not in SUFFIXES:
        return f"should end in {', '.join(sorted(SUFFIXES))}"
    return ""


def _allowed(path: str) -> str:
    if reason := objection(path):
        raise PydanticCustomError("path", reason)
    return path


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PackedFile(_Entry):
    """One file of a backbone and the digests of its chunks, in order."""

    path: Annotated[str, AfterValidator(_allowed)]
    bytes: Annotated[int, Field(ge=0, le=2**50)]
    chunks: tuple[Digest, ...]


class Manifest(_Entry):
    """All files of a backbone.

    Attributes:
        fingerprint: That clients report in the roll call; checked again where the backbone is installed.
        chunk_bytes: Size of every chunk but each file's last.
    """

    version: Literal[1]
    name: Annotated[str, Field(pattern=NAME)]
    task: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,63}$")]
    fingerprint: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    chunk_bytes: Annotated[int, Field(ge=4096, le=64 * 1024**2)]
    files: Annotated[tuple[PackedFile, ...], Field(min_length=1, max_length=4096)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        lower = [file.path.lower() for file in self.files]
        folders = {str(parent) for path in lower for parent in PurePosixPath(path).parents}
        for path, file in zip(lower, self.files, strict=True):
            if lower.count(path) > 1 or path in folders:
                raise PydanticCustomError("twice", "has two files of one path")
            if len(file.chunks) != math.ceil(file.bytes / self.chunk_bytes):
                raise PydanticCustomError("chunks", "has a file whose size is not that of its chunks")
        return self

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files)

    def size_of(self, file: PackedFile, index: int) -> int:
        """Bytes of one of a file's chunks."""
        return min(self.chunk_bytes, file.bytes - index * self.chunk_bytes)

    def to_bytes(self) -> bytes:
        """As it is written and signed."""
        return self.model_dump_json(indent=1).encode() + b"\n"


def sign(content: bytes, key: Ed25519PrivateKey) -> bytes:
    """The signature of a manifest's bytes, in base64."""
    return base64.b64encode(key.sign(PURPOSE + content)) + b"\n"


def verified(content: bytes, signature: bytes, key: Ed25519PublicKey) -> Manifest:
    """The manifest, after its signature was checked; before that nothing of it is looked at.

    Raises:
        BackboneError: it is not signed with this key, or not one.
    """
    try:
        key.verify(base64.b64decode(signature.strip(), validate=True), PURPOSE + content)
    except (InvalidSignature, binascii.Error):
        raise BackboneError("the manifest is not signed with this key, or was altered") from None
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise BackboneError(f"the manifest is none: {'.'.join(map(str, first['loc']))} {first['msg']}") from None


def private_key(file: Path) -> Ed25519PrivateKey:
    """The key in a PEM file; where there is none, a new one, with its public half beside it as ``<file>.pub``.

    Raises:
        SettingsError: the file holds something else, or cannot be written.
    """
    try:
        if not file.exists():
            return _new_key(file)
    except OSError as error:
        raise SettingsError(f"--key {file}: no key can be written there: {error.strerror}") from None
    try:
        key = serialization.load_pem_private_key(file.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SettingsError(f"--key {file}: no private key in PEM format: {error}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SettingsError(f"--key {file}: is a {type(key).__name__}, should be Ed25519")
    return key


def _new_key(file: Path) -> Ed25519PrivateKey:
    new = Ed25519PrivateKey.generate()
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    write_atomic(file, new.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain))
    public = new.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)
    write_atomic(public_file(file), public)
    public_file(file).chmod(0o644)
    return new


def public_file(file: Path) -> Path:
    """Where the public half of a key lies."""
    return file.with_name(f"{file.name}.pub")


def public_key(file: Path) -> Ed25519PublicKey:
    """The key in a PEM file.

    Raises:
        SettingsError: the file holds something else.
    """
    try:
        key = serialization.load_pem_public_key(file.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise SettingsError(f"--key {file}: no public key in PEM format: {error}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise SettingsError(f"--key {file}: is a {type(key).__name__}, should be Ed25519")
    return key
