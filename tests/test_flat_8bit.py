"""State in 8 and 4 bits in flat partitions that are cut anywhere: blocks, codes and scales of one process.

Ranks are threads (:mod:`tests.shards`); real engines are in ``tests/sharded``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from hina_optim import HinaAdaptive
from hina_optim.engine.exhaustion import ExhaustionError
from hina_optim.engine.layout import Shard
from hina_optim.engine.optimizer import HinaOptimizer
from hina_optim.engine.transfers import Transfers
from hina_optim.state.blockwise import BlockCodec
from hina_optim.state.ranges import RangeCodec, block_at, codes_of, ends
from tests.optim_cases import NOTHING
from tests.shards import ThreadLayout, World, in_threads
from tests.traced import traced

LR = 1e-3
#: Rows that are whole blocks, shorter than one, longer than one; two that share a stack, kernels, a vector; and two
#: that are cut into chunks.
SHAPES: dict[str, tuple[int, ...]] = {
    "odd": (7, 300),
    "odd again": (7, 300),
    "even": (13, 256),
    "wide": (5, 1024),
    "narrow": (40, 33),
    "kernels": (3, 16, 3, 3),
    "vector": (37,),
    "large odd": (30, 1000),
    "large even": (21, 1024),
}
CHUNKS = {"max_buffer_memory_mb": 0.7}
#: Codes, masks and signs that share bytes, in rows of odd length, too.
FOUR = {"state_precision": "4bit", "use_lr_mask": True}


# -- steps -------------------------------------------------------------------------------------------------------------


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) / 8 for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, Tensor]:
    noise, drift = torch.Generator().manual_seed(100 + step), torch.Generator().manual_seed(5)
    return {n: torch.randn(s, generator=noise) + torch.randn(s, generator=drift) for n, s in SHAPES.items()}


def even(rank: int, size: int, total: int) -> tuple[int, int]:
    each = -(-total // size)
    return min(rank * each, total), min((rank + 1) * each, total)


def uneven(rank: int, size: int, total: int) -> tuple[int, int]:
    """All lies in a few elements of the middle: several ranks within one block, and whole rows beside them."""
    middle = total // 2
    cuts = [0, *sorted(min(total, middle + 3 * i * i) for i in range(size - 1)), total]
    return cuts[rank], cuts[rank + 1]


Cut = Callable[[int, int, int], tuple[int, int]]


def built(options: dict[str, Any], named: Sequence[tuple[str, nn.Parameter]]) -> HinaOptimizer:
    given = {**NOTHING, "state_precision": "8bit", "min_8bit_size": 100, **options}
    return HinaAdaptive(named, lr=LR, **given)  # type: ignore[arg-type]


class Rank:
    """One rank's parameters and optimizer; of a world of one, everything, in its own shape."""

    def __init__(self, world: World | None, rank: int, options: dict[str, Any], cut: Cut = even) -> None:
        self.named: list[tuple[str, nn.Parameter]] = []
        self.kept: list[dict[str, tuple[int, Tensor]]] = []
        self.places: dict[str, tuple[int, int]] = {}
        layout = None if world is None else ThreadLayout(world, rank)
        for name, value in weights().items():
            p = nn.Parameter(value.clone())
            self.places[name] = 0, value.numel()
            if layout is not None and world is not None:
                a, b = self.places[name] = cut(rank, world.size, value.numel())
                p = nn.Parameter(value.reshape(-1)[a:b].clone())
                layout.shards[p] = Shard(tuple(value.shape), a, b)
            self.named.append((name, p))
        self.optimizer = built(options, self.named)
        if layout is not None:
            self.optimizer.bind_layout(layout)

    def step(self, step: int, spoil: str = "") -> None:
        for name, p in self.named:
            given = gradients(step)[name]
            if name == spoil:
                given.reshape(-1)[given.numel() // 2] = torch.nan
            a, b = self.places[name]
            p.grad = given.reshape(-1)[a:b].reshape(p.shape).clone()
        self.optimizer.step()

    def pieces(self) -> dict[str, tuple[int, Tensor]]:
        """Weights, codes, scales and other state of the parameters' shapes, flat, and where in the whole they begin."""
        found = {}
        for name, p in self.named:
            found[name] = self.places[name][0], p.detach().reshape(-1).clone()
            bucket = self.optimizer._buckets._of[p]
            member = next(m for m in bucket.members if m.param is p)
            for slot in bucket.slots:
                if slot.shape != "like" or slot.name in bucket.key.zero_anchors:
                    continue
                codec, begin = bucket.codecs[slot.name], self.places[name][0]
                value = bucket.decoded(member, slot.name).reshape(-1)
                found[f"{name}/{slot.name}"] = begin, value
                if isinstance(codec, (BlockCodec, RangeCodec)):
                    codes = member.state[slot.name][None]
                    codes = codes_of(codec, codes, (1, *p.shape)) if codec.per_byte > 1 else codes
                    found[f"{name}/{slot.name} codes"] = begin, codes.reshape(-1).clone()
                    blocks = codec.blocks if isinstance(codec, RangeCodec) else codec
                    first = block_at(SHAPES[name], blocks.block, begin) if value.numel() else 0
                    found[f"{name}/{slot.name} scales"] = first, member.state[slot.name + "_scale"].reshape(-1).clone()
        return found


def compared(ranks: Sequence[dict[str, tuple[int, Tensor]]], whole: dict[str, tuple[int, Tensor]]) -> int:
    """Assert that all pieces are those of the whole, to the bit; how many scales there are."""
    scales = 0
    for rank, pieces in enumerate(ranks):
        assert pieces.keys() == whole.keys()
        for key, (begin, value) in pieces.items():
            expected = whole[key][1][begin : begin + value.numel()]
            assert torch.equal(value, expected), f"{key} of rank {rank}"
            scales += value.numel() if key.endswith("scales") else 0
    for key, (_, value) in whole.items():
        assert sum(p[key][1].numel() for p in ranks) >= value.numel(), f"{key}: elements are on no rank"
    return scales


def check(size: int, options: dict[str, Any], life: Callable[[Rank], None], cut: Cut = even) -> World:
    """A life on ``size`` ranks is that of one process, to the bit: nothing here crosses elements."""
    world = World(size)

    def main(rank: int) -> list[dict[str, tuple[int, Tensor]]]:
        one = Rank(world, rank, options, cut)
        try:
            life(one)
            return [*one.kept, one.pieces()]
        except BaseException:
            world.barrier.abort()
            raise

    found = in_threads(size, main)
    one = Rank(None, 0, {k: v for k, v in options.items() if k != "compile"})
    life(one)
    for *pieces, whole in zip(*found, [*one.kept, one.pieces()], strict=True):
        assert compared(pieces, whole) >= sum(v.numel() for key, (_, v) in whole.items() if key.endswith("scales"))
    return world


def six_steps(one: Rank) -> None:
    for step in range(6):
        one.step(step)


@pytest.mark.parametrize(
    "options", [{}, CHUNKS, FOUR, {**FOUR, **CHUNKS}], ids=["whole", "chunks", "4 bits", "4 bits, chunks"]
)
@pytest.mark.parametrize("cut", [even, uneven])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_codes_and_scales_are_those_of_one_process(size: int, cut: Cut, options: dict[str, Any]) -> None:
    """Uneven, empty, inside one row, several in one block; rows that are whole blocks and rows that are not; chunks."""
    world = check(size, options, six_steps, cut)
    # one all-reduce of sums a step, one of scales, and one of scales when state is made
    assert (world.reductions, world.largest) == ((13, 7) if size > 1 else (6, 0))


def test_chunks_are_cut_between_blocks() -> None:
    one = Rank(World(1), 0, CHUNKS)
    one.step(0)
    for name in ("large odd", "large even"):
        bucket = one.optimizer._buckets._of[dict(one.named)[name]]
        assert bucket.in_ranges and bucket.numel > 2 * 4096
    assert ends(0, 30_000, 4375, one.optimizer._buckets._of[dict(one.named)["large odd"]].codecs.values()) == [
        *range(4000, 30_000, 4000),
        30_000,
    ]


@pytest.mark.parametrize("options", [{}, FOUR], ids=["8 bits", "4 bits"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_gradient_that_is_not_finite_leaves_every_bit(size: int, options: dict[str, Any]) -> None:
    """Also of blocks that are on several ranks, while others go on."""

    def life(one: Rank) -> None:
        for step in range(4):
            before = one.pieces() if step == 2 else {}
            one.step(step, spoil="odd again" if step == 2 else "")
            for key, (_, value) in before.items():
                same = torch.equal(one.pieces()[key][1], value)
                assert same or not key.startswith("odd again"), key

    check(size, options, life)


def test_nothing_is_sent_where_no_block_is_cut() -> None:
    """Partitions that happen to lie between blocks take no more collectives than others do."""

    def between(rank: int, size: int, total: int) -> tuple[int, int]:
        a, b = even(rank, size, total // 4)
        return (a * 4, b * 4) if total == 4096 else even(rank, size, total)

    world = World(2)

    def main(rank: int) -> None:
        layout, value = ThreadLayout(world, rank), torch.ones(8, 512)
        a, b = between(rank, 2, value.numel())
        p = nn.Parameter(value.reshape(-1)[a:b].clone())
        layout.shards[p] = Shard((8, 512), a, b)
        optimizer = built({}, [("p", p)])
        optimizer.bind_layout(layout)
        p.grad = torch.ones_like(p)
        optimizer.step()

    in_threads(2, main)
    assert (world.reductions, world.largest) == (1, 0)


# -- conversions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["together", "by hand", "by hand and saved"])
@pytest.mark.parametrize(("before", "after"), [("fp32", "8bit"), ("bf16", "8bit"), ("fp32", "4bit"), ("8bit", "4bit")])
def test_conversion_in_the_middle_of_a_training(before: str, after: str, how: str) -> None:
    """All ranks hold the scales of one process after it, and the trajectory is that of one process."""

    def life(one: Rank) -> None:
        for step in range(5):
            if step in (2, 4):
                wanted = after if step == 2 else before
                if how == "together":
                    one.optimizer.set_state_precision(wanted)
                    one.kept.append(one.pieces())
                else:
                    one.optimizer.param_groups[0]["state_precision"] = wanted
                    if how.endswith("saved") and one.places["odd"][0] == 0:  # one rank alone
                        one.optimizer.state_dict()
            one.step(step)
            one.kept.append(one.pieces())

    check(3, {"state_precision": before, "use_lr_mask": after == "4bit"}, life)


def test_second_moments_that_are_made_of_means() -> None:
    """Whole again out of rows and columns: blocks that are cut are encoded whole on every rank that has a part."""
    world = World(3)
    options = {"factored_second_moment": True, "use_adopt_stability": False}

    def main(rank: int) -> dict[str, tuple[int, Tensor]]:
        one = Rank(world, rank, options)
        for step in range(2):
            one.step(step)
        one.optimizer.change_options([{"factored_second_moment": False}])
        return one.pieces()

    found = in_threads(3, main)
    of_one = Rank(None, 0, options)
    for step in range(2):
        of_one.step(step)
    of_one.optimizer.change_options([{"factored_second_moment": False}])
    whole = of_one.pieces()
    for pieces in found:
        for key, (begin, value) in pieces.items():
            if key.endswith("exp_avg_sq scales"):
                expected = whole[key][1][begin : begin + value.numel()]
                torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    for key in (key for key in whole if key.endswith("exp_avg_sq scales")):
        of = {}
        for pieces in found:
            begin, value = pieces[key]
            for i, scale in enumerate(value.tolist()):
                assert of.setdefault(begin + i, scale) == scale, f"{key}: ranks differ"


# -- homes, graphs, memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, CHUNKS, FOUR], ids=["whole", "chunks", "4 bits"])
def test_state_in_host_memory(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transfers, "COPY_ALWAYS", True)
    check(3, {**options, "state_device": "cpu"}, six_steps)


def test_no_memory_for_what_is_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried once more; where that fails, weights and state belong together, with scales of this rank alone."""
    from hina_optim.engine import scales

    real, failing = scales._again, [0]

    def again(*given: Any) -> Any:
        if failing[0]:
            failing[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate some.")
        return real(*given)

    monkeypatch.setattr(scales, "_again", again)
    failing[0] = 1

    def life(one: Rank) -> None:
        for step in range(3):
            one.step(step)

    check(2, {}, life)
    assert failing[0] == 0, "nothing was encoded again"

    world, ran = World(2), []

    def main(rank: int) -> None:
        one = Rank(world, rank, {})
        one.step(0)
        world.barrier.wait()
        if rank == 0:
            failing[0] = 4  # both ranks, twice
        world.barrier.wait()
        before = copy.deepcopy([p.detach() for _, p in one.named])
        with pytest.raises(ExhaustionError, match="9 of 9 parameters were updated"):
            one.step(1)
        ran.append((one, before))

    in_threads(2, main)
    for one, before in ran:
        for (name, p), old in zip(one.named, before, strict=True):
            assert p.numel() == 0 or not torch.equal(p, old), name
            assert int(one.optimizer.state[p]["step"]) == 2
    whole = Rank(None, 0, {})
    for step in range(2):
        whole.step(step)
    expected = whole.pieces()
    for one, _ in ran:
        for key, (begin, value) in one.pieces().items():
            if key.endswith(("codes", "scales")):
                continue
            there = expected[key][1][begin : begin + value.numel()]
            assert float((value - there).abs().max() if value.numel() else 0.0) <= 0.04 * float(
                expected[key][1].abs().max()
            ), key


class Lonely(ThreadLayout):
    """One rank that is told of others, which never send anything: its parts of blocks are all there is."""

    def __init__(self) -> None:
        super().__init__(World(1), 0)

    def ranges(self, param: Tensor) -> tuple[tuple[int, int], ...]:
        shard = self.shards[param]
        total = int(torch.Size(shard.shape).numel())
        return (0, shard.start), (shard.start, shard.stop), (shard.stop, total)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, CHUNKS, FOUR], ids=["whole", "chunks", "4 bits"])
def test_compiled_as_eager(options: dict[str, Any]) -> None:
    """Graphs by shape, traced in full: ends of blocks, ends of rows, whole rows, and what is set aside."""
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        layout, named = Lonely(), []
        for name in ("odd", "odd again", "narrow", "large odd", "large even"):
            value = weights()[name]
            a, b = value.numel() // 7 + 1, value.numel() * 5 // 6
            p = nn.Parameter(value.reshape(-1)[a:b].clone())
            layout.shards[p] = Shard(tuple(value.shape), a, b)
            named.append((name, p))
        optimizer = built({**options, "compile": compiled}, named)
        optimizer.bind_layout(layout)
        with traced():
            for step in range(3):
                for name, p in named:
                    shard = layout.shards[p]
                    p.grad = gradients(step)[name].reshape(-1)[shard.start : shard.stop].clone()
                optimizer.step()
        assert (counters["stats"]["unique_graphs"] > 0) == compiled
        assert any(bucket.cut_blocks("exp_avg") for bucket in set(optimizer._buckets._of.values()))
        found.append(
            {f"{n}.{k}": v.clone() for n, p in named for k, v in {**optimizer.state[p], "p": p.detach()}.items()}
        )
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-6, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}")


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_decoded_values_still_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier versions saved what a partition had cut in float32: encoded again, it is what one process makes of it."""
    from hina_lightning import sharded_state
    from hina_optim.state import portable

    real = portable._Held._form

    def decoded(self: Any, name: str) -> dict[str, Any]:
        form = dict(real(self, name))
        coded = {"form": "blocks", "signed": name == "exp_avg", "block": 256, "compute": "float32"}
        return {**form, "decoded": coded} if name.startswith("exp_avg") else form

    old = Rank(None, 0, {"state_precision": "fp32"})
    for step in range(2):
        old.step(step)
    with monkeypatch.context() as patch:
        patch.setattr(portable._Held, "_form", decoded)
        sharded_state.save(tmp_path / "old", old.optimizer)
    whole = Rank(None, 0, {})
    sharded_state.load(tmp_path / "old", whole.optimizer)

    def main(rank: int) -> dict[str, tuple[int, Tensor]]:
        one = Rank(world, rank, {}, uneven)
        one.optimizer.settle_layout()
        sharded_state.load(tmp_path / "old", one.optimizer)
        return one.pieces()

    world = World(3)
    expected = {key: value for key, value in whole.pieces().items() if "/" in key}
    compared([{k: v for k, v in pieces.items() if "/" in k} for pieces in in_threads(3, main)], expected)


def test_a_state_dict_of_a_rank_comes_back(tmp_path: Path) -> None:
    """As DeepSpeed keeps it: each rank its own, packed signs and cut blocks included."""
    world = World(3)

    def main(rank: int) -> None:
        one = Rank(world, rank, {})
        for step in range(2):
            one.step(step)
        torch.save(one.optimizer.state_dict(), tmp_path / f"{rank}.pt")
        again = Rank(world, rank, {})
        with torch.no_grad():
            for (_, p), (_, q) in zip(one.named, again.named, strict=True):
                q.copy_(p)
        again.optimizer.settle_layout()
        again.optimizer.load_state_dict(torch.load(tmp_path / f"{rank}.pt", weights_only=True))
        early = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        early["hina"]["version"] = 1
        with pytest.raises(ValueError, match="an earlier version, which kept 'exp_avg'"):
            again.optimizer.load_state_dict(early)
        for run in (one, again):
            for step in range(2, 4):
                run.step(step)
        for key, (_, value) in one.pieces().items():
            assert torch.equal(again.pieces()[key][1], value), key

    in_threads(3, main)
