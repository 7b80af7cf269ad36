"""Names under which the cache knows pictures and their vectors.

A name is an HMAC-SHA256 (RFC 2104) under a secret only the operator's processes hold. So a client can neither guess
nor choose a name, and a tenant learns nothing from another's: every scope has a secret of its own, derived from the
operator's. What goes in is encoded with explicit lengths, because plain concatenation would give ("ab", "c") and
("a", "bc") one name.
"""

from __future__ import annotations

import hmac

from omnilmm.errors import ConfigError
from omnilmm.messages import PixelIdentity

MIN_SECRET_BYTES = 16

EMBEDDING = "emb:"
ALIAS = "pix:"


def derive(secret: bytes, purpose: bytes) -> bytes:
    """A 32-byte secret for one purpose, from which the operator's cannot be found.

    Raises:
        ConfigError: the operator's secret is shorter than 16 bytes.
    """
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(f"cache secret: at least {MIN_SECRET_BYTES} random bytes are needed")
    return hmac.digest(secret, purpose, "sha256")


class KeyRing:
    """Makes the names. Every process of one deployment must be given the same secret.

    Args:
        secret: the operator's, at least 16 random bytes.

    Raises:
        ConfigError: the secret is too short.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = derive(secret, b"omnilmm cache names")

    def embedding_key(
        self, identity: PixelIdentity, *, scope: str, family: str, fingerprint: str, preprocessing: str, dtype: str
    ) -> str:
        """The name of one picture's vectors: "emb:" and 64 hex digits.

        Args:
            identity: what the picture shows.
            scope: who may share it; two scopes never share a name.
            family: the model family (config.Family).
            fingerprint: digest of the encoder's weights.
            preprocessing: everything between file and tensor (ImagePolicy.version).
            dtype: of the stored numbers.
        """
        return EMBEDDING + self._digest(
            scope,
            b"embedding",
            identity.digest,
            _number(identity.width),
            _number(identity.height),
            _text(family),
            _text(fingerprint),
            _text(preprocessing),
            _text(dtype),
        )

    def alias_key(self, file_digest: bytes, *, scope: str, decoding: str) -> str:
        """The name under which a file's pixels are remembered: "pix:" and 64 hex digits.

        Args:
            file_digest: SHA-256 of the file's bytes.
            scope: as in `embedding_key`.
            decoding: whatever decides which pixels a file gives (ImagePolicy.version, or its decoding part alone).
        """
        return ALIAS + self._digest(scope, b"alias", file_digest, _text(decoding))

    def _digest(self, scope: str, *fields: bytes) -> str:
        scope_secret = hmac.digest(self._secret, _joined(b"scope", _text(scope)), "sha256")
        return hmac.digest(scope_secret, _joined(*fields), "sha256").hex()


def _joined(*fields: bytes) -> bytes:
    return b"".join(_number(len(field)) + field for field in fields)


def _number(value: int) -> bytes:
    return value.to_bytes(8, "big")


def _text(value: str) -> bytes:
    # Lone surrogates cannot be encoded by default; a name must exist for any string, and differ for different ones.
    return value.encode("utf-8", "surrogatepass")
