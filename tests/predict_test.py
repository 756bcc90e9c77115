"""The predicted time of a step: a small program by hand."""

import functools
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from helpers import QUICK, ROOT, environment, error_line, output, refusal

from mirai_jax.benchmark import hlo, predict, predict_sampler, rates
from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.sampling import sampler
from mirai_jax.utils.errors import TrainingError

# A GFLOP, a MB or 1e6 cycles take 1 ms.
CHIP = rates.Chip({"bfloat16": 1, "default": 1}, bandwidth=1, link=1, clock=1)
TEXT = """HloModule jit_step

%product (a: bf16[1000,500], b: bf16[500,1000]) -> bf16[1000,1000] {
  %a = bf16[1000,500]{1,0} parameter(0)
  %b = bf16[500,1000]{1,0} parameter(1)
  ROOT %c = bf16[1000,1000]{1,0:T(8,128)} convolution(%a, %b), dim_labels=bf_io->bf
}

%condition (t: (s32[], bf16[1000,500])) -> pred[] {
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %n = s32[]{:T(128)} constant(6)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (t: (s32[], bf16[1000,500])) -> (s32[], bf16[1000,500]) {
  %x = bf16[1000,500]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%t), index=1
  %w = bf16[500,1000]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=2
  %y = bf16[1000,1000]{1,0:T(8,128)S(1)} fusion(%x, %w), kind=kOutput, calls=%product, metadata={op_name="jit(step)/jvp(Generator)/dot"}, backend_config={"window_config":{"estimated_cycles":"4000000"}}
  %before = s32[]{:T(128)} get-tuple-element(%t), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%before, %two)
  ROOT %tuple = (s32[], bf16[1000,500]) tuple(%next, %x)
}

ENTRY %main (p: f32[1000000]) -> f32[1000000] {
  %p = f32[1000000]{0:T(1024)} parameter(0)
  %loop = (s32[], bf16[1000,500]) while(%start), condition=%condition, body=%body
  %scores = f32[16,10,20]{2,1,0} convolution(%q, %k), window={size=16 stride=15 lhs_dilate=16}, dim_labels=0bf_0io->0bf, metadata={op_name="jit(step)/jvp(Generator)/bhtd,bhsd->bhts/dot_general"}
  %q = f32[16,10,50]{2,1,0:T(8,128)S(1)} parameter(1)
  %k = f32[16,50,20]{2,1,0:T(8,128)S(1)} parameter(2)
  %sum = f32[1000000]{0:T(1024)} all-reduce(%p), replica_groups=mesh['axis_0'=4] {'axis_0'}, to_apply=%add
  ROOT %new = f32[1000000]{0:T(1024)} add(%p, %sum), metadata={op_name="jit(step)/add"}, backend_config={"estimated_cycles":"500"}
}
"""


def test_a_step_by_class_of_work():
    classes = predict.predict(TEXT, CHIP, 4).classes
    # Three times (to six by two) 1 GFLOP, where the compiler says 4 ms.
    assert classes["products"] == pytest.approx((3 * 1.0, 3 * 4.0))
    # 2 * 16 * 10 * 20 * 50 operations, and as many bytes as leave the fast memory.
    assert classes["attention"] == pytest.approx((4 * 16 * 10 * 20 / 1e6,) * 2)
    assert classes["optimizer"] == pytest.approx((12.0, 12.0))  # three times 4 MB
    # 4 MB around a ring twice, a quarter of which stays, over two links.
    assert classes["collectives"] == pytest.approx((2 * 0.75 * 4 / 2,) * 2)
    assert classes["rest"] == pytest.approx((0, 0), abs=1e-4)  # the counter of the loop


