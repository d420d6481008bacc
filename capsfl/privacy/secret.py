"""The root of a run's random draws: its seed, which everybody may know, or a secret that stays beside its keys.

Whoever knows the root draws sampling and noise again and subtracts the noise. A secret keeps that to the holder of the
file: it is in no configuration, record, page or checkpoint, which hold a fingerprint at most. The draws themselves come
from JAX's generators (Threefry-2x32 by default, with a key of 64 bits), which are counter-based and statistically
strong, and which nobody claims to be cryptographic.
"""

import contextlib
import hashlib
import os
import secrets
import stat
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

SECRET_BYTES = 32


class SecretError(ValueError):
    """A secret that cannot be used; the message names the file and the remedy."""


def root_key(*, seed: int, name: str, secret: bytes | None = None) -> Array:
    """Returns the key that every draw of a task's rounds is folded from.

    Args:
        seed: of the run; without meaning where there is a secret.
        name: of run and task, so that those of one root never share noise.
        secret: of `open_secret`; None draws from the seed.
    """
    if secret is None:
        place = hashlib.sha256(name.encode()).digest()
        return jax.random.fold_in(jax.random.key(seed), int.from_bytes(place[:4], "big"))
    return _key_of("capsfl.root", secret, name)


def fingerprint_key(*, seed: int, name: str, secret: bytes | None = None) -> Array:
    """Returns what a checkpoint may hold to tell the root key again: the key itself, or of a secret one a digest."""
    return root_key(seed=seed, name=name) if secret is None else _key_of("capsfl.fingerprint", secret, name)


def open_secret(path: Path, *, begun: bool) -> bytes:
    """Reads a run's secret, or draws it from the operating system on the run's first start.

    The file is made whole under its name or not at all, readable by its owner alone; of several processes that make it
    at once, one succeeds and all read the same.

    Args:
        path: its file.
        begun: whether the run has rounds behind it, which another secret could not continue.

    Raises:
        SecretError: the file is gone from a run that has begun, others can read it, or it is damaged.
    """
    if not path.exists():
        if begun:
            raise SecretError(
                f"{path}: missing, and the run has rounds that were drawn from it; put it back, or delete the run's "
                "folder to start over"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
                file.write(secrets.token_hex(SECRET_BYTES) + "\n")
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise SecretError(f"{path}: others can read it; run `chmod 600 {path}` if nobody has")
    text = path.read_text(encoding="ascii", errors="replace").strip()
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise SecretError(f"{path}: not a secret of {SECRET_BYTES} bytes in hex; put the run's own back")
    return secret


def _key_of(purpose: str, secret: bytes, name: str) -> Array:
    like = jax.random.key_data(jax.random.key(0))
    digest = hashlib.sha256(b"\0".join((purpose.encode(), secret, name.encode()))).digest()
    return jax.random.wrap_key_data(jnp.asarray(np.frombuffer(digest, ">u4")[: like.size], jnp.uint32))
