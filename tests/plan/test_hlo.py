"""Optimized HLO text to data: every form of type, loop bound and replica group that the compilers write."""

from __future__ import annotations

import numpy as np
import pytest

from palmjax.plan import hlo

TEXT = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "/venv/lib/site-packages/flax/linen.py"
2 "/src/palmjax/models/decoder.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=2 function_name_id=1 line=40 end_line=40 column=1 end_column=2}
2 {file_name_id=1 function_name_id=1 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%inside (p0: bf16[8,128]) -> bf16[8,128] {
  %p0 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %double = bf16[8,128]{1,0:T(8,128)(2,1)} add(%p0, %p0), metadata={op_name="jit(step)/mul" stack_frame_id=2}
}

%body (b: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %b = (s32[]{:T(128)}, /*index=1*/bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%b), index=1
  %fusion.1 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%inside, backend_config={"window_config":{"estimated_cycles":"1234"}}
  ROOT %t = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%i, %fusion.1)
}

%condition (c: (s32[], bf16[8,128])) -> pred[] {
  %c = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%c), index=0
  %bound = s32[]{:T(128)} constant(118)
  ROOT %lt = pred[]{:T(512)} compare(%j, %bound), direction=LT
}

ENTRY %main.1_spmd (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="state.params[\\'x\\']"}
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%zero, %a)
  %while.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%start), condition=%condition, body=%body
  ROOT %out = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def module() -> hlo.Module:
    return hlo.parse(TEXT)


def instruction(text: str) -> hlo.Instruction:
    whole = f"HloModule m\n\nENTRY %e (a: f32[4]) -> f32[4] {{\n  ROOT %r = f32[4]{{0}} {text}\n}}\n"
    return hlo.parse(whole).computations["e"].by_name["r"]


def test_computations_their_order_and_roots(module: hlo.Module) -> None:
    assert module.entry == "main.1_spmd"
    assert [i.name for i in module.computations["body"].instructions] == ["b", "i", "x", "fusion.1", "t"]
    assert module.computations["inside"].root == "double"


def test_types_with_layouts_tuples_and_memory_spaces(module: hlo.Module) -> None:
    carry = module.computations["body"].by_name["b"].result
    assert [str(shape) for shape in carry] == ["s32[]", "bf16[8,128]"]
    assert [shape.space for shape in carry] == [0, 1]
    assert carry[1].bytes == 8 * 128 * 2


def test_a_loop_runs_as_often_as_the_constant_it_compares_with(module: hlo.Module) -> None:
    loop = module.computations[module.entry].by_name["while.1"]
    assert module.trips(loop) == 118


def test_the_compilers_own_count_comes_before_the_constant() -> None:
    text = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    module = hlo.parse(text)
    assert module.trips(module.computations[module.entry].by_name["while.1"]) == 7


def test_a_loop_without_a_bound_is_refused_by_name() -> None:
    module = hlo.parse(TEXT.replace("constant(118)", "add(%j, %j)"))
    with pytest.raises(ValueError, match=r"while\.1.*trips"):
        module.trips(module.computations[module.entry].by_name["while.1"])


def test_cycles_and_what_a_fusion_without_a_name_is_made_of(module: hlo.Module) -> None:
    fusion = module.computations["body"].by_name["fusion.1"]
    assert fusion.cycles == 1234
    assert module.named(fusion).op_name == "jit(step)/mul"


def test_cycles_that_the_compiler_could_not_estimate_are_none() -> None:
    assert instruction('copy(%a), backend_config={"estimated_cycles":"9223372036854775807"}').cycles is None
    assert instruction("copy(%a)").cycles is None


def test_a_frame_in_a_library_gives_way_to_its_caller(module: hlo.Module) -> None:
    assert module.source(module.computations["inside"].by_name["double"]) == "/src/palmjax/models/decoder.py:40"


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a'}", [[0, 1, 2, 3]]),
    ],
)
def test_every_form_of_replica_groups(text: str, groups: list[list[int]]) -> None:
    found = instruction(f"all-gather(%a), channel_id=1, {text}, dimensions={{0}}").groups
    np.testing.assert_array_equal(found, groups)


def test_empty_groups_are_all_devices_and_unknown_forms_are_refused() -> None:
    assert instruction("all-reduce(%a), replica_groups={}").groups is None
    with pytest.raises(ValueError, match="unknown form"):
        _ = instruction("all-reduce(%a), replica_groups=mesh['a'=4] {'a':(1)2}").groups


def test_pairs_and_algorithms() -> None:
    permute = instruction("collective-permute(%a), channel_id=2, source_target_pairs={{0,1},{1,0}}")
    np.testing.assert_array_equal(permute.pairs, [[0, 1], [1, 0]])
    config = '{"collective_algorithm_config":{"emitter":"2DAllGather","debug":"\\ngroup {16 16}"},"x":1}'
    gather = instruction(f"all-gather(%a), replica_groups={{}}, backend_config={config}")
    assert gather.algorithm == {"emitter": "2DAllGather", "debug": "\ngroup {16 16}"}


def test_text_without_an_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("HloModule nothing\n")