GPU = """HloModule jit_step

%scores (a: f32[2,12,100,64], b: f32[2,12,100,64]) -> f32[2,12,100,100] {
  %a = f32[2,12,100,64]{3,2,1,0} parameter(0)
  %b = f32[2,12,100,64]{3,2,1,0} parameter(1)
  ROOT %d = f32[2,12,100,100]{3,2,1,0} dot(%a, %b), lhs_batch_dims={0,1}, lhs_contracting_dims={3}, rhs_batch_dims={0,1}, rhs_contracting_dims={3}, operand_precision={high,high}
}

ENTRY %main (q: bf16[8,256,12,64]) -> f32[] {
  %q = bf16[8,256,12,64]{3,2,1,0} parameter(0)
  %x = f32[2,12,100,64]{3,2,1,0} parameter(1)
  %s = f32[2,12,100,100]{3,2,1,0} fusion(%x, %x), kind=kCustom, calls=%scores
  %t = (bf16[100,200]{1,0}, s8[4]{0}) custom-call(%u, %v), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"lhs_batch_dimensions":[]}}}
  %u = bf16[100,300]{1,0} parameter(2)
  %v = bf16[300,200]{1,0} parameter(3)
  %f = (bf16[8,12,256,64]{3,1,2,0}, f32[8,12,256]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["8", "12", "256", "256"]}}
  %g = (bf16[8,12,256,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q, %q, %q), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["8", "12", "256", "256"]}}
}
"""


def test_the_products_of_a_program_for_gpus():
    program = hlo.Program(GPU)
    found = {op.name: product for op, _ in program.executed() for product in program.products(op)}
    assert found["s"] == (pytest.approx(2 * 2 * 12 * 100**2 * 64), "high")
    assert found["t"] == (pytest.approx(2 * 100 * 300 * 200), "bfloat16")
    pairs = 8 * 12 * 256**2 * 64
    assert found["f"] == (4 * pairs, "bfloat16") and found["g"] == (10 * pairs, "bfloat16")
    # TensorFloat-32 at half the rate.
    h100 = rates.CHIPS["h100"]
    assert h100.tflops["bfloat16"] == 2 * h100.tflops["high"] > 10 * h100.tflops["highest"]


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "SAME"},
        {"padding": [(2, 0), (0, 1)], "window_strides": (2, 3)},
        {"padding": [(1, 2), (-1, 0)], "lhs_dilation": (2, 3), "rhs_dilation": (1, 2)},
        {"padding": "SAME", "feature_group_count": 4},
    ],
    ids=str,
)
def test_a_convolution_multiplies_where_its_window_is_on_the_image(options):
    images, kernels = np.ones((2, 9, 12, 8), np.float32), np.ones((3, 3, 8, 16), np.float32)
    kernels = kernels[:, :, : 8 // options.get("feature_group_count", 1)]
    options = {"window_strides": (1, 1), "dimension_numbers": ("NHWC", "HWIO", "NHWC"), **options}
    convolve = jax.jit(functools.partial(jax.lax.conv_general_dilated, **options))
    program = hlo.Program(convolve.lower(images, kernels).compile().as_text())
    found = [x for op, _ in program.executed() for x, _ in program.products(op)]
    # Of ones, each result is the number of its products.
    assert found == [2 * float(convolve(images, kernels).sum())]


CUDNN = """HloModule m

ENTRY %main (x: f32[2,9,12,8]) -> f32[] {
  %x = f32[2,9,12,8]{3,2,1,0} parameter(0)
  %w = f32[16,3,3,8]{3,2,1,0} parameter(1)
  %y = f32[2,9,12,16]{3,2,1,0} parameter(2)
  %forward = (f32[2,9,12,16]{3,2,1,0}, u8[0]{0}) custom-call(%x, %w), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %of_input = (f32[2,9,12,8]{3,2,1,0}, u8[0]{0}) custom-call(%y, %w), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %of_filter = (f32[16,3,3,8]{3,2,1,0}, u8[0]{0}) custom-call(%x, %y), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
}
"""


def test_a_convolution_of_cudnn_and_its_gradients():
    program = hlo.Program(CUDNN)
    one = 2 * 2 * (3 * 9 - 2) * (3 * 12 - 2) * 8 * 16
    assert [program.products(op) for op, _ in program.executed()] == 3 * [[(one, "default")]]


@pytest.mark.parametrize(
    "groups, ways",
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0':(2)2}", 2),
        ("replica_groups={}", 8),
    ],
)
def test_a_sum_goes_around_the_ring_of_its_group(groups, ways):
    text = f"""HloModule m

%inside (own: f32[1000]) -> f32[1000] {{
  %own = f32[1000]{{0}} parameter(0)
  ROOT %add = f32[1000]{{0}} all-reduce(%own), channel_id=1, {groups}, to_apply=%add
}}

%part (all: f32[1000]) -> f32[10] {{
  %all = f32[1000]{{0}} parameter(0)
  %sum = f32[1000]{{0}} all-reduce(%all), channel_id=2, {groups}, to_apply=%add
  ROOT %own.1 = f32[10]{{0}} dynamic-slice(%sum, %i), dynamic_slice_sizes={{10}}
}}

ENTRY %main (a: f32[1000]) -> f32[1000] {{
  %a = f32[1000]{{0}} parameter(0)
  %alone = f32[1000]{{0}} all-reduce(%a), channel_id=3, {groups}, use_global_device_ids=true, to_apply=%add
  %fused = f32[1000]{{0}} fusion(%a), kind=kCustom, calls=%inside
  %scattered = f32[10]{{0}} fusion(%a), kind=kCustom, calls=%part
}}
"""
    program = hlo.Program(text, 8)
    moved = [program.moved(op) for op, _ in program.executed() if program.is_collective(op)]
    once = 4000 * (ways - 1) / ways
    assert moved == pytest.approx([2 * once, 2 * once, once])


