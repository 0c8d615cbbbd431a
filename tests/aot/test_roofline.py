"""Predicted times against sums done by hand, on a chip of round numbers."""

import dataclasses
from collections import Counter

import pytest

from elastictok_jax.aot.collectives import Collective
from elastictok_jax.aot.costs import Costs
from elastictok_jax.aot.roofline import roofline
from elastictok_jax.hardware import CHIPS, Chip

CHIP = Chip(
    name="round",
    peak_flops=100.0,
    hbm_bytes=64.0,
    usable_bytes=60.0,
    hbm_bandwidth=10.0,
    ici_bandwidth=12.0,  # two a link
    ici_links=6,
    dcn_bandwidth=0.5,
)
FOUR = ((0, 1, 2, 3),)


def test_each_term():
    exchanges = Counter(
        {
            Collective("all-gather", 16.0, FOUR): 3,  # 3 x 12 bytes over two links: 9 s
            Collective("all-reduce", 8.0, FOUR): 1,  # 12 bytes over two links: 3 s
            Collective("collective-permute", 4.0, FOUR): 5,  # 20 bytes over one link: 10 s
        }
    )
    costs = Costs(flops=1500.0, bytes=70.0, collectives=exchanges)
    line = roofline(costs, chip=CHIP, slice_of=[0] * 4)
    assert line.terms == {"compute": 15.0, "memory": 7.0, "interconnect": 22.0, "network": 0.0}
    assert (line.seconds, line.bound, line.serial_seconds) == (22.0, "interconnect", 44.0)


def test_the_two_ways_round_a_ring_share_its_time():
    def permute(*rings):
        return Collective("collective-permute", 4.0, rings)

    backwards, others = (0, 3, 2, 1), (0, 2, 1, 3)
    exchanges = Counter({permute(*FOUR): 5, permute(backwards): 3, permute(others): 1})
    costs = Costs(flops=0.0, bytes=0.0, collectives=exchanges)
    line = roofline(costs, chip=CHIP, slice_of=[0] * 4)
    assert line.interconnect == max(10.0, 6.0) + 2.0


def test_exchanges_between_slices_use_the_network():
    costs = Costs(collectives=Counter({Collective("all-reduce", 4.0, FOUR): 1}))  # sends 6 bytes
    line = roofline(costs, chip=CHIP, slice_of=[0, 0, 1, 1])
    # Two members in a slice: each takes half of what they have reduced across.
    assert (line.interconnect, line.network, line.bound) == (0.0, 6.0, "network")
    alone = roofline(costs, chip=CHIP, slice_of=[0, 1, 2, 3])
    assert alone.network == 12.0
    unknown = dataclasses.replace(CHIP, dcn_bandwidth=None)
    assert roofline(costs, chip=unknown, slice_of=[0, 0, 1, 1]).network is None


def test_two_devices_share_a_chip():
    half = dataclasses.replace(CHIP, devices=2)
    line = roofline(Costs(flops=100.0, bytes=10.0), chip=half, slice_of=[0])
    assert (line.compute, line.memory, line.bound) == (2.0, 2.0, "compute")


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_chips_make_sense(chip):
    assert chip.usable_bytes * chip.devices <= chip.hbm_bytes
    # Four links on a plane or six in space, of 50 or 100 GB/s each way.
    assert chip.ici_links in (4, 6)
    assert chip.ici_bandwidth / chip.ici_links in (50e9, 100e9)
