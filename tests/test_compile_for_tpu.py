"""What a compiled program costs, and that the package's own functions compile for TPUs."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrl_sd import abstract, hlo, model, sharding, tpu
from jaxrl_sd import config as configuration
from jaxrl_sd.types import InputError


def cost_of(function, *arguments, trips=None):
    return hlo.cost(jax.jit(function).lower(*arguments).compile().as_text(), trips)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    config = configuration.default()
    config.output_dir = str(tmp_path_factory.mktemp("run"))
    config.mesh.fsdp = config.mesh.tensor = 2
    config.compute.dtype = "bfloat16"
    return config


def test_products_in_loops_count_as_often_as_they_run():
    x, w = jnp.ones((8, 16)), jnp.ones((3, 5, 16, 16))

    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0]

    def blocks(x, w):
        return jax.lax.scan(lambda x, w: (layers(x, w), None), x, w)[0]

    assert cost_of(blocks, x, w).flops == 3 * 5 * 2 * 8 * 16 * 16
    backward = cost_of(jax.grad(lambda w: layers(x, w).sum()), w[0])
    assert backward.flops == 3 * 5 * 2 * 8 * 16 * 16  # once forward, twice backward


BY_TWOS = """
%body (p: (s32[], f32[8,16], f32[16,16])) -> (s32[], f32[8,16], f32[16,16]) {
  %p = (s32[], f32[8,16]{1,0}, f32[16,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = f32[8,16]{1,0} get-tuple-element(%p), index=1
  %w = f32[16,16]{1,0} get-tuple-element(%p), index=2
  %y = f32[8,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[8,16]{1,0}, f32[16,16]{1,0}) tuple(%next, %y, %w)
}

%condition (q: (s32[], f32[8,16], f32[16,16])) -> pred[] {
  %q = (s32[], f32[8,16]{1,0}, f32[16,16]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(15)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (a: (s32[], f32[8,16], f32[16,16])) -> (s32[], f32[8,16], f32[16,16]) {
  %a = (s32[], f32[8,16]{1,0}, f32[16,16]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[8,16]{1,0}, f32[16,16]{1,0}) while(%a), condition=%condition, body=%body
}
"""


def test_a_loop_that_counts_by_twos_runs_half_as_often():
    """As XLA for TPU writes products with weights that arrive piece by piece."""
    assert hlo.cost(BY_TWOS).flops == 8 * 2 * 8 * 16 * 16
    assert hlo.cost(BY_TWOS.replace("constant(2)", "constant(1)")).flops == 15 * 2 * 8 * 16 * 16


def test_the_flops_outside_of_loops_are_xlas():
    q, k = jnp.ones((4, 32, 6, 8)), jnp.ones((4, 24, 6, 8))
    compiled = jax.jit(partial(jnp.einsum, "bihd,bjhd->bhij")).lower(q, k).compile()
    assert hlo.cost(compiled.as_text()).flops == compiled.cost_analysis()["flops"]


def test_a_loop_of_dynamic_length_is_named_or_told():
    def power(x, n):
        with jax.named_scope("tokens"):
            return jax.lax.fori_loop(0, n, lambda _, y: y @ x, x)

    arguments = jnp.ones((4, 4)), jnp.int32(3)
    once, told = cost_of(power, *arguments), cost_of(power, *arguments, trips={"tokens": 7})
    assert told.flops == 7 * once.flops == 7 * 2 * 4**3
    assert ["tokens" in name for name in once.unbounded] == [True] and not told.unbounded


@pytest.mark.parametrize(
    ("kind", "function", "factor"),
    [
        ("all-reduce", lambda x: jax.lax.psum(x, "x"), 2 * 3 / 4),
        ("all-gather", lambda x: jax.lax.all_gather(x, "x").sum(0), 3),
        ("reduce-scatter", lambda x: jnp.tile(jax.lax.psum_scatter(x, "x", tiled=True), 4), 3 / 4),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "x", [(0, 1), (1, 0)]), 1),
    ],
)
def test_communication_in_a_loop(kind, function, factor):
    mesh = jax.make_mesh((2, 4), ("y", "x"), axis_types=(AxisType.Auto,) * 2)

    def loop(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(function(x)), None), x, length=5)[0]

    spec = PartitionSpec("y")
    looped = jax.shard_map(loop, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    cost = cost_of(looped, jnp.ones((2 * 64,)))
    assert cost.collectives == {kind: 5}
    assert cost.sent == {kind: 5 * factor * 64 * 4}


# Lines as libtpu 0.0.42 prints them, shortened.
PRODUCTS = """HloModule m, is_scheduled=true

%fused (p.1: f32[32,1151,512], p.2: bf16[512,8,128]) -> f32[32,1151,8,128] {
  %p.1 = f32[32,1151,512]{2,1,0:T(8,128)S(1)} parameter(0)
  %p.2 = bf16[512,8,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c.1 = f32[32,1151,8,128]{3,1,2,0:T(8,128)} convolution(%p.1, %p.2), WINDOW
}

ENTRY %main (a: f32[32,1151,512], b: bf16[512,8,128]) -> f32[32,1151,8,128] {
  %a = f32[32,1151,512]{2,1,0:T(8,128)S(1)} parameter(0)
  %b = bf16[512,8,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %f = f32[32,1151,8,128]{3,1,2,0:T(8,128)} fusion(%a, %b), kind=kOutput, calls=%fused
}
"""


def test_products_that_are_written_as_convolutions():
    # Heads as a spatial axis that the kernel slides over.
    window = "window={size=1x8 pad=0_0x7_7 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f"
    text = PRODUCTS.replace("[32,1151,512]", "[32,1151,512,1]").replace("WINDOW", window)
    text = text.replace("[512,8,128]", "[512,8,128,1]")
    cost = hlo.cost(text)
    assert cost.flops == 2 * 32 * 1151 * 512 * 8 * 128
    # The first operand is in vector memory; the second has two bytes an element.
    assert cost.bytes == 2 * 512 * 8 * 128 + 4 * 32 * 1151 * 8 * 128
    kept = text.replace("{3,1,2,0:T(8,128)} fusion", "{3,1,2,0:T(8,128)S(1)} fusion")
    assert hlo.cost(kept).bytes == 2 * 512 * 8 * 128


def test_batch_axes_of_a_product_that_are_dilated_apart():
    text = """HloModule m

ENTRY %main (a: f32[16,4,1151,2,128], b: f32[16,1151,128,4]) -> f32[16,4,1151,2,1151] {
  %a = f32[16,4,1151,2,128]{4,3,2,1,0} parameter(0)
  %b = f32[16,1151,128,4,1]{4,3,2,1,0} parameter(1)
  ROOT %c = f32[16,4,1151,2,1151]{4,3,2,1,0} convolution(%a, %b), \
window={size=16x4x1 stride=15x3x1 lhs_dilate=16x4x1}, dim_labels=01b2f_0oi12->01b2f
}
"""
    assert hlo.cost(text).flops == 2 * 16 * 4 * 1151 * 2 * 128 * 1151


def test_exact_products_of_float32_take_six_passes():
    text = """HloModule m

ENTRY %main (a: f32[64,32], b: f32[32,16]) -> f32[64,16] {
  %a = f32[64,32]{1,0} parameter(0)
  %b = f32[32,16]{1,0} parameter(1)
  ROOT %c = f32[64,16]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}
"""
    default, exact = (
        hlo.cost(text),
        hlo.cost(text.replace("->bf", "->bf, operand_precision={highest,highest}")),
    )
    assert default.passes == default.flops == exact.flops == 2 * 64 * 32 * 16
    assert exact.passes == 6 * exact.flops


CHAIN = """HloModule m

%start (p: f32[2,8]) -> (f32[2,8], f32[4,8], u32[]) {
  %p = f32[2,8]{1,0} parameter(0)
  %g.1 = f32[4,8]{1,0} all-gather(%p), channel_id=3, GROUPS, frontend_attributes={chain_id="0"}
  ROOT %s = (f32[2,8]{1,0}, f32[4,8]{1,0}, u32[]{:S(2)}) custom-call(%g.1), \
custom_call_target="AsyncCollectiveStart"
}

%goes_on (p: f32[2,8], o: f32[4,8]) -> (f32[2,8], f32[4,8], f32[4,8]) {
  %p = f32[2,8]{1,0} parameter(0)
  %o = f32[4,8]{1,0} parameter(1)
  %g.2 = f32[4,8]{1,0} all-gather(%p), channel_id=3, GROUPS, frontend_attributes={chain_id="0"}
  ROOT %t = (f32[2,8]{1,0}, f32[4,8]{1,0}, f32[4,8]{1,0}) tuple(%p, %o, %g.2)
}

ENTRY %main (a: f32[2,8]) -> f32[4,8] {
  %a = f32[2,8]{1,0} parameter(0)
  %f.1 = (f32[2,8]{1,0}, f32[4,8]{1,0}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%start
  %e.1 = f32[2,8]{1,0} get-tuple-element(%f.1), index=0
  %e.2 = f32[4,8]{1,0} get-tuple-element(%f.1), index=1
  %f.2 = (f32[2,8]{1,0}, f32[4,8]{1,0}, f32[4,8]{1,0}) fusion(%e.1, %e.2), calls=%goes_on
  ROOT %e.3 = f32[4,8]{1,0} get-tuple-element(%f.2), index=2
}
"""


@pytest.mark.parametrize(
    "groups", ["{{0,2},{1,3}}", "[2,2]<=[4]", "mesh['axis_0'=2,'axis_1'=2] {'axis_0'}"]
)
def test_a_collective_in_pieces_counts_once(groups):
    cost = hlo.cost(CHAIN.replace("GROUPS", f"replica_groups={groups}"))
    assert cost.collectives == {"all-gather": 1}
    assert cost.sent == {"all-gather": 2 * 8 * 4}


def test_all_reduce_and_slice_is_reduce_scatter():
    text = """HloModule m

%all-reduce-scatter.1 (p: f32[8,128]) -> f32[2,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %z = s32[] constant(0)
  %r = f32[8,128]{1,0} all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %d = f32[2,128]{1,0} dynamic-slice(%r, %z, %z), dynamic_slice_sizes={2,128}
}

ENTRY %main (a: f32[8,128]) -> f32[2,128] {
  %a = f32[8,128]{1,0} parameter(0)
  ROOT %f = f32[2,128]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    cost = hlo.cost(text)
    assert cost.sent == {"reduce-scatter": 3 / 4 * 8 * 128 * 4}


def test_a_loop_reads_and_writes_slices_of_stacked_arrays():
    stack = jnp.ones((40, 64, 64))

    def step(x, w):
        y = jnp.tanh(x @ w)
        return y, y

    cost = cost_of(lambda x, w: jax.lax.scan(step, x, w), stack[0], stack)
    # A layer reads a slice and writes one: by far less than the stack.
    assert 4 * stack.nbytes <= cost.bytes <= 12 * stack.nbytes < 40 * stack.nbytes


def report(**changes):
    fields = dict.fromkeys((f.name for f in dataclasses.fields(tpu.Report)), 0.0)
    fields |= dict(function="update", topology="v5e:2x2", fits=True, error="", sent={})
    return tpu.Report(**{**fields, **changes})


def test_the_roofline_is_the_slowest_of_three():
    chip = tpu.CHIPS["v5e"]
    cost = hlo.Cost(flops=1.0, passes=1.97e14, bytes=8.1e10, sent={"all-gather": 9e10})
    assert tpu.roofline(cost, chip) == {"compute_s": 1.0, "memory_s": 0.1, "network_s": 2.0}
    line = tpu.table([report(compute_s=1.0, memory_s=0.1, network_s=2.0, roofline_s=2.0)])
    assert "2.0000 (network)" in line


def test_what_the_compiler_says_of_too_much_memory_is_kept():
    error = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."
    r = tpu._too_large("update", "v5e:2x2", 1e9, error)
    assert (r.fits, r.error, r.total) == (False, error, 20.5 * 2**30 + 1e9)
    assert "| no |" in tpu.table([r])


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("Qwen3-0.6B", 596_049_920),
        ("Qwen3-1.7B", 1_720_574_976),
        ("Qwen3-4B", 4_022_468_096),
        ("Qwen3-8B", 8_190_735_360),
        ("Qwen3-14B", 14_768_307_200),
        ("Qwen3-32B", 32_762_123_264),
    ],
)
def test_models_of_the_hub_have_their_published_sizes(name, size):
    config = abstract.read_model(f"somewhere/{name}-Base")
    shapes = jax.tree.leaves(
        model.param_shapes(config), is_leaf=lambda node: isinstance(node, tuple)
    )
    assert sum(map(math.prod, shapes)) == size


KERNEL = """HloModule m

ENTRY %main (q: bf16[32,1536,128]) -> bf16[32,1536,128] {
  %q = bf16[32,1536,128]{2,1,0} parameter(0)
  ROOT %splash_mha_fwd_residuals.3 = bf16[32,1536,128]{2,1,0} custom-call(%q), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}
}
"""


def test_custom_kernels_are_named_or_told():
    assert hlo.cost(KERNEL).kernels == {"splash_mha_fwd_residuals"}
    told = hlo.cost(KERNEL, kernel=lambda name, operands: operands[0].size)
    assert (told.flops, told.kernels) == (32 * 1536 * 128, frozenset())


@pytest.mark.parametrize(("queries", "responses"), [(1408, 8), (1536, 8), (256, 0)])
def test_attention_of_full_streams_counts_visible_pairs(small, queries, responses):
    config = small.copy_and_resolve_references()
    S, T, G = 256, 144, 8
    config.rollout.max_prompt, config.rollout.max_response, config.rollout.group_size = S, T, G
    config.compute.tokens = S + G * T  # 1,408, of which the kernel makes 1,536
    config.method.name = "grpo"
    q = hlo.Array("bf16", (16, queries, 128), True)
    of = abstract.attention_flops(config)
    prompt, response = S**2 / 2, T * S + T**2 / 2
    forward = 2 * 2 * 16 * 128 * (prompt + responses * response)
    assert of("splash_mha_fwd_residuals", (q,)) == forward
    assert of("splash_mha_dkv_no_residuals", (q,)) == 2 * forward
    assert of("splash_mha_dq_no_residuals", (q,)) == 1.5 * forward


@pytest.mark.parametrize("tokens", [400, 2816])
def test_rows_that_fit_a_stream_are_counted(small, tokens):
    config = small.copy_and_resolve_references()
    S, T, G = 256, 144, 8
    config.rollout.max_prompt, config.rollout.max_response, config.rollout.group_size = S, T, G
    config.compute.tokens, config.method.name = tokens, "grpo"
    rows, prompts = {400: (1, 1), 2816: (16, 2)}[tokens]
    size = -(-tokens // 128) * 128
    q = hlo.Array("bf16", (1, size, 1), True)
    pairs = prompts * S**2 / 2 + rows * (T * S + T**2 / 2)
    assert abstract.attention_flops(config)("splash_mha_fwd", (q,)) == 4 * pairs


def test_a_generation_means_its_slice():
    assert tpu.slice_of("v5p", 16) == "v5p:2x2x4"
    assert tpu.slice_of("v5e:4x8", 16) == "v5e:4x8"
    with pytest.raises(InputError, match=r"topology: v6e has slices of .* chips, mesh has 2"):
        tpu.slice_of("v6e", 2)
    with pytest.raises(InputError, match=r"topology: expected one of .*, got 'v99'"):
        tpu.slice_of("v99", 4)


def test_the_summary_has_a_line_for_each_configuration():
    r = dataclasses.asdict(report(total=5e9, roofline_s=0.25))
    late = r | {"function": "score", "total": 2e9, "fits": False, "roofline_s": 1.5}
    record = {"config": "a", "topology": "v5p:2x2x1", "mesh": {"data": 1, "fsdp": 2, "tensor": 2}}
    record |= {"compute": {"tokens": 8192}, "functions": [r, late]}
    line = tpu.summary([record]).splitlines()[2]
    assert "| a | v5p:2x2x1 | fsdp 2 x tensor 2 | 8,192 | 102.8 | no | score | 2.0 |" in line
    assert line.endswith("|  |  | 1.5 | 0.25 |  |")


def test_a_model_that_is_not_known_is_refused():
    with pytest.raises(InputError, match=r"model.path: hub/Llama-9B is no folder, and of hub"):
        abstract.read_model("hub/Llama-9B")


def test_the_functions_of_a_training_step_compile_for_a_tpu(small):
    pytest.importorskip("libtpu")
    mesh = tpu.make_mesh("v5e:2x2", **small.mesh)
    calls = abstract.calls(small, mesh)
    call = calls["score"]()
    r = tpu.report("score", call.lower(), "v5e:2x2", tpu.bytes_of(call.beside))
    assert r.fits and min(r.arguments, r.temporaries, r.resident, r.flops, r.roofline_s) > 0
    assert r.total < 1e9 and sum(r.sent.values()) > 0


def test_a_gathered_weight_is_multiplied_at_once():
    """Not piece by piece, with the products of all tokens read and written for each."""
    pytest.importorskip("libtpu")
    mesh = tpu.make_mesh("v5e:2x2", data=1, fsdp=4, tensor=1)

    def gate(x, w):
        return model.linear(x, sharding.gather({"gate": w}, mesh), "gate", None)

    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    w = jax.ShapeDtypeStruct((2048, 8192), jnp.bfloat16, sharding=split)
    x = jax.ShapeDtypeStruct((4, 4096, 2048), jnp.bfloat16, sharding=sharding.of_rows(mesh))
    assert cost_of(gate, x, w).collectives == {"all-gather": 1}


def test_a_topology_of_another_size_is_refused(small):
    pytest.importorskip("libtpu")
    with pytest.raises(InputError, match="v5e:2x4 has 8 chips, and mesh data=1, fsdp=2, tensor=2"):
        tpu.make_mesh("v5e:2x4", **small.mesh)
    with pytest.raises(InputError, match="topology: libtpu has no 'v99:2x2'"):
        tpu.make_mesh("v99:2x2", **small.mesh)
    with pytest.raises(InputError, match="mesh: data=1, fsdp=8, tensor=2 cannot be laid on these"):
        tpu.make_mesh("v6e:4x4", data=1, fsdp=8, tensor=2)