ASYNC = """HloModule jit_step

%begin (own: bf16[250,1000]) -> (bf16[250,1000], bf16[1000,1000]) {
  %own = bf16[250,1000]{1,0} parameter(0)
  %gathered = bf16[1000,1000]{1,0} all-gather(%own), dimensions={0}
  ROOT %both = (bf16[250,1000], bf16[1000,1000]) custom-call(%gathered)
}

%end (all: bf16[1000,1000]) -> bf16[1000,1000] {
  %all = bf16[1000,1000]{1,0} parameter(0)
  ROOT %again = bf16[1000,1000]{1,0} all-gather(%all), dimensions={0}
}

ENTRY %main (w: bf16[250,1000]) -> bf16[1000,1000] {
  %w = bf16[250,1000]{1,0} parameter(0)
  %async-collective-start.1 = (bf16[250,1000], bf16[1000,1000]) fusion(%w), kind=kCustom, calls=%begin
  %whole = bf16[1000,1000]{1,0} get-tuple-element(%async-collective-start.1), index=1
  ROOT %async-collective-done.1 = bf16[1000,1000]{1,0} fusion(%whole), kind=kCustom, calls=%end
}
"""


def test_a_transfer_that_other_work_hides_counts_once_and_at_the_upper_end():
    classes = predict.predict(ASYNC, CHIP, 4).classes
    assert classes["collectives"] == pytest.approx((0, 0.75 * 2 / 2))


