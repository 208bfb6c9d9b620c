"""Random numbers that depend on what they are drawn for, and on nothing else."""

import hashlib

import torch


def generator_for(*key: object) -> torch.Generator:
    """A generator whose draws are the same for the same key on every machine, and independent
    for different keys; the order in which adapters or modules are worked on does not matter."""
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
