"""The reader of compiled programs, on texts; needs no GPU and no plugin."""

import pytest

from tests.program.hlo import Program, Result

TEXT = """\
HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%fused_write (p0: bf16[1,4,512,8], p1: bf16[1,4,1,8], p2: s32[]) -> bf16[1,4,512,8] {
  %p0 = bf16[1,4,512,8]{3,2,1,0} parameter(0)
  %p1 = bf16[1,4,1,8]{3,2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %write = bf16[1,4,512,8]{3,2,1,0} dynamic-update-slice(%p0, %p1, %zero, %zero, %p2, %zero)
  ROOT %same = bf16[1,4,512,8]{3,2,1,0} bitcast(%write)
}

%body (carry: (bf16[1,4,512,8], f32[16])) -> (bf16[1,4,512,8], f32[16]) {
  %carry = (bf16[1,4,512,8]{3,2,1,0}, f32[16]{0}) parameter(0)
  %cache = bf16[1,4,512,8]{3,2,1,0} get-tuple-element(%carry), index=0
  %x = f32[16]{0} get-tuple-element(%carry), index=1
  %new = bf16[1,4,1,8]{3,2,1,0} custom-call(%x), custom_call_target="__cublas$gemm"
  %at = s32[] constant(3)
  %written = bf16[1,4,512,8]{3,2,1,0} fusion(%cache, %new, %at), kind=kLoop, calls=%fused_write
  %total = (f32[]{:T(128)}, s4[6]{0}) reduce(%x, %x), dimensions={0}, to_apply=%add
  ROOT %next = (bf16[1,4,512,8]{3,2,1,0}, f32[16]{0}) tuple(%written, %x)
}

%condition (carry: (bf16[1,4,512,8], f32[16])) -> pred[] {
  %carry = (bf16[1,4,512,8]{3,2,1,0}, f32[16]{0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (a: bf16[1,4,512,8], b: f32[16]) -> (bf16[1,4,512,8], f32[16]) {
  %a = bf16[1,4,512,8]{3,2,1,0} parameter(0)
  %b = f32[16]{0} parameter(1)
  %copy-start.1 = (f32[16]{0}, f32[16]{0}, u32[]) copy-start(%b)
  %copy-done.1 = f32[16]{0} copy-done(%copy-start.1)
  %both = (bf16[1,4,512,8]{3,2,1,0}, f32[16]{0}) tuple(%a, %copy-done.1)
  ROOT %end = (bf16[1,4,512,8]{3,2,1,0}, f32[16]{0}) while(%both), condition=%condition, body=%body
}
"""


def test_what_moves_no_data_is_no_kernel():
    assert [k.name for k in Program(TEXT).kernels()] == ["copy-start.1", "new", "written", "total"]


def test_kernels_of_a_loop():
    (body,) = Program(TEXT).loops()
    assert [k.name for k in body] == ["new", "written", "total"]


def test_what_a_fusion_does():
    written = Program(TEXT).kernels()[2]
    assert written.in_place and written.root == "dynamic-update-slice"
    assert {"dynamic-update-slice", "bitcast"} <= written.does


def test_results_and_their_sizes():
    total = Program(TEXT).kernels()[3]
    assert total.results == (Result("f32", ()), Result("s4", (6,)))
    assert [r.nbytes for r in total.results] == [4, 3]
    assert total.nbytes == 7 and not total.in_place


def test_a_text_without_a_program():
    with pytest.raises(ValueError, match="HLO"):
        Program("nothing")
