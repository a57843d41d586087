"""The batches of a kiln run, read from its token shards: the sample order of src/io/dataset.cpp for one source.

Self-check: python scripts/gpu/kiln_data.py [--test]  (known answers of Philox4x32-10, and that the order is a
permutation)
"""

import glob
import mmap
import struct
import sys

MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1


def philox_bits(seed, stream, n):
    """64 bits of Philox4x32-10, draw n of a stream (src/base/rng.cpp)."""
    c = [n & MASK32, n >> 32, stream & MASK32, stream >> 32]
    key0, key1 = seed & MASK32, seed >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ key0, p1 & MASK32, (p0 >> 32) ^ c[3] ^ key1, p0 & MASK32]
        key0, key1 = (key0 + 0x9E3779B9) & MASK32, (key1 + 0xBB67AE85) & MASK32
    return (c[1] << 32) | c[0]


def stream_of(name):
    """FNV-1a."""
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = ((value ^ byte) * 0x100000001B3) & MASK64
    return value


def permuted_index(n, size, seed, stream):
    """The n-th image of the seeded bijection of [0, size): four Feistel rounds, walked until inside."""
    if size <= 1:
        return 0
    half = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    x = n
    while True:
        left, right = x >> half, x & mask
        for turn in range(4):
            left, right = right, left ^ (philox_bits(seed, stream, (turn << 60) | right) & mask)
        x = (left << half) | right
        if x < size:
            return x


def read_shard(path):
    """llm.c's format: 256 int32 of header, then uint16 or uint32 tokens; a memory-mapped tensor of int16 or int32."""
    import torch

    with open(path, "rb") as file:
        magic, version, count = struct.unpack("<3i", file.read(12))
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    kinds = {(20240520, 1): torch.int16, (20240801, 7): torch.int32}
    if (magic, version) not in kinds:
        raise SystemExit(f"{path}: magic {magic}, version {version}: not a token shard")
    tokens = torch.frombuffer(data, dtype=kinds[magic, version], offset=1024)
    if len(tokens) != count:
        raise SystemExit(f"{path}: {len(tokens)} tokens, expected {count}")
    return tokens


class Samples:
    """sample(n): an int64 tensor of seq_len + 1 tokens, as Dataset::sample gives inputs and targets for a single source."""

    def __init__(self, pattern, seq_len, seed):
        self.seq_len, self.seed = seq_len, seed
        self.shards = [read_shard(path) for path in sorted(glob.glob(pattern))]
        if not self.shards:
            raise SystemExit(f"{pattern}: no such token shard")
        self.firsts, self.count = [], 0
        for shard in self.shards:
            self.firsts.append(self.count)
            self.count += max(0, (len(shard) - 1) // seq_len)

    def sample(self, n):
        stream = stream_of("data") ^ (n // self.count)  # of source 0, by epoch
        index = permuted_index(n % self.count, self.count, self.seed, stream)
        shard = max(s for s in range(len(self.shards)) if self.firsts[s] <= index)
        begin = (index - self.firsts[shard]) * self.seq_len
        tokens = self.shards[shard][begin : begin + self.seq_len + 1].long()
        return tokens & 0xFFFF if self.shards[shard].element_size() == 2 else tokens


def self_check():
    # Known answer of Random123's kat_vectors (philox4x32, 10 rounds, all zero): words 6627e8d5 e169c58d.
    assert philox_bits(0, 0, 0) == 0xE169C58D6627E8D5
    for size in (1, 2, 3, 1000, 4097):
        assert sorted(permuted_index(n, size, 7, 9) for n in range(size)) == list(range(size))
    print("kiln_data: self-check passed")


if __name__ == "__main__" and "--test" in sys.argv:
    self_check()