STACK = """HloModule jit_step

%slice (s: f32[10000], i: s32[]) -> f32[1,1000] {
  %s.1 = f32[10000]{0} parameter(0)
  %i.1 = s32[] parameter(1)
  ROOT %layer.1 = f32[1,1000]{1,0} dynamic-slice(%s.1, %i.1, %zero), dynamic_slice_sizes={1,1000}
}

%of_stack (s: f32[10,1000], x: f32[1000], i: s32[]) -> (f32[1000], f32[10,1000]) {
  %s = f32[10,1000]{1,0} parameter(0)
  %x = f32[1000]{0} parameter(1)
  %i = s32[] parameter(2)
  %flat = f32[10000]{0} bitcast(%s)
  %layer = f32[1,1000]{1,0} fusion(%flat, %i), kind=kLoop, calls=%slice
  %y = f32[1,1000]{1,0} add(%layer, %x)
  %stored = f32[10,1000]{1,0} dynamic-update-slice(%s, %y, %i, %zero)
  ROOT %t = (f32[1000], f32[10,1000]) tuple(%y, %stored)
}

%same (s: f32[10,1000]) -> f32[10000] {
  %s.2 = f32[10,1000]{1,0} parameter(0)
  ROOT %flat.2 = f32[10000]{0} bitcast(%s.2)
}

%whole (s: f32[10,1000]) -> f32[] {
  %s.3 = f32[10,1000]{1,0} parameter(0)
  %flat.3 = f32[10000]{0} fusion(%s.3), kind=kLoop, calls=%same
  ROOT %sum.3 = f32[] reduce(%flat.3, %zero), dimensions={0}, to_apply=%add
}

ENTRY %main (a: f32[10,1000]) -> f32[] {
  %a = f32[10,1000]{1,0} parameter(0)
  %b = f32[1000]{0} parameter(1)
  %n = s32[] parameter(2)
  %f = (f32[1000]{0}, f32[10,1000]{1,0}) fusion(%a, %b, %n), kind=kLoop, calls=%of_stack
  %g = f32[10,1000]{1,0} dynamic-update-slice(%a, %b, %n, %n)
  %h = f32[] fusion(%a), kind=kLoop, calls=%whole
}
"""


def test_a_layer_of_a_stack_is_read_and_written_without_the_others():
    fused, alone, whole = hlo.Program(STACK).executed()
    # The layer and x in, y and the layer out, and the index; then the update in and out, and two indices.
    assert hlo.Program(STACK).bytes(fused[0]) == 4 * 4000 + 4
    assert hlo.Program(STACK).bytes(alone[0]) == 2 * 4000 + 2 * 4
    assert hlo.Program(STACK).bytes(whole[0]) == 40_000 + 4


SAMPLER = """HloModule jit_draw

%turn (t: (s32[], bf16[1000,500])) -> (s32[], bf16[1000,500]) {
  %t = (s32[], bf16[1000,500]{1,0}) parameter(0)
  %cache = bf16[1000,500]{1,0:T(8,128)} get-tuple-element(%t), index=1
  %near = (bf16[1000,500]{1,0:T(8,128)S(1)}, bf16[1000,500]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%cache)
  %sum = f32[] fusion(%done), kind=kLoop, calls=%add, backend_config={"estimated_cycles":"3000000"}
  %done = bf16[1000,500]{1,0:T(8,128)S(1)} copy-done(%near)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %first = (s32[], bf16[1000,500]) while(%a), condition=%c, body=%turn, backend_config={"known_trip_count":{"n":"64"}}
  %second = (s32[], bf16[1000,500]) while(%first), condition=%c, body=%turn, backend_config={"known_trip_count":{"n":"36"}}
}
"""


def test_a_token_takes_at_least_what_is_copied_into_the_fast_memory():
    first, second = predict_sampler.segments(SAMPLER, CHIP, 100)
    assert (first.places, second.places, second.tokens) == (64, 100, 36)
    assert first.milliseconds == second.milliseconds == pytest.approx((1.0, 3.0), rel=1e-4)


def test_loops_of_random_numbers_draw_no_tokens():
    # 65 tokens: a loop of 64, and one token, which the compiler writes out with another loop.
    config = GeneratorConfig(
        num_layers=1, num_heads=2, width=16, vocab_size=32, num_classes=4, grid=(5, 13)
    )
    settings = types.SimpleNamespace(generator=config, sample=sampler.SampleOptions(guidance=2.0))
    text = predict_sampler.compile_sampler(settings, 2, jax.devices()[0])
    (segment,) = predict_sampler.segments(text, CHIP, 65)
    assert (segment.places, segment.tokens) == (64, 64) and segment.milliseconds[0] > 0
    assert "the last token" in predict_sampler.lines(text, CHIP, settings, 2)[-1]
    assert "64 turns" in refusal(predict_sampler.segments, text, CHIP, 128, error=TrainingError)


