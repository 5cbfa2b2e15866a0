"""Small PDF files, written byte by byte, for what ordinary writers do not write: encrypted, damaged, without pages."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

_PAD = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")  # ISO 32000-1, 7.6.3.3


def pdf(
    greys: Sequence[float] = (0.5,),
    *,
    size: tuple[int, int] = (120, 160),
    missing: Sequence[int] = (),
    password: str | None = None,
) -> bytes:
    """A PDF with one page of a single grey (0 black … 1 white) for each of ``greys``.

    size: of a page, in points. missing: pages, counted from 1, whose object is not there. password: encrypts it
    (RC4, 40 bits).
    """
    first = 3
    kids = " ".join(f"{first + 2 * index} 0 R" for index in range(len(greys)))
    objects = {1: b"<</Type/Catalog/Pages 2 0 R>>", 2: f"<</Type/Pages/Kids[{kids}]/Count {len(greys)}>>".encode()}
    key = None if password is None else _key(password)
    for index, grey in enumerate(greys):
        number = first + 2 * index
        content = f"{grey:g} g 0 0 {size[0]} {size[1]} re f".encode()
        if key is not None:
            content = _rc4(hashlib.md5(key + (number + 1).to_bytes(3, "little") + b"\0\0").digest()[:10], content)
        if index + 1 not in missing:
            box = f"/MediaBox[0 0 {size[0]} {size[1]}]"
            objects[number] = f"<</Type/Page/Parent 2 0 R{box}/Contents {number + 1} 0 R>>".encode()
        objects[number + 1] = f"<</Length {len(content)}>>stream\n".encode() + content + b"\nendstream"
    trailer = ""
    if key is not None:
        user, number = _rc4(key, _PAD).hex(), max(objects) + 1
        objects[number] = f"<</Filter/Standard/V 1/R 2/O<{_owner(password).hex()}>/U<{user}>/P -4>>".encode()
        trailer = f"/Encrypt {number} 0 R/ID[<00><00>]"
    out, places = b"%PDF-1.4\n", {}
    for number, body in objects.items():
        places[number] = len(out)
        out += f"{number} 0 obj\n".encode() + body + b"\nendobj\n"
    start, last = len(out), max(objects)
    out += f"xref\n0 {last + 1}\n0000000000 65535 f \n".encode()
    for number in range(1, last + 1):
        out += f"{places.get(number, 0):010d} 00000 {'n' if number in places else 'f'} \n".encode()
    return out + f"trailer<</Size {last + 1}/Root 1 0 R{trailer}>>\nstartxref\n{start}\n%%EOF\n".encode()


def _owner(password: str | None) -> bytes:
    padded = ((password or "").encode() + _PAD)[:32]
    return _rc4(hashlib.md5(padded).digest()[:5], padded)


def _key(password: str) -> bytes:
    padded = (password.encode() + _PAD)[:32]
    permissions = (-4 & 0xFFFFFFFF).to_bytes(4, "little")
    return hashlib.md5(padded + _owner(password) + permissions + b"\0").digest()[:5]


def _rc4(key: bytes, data: bytes) -> bytes:
    state, j = list(range(256)), 0
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    out, i, j = bytearray(), 0, 0
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)
