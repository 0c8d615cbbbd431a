"""Families compute the same step on every mesh."""

import pytest

from tests.models import conformance
from tests.models.test_conformance import CASES, config_of

MESHES = (
    {"data": 8},
    {"data": 2, "fsdp": 2, "sequence": 2},
    {"data": 1, "fsdp": 4, "sequence": 2},
)


@pytest.mark.parametrize("case", ["elastictok", "toy"])
def test_any_mesh_computes_the_same_step(case):
    family, options = CASES[case]
    conformance.check_any_mesh(config_of(family, **options | {"data__batch_size": 8}), MESHES)
