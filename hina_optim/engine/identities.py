"""Who the parameters are: places, names, roles in adapters, and which of them belong together."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from hina_optim.adapters.inference import infer_roles
from hina_optim.adapters.roles import find_adapters, find_pairs, role_of
from hina_optim.engine.bucket import Member
from hina_optim.state.names import plain_name
from hina_optim.techniques.base import ParamInfo

if TYPE_CHECKING:
    from hina_optim.engine.optimizer import HinaOptimizer

__all__ = ["Identities"]


class Identities:
    """The parameters of one optimizer by place and name.

    A *position* is a number for a group and a place in it, ``(group << 24) | place``; it outlives the objects, which
    frameworks replace.

    Attributes:
        aliases: Position → a name that says what a nameless parameter is to an adapter.
        unknown_roles: Group → what is not known of the roles of its nameless parameters, in words.
    """

    def __init__(self, optimizer: HinaOptimizer) -> None:
        self._optimizer = optimizer
        self._known: dict[int, tuple[str, tuple[int, ...]]] = {}  # position → name and shape
        self.aliases: dict[int, str] = {}
        self.unknown_roles: dict[int, str] = {}

    def places(self) -> list[tuple[int, int, Tensor]]:
        """Position, index of the group, and parameter, in order."""
        opt = self._optimizer
        found = []
        for g, group in opt.indexed_groups():
            for i, p in enumerate(opt._layout.params(group)):
                position = opt._layout.position(p)
                found.append(((g << 24) | i if position is None else position, g, p))
        return found

    def members(self, params: Sequence[Tensor]) -> list[tuple[int, Member]]:
        """What is known of each parameter, with the index of its group."""
        opt = self._optimizer
        wanted = set(params)
        names, places = opt.param_names(), self.places()
        shapes = [opt._layout.shard(p).shape for _, _, p in places]
        positions = [position for position, _, _ in places]
        told = [self.aliases.get(position, name) for position, name in zip(positions, names, strict=True)]
        partner, adapter = self._related(dict(zip(positions, zip(told, shapes, strict=True), strict=True)))
        found = []
        for at, (_, g, p) in enumerate(places):
            if p in wanted:
                shard = opt._layout.shard(p)
                mate = partner.get(positions[at], -1)
                info = ParamInfo(shard.shape, role_of(told[at], shard.shape), mate >= 0)
                key = zlib.crc32(plain_name(names[at]).encode()) if opt._names[g] else positions[at]
                state = opt.state.get(p, {})
                whole = adapter.get(positions[at], -1)
                found.append((g, Member(p, names[at], positions[at], key, info, shard, state, mate, whole)))
        return found

    def shapes(self) -> dict[int, list[tuple[int, ...]]]:
        """Group → the shapes of its parameters, as they were last known by their places."""
        found: dict[int, list[tuple[int, ...]]] = {}
        for position, (_, shape) in sorted(self._known.items()):
            found.setdefault(position >> 24, []).append(shape)
        return found

    def infer(self, g: int) -> None:
        """Find the adapters of a group whose parameters have no names, as far as shapes, order and zeros prove them.

        What is found is kept as names that say it: ``inferred0.lora_a``. A checkpoint holds them, because later the
        weights no longer prove it.
        """
        found = infer_roles(self._optimizer.param_groups[g]["params"])
        for n, members in enumerate(found.adapters):
            for i in members:
                part = str(found.roles[i]).replace("loha_", "hada_")
                self.aliases[(g << 24) | i] = f"group{g}.inferred{n}.{part}"
        self.unknown_roles[g] = found.report

    def positions(self) -> list[int]:
        """The position of each parameter, in order."""
        return [position for position, _, _ in self.places()]

    def told_names(self) -> list[str]:
        """A name for each parameter that says what it is to an adapter, where that is known."""
        names = self._optimizer.param_names()
        return [self.aliases.get(at, name) for (at, _, _), name in zip(self.places(), names, strict=True)]

    def learn(self, g: int, names: Sequence[str] | None) -> None:
        """Remember names and shapes of a group, in case that its list is empty when they are needed."""
        for i, p in enumerate(self._optimizer.param_groups[g]["params"]):
            position = (g << 24) | i
            name = names[i] if names else self.aliases.get(position, f"group{g}.{i}")
            self._known[position] = (name, tuple(p.shape))

    def _related(self, present: dict[int, tuple[str, tuple[int, ...]]]) -> tuple[dict[int, int], dict[int, int]]:
        """Position → position of the other factor of its product; position → number of its adapter.

        Parameters of a group whose list is empty are remembered: ZeRO empties all other groups while it steps one.
        """
        every = self._optimizer._layout.known().items()
        present = {at: (self.aliases.get(at, name), shape) for at, (name, shape) in every} | present
        full = {position >> 24 for position in present}
        self._known = {at: what for at, what in self._known.items() if at >> 24 not in full} | present
        positions = list(self._known)
        names, shapes = zip(*self._known.values(), strict=True) if self._known else ((), ())
        partner: dict[int, int] = {}
        for a, b in find_pairs(names, shapes):
            partner[positions[a]], partner[positions[b]] = positions[b], positions[a]
        adapter = {positions[i]: n for n, members in enumerate(find_adapters(names, shapes)) for i in members}
        return partner, adapter
