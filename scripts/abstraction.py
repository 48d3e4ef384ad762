"""What the framework costs in the compiled program: the same GPT step through it, and written by hand in plain JAX.

    python scripts/abstraction.py --shape=a

compiles both for one CPU device, without running them, and prints the FLOPs and the temporary bytes that XLA gives for each.
The hand-written step uses dicts and functions alone, and makes the same choices: layers stacked in memory, attention in
blocks of queries, weight gradients in the form of XLA:CPU's fast library, a head fused with its loss, hand-written backward
passes of norm and GELU, AdamW with clipping, a step that a non-finite gradient leaves untouched. Exit code 1 when a figure
of the framework's is more than 3 % larger.
"""

import argparse
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from benchmark import SHAPES
from jax import lax

ALLOWED = 0.03
_BLOCK = 64
_CHUNK_ELEMENTS = 2**25


@jax.custom_vjp
def matmul(x, weight):
    return x @ weight


def _matmul_backward(kept, g):
    x, weight = kept
    x_TI, g_TO = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    barrier = lax.optimization_barrier
    small_x = x_TI.shape[1] <= g_TO.shape[1]
    dweight = barrier(x_TI.T) @ g_TO if small_x else barrier(barrier(g_TO.T) @ x_TI).T
    return lax.dot_general(g, weight, (((g.ndim - 1,), (1,)), ((), ()))), dweight


matmul.defvjp(lambda x, weight: (x @ weight, (x, weight)), _matmul_backward)


@jax.custom_vjp
def norm(x, scale, bias):
    return _norm_forward(x, scale, bias)[0]


def _norm_forward(x, scale, bias):
    mean = x.mean(-1, keepdims=True)
    inverse = lax.rsqrt(jnp.maximum((x * x).mean(-1, keepdims=True) - mean * mean, 0.0) + 1e-5)
    return (x - mean) * inverse * scale + bias, (x, scale, mean, inverse)


def _norm_backward(kept, g):
    x, scale, mean, inverse = kept
    normalised, scaled = (x - mean) * inverse, g * scale
    across = (scaled * normalised).mean(-1, keepdims=True)
    dx = inverse * (scaled - scaled.mean(-1, keepdims=True) - normalised * across)
    return dx, (g * normalised).sum((0, 1)), g.sum((0, 1))


norm.defvjp(_norm_forward, _norm_backward)


@jax.custom_vjp
def gelu(x):
    return jax.nn.gelu(x)


def _gelu_backward(x, g):
    tanh = jnp.tanh(np.sqrt(2 / np.pi).astype(np.float32) * (x + 0.044715 * x**3))
    slope = np.sqrt(2 / np.pi).astype(np.float32) * (1 + 3 * 0.044715 * x * x)
    return (g * (0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * slope),)


gelu.defvjp(lambda x: (jax.nn.gelu(x), x), _gelu_backward)


def _scores(query, key, segments, rows):
    position = np.arange(rows.start, rows.stop)[:, None]
    hidden = np.where(np.arange(rows.stop) <= position, 0.0, -1e30).astype(np.float32)
    scores = query[:, :, rows] @ key[:, :, : rows.stop].swapaxes(2, 3) + hidden
    return jnp.where(segments[:, None, rows, None] == segments[:, None, None, : rows.stop], scores, -1e30)


