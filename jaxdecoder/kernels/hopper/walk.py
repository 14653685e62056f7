"""The steps of a Hopper kernel's block: which columns it visits, and in which order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxdecoder.kernels.hopper.memory import Span
from jaxdecoder.kernels.typing import AnyArray, Carry
from jaxdecoder.typing import Index

Products = TypeVar("Products")


class Work(NamedTuple):
    """A launch's rows of blocks, in the order they are begun, and the columns that each visits.

    int32. See `masks.BlockLists`, which are here for each batch entry or, with a first axis of 1,
    for all.
    """

    order: AnyArray
    """(rows,)"""
    counts: AnyArray
    full_counts: AnyArray
    indices: AnyArray


class At(NamedTuple):
    """The place of a block."""

    work: Work
    batch: jax.Array
    head: jax.Array
    lists: jax.Array
    """The entry of the lists of `work`."""
    row: jax.Array

    def n_full(self) -> jax.Array:
        """Read how many of the row's columns need no mask."""
        return self.work.full_counts[self.lists, self.row]

    def n_columns(self) -> jax.Array:
        """Read how many columns the row has."""
        return self.work.counts[self.lists, self.row]

    def start(self, step: Step, block: int) -> jax.Array:
        """Read where the column of a step starts, in columns of `block` positions."""
        return self.work.indices[self.lists, self.row, step.column] * block

    def column(self, step: Step, block: int) -> Span:
        """Read the positions of the column of a step."""
        return pl.ds(self.start(step, block), block)


class Step(NamedTuple):
    """One step of a walk. Its properties are computed only where they are read."""

    number: Index
    """The count of steps before it."""
    within: Index
    """The count of steps before it whose columns need a mask like its own, or none like its own."""
    first: Index
    """The place of the first of these columns in the list."""
    span: Index
    """The number of these columns."""
    members: int
    """Heads that share the walk."""

    @property
    def member(self) -> Index:
        """The number of the step's head, of those that share the walk."""
        return jnp.int32(0) if self.members == 1 else lax.div(self.within, self.span)

    @property
    def column(self) -> Index:
        """The step's place in the list of columns."""
        return self.first + (self.within if self.members == 1 else lax.rem(self.within, self.span))


Visit = Callable[[bool, Step, Carry], Carry]
"""(check, step, carry) -> carry; `check` is whether the column needs the mask."""

VisitWith = Callable[[bool, Step, Carry, Products, bool], tuple[Carry, Products]]
"""(check, step, carry, products, more) -> carry and, if there are `more` steps, the products of
the next."""


def walk(at: At, members: int, visit: Visit[Carry], carry: Carry) -> Carry:
    """Visit the columns of a row once for every member, those first that need no mask.

    `visit` is traced for both kinds; loops that are not nested leave more registers to the
    accumulators.
    """
    for check, first, last in _ranges(at.n_full(), at.n_columns()):
        span = last - first
        one = _one_step(visit, check, first, span, members)
        carry = _loop(span * members, one, carry, apart=check)
    return carry


def walk_with(
    at: At,
    members: int,
    multiply: Callable[[Index], Products],
    visit: VisitWith[Carry, Products],
    carry: Carry,
    ahead: bool,
) -> Carry:
    """Walk with the products that `multiply` makes for the number of a step.

    `ahead`: every step finds products that the step before it has begun. The last step is then
    traced apart, and checked in any case.
    """

    def alone(check: bool, step: Step, carry: Carry) -> Carry:
        return visit(check, step, carry, multiply(step.number), False)[0]

    def and_next(check: bool, step: Step, both: tuple[Carry, Products]) -> tuple[Carry, Products]:
        return visit(check, step, *both, True)

    def all_steps(carry: Carry) -> Carry:
        both = carry, multiply(jnp.int32(0))
        partial = end > full
        for check, first, last in _ranges(full, end):
            span = last - first
            count = span * members - (partial if check else ~partial).astype(jnp.int32)
            both = _loop(count, _one_step(and_next, check, first, span, members), both, apart=check)
        first = jnp.where(partial, full, 0)
        span = end - first
        step = Step(end * members - 1, span * members - 1, first, span, members)
        return visit(True, step, *both, False)[0]

    if not ahead:
        return walk(at, members, alone, carry)
    full, end = at.n_full(), at.n_columns()
    return lax.cond(end > 0, all_steps, lambda carry: carry, carry)


def _ranges(full: jax.Array, end: jax.Array) -> list[tuple[bool, jax.Array, jax.Array]]:
    """Return whether to check columns, their start and their end, in the order of the walk."""
    return [(False, jnp.int32(0), full), (True, full, end)]


def _one_step(
    visit: Visit[Carry], check: bool, first: Index, span: Index, members: int
) -> Callable[[Index, Carry], Carry]:
    def one(t: Index, carry: Carry) -> Carry:
        return visit(check, Step(first * members + t, t, first, span, members), carry)

    return one


def _loop(count: Index, one: Callable[[Index, Carry], Carry], carry: Carry, apart: bool) -> Carry:
    """Do `one` so many times.

    `apart`: keep the loop apart from the one before by a condition. Compilers have got adjacent
    loops wrong, and a condition costs nothing.
    """
    loop = functools.partial(lax.fori_loop, 0, count, one)
    return lax.cond(count > 0, loop, lambda carry: carry, carry) if apart else loop(carry)
