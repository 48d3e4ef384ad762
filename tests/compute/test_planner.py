"""The planner: a recorded schedule read line by line, programs compiled here, machines by name, and real TPU compilers."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from llmos_jax import api
from llmos_jax.compute import hlo, planner, topology, xla
from llmos_jax.compute.mesh import MeshConfig
from llmos_jax.compute.sharding import make_placement
from llmos_jax.errors import ConfigError, DeviceMemoryError
from llmos_jax.main import main
from llmos_jax.models import gpt
from llmos_jax.train.compile import whole_arrays
from llmos_jax.train.state import describe_model

SCHEDULE = pathlib.Path("tests/compute/schedule.txt")  # cut out of what the TPU compiler made of GPT-3 for 512 chips
ASSIGNMENT = """BufferAssignment:
allocation 0: size 900, page 0, thread-local:
 value: <9 convolution.1 @0> (size=900,offset=0): bf16[450]{0}
allocation 6: size 800, page 0, parameter 16, shape |f32[10,20]| at ShapeIndex {}, maybe-live-out:
 value: <4377 param.1 @0> (size=800,offset=0): f32[10,20]{1,0:T(8,128)}
allocation 7: size 5000, page 0, preallocated-temp:
 value: <12 all-gather.72 @0> (size=1000,offset=0): bf16[1,25,20]{2,1,0:T(8,128)(2,1)}
 value: <13 fusion.1{1} @0> (size=400,offset=1000): f32[100]{0}
 value: <14 fusion.2{} @0> (size=40,offset=0): (f32[100]{0}, f32[4]{0})
 value: <15 all-gather.72 @0> (size=1000,offset=2000): bf16[1,25,20]{2,1,0:T(8,128)(2,1)}
"""


def test_a_recorded_schedule():
    gather, permute, scatter, weight, total = hlo.collectives(SCHEDULE.read_text())
    activation = 24 * 256 * 12288 * 2
    # Offloaded: started twice (program, then data); only what comes after the data counts as hiding it.
    assert (gather.kind, gather.devices, gather.count, gather.is_async, gather.hidden_by) == ("all-gather", 8, 96, True, 1)
    assert gather.type == "bf16[24,2048,12288]" and gather.sent_bytes == 7 * activation
    assert gather.source == "jit(step)/rematted_computation/add"
    # In a loop of 4 / 2 turns inside one of 96; copies hide nothing.
    assert (permute.kind, permute.devices, permute.count, permute.hidden_by) == ("collective-permute", 4, 96 * 2, 2)
    assert permute.type == "bf16[24,256,12288]" and permute.sent_bytes == activation and permute.is_async
    # An all-reduce of which a slice is kept, fused.
    assert (scatter.kind, scatter.devices, scatter.count, scatter.is_async) == ("reduce-scatter", 4, 96, False)
    assert scatter.type == "bf16[192,6144]" and scatter.sent_bytes == 3 * 192 * 6144 * 2
    assert (weight.kind, weight.devices, weight.is_async, weight.hidden_by) == ("all-gather", 64, False, 0)
    assert (total.kind, total.count, total.type, total.devices) == ("all-reduce", 1, "f32[], f32[3]", 512)  # no groups: all
    assert all(collective.is_counted for collective in (gather, permute, scatter, weight, total))


def test_a_loop_of_unknown_length_is_marked():
    text = SCHEDULE.read_text().replace(
        "compare(%get-tuple-element.1833, %constant.462)", "compare(%get-tuple-element.1833, %x)"
    )
    text = text.replace(
        "%constant.462 = s32[]{:T(128)} constant(96)", "%x = s32[]{:T(128)} get-tuple-element(%wide.param.45), index=0"
    )
    found = hlo.collectives(text)
    assert [c.is_counted for c in found] == [False] * 4 + [True] and found[0].count == 1 and found[1].count == 2


def test_a_collective_that_products_carry_along():
    """As v5e's compiler writes it: one all-gather, not three."""
    text = """HloModule m, num_partitions=8

%fused_computation.1 (p: bf16[64,8]) -> bf16[512,8] {
  %p = bf16[64,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[512,8]{1,0} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={0}
}

%async_collective_fusion.3 (p: bf16[64,8]) -> bf16[512,8] {
  %p = bf16[64,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[512,8]{1,0} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={0}
}

ENTRY %main (x: bf16[64,8]) -> bf16[512,8] {
  %x = bf16[64,8]{1,0} parameter(0)
  %async-collective-start.1 = (bf16[64,8]{1,0}, bf16[512,8]{1,0}, u32[]) fusion(%x), kind=kCustom, calls=%fused_computation.1
  %get-tuple-element.1 = bf16[64,8]{1,0} get-tuple-element(%async-collective-start.1), index=0
  %fusion.4 = (bf16[9,9]{1,0}, bf16[64,8]{1,0}) fusion(%get-tuple-element.1), kind=kOutput, calls=%async_collective_fusion.3
  %get-tuple-element.2 = bf16[64,8]{1,0} get-tuple-element(%fusion.4), index=1
  %async-collective-done.1 = bf16[512,8]{1,0} fusion(%get-tuple-element.2), kind=kCustom, calls=%fused_computation.1
  ROOT %fusion.5 = bf16[512,8]{1,0} fusion(%async-collective-done.1), kind=kLoop, calls=%fused_computation.1.not
}
"""
    (found,) = hlo.collectives(text)
    assert (found.kind, found.devices, found.is_async, found.hidden_by) == ("all-gather", 8, True, 1)
    assert found.sent_bytes == 448 * 8 * 2


