"""Which parameters run together: buckets are formed, checked at every step, and formed again when something changed.

Frameworks replace parameters, state dicts and group options behind an optimizer's back. Nothing is trusted from one
step to the next: every step looks at what the groups hold, and a bucket whose parameters, views or options are not what
it was built for is built again from ``optimizer.state``, which is always true.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hina_optim import arguments as rule
from hina_optim.engine import population, sizes
from hina_optim.engine.agreement import Agreement
from hina_optim.engine.bucket import KAHAN, SOLO_NUMEL, Bucket, BucketKey, Member
from hina_optim.engine.compiled import is_compiled
from hina_optim.engine.identities import Identities
from hina_optim.engine.inheritance import Heirs, inherits
from hina_optim.engine.loading import check_loaded, check_state
from hina_optim.engine.plan import check_recipe
from hina_optim.engine.program import Program
from hina_optim.engine.scales import agree_on_state
from hina_optim.state.precision import Storage
from hina_optim.state.slot import Slot
from hina_optim.techniques.base import ParamInfo, Technique

if TYPE_CHECKING:
    from hina_optim.engine.optimizer import HinaOptimizer

__all__ = ["Buckets"]

log = logging.getLogger("hina_optim")


class Buckets:
    """The buckets of one optimizer."""

    def __init__(self, optimizer: HinaOptimizer) -> None:
        self._optimizer = optimizer
        self.identities = Identities(optimizer)
        self._of: dict[Tensor, Bucket] = {}
        self._options: dict[int, tuple[dict[str, Any], tuple[Any, ...]]] = {}
        #: positions of parameters that were once without a gradient when their bucket had one
        self._alone: set[int] = set()
        self._said: set[str] = set()
        self._formed = False  # whether buckets were made
        self._zero: set[Tensor] | None = None  # while all ranks make state: the parameters that are zero everywhere

    # -- one step ------------------------------------------------------------------------------------------------

    def prepare(self) -> list[Bucket]:
        """Buckets of all parameters that have a gradient now, with state; raises before anything has changed.

        Where parameters are sharded, all ranks agree first: on the parameters that are stepped, and on whether any
        rank has found something wrong, so that none is left waiting for the others.
        """
        opt = self._optimizer
        opt.settle_layout()
        layout = opt._layout
        agreement = Agreement(opt)
        with agreement.noting():
            self._check_options()
        params = [p for group in opt.param_groups for p in layout.params(group)]
        grads: list[Tensor | None] = [None] * len(params)
        with agreement.noting():
            grads = [self._checked_grad(p) for p in params]
        if layout.sharded:
            held = [p for p, grad in zip(params, grads, strict=True) if grad is not None or not layout.local(p).numel()]
            loose = any(self._of[p].loose for p in params if p in self._of)
            agreement.needs(loose or self._unhoused(held), not opt.state)
        with_grad = agreement.stepping(params, grads)
        self.ensure_together(with_grad, agreement)
        work = list(dict.fromkeys(self._of[p] for p in with_grad))
        return [] if self._is_priming(work) else work

    def _checked_grad(self, p: Tensor) -> Tensor | None:
        """A parameter's gradient, if it is one that can be used."""
        if p.grad is not None:
            if p.grad.layout is not torch.strided:
                raise RuntimeError(
                    f"{self._label(p)} has a sparse gradient; {type(self._optimizer).__name__} needs a dense one "
                    "(build the embedding with sparse=False)."
                )
            if p.grad.is_complex():
                raise RuntimeError(f"{self._label(p)} has a complex gradient; only real ones can be used.")
        layout = self._optimizer._layout
        grad = layout.grad(p)
        if grad is not None and grad.shape != layout.local(p).shape:
            raise RuntimeError(
                f"{self._label(p)} has shape {tuple(layout.local(p).shape)}, its gradient {tuple(grad.shape)}: the "
                "parameter changed its shape after backward; clear the gradient."
            )
        return grad

    def ensure_together(self, params: Sequence[Tensor], agreement: Agreement) -> None:
        """:meth:`ensure` on all ranks at once: if one of them cannot make its state, all raise.

        What ranks tell each other here is decided by all: one of them may have lost its state, or been given another.
        """
        if not self._optimizer._layout.sharded:
            self.ensure(params)
            return
        self._formed = False
        if agreement.needed:
            with agreement.noting():
                if agreement.blank:
                    self._optimizer.before_state()
            self._zero = agreement.zero_everywhere(params)
        blank = [p for p in params if not self._optimizer.state.get(p)]
        try:
            with agreement.noting():
                self.ensure(params, sound=not agreement.needed)
            if agreement.needed:
                agree_on_state(self, agreement)
            # where nobody had to, buckets are only formed again because other parameters have gradients: on all ranks
            if agreement.needed or self._formed:
                buckets = dict.fromkeys(self._of[p] for p in params if p in self._of)
                agreement.formed(
                    repr([([m.position for m in b.members], b.step, sorted(b.key.zero_anchors)) for b in buckets])
                )
        except BaseException:
            for p in blank:  # what all ranks make when they try again
                if p in self._of:
                    self._drop(self._of[p])
                self._optimizer.state.pop(p, None)
            raise
        finally:
            self._zero = None

    def ensure(self, params: Sequence[Tensor], sound: bool = False) -> None:
        """Give every one of ``params`` a bucket that holds it, and only parameters of ``params``.

        Args:
            params: Which.
            sound: Their buckets were just found to be what they were built of.
        """
        if not params:
            return
        self._optimizer.settle_layout()
        self._check_options()
        wanted, state = set(params), self._optimizer.state
        hits: dict[Bucket, int] = {}
        for p in params:
            bucket = self._of.get(p)
            if bucket is not None:
                hits[bucket] = hits.get(bucket, 0) + 1
        for bucket, count in hits.items():
            if count != bucket.size:
                left = [m for m in bucket.members if m.param not in wanted]
                self._alone.update(m.position for m in left if state.get(m.param) is m.state)
            if count != bucket.size or not (sound or self._is_sound(bucket)):
                self._drop(bucket)
        homeless = [p for p in params if p not in self._of]
        if homeless:
            if not state and self._zero is None:
                self._optimizer.before_state()
            self._drop_stale()
            self._formed = True
            self._form(homeless)
            self._form_waiting()

    def _is_sound(self, bucket: Bucket) -> bool:
        """Whether parameters and state still are what a bucket was built of."""
        made_for = (bucket.key.local_shape, bucket.key.dtype, bucket.key.device)
        if any((w.shape, w.dtype, w.device) != made_for for w in bucket.weights()):
            return False
        return bucket.views_hold(self._optimizer.state)

    def _unhoused(self, params: Sequence[Tensor]) -> bool:
        """Whether any of these parameters has no bucket, or one that no longer holds."""
        buckets = {self._of.get(p) for p in params}
        return any(bucket is None or not self._is_sound(bucket) for bucket in buckets)

    def program(self, bucket: Bucket) -> Program:
        """The bucket's segments for its next step."""
        measuring = population.measuring(bucket)
        kind = measuring, tuple(one.acts(bucket.step) for one in bucket.chain)
        if kind not in bucket.programs:
            bucket.programs[kind] = Program(bucket, measuring, compiled=is_compiled(bucket))
        program: Program = bucket.programs[kind]
        return program

    def refresh(self, work: Iterable[Bucket]) -> None:
        """Digest what the last step measured, if it measured anything."""
        due = population.due(work)
        if due:
            everyone = self._everyone()
            for name in due:
                population.refresh(name, everyone)

    def advance(self, updated: Mapping[Bucket, Sequence[tuple[int, int]]]) -> None:
        """Count the step of the parameters that have taken it: of each bucket, those in these ranges."""
        for bucket, ranges in updated.items():
            if sum(stop - first for first, stop in ranges) == bucket.size:
                bucket.steps.add_(1)
                bucket.step += 1
                continue
            for first, stop in ranges:
                bucket.steps[first:stop].add_(1)
            self._drop(bucket)  # its parameters no longer are at the same step

    def _everyone(self) -> list[Bucket]:
        """Buckets of all parameters that have state, however they came to it (a load, a swap)."""
        self._drop_stale()
        self._form_waiting()
        return list(dict.fromkeys(self._of.values()))

    def _form_waiting(self) -> None:
        """Buckets for those that have state and none: they have no gradient now, but count among all parameters."""
        waiting = [p for _, _, p in self.identities.places() if self._optimizer.state.get(p) and p not in self._of]
        if waiting:
            self._form(waiting, needed=False)

    def _is_priming(self, work: Sequence[Bucket]) -> bool:
        """A step with lr 0 and all-zero gradients, as torch's checkpoint code takes to create state: it must not count.

        Looked at only when every lr is 0, so that an ordinary step never waits for the device.
        """
        for bucket in work:
            lr = bucket.group["lr"]
            if (lr.device.type != "cpu" or float(lr) != 0.0) if isinstance(lr, Tensor) else lr != 0:
                return False
        grads = [g for bucket in work for g in bucket.grads()]
        if not grads:
            return False
        anything = sizes.nonzero(grads).amax().reshape(1)
        return not bool(self._optimizer._layout.total(anything))

    # -- forming buckets -----------------------------------------------------------------------------------------

    def _form(self, params: Sequence[Tensor], needed: bool = True) -> None:
        """Buckets for parameters that have none; if they are not needed now, state that does not fit is left alone."""
        members = self.identities.members(params)
        recipes: dict[tuple[int, ParamInfo, torch.dtype], tuple[tuple[Technique, ...], tuple[Slot, ...]]] = {}
        groups: dict[BucketKey, list[Member]] = {}
        if self._zero is None:
            zero = self._zero_params([m for _, m in members if not m.state])
        else:
            zero = {m.position for _, m in members if m.param in self._zero}
        layout = self._optimizer._layout
        for g, m in members:
            kind = g, m.info, m.param.dtype
            if kind not in recipes:
                recipes[kind] = self._recipe(self._optimizer.group(g), m.info, m.param.dtype)
            slots = recipes[kind][1]
            anchors = frozenset(s.name for s in slots if s.constant and self._is_zero(s, m, zero))
            try:
                check_state(self._optimizer, m, slots, anchors, self._optimizer.group(g))
            except RuntimeError:
                if needed:
                    raise
                continue
            step = int(m.state["step"]) if "step" in m.state else 0
            alone = m.info.numel > SOLO_NUMEL or m.position in self._alone
            key = BucketKey(
                group=g,
                info=m.info,
                shard=m.shard,
                pattern=layout.pattern(m.param),
                local_shape=tuple(layout.local(m.param).shape),
                dtype=m.param.dtype,
                device=m.param.device,
                step=step,
                zero_anchors=anchors,
                solo=m.position if alone else -1,
            )
            groups.setdefault(key, []).append(m)
        opt = self._optimizer
        for key, same in groups.items():
            chain, slots = recipes[key.group, key.info, key.dtype]
            bucket = Bucket(key, same, opt.group(key.group), slots, chain, opt._transfers, layout)
            for m in same:
                opt.state[m.param] = m.state
                self._of[m.param] = bucket

    def _recipe(
        self, group: dict[str, Any], info: ParamInfo, dtype: torch.dtype
    ) -> tuple[tuple[Technique, ...], tuple[Slot, ...]]:
        """The techniques of a group that apply to such a parameter, and the state that they keep."""
        opt = self._optimizer
        chain = tuple(opt.recipe(group, info))
        check_recipe(chain, type(opt).__name__)
        chain = tuple(one for one in chain if one.applies(info))
        slots: dict[str, Slot] = {}
        for one in chain:
            for slot in one.slots(info):
                if slots.setdefault(slot.name, slot) != slot:
                    raise ValueError(
                        f"{type(opt).__name__}: technique {one.name!r} declares the state {slot.name!r} as {slot}, "
                        f"another one as {slots[slot.name]}; give it another name."
                    )
        if group["rounding"] == "kahan" and dtype in (torch.bfloat16, torch.float16):
            slots[KAHAN.name] = KAHAN
        return chain, tuple(slots.values())

    def _zero_params(self, members: Sequence[Member]) -> set[int]:
        """Positions of parameters that are zero everywhere (one host sync, when state is made)."""
        if not members:
            return set()
        layout = self._optimizer._layout
        some = layout.total(sizes.nonzero([layout.local(m.param) for m in members]))
        return {m.position for m, s in zip(members, some.tolist(), strict=True) if not s}

    @staticmethod
    def _is_zero(slot: Slot, m: Member, zero: set[int]) -> bool:
        have = m.state.get(slot.name)
        if have is not None:
            return have.ndim == 0 and m.param.ndim > 0
        return m.position in zero and m.param.ndim > 0

    # -- upkeep ------------------------------------------------------------------------------------------------------

    def _check_options(self, together: bool = False) -> None:
        """Give the buckets of a group whose options changed their new recipe; form them again if its state differs.

        Args:
            together: Whether all ranks do this now, with the same options.
        """
        changed: list[tuple[Bucket, Sequence[Technique], Sequence[Slot]]] = []
        seen_now: dict[int, tuple[dict[str, Any], tuple[Any, ...]]] = {}
        for g, group in self._optimizer.indexed_groups():
            options = tuple(v for k, v in group.items() if k not in ("params", "lr", "initial_lr", "name"))
            lr = group["lr"]
            if not isinstance(lr, Tensor) and not 0 <= lr < math.inf:
                rule.check(type(self._optimizer).__name__, "lr", lr, rule.NON_NEGATIVE)
            seen = self._options.get(g)
            if seen is None or seen[0] is not group or seen[1] != options:
                if seen is not None:
                    self._optimizer.check_group(group)
                seen_now[g] = group, options
                for bucket in dict.fromkeys(b for b in self._of.values() if b.key.group == g):
                    changed.append((bucket, *self._recipe(group, bucket.info, bucket.key.dtype)))
        if not changed:
            self._options |= seen_now
            return
        changed.sort(key=lambda one: one[0].members[0].position)  # on all ranks the same order
        heirs = Heirs(
            self._optimizer,
            [(b, slots, self._optimizer.group(b.key.group)) for b, _, slots in changed if inherits(b.slots, slots)],
            together,
        )
        self._options |= seen_now
        for bucket, chain, slots in changed:
            group = self._optimizer.group(bucket.key.group)
            bucket.group, bucket.chain = group, tuple(chain)
            bucket.programs.clear()
            if slots != bucket.slots or not bucket.stored_as(Storage.of(group)):
                bucket.convert(Storage.of(group), slots)
        for bucket, _, slots in changed:  # only now: what is let go of here cannot be converted back
            if {s.name for s in slots} != {s.name for s in bucket.slots}:
                heirs.install(bucket, slots)
                self._drop(bucket)

    def _drop(self, bucket: Bucket) -> None:
        for p in bucket.params:
            self._of.pop(p, None)
        bucket.release()

    def _drop_stale(self) -> None:
        """Let go of buckets whose parameters or state were replaced."""
        for bucket in set(self._of.values()):
            if not bucket.views_hold(self._optimizer.state):
                self._drop(bucket)

    def check_loaded(
        self, groups: Sequence[dict[str, Any]], state: Mapping[Tensor, Mapping[str, Any]]
    ) -> dict[Tensor, set[str]]:
        """See :func:`hina_optim.engine.loading.check_loaded`."""
        return check_loaded(self._optimizer, groups, state)

    def clear(self) -> None:
        """Let go of all buckets and the memory that they hold."""
        for bucket in set(self._of.values()):
            self._drop(bucket)

    def restore(self, alone: Iterable[int]) -> None:
        """Form the buckets of a run that is resumed: from all state, with parameters at the places ``alone`` alone."""
        places = self.identities.places()
        self.clear()
        self._alone = {places[at][0] for at in alone}
        self.ensure([p for _, _, p in places if self._optimizer.state.get(p)])

    def conform(self) -> None:
        """Bring state in line with options edited since the last step: a checkpoint must hold what its options say."""
        with contextlib.suppress(ValueError):  # a bad option is the next step's to refuse, not a reason not to save
            self._check_options()
            self._form_waiting()

    def agree_on_scales(self) -> None:
        """See that blocks of 8 bits that lie on several ranks have the same scale on all; called by all of them."""
        agreement = Agreement(self._optimizer)
        agreement.sound(together=agree_on_state(self, agreement))

    def alone(self) -> list[int]:
        """Places, in the order of the groups, of parameters that run alone because they once lacked a gradient.

        Saved, because some operations round differently on a stack (Fourier transforms): a resumed run must stack what
        the uninterrupted one does.
        """
        return [at for at, (position, _, _) in enumerate(self.identities.places()) if position in self._alone]

    def convert(self, precision: str) -> None:
        """Store all state in another precision."""
        self.change([{"state_precision": precision} for _ in self._optimizer.param_groups])

    def change(self, changes: Sequence[Mapping[str, Any]]) -> None:
        """Set options of the groups, a mapping for each, and bring all state in line with them now.

        Where that fails, the options are as they were, and what was converted is converted back; what cannot be, for
        want of memory, leaves them as they were set, and all is brought in line at the next occasion.
        """
        opt = self._optimizer
        self._check_options()
        self.ensure([p for _, _, p in self.identities.places() if opt.state.get(p)])
        groups = list(zip(opt.param_groups, changes, strict=True))
        before = [{name: group[name] for name in options if name in group} for group, options in groups]
        for group, options in groups:
            group.update(options)
        agreement = Agreement(opt)
        try:
            with agreement.noting():
                self._check_options(together=True)
            agreement.sound(together=agree_on_state(self, agreement))
        except BaseException:
            for (group, options), old in zip(groups, before, strict=True):
                for name in options.keys() - old.keys():
                    del group[name]
                group.update(old)
            try:
                self._check_options()
            except (RuntimeError, ValueError):
                for group, options in groups:
                    group.update(options)
                self._options.clear()
            raise
        self._form_waiting()

    def rehouse(self, option: str, device: str | None) -> None:
        """Move state that exists to where an option says from now on."""
        self.change([{option: device} for _ in self._optimizer.param_groups])

    def host_bytes(self) -> int:
        """Bytes of state that are in host memory for parameters elsewhere."""
        self._drop_stale()
        self._form_waiting()
        buckets = dict.fromkeys(self._of.values())
        return sum(b.storage[part].nbytes for b in buckets for part in b.hosted_parts)

    def state_bytes(self, precision: str | None) -> int:
        """Bytes of state held, or what all trainable parameters would hold in ``precision``."""
        opt = self._optimizer
        if precision is None:
            return sum(
                opt._layout.unwrap(p, v).nbytes
                for p, s in opt.state.items()
                for v in s.values()
                if isinstance(v, Tensor)
            )
        return sizes.state_bytes(
            sizes.kept(opt, [{**group, "state_precision": precision} for group in opt.param_groups])
        )

    def techniques(self, param: Tensor) -> tuple[Technique, ...]:
        """What acts on a parameter: of its bucket, or what its recipe will be."""
        bucket = self._of.get(param)
        if bucket is not None:
            return bucket.chain
        ((g, member),) = self.identities.members([param])
        return self._recipe(self._optimizer.group(g), member.info, param.dtype)[0]

    def decoded(self, param: Tensor, name: str) -> Tensor | None:
        """One piece of a parameter's state, as it is computed with; None if there is none."""
        if name not in self._optimizer.state.get(param, {}):
            return None
        bucket = self._of.get(param)
        if bucket is None or not bucket.views_hold(self._optimizer.state):
            self._drop_stale()
            self._form_waiting()
            bucket = self._of[param]
        return bucket.decoded(next(m for m in bucket.members if m.param is param), name)

    def _label(self, param: Tensor) -> str:
        names = self._optimizer.param_names()
        every = [p for _, _, p in self.identities.places()]
        return next((f"parameter {n}" for n, p in zip(names, every, strict=True) if p is param), "a parameter")

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            log.warning("%s: %s", type(self._optimizer).__name__, message)