def _blocks(length):
    rows = max(_BLOCK, length // 8)
    return [slice(start, start + rows) for start in range(0, length, rows)]


@jax.custom_vjp
def attention(query, key, value, segments):
    """Causal attention within segments, [B, L, H, K], block by block of queries."""
    return _attention_forward(query, key, value, segments)[0]


def _attention_forward(query, key, value, segments):
    scale, outputs, sums = 1 / np.sqrt(query.shape[-1]).astype(np.float32), [], []
    given = (query, key, value, segments)
    scaled, key, value = (query * scale).swapaxes(1, 2), key.swapaxes(1, 2), value.swapaxes(1, 2)
    for rows in _blocks(query.shape[1]):
        scores = _scores(scaled, key, segments, rows)
        peak = scores.max(-1, keepdims=True)
        exponentials = jnp.exp(scores - peak)
        total = exponentials.sum(-1, keepdims=True)
        outputs.append(exponentials @ value[:, :, : rows.stop] / total)
        sums.append(peak + jnp.log(total))
    output = jnp.concatenate(outputs, 2).swapaxes(1, 2)
    return output, (*given, output, jnp.concatenate(sums, 2))


def _attention_backward(kept, g):
    query, key, value, segments, output, sums = kept
    scale, blocks = 1 / np.sqrt(query.shape[-1]).astype(np.float32), _blocks(query.shape[1])
    along = (g * output).sum(-1, keepdims=True).swapaxes(1, 2)
    scaled, key, value, g = ((query * scale).swapaxes(1, 2), *(x.swapaxes(1, 2) for x in (key, value, g)))
    dquery, dkey, dvalue = [], [0.0] * len(blocks), [0.0] * len(blocks)
    for number, rows in enumerate(blocks):
        weights = jnp.exp(_scores(scaled, key, segments, rows) - sums[:, :, rows])
        dscores = weights * (g[:, :, rows] @ value[:, :, : rows.stop].swapaxes(2, 3) - along[:, :, rows])
        dquery.append(dscores @ key[:, :, : rows.stop] * scale)
        of_value, of_key = g[:, :, rows].swapaxes(2, 3) @ weights, scaled[:, :, rows].swapaxes(2, 3) @ dscores
        for before, piece in enumerate(blocks[: number + 1]):
            dvalue[before], dkey[before] = dvalue[before] + of_value[..., piece], dkey[before] + of_key[..., piece]
    dkey, dvalue = (jnp.concatenate(parts, 3).transpose(0, 3, 1, 2) for parts in (dkey, dvalue))
    return jnp.concatenate(dquery, 2).swapaxes(1, 2), dkey, dvalue, None


attention.defvjp(_attention_forward, _attention_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def head(hidden, weight, targets, weights, chunks):
    """The summed cross-entropy of the logits `hidden @ weight.T`; its gradient is made in the forward pass."""
    return _head_forward(hidden, weight, targets, weights, chunks)[0]


def _head_forward(hidden, weight, targets, weights, chunks):
    def add(carry, piece):
        (total, correct), dweight = carry
        hidden, targets, weights = piece
        logits = hidden @ weight.T
        peak = logits.max(-1, keepdims=True)
        exponentials = jnp.exp(logits - peak)
        sums = exponentials.sum(-1, keepdims=True)
        chosen = jnp.take_along_axis(logits, targets[..., None], -1)
        nll = ((peak + jnp.log(sums) - chosen)[..., 0] * weights).sum()
        right = ((chosen >= peak)[..., 0] * weights).sum()
        is_target = lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
        dlogits = exponentials * (weights[..., None] / sums) - jnp.where(is_target, weights[..., None], 0)
        dhidden, of_weight = jax.vjp(lambda h, w: matmul(h, w.T), hidden, weight)[1](dlogits)
        return ((total + nll, correct + right), dweight + of_weight), dhidden

    start, arrays = ((0.0, 0.0), jnp.zeros_like(weight)), (hidden, targets, weights)
    if chunks == 1:
        (sums, dweight), dhidden = add(start, arrays)
        return sums, (dhidden, dweight)
    arrays = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0), arrays)
    (sums, dweight), dhidden = lax.scan(add, jax.tree.map(jnp.float32, start), arrays)
    return sums, (jnp.moveaxis(dhidden, 0, 1).reshape(hidden.shape), dweight)


def _head_backward(chunks, kept, g):
    return kept[0] * g[0], kept[1] * g[0], None, None


head.defvjp(_head_forward, _head_backward)