def test_arrays_of_a_buffer_assignment():
    found = hlo.arrays(ASSIGNMENT, SCHEDULE.read_text(), 300)
    assert [(a.type, a.size_bytes, a.is_argument) for a in found] == [
        ("bf16[1,25,20]", 1000, False),
        ("f32[10,20]", 800, True),
        ("f32[100]", 400, False),
    ]
    assert found[1].source == "state.params['x']" and found[0].shape == (1, 25, 20)
    assert hlo.type_bytes("(f32[3,2]{1,0}, (pred[5], bf16[]), s4[8], f8e4m3fn[3])") == 24 + 5 + 2 + 4 + 3
    with pytest.raises(ValueError, match="no HLO module"):
        hlo.parse_module("nothing")


def sharded_program(is_gathered):
    """A loop of 6 products over sharded weights [6, 64, 64], whose gradient is left whole on every device or not."""
    placement = make_placement(MeshConfig(data=4, model=2))

    def where(*axes):
        return NamedSharding(placement.mesh, PartitionSpec(*axes))

    def loss(weights, x):
        def layer(x, weight):
            return lax.with_sharding_constraint(jnp.tanh(x @ weight), where("data", None)), None

        return lax.scan(layer, x, weights)[0].sum()

    weights = jax.ShapeDtypeStruct((6, 64, 64), jnp.float32, sharding=where(None, "data", "model"))
    x = jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=where("data", None))
    out = where() if is_gathered else weights.sharding
    return jax.jit(jax.grad(loss), out_shardings=out).trace(weights, x), placement


@pytest.mark.parametrize("is_gathered", [False, True])
def test_a_report_of_a_program_compiled_here(is_gathered):
    traced, placement = sharded_program(is_gathered)
    report = planner.make_report(traced, placement.mesh, model_flops=8e6, wholes={"weights": (6, 64, 64)})
    assert report.memory["arguments"] == 6 * 64 * 64 * 4 // 8 + 32 * 64 * 4 // 4
    assert report.memory["peak"] >= report.memory["arguments"] and report.mesh == {"data": 4, "model": 2}
    assert report.matmul_flops == 6 * 3 * 2 * 32 * 64 * 64 / 8 and report.model_flops == 1e6
    gathers = [c for c in report.collectives if c.kind in ("all-gather", "all-reduce") and c.count == 6]
    assert gathers and all(c.devices in (2, 4, 8) for c in report.collectives)
    assert bool(report.whole) == is_gathered
    text = planner.format_report(report)
    assert "8 x cpu, mesh data 4 x model 2" in text and ("whole though sharded by the rules: none" in text) != is_gathered
    assert json.loads(planner.to_json(report))["memory"] == report.memory


def test_products_are_counted_through_every_kind_of_call():
    x = jnp.ones((8, 8))
    product = 2 * 8**3

    def count(function):
        return planner.matmul_flops(jax.make_jaxpr(function)(x).jaxpr)

    assert count(lambda x: x @ x) == product
    assert count(lambda x: lax.scan(lambda c, _: (jax.jit(lambda y: y @ y)(c), None), x, None, length=5)[0]) == 5 * product
    assert count(lambda x: lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, x)) == 2 * product
    once, again = (
        count(jax.grad(lambda x, r=r: r(lambda y: (jnp.sin(y @ x) @ x).sum())(x))) for r in (lambda f: f, jax.checkpoint)
    )
    assert once == 6 * product and again == 7 * product  # the last product need not be repeated


def test_what_counts_as_whole():
    placement = make_placement(MeshConfig(data=2, model=4, parameters="fsdp"))
    config = gpt.Config(vocab_size=640, context=64, width=32, layers=3, heads=4, mlp=512)
    handle = describe_model(functools.partial(gpt.build, config, placement), placement)
    found, unchecked = whole_arrays(handle, placement, 16, 64)
    qkv = "stack/blocks/attention/qkv/weight"
    assert found[qkv] == (3, 32, 4, 3, 8) and found[f"one layer of {qkv}"] == (32, 4, 3, 8)
    assert found["logits"] == (8, 64, 640) and found["logits of a shard of the vocabulary"] == (8, 64, 160)
    assert found["embedding"] == (640, 32) and "one layer of stack/blocks/up/weight" not in found
    assert "one layer of stack/blocks/up/weight" in unchecked  # 512 are 8 x 64 tokens, too
    assert not whole_arrays(handle, placement, 8, 64)[1]
    assert "stack/blocks/mlp_norm/scale" not in found and "positions" not in found  # not sharded; gathered by FSDP
    array = hlo.Array("x", "bf16[1,4,3,8,32]", (1, 4, 3, 8, 32), 8192, False, "somewhere")
    assert planner.find_whole([array], found) == [f"bf16[1,4,3,8,32] is all of one layer of {qkv} (somewhere)"]
    data_only = make_placement(MeshConfig(data=8, parameters="fsdp"))
    handle = describe_model(functools.partial(gpt.build, config, data_only), data_only)
    assert f"one layer of {qkv}" not in whole_arrays(handle, data_only, 16, 64)[0]  # gathered when it is used


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5p-100", "no slice of that size; there are v5p-2, v5p-8, v5p-16"),
        ("h100", "kinds: v5p-N, tpu7x-N, v5e-N"),
        ("v5p:4x4", "a slice of v5p has 3 dimensions"),
        ("", "no machine that is known"),
    ],
)
def test_unknown_machines_are_refused(name, words):
    with pytest.raises(ConfigError, match=words):
        topology.topology_devices(name)


