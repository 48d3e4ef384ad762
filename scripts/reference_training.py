"""PyTorch's side of `scripts/benchmark.py train`: the same GPT, optimizer, shapes and protocol, eager or compiled.

    python scripts/reference_training.py --shape a                                # float32 on CPU
    python scripts/reference_training.py --shape c --device cuda --compile        # bfloat16 (autocast) on a GPU

Runs in an interpreter of its own that has PyTorch; nothing of llmos_jax is imported. It is written as people write PyTorch for
speed: fused attention and AdamW, TF32 for what stays in float32. With `--documents` each row's attention is that of so many
documents of equal length, by a batch of shorter rows, which costs PyTorch no mask.
"""

import argparse
import os

import benchmark


def main():
    """Parses the command line and serves the protocol."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=benchmark.SHAPES, default="a")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile, which fuses what lies between the products")
    parser.add_argument("--documents", type=int, default=0, help="documents that a row is packed from")
    parser.add_argument("--name", default="torch")
    parser.add_argument("--steps", type=int, help="run this many steps once and leave")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    import torch

    run, tokens_per_step, flops_per_token = train_worker(args)
    peak = torch.cuda.max_memory_allocated if args.device == "cuda" else lambda: 0
    benchmark.serve(args.name, run, tokens_per_step, flops_per_token, peak, {"torch": torch.__version__}, args.steps)


def train_worker(args):
    """Returns (run, tokens per step, FLOPs per token); `run(n)` does n steps and returns the last loss."""
    import torch

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    width, layers, heads, mlp, vocab, length, rows = benchmark.SHAPES[args.shape]
    model = make_model(width, layers, heads, mlp, vocab, length, max(args.documents, 1)).to(args.device)
    call = torch.compile(model) if args.compile else model
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
    batches = torch.randint(0, vocab, (8, rows, length + 1), device=args.device)
    done = 0

    def run(count):
        nonlocal done
        for _ in range(count):
            tokens = batches[done % len(batches)]
            with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.device == "cuda"):
                loss = call(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done += 1
        return loss.item()

    multiplied = sum(p.numel() for p in matrices) - length * width  # the tied embedding is the head
    return run, rows * length, 6 * multiplied + 12 * layers * width * length


def make_model(width, layers, heads, mlp, vocab, length, documents):
    """Returns a GPT-2 module `(tokens [B, L], targets [B, L]) -> mean loss`."""
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, mlp), nn.Linear(mlp, width)

        def forward(self, x):
            b, t, _ = x.shape
            qkv = self.qkv(self.attention_norm(x)).view(b * documents, t // documents, 3, heads, width // heads)
            mixed = functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
            x = x + self.output(mixed.transpose(1, 2).reshape(b, t, width))
            return x + self.down(functional.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
            self.blocks, self.norm = nn.Sequential(*[Block() for _ in range(layers)]), nn.LayerNorm(width)
            for p in self.parameters():
                if p.dim() > 1:
                    nn.init.normal_(p, std=0.02)

        def forward(self, tokens, targets):
            hidden = self.norm(self.blocks(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]))
            logits = functional.linear(hidden, self.tokens.weight)
            return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return GPT()


if __name__ == "__main__":
    main()
