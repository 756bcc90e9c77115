"""Several TPU slices: CPU devices that say of themselves what chips of two slices would."""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
import pytest
from helpers import refusal, tiny
from jax.sharding import AxisType, Mesh

from configs import mirai_e
from mirai_jax import sharding
from mirai_jax.benchmark import memory_plan
from mirai_jax.config import schema

SIZE = 8  # chips: two slices of 2 x 2


@dataclasses.dataclass(frozen=True)
class Chip:
    device: Any
    slice_index: int
    coords: tuple[int, ...]
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    core_on_chip: int = 0

    def __getattr__(self, name):
        return getattr(self.device, name)


def chips():
    """In an order that mixes the slices, as nothing promises another."""
    of_slice = [Chip(d, i // 4, (i % 2, i // 2 % 2, 0)) for i, d in enumerate(jax.devices())]
    return of_slice[::2] + of_slice[1::2]


def test_slices_split_data_alone_and_rows_stay():
    batch = {"label": np.arange(16, dtype=np.int32)}
    for shape in ((8, 1, 1), (4, 2, 1), (2, 2, 2), (2, 1, 4)):
        mesh = sharding.make_mesh(shape, chips())
        assert mesh.devices.shape == shape
        half = shape[0] // 2
        for k, part in enumerate((mesh.devices[:half], mesh.devices[half:])):
            assert {chip.slice_index for chip in part.flat} == {k}
        put = sharding.put_batch(batch, real(mesh))["label"]
        np.testing.assert_array_equal(put, batch["label"])
        for shard in put.addressable_shards:  # slice 0, whose processes come first, has the first
            assert (shard.data < 8).all() == (shard.device.id < 4)


def real(mesh):
    """The same mesh of the devices that compile and compute."""
    devices = np.vectorize(lambda chip: chip.device)(mesh.devices)
    return Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def test_axes_that_would_cross_slices_are_refused():
    assert sharding.num_slices(chips()) == 2
    config = tiny(mirai_e)
    config.mesh.update(data=1, fsdp=-1)
    message = refusal(schema.read, config, SIZE, 2)
    assert "mesh.fsdp is 8; a slice has 4 devices" in message
    config.mesh.update(data=1, fsdp=4, tensor=2)
    assert "mesh.fsdp * mesh.tensor is 8" in refusal(schema.read, config, SIZE, 2)
    assert schema.read(config, SIZE).mesh == (1, 4, 2)
    config.mesh.update(data=-1, fsdp=2, tensor=2)
    assert schema.read(config, SIZE, 2).mesh == (2, 2, 2)


def test_hosts_with_gpus_are_not_slices():
    """Each has another slice_index, which jax.make_mesh refuses; any axis may cross them."""
    hosts = [dataclasses.replace(c, platform="gpu", device_kind="H100") for c in chips()]
    mesh = sharding.make_mesh((1, 8, 1), hosts)
    assert [device.id for device in mesh.devices.flat] == list(range(SIZE))


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text or "")]


def device_ids(dims, axes):
    """The devices that HLO writes as [dims]T(axes)."""
    ids = np.arange(np.prod(numbers(dims))).reshape(numbers(dims))
    return ids.transpose(numbers(axes) or range(ids.ndim))


def groups_of(line):
    """The groups of positions in the mesh among which a line of HLO communicates."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line):
        return [numbers(group) for group in re.findall(r"\{.*?\}", listed[1])]
    order = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if iota := re.search(rf"replica_groups=\[([\d,]+)\]<={order}", line):
        return device_ids(iota[2], iota[3]).reshape(numbers(iota[1])).tolist()
    pattern = rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\({order}\))? ?\{{(.*?)\}}"
    if mesh := re.search(pattern, line):
        dims = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        names = re.findall(r"'(\w+)'", mesh[4])
        assert mesh[4] == ",".join(map(repr, names)), line  # whole axes
        ids = device_ids(mesh[2] or str(SIZE), mesh[3]).reshape([*dims.values()])
        ids = np.moveaxis(ids, [[*dims].index(name) for name in names], range(-len(names), 0))
        return ids.reshape(-1, math.prod(dims[name] for name in names)).tolist()
    assert "replica_groups={}" in line, line
    return [list(range(SIZE))]


def communication(text):
    """[(operation, groups)] of a compiled program."""
    names = (
        "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    )
    lines = re.findall(rf"^.* = .*? ({names})(?:-start)?\((.*)$", text, re.MULTILINE)
    return [(name, groups_of(rest)) for name, rest in lines]


def test_the_reader_of_groups():
    assert groups_of("replica_groups={{0,1},{2,3}}, x={}") == [[0, 1], [2, 3]]
    assert groups_of("replica_groups=[2,4]<=[8], x=[1]") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups_of("replica_groups=[4,2]<=[2,4]T(1,0)") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert groups_of("replica_groups=mesh['a'=4,'b'=2] {'a'}, x") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    turned = groups_of("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}")
    assert turned == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert groups_of("source_target_pairs={{0,1},{1,0}}") == [[0, 1], [1, 0]]
    found = communication("  %a = (f32[2]{0}, f32[2]) all-gather-start(%b), replica_groups={{0,4}}")
    assert found == [("all-gather", [[0, 4]])]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    "fsdp, tensor", [(2, 2), *(pytest.param(*s, marks=pytest.mark.slow) for s in ((4, 1), (2, 1)))]
)
def test_gradients_alone_cross_slices(fsdp, tensor, monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda *given: real(make_mesh(*given)))
    config = tiny(mirai_e)
    config.mesh.update(fsdp=fsdp, tensor=tensor)
    settings = schema.read(memory_plan.without_files(config), SIZE, sharding.num_slices(chips()))
    compiled = memory_plan.compile_step(settings, chips())
    found = communication(compiled.run.as_text())
    crossing = {
        name for name, groups in found if any({i < 4 for i in g} == {True, False} for g in groups)
    }
    assert crossing == {"all-reduce"}
    assert "all-gather" in {name for name, _ in found}  # of parameters, inside a slice