def test_options_are_chosen_by_device_and_changed_by_name():
    class Device:
        platform, device_kind = "tpu", "TPU v5"

    chosen = xla.compiler_options(Device)
    assert chosen == {option.name: option.value for option in xla.OPTIONS["TPU v5p"]} and len(chosen) > 3
    first = next(iter(chosen))
    changed = xla.compiler_options(Device, {first: "none", "a": "true", "b": "-3", "c": "text"})
    assert first not in changed and changed["a"] is True and changed["b"] == -3 and changed["c"] == "text"
    assert xla.compiler_options(jax.devices()[0]) == {}


def test_the_compiler_knows_every_option_for_gpus():
    """Names are looked up in one table whatever the program is compiled for, so a CPU's compiler refuses what a GPU's would."""
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    assert xla.compile_lowered(lowered, {option.name: option.value for option in xla.OPTIONS["gpu"]})(1.0) == 2.0
    with pytest.raises(
        ConfigError, match="No such compile option: 'xla_gpu_of_old'.*train.compiler_options.xla_gpu_of_old=none"
    ):
        xla.compile_lowered(lowered, {"xla_gpu_of_old": True})
    with pytest.raises(ConfigError, match="'perhaps' is not a valid bool"):
        xla.compile_lowered(lowered, {"xla_cpu_enable_fast_math": "perhaps"})


def test_the_verb_says_what_is_missing(capsys):
    assert main(["llmos", "plan", "--config=experiments/gpt.py"]) == 78
    assert "plan needs --config and --topology" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("v5p-128", 64), ("v5e-16", 16), ("v6e-8", 8), ("tpu7x-8", 8), ("2xv5p-8", 8)])
def test_machines_by_name(name, count, tpu_compiler):
    devices = topology.topology_devices(name)
    assert len(devices) == count and devices[0].platform == "tpu"
    assert len({getattr(device, "slice_index", 0) for device in devices}) == (2 if name.startswith("2x") else 1)
    for mesh in (MeshConfig(), MeshConfig(model=2), MeshConfig(data=2, model=-1)):  # no size needs a dimension of its own
        assert make_placement(mesh, devices).mesh.size == count


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5p", "v5e", "v6e"])
def test_the_compiler_knows_every_option(chip, tpu_compiler):
    device = topology.topology_devices(f"{chip}-8")[0]
    x = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device))
    lowered = jax.jit(lambda x: x @ x).lower(x)
    lowered.compile(compiler_options=xla.compiler_options(device))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        lowered.compile(compiler_options={"xla_no_such_option": True})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_plan_for_a_tpu(tpu_compiler):
    """In small what is done for GPT-3: FSDP x tensor parallelism, nothing whole, every large collective asynchronous."""
    choices = {
        "model.width": 1024, "model.heads": 8, "model.layers": 8, "model.remat": "full", "model.context": 1024,
        "data.length": 1024, "data.tokenizer": "bpe:32000", "train.batch_size": 96, "mesh.parameters": "fsdp",
        "mesh.data": 16, "mesh.model": 4, "optim.gradient_dtype": "bfloat16", "optim.name": "adamw",
    }  # fmt: skip
    overrides = [(name, str(value)) for name, value in choices.items()]
    settings, _ = api.load_settings("experiments/gpt.py", overrides)
    report = api.plan(settings, "v5p-128")
    parameters = gpt.parameter_count(gpt.Config(vocab_size=32000, context=1024, width=1024, layers=8, heads=8))
    assert report.memory["arguments"] == pytest.approx(12 * parameters / 64, rel=0.2)  # float32, two moments
    assert not report.whole and not report.unchecked and report.memory["total"] < report.hbm_bytes
    large = [c for c in report.collectives if c.sent_bytes > 2**20]
    assert {c.kind for c in large} >= {"all-gather", "reduce-scatter"} and all(c.is_async for c in large)
    larger = [*overrides, ("train.batch_size", "65536"), ("model.remat", "none")]
    with pytest.raises(DeviceMemoryError, match="does not fit"):
        api.plan(api.load_settings("experiments/gpt.py", larger)[0], "v5p-128")
