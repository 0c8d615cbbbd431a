"""Groups of devices in every way in which XLA writes them, and their mesh axes."""

import pytest

from elastictok_jax.aot.collectives import Collective, collective_of, replica_groups
from elastictok_jax.aot.hlo import parse_module

MESH = {"data": 2, "fsdp": 3, "tensor": 1, "sequence": 4}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,4},{1,5}}", ((0, 4), (1, 5))),
        ("{}", ()),
        ("[2,3]<=[6]", ((0, 1, 2), (3, 4, 5))),
        ("[3,2]<=[2,3]T(1,0)", ((0, 3), (1, 4), (2, 5))),
        ("mesh['a'=4,'b'=1] {'a'}", ((0, 1, 2, 3),)),
        ("mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
        ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'b'}", ((0, 1), (2, 3))),
        (
            "mesh['a'=1,'b'=4,'c'=4], device_ids=([4,4]T(1,0)) {'b'}",
            tuple(tuple(range(i, i + 4)) for i in range(0, 16, 4)),
        ),
        ("mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("mesh['a'=8] {'a':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=8] {'a':(4)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
    ],
)
def test_replica_groups(text, groups):
    assert replica_groups(f", channel_id=1, replica_groups={text}, dimensions={{0}}") == groups


def test_replica_groups_of_a_new_form_are_an_error():
    with pytest.raises(ValueError, match="unknown form: <3>"):
        replica_groups(", replica_groups=<3>, dimensions={0}")


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        (((0, 1, 2, 3), (4, 5, 6, 7)), ("sequence",)),
        (((0, 4, 8), (1, 5, 9)), ("fsdp",)),
        (((0, 12),), ("data",)),
        (((0, 4, 8, 12, 16, 20),), ("data", "fsdp")),
        ((), ("data", "fsdp", "sequence")),
        (((5,),), ()),
    ],
)
def test_axes_along_which_a_group_differs(groups, axes):
    assert Collective("all-gather", 1.0, groups).axes(MESH) == axes


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-gather", 75.0),
        ("reduce-scatter", 75.0),
        ("all-reduce", 150.0),
        ("all-to-all", 75.0),
        ("collective-permute", 100.0),
    ],
)
def test_bytes_sent_around_a_ring_of_four(kind, sent):
    assert Collective(kind, 100.0, ((0, 1, 2, 3),)).sent_bytes(8) == sent


def test_a_group_of_all_devices_and_one_of_one():
    assert Collective("all-gather", 80.0, ()).sent_bytes(8) == 70.0
    assert Collective("all-reduce", 80.0, ((0,), (1,))).sent_bytes(2) == 0.0


def test_groups_that_leave_their_slice():
    slice_of = [0, 0, 1, 1]
    assert Collective("all-reduce", 1.0, ((0, 2), (1, 3))).crosses(slice_of)
    assert not Collective("all-reduce", 1.0, ((0, 1), (2, 3))).crosses(slice_of)
    assert Collective("all-reduce", 1.0, ()).crosses(slice_of)


@pytest.mark.parametrize(
    ("pairs", "groups"),
    [
        ("{0,1},{1,2},{2,0}", ((0, 1, 2),)),  # a ring
        ("{1,2},{0,1}", ((0, 1, 2),)),  # a chain, whatever comes first
        ("{3,3},{0,2},{2,0}", ((3,), (0, 2))),
        ("", ()),
    ],
)
def test_rings_and_chains_of_a_permute(pairs, groups):
    text = f"""\
ENTRY %main (p: f32[5]) -> f32[5] {{
  %p = f32[5]{{0}} parameter(0)
  ROOT %permute = f32[5]{{0}} collective-permute(%p), source_target_pairs={{{pairs}}}
}}
"""
    main = parse_module(text).computations["main"]
    assert collective_of(main.instructions["permute"], main) == Collective(
        "collective-permute", 20.0, groups
    )
