"""LLaMA in plain PyTorch: the peer that kiln is measured against and whose loss curve it is held to."""

import json
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

# hidden, ffn, heads, layers; as in src/model/llama_config.cpp
SIZES = {"9m": (128, 352, 4, 4), "60m": (512, 1376, 8, 8), "130m": (768, 2048, 12, 12), "350m": (1024, 2736, 16, 24),
         "1b": (2048, 5461, 32, 24)}  # fmt: skip
VOCAB = 32000


class Block(nn.Module):
    def __init__(self, hidden, ffn, heads, kv_heads):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, hidden // heads
        self.norm1 = nn.Parameter(torch.ones(hidden))
        self.norm2 = nn.Parameter(torch.ones(hidden))
        self.qkv = nn.Linear(hidden, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.o = nn.Linear(heads * self.head_dim, hidden, bias=False)
        self.gate_up = nn.Linear(hidden, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def rotate(self, x, cos, sin):
        """The rotate-half form of RoPE; x [B,H,T,D]."""
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    def forward(self, x, cos, sin, eps):
        batch, tokens, hidden = x.shape
        y = F.rms_norm(x, (hidden,), self.norm1.to(x.dtype), eps)
        q, k, v = self.qkv(y).view(batch, tokens, -1, self.head_dim).transpose(1, 2).split(
            (self.heads, self.kv_heads, self.kv_heads), dim=1)  # fmt: skip
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x = x + self.o(attended.transpose(1, 2).reshape(batch, tokens, -1))
        gate, up = self.gate_up(F.rms_norm(x, (hidden,), self.norm2.to(x.dtype), eps)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self, hidden, ffn, heads, layers, vocab=VOCAB, kv_heads=None, eps=1e-6, rope_base=10000.0):
        super().__init__()
        self.eps, self.rope_base, self.head_dim = eps, rope_base, hidden // heads
        self.embedding = nn.Embedding(vocab, hidden)
        self.blocks = nn.ModuleList(Block(hidden, ffn, heads, kv_heads or heads) for _ in range(layers))
        self.norm = nn.Parameter(torch.ones(hidden))
        self.head = nn.Linear(hidden, vocab, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def rope(self, tokens, device):
        exponent = -torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device) / self.head_dim
        angle = torch.outer(torch.arange(tokens, dtype=torch.float64, device=device), self.rope_base**exponent)
        return angle.cos().float(), angle.sin().float()

    def forward(self, tokens, targets, cos, sin):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, self.eps)
        logits = self.head(F.rms_norm(x, x.shape[-1:], self.norm.to(x.dtype), self.eps))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.view(-1), ignore_index=-100)

    def flops_per_token(self, seq):
        """As kiln counts them: 6 a weight of the matrix products, 6 L C T of causal attention."""
        weights = sum(p.numel() for p in self.parameters() if p.dim() > 1) - self.embedding.weight.numel()
        attention = sum(block.heads * block.head_dim for block in self.blocks)
        return 6.0 * weights + 6.0 * attention * seq


def read_safetensors(path):
    """Name to fp32 tensor; the format is a length, a JSON header and the bytes."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16}
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        kind = kinds[entry["dtype"]]
        flat = torch.frombuffer(data, dtype=kind, offset=8 + length + begin, count=(end - begin) // kind.itemsize)
        tensors[name] = flat.view(entry["shape"]).float()
    return tensors


def load_checkpoint(directory):
    """A model with the weights of a kiln checkpoint (Hugging Face names), in fp32."""
    directory = pathlib.Path(directory)
    config = json.loads((directory / "config.json").read_text())
    weights = read_safetensors(directory / "model.safetensors")
    model = Llama(config["hidden_size"], config["intermediate_size"], config["num_attention_heads"],
                  config["num_hidden_layers"], config["vocab_size"], config["num_key_value_heads"],
                  config["rms_norm_eps"], config["rope_theta"])  # fmt: skip
    if config.get("tie_word_embeddings"):
        raise SystemExit(f"{directory}: tied embeddings, which this peer does not have")
    with torch.no_grad():
        model.embedding.weight.copy_(weights.pop("model.embed_tokens.weight"))
        model.norm.copy_(weights.pop("model.norm.weight"))
        model.head.weight.copy_(weights.pop("lm_head.weight"))
        for n, block in enumerate(model.blocks):
            take = lambda name: weights.pop(f"model.layers.{n}.{name}.weight")  # noqa: E731
            block.norm1.copy_(take("input_layernorm"))
            block.norm2.copy_(take("post_attention_layernorm"))
            block.qkv.weight.copy_(torch.cat([take(f"self_attn.{p}_proj") for p in "qkv"]))
            block.o.weight.copy_(take("self_attn.o_proj"))
            block.gate_up.weight.copy_(torch.cat([take(f"mlp.{p}_proj") for p in ("gate", "up")]))
            block.down.weight.copy_(take("mlp.down_proj"))
    if weights:
        raise SystemExit(f"{directory}: tensors that the model does not have: {sorted(weights)}")
    return model