def plain_step(shape):
    """Returns the traced step, by hand."""
    width, layers, heads, mlp, vocab, length, rows = SHAPES[shape]
    shapes = {
        "norm1": (2, width), "qkv": (width, 3 * width), "qkv_bias": (3 * width,), "out": (width, width), "out_bias": (width,),
        "norm2": (2, width), "up": (width, mlp), "up_bias": (mlp,), "down": (mlp, width), "down_bias": (width,),
    }  # fmt: skip
    blocks = {name: jax.ShapeDtypeStruct((layers, *dims), jnp.float32) for name, dims in shapes.items()}
    tables = {"embedding": (vocab, width), "positions": (length, width), "norm": (2, width)}
    params = {name: jax.ShapeDtypeStruct(dims, jnp.float32) for name, dims in tables.items()} | {"blocks": blocks}
    chunks = next(n for n in range(1, length + 1) if length % n == 0 and rows * length // n * vocab <= _CHUNK_ELEMENTS)
    is_matrix = jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in str(path) and "bias" not in str(path), params)
    optimizer = optax.adamw(1.0, 0.9, 0.95, 1e-8, weight_decay=0.1, mask=is_matrix)

    def block(x, p, segments):
        qkv = matmul(norm(x, *p["norm1"]), p["qkv"]) + p["qkv_bias"]
        qkv = qkv.reshape(rows, length, heads, 3, width // heads)
        mixed = attention(qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :], segments).reshape(x.shape)
        x = x + matmul(mixed, p["out"]) + p["out_bias"]
        hidden = gelu(matmul(norm(x, *p["norm2"]), p["up"]) + p["up_bias"])
        return x + matmul(hidden, p["down"]) + p["down_bias"]

    def loss(params, batch):
        x = params["embedding"][batch["tokens"]] + params["positions"][batch["positions"]]
        if layers < 8:
            stacked = {name: [part[0] for part in lax.split(leaf, [1] * layers)] for name, leaf in params["blocks"].items()}
            for layer in range(layers):
                x = block(x, {name: parts[layer] for name, parts in stacked.items()}, batch["segments"])
        else:
            x = lax.scan(lambda x, p: (block(x, p, batch["segments"]), None), x, params["blocks"])[0]
        hidden = norm(x, *params["norm"])
        return head(hidden, params["embedding"], batch["targets"], batch["weights"], chunks)

    def step(params, moments, batch, rate):
        total, pullback, correct = jax.vjp(lambda p: loss(p, batch), params, has_aux=True)
        weight = batch["weights"].sum()
        gradients = jax.tree.map(lambda g: g / weight, pullback(1.0)[0])
        size = optax.global_norm(gradients)
        gradients = jax.tree.map(lambda g: g * jnp.minimum(1.0, 1.0 / (size + 1e-6)), gradients)
        updates, new = optimizer.update(gradients, moments, params)
        updated = optax.apply_updates(params, jax.tree.map(lambda u: u * rate, updates))
        is_good = jnp.isfinite(size) & jnp.isfinite(total)
        kept = jax.tree.map(lambda a, b: jnp.where(is_good, a, b), (updated, new), (params, moments))
        return *kept, {"loss": total / weight, "accuracy": correct / weight, "norm": size}

    ints = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = {name: ints for name in ("tokens", "targets", "segments", "positions")}
    batch["weights"] = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    moments = jax.eval_shape(optimizer.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).trace(params, moments, batch, jax.ShapeDtypeStruct((), jnp.float32))


def framework_step(shape):
    """Returns the traced step that a training run of the shape compiles, on one device."""
    from llmos_jax.compute.sharding import make_placement
    from llmos_jax.config import parse
    from llmos_jax.models import gpt
    from llmos_jax.tasks import language
    from llmos_jax.train import compile as step_compile
    from llmos_jax.train import optim, state
    from llmos_jax.train.settings import Settings

    width, layers, heads, mlp, vocab, length, rows = SHAPES[shape]
    model = dict(name="gpt", width=width, layers=layers, heads=heads, mlp=mlp, vocab_size=vocab, context=length)
    tree = dict(name="abstraction", model=model, data=dict(length=length), optim=dict(schedule="constant", warmup=0.0))
    settings = parse(Settings, tree | dict(train=dict(batch_size=rows, steps=1000)))
    known = language.outline(settings.task, model=settings.model, data=settings.data)
    placement = make_placement(None, jax.devices()[:1])
    handle = state.describe_model(functools.partial(gpt.build, settings.model, placement), placement)
    optimizer = optim.make_optimizer(settings.optim, handle.infos)
    return step_compile.trace_step(settings, known, handle, optimizer, placement)[0]


def measure(traced):
    """Returns {"flops", "temporary_bytes", "argument_bytes"} of a step, as XLA has it."""
    compiled = traced.lower().compile()
    memory = compiled.memory_analysis()
    return {
        "flops": compiled.cost_analysis()["flops"],
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
    }


def main():
    """Compiles both steps, prints their figures; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="a")
    args = parser.parse_args()
    framework, plain = measure(framework_step(args.shape)), measure(plain_step(args.shape))
    ratios = {name: framework[name] / plain[name] for name in plain}
    print(f"{'shape ' + args.shape:18s} {'framework':>14s} {'by hand':>14s} {'ratio':>7s}")
    for name, ratio in ratios.items():
        print(f"{name:18s} {framework[name]:14,.0f} {plain[name]:14,.0f} {ratio:7.4f}")
    print(json.dumps({"what": "abstraction", "shape": args.shape, "framework": framework, "plain": plain, "ratios": ratios}))
    return int(max(ratios["flops"], ratios["temporary_bytes"]) > 1 + ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
