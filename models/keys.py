"""Keys of random draws: whatever names a draw decides it, and nothing else does."""

import hashlib


def sample_key(*parts: str | int) -> int:
    """The 63-bit key of a sample's noise, from whatever names it: seed, stage, round, prompt id, sample index."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