# Chips and devices ---------------------------------------------------------------------------------


def test_a_chip_is_known_by_its_exact_name_alone():
    assert rates.of_kind("NVIDIA H100 80GB HBM3") == rates.CHIPS["h100"]
    assert rates.of_kind("NVIDIA H100 PCIe").tflops["bfloat16"] == 756
    assert rates.of_kind("TPU v5 lite").tflops["bfloat16"] == 197
    for kind in ("TPU v4 lite", "NVIDIA H100", "NVIDIA A100", "TPU7x", "cpu", ""):
        assert rates.of_kind(kind) is None
    kinds = [kind for chip in rates.CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))


def test_where_a_step_has_no_prediction():
    def devices(count, platform, kind, slices=1):
        return [
            types.SimpleNamespace(platform=platform, device_kind=kind, slice_index=i % slices)
            for i in range(count)
        ]

    tpu, card = rates.CHIPS["v5e"], rates.of_kind("NVIDIA H100 PCIe")
    for chip, count, *given in (
        (tpu, 8, "tpu", "TPU v5 lite"),
        (card, 1, "gpu", "NVIDIA H100 PCIe"),
        (predict.of_rates(1e11, 1e10), 1, "cpu", "cpu"),
    ):
        assert not predict.obstacle(chip, devices(count, *given))
    for why, chip, count, *given in (
        ("simulates", predict.of_rates(1e11, 1e10), 2, "cpu", "cpu"),
        ("slices", tpu, 8, "tpu", "TPU v5 lite", 2),
        ("TPU7x", None, 8, "tpu", "TPU7x"),
        ("links", card, 2, "gpu", "NVIDIA H100 PCIe"),
    ):
        assert why in predict.obstacle(chip, devices(count, *given))


def test_several_simulated_devices_have_no_predicted_sampler():
    given = "--config=configs/llamagen.py", "--devices=2", "--sampler=4"
    assert "--sampler is 4" in error_line("mirai_jax.plan", *given)


# For the screen, and against the clock ---------------------------------------------------------------


def test_the_lines_for_the_screen():
    prediction = predict.Prediction({"products": (3.0, 12.0), "rest": (1.0, 4.0)})
    lines = prediction.lines(CHIP, flops=2e9, batch_size=8, steps=86_400_000)
    assert "not run" not in lines[1] and "3.0 .. 12.0" in lines[1]
    text = "MFU 12% .. 50%, 500 .. 2,000 images/s, 86,400,000 steps in 4.0 .. 16.0 days"
    assert text in "\n".join(lines)


CLOCK = """
import time
from mirai_jax.utils import host_memory
host_memory.keep_freed()
import jax
from mirai_jax.benchmark import predict, run, work
(settings,) = run.read_settings("configs/mirai_e.py", False, []).values()
step = work.StepWork(settings, jax.devices())
step.first_steps()
text, ratios = step._compiled.run.as_text(), []
for _ in range(3):
    chip, taken = predict.measured(jax.devices()[0], time.process_time), []
    for _ in range(5):
        begun = time.process_time()
        step.step()
        taken.append(time.process_time() - begun)
    ratios.append(predict.predict(text, chip, 1).total[0] / 1e3 / min(taken))
print(sorted(ratios)[1])
"""


@pytest.mark.slow
def test_a_step_of_this_cpu_takes_about_the_predicted_processor_time():
    optimized = {name: value for name, value in environment().items() if name not in QUICK}
    done = subprocess.run(
        [sys.executable, "-c", CLOCK], cwd=ROOT, env=optimized, capture_output=True, text=True
    )
    assert 0.6 < float(done.stdout.split()[-1]) < 1.4, done.stderr


@pytest.mark.slow
def test_a_plan_predicts_this_cpu_and_its_sampler():
    printed = output("mirai_jax.plan", "--config=configs/llamagen.py", "--sampler=4")
    for words in ("GFLOP/s", "products", "images/s", "4 images at once", "64 places", "hours"):
        assert words in printed
