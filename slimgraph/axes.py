"""The axis algebra: what every dimension of every tensor is made of.

A dimension is described by a *term*:

- an `Atom` is an indivisible run of positions;
- a `Product` is row-major, outermost factor first: what `view` and `reshape` split and merge, e.g. heads × head_dim;
- a `Concat` lies end to end: what `cat`, `split` and `slice` make and cut, e.g. query | key | value.

`Axes` holds what is known about the atoms. Two terms that an operator aligns are *unified*; an atom of 64 that meets
4 × 16 becomes that product everywhere, one that meets 40 | 24 becomes that concatenation. Whatever cannot be aligned
is *frozen with a reason*: a frozen atom is never cut, so nothing has to be known about it.

>>> axes = Axes()
>>> x, y = axes.atom(6, "x"), axes.atom(6, "y")
>>> rows, cols = axes.reshape((x,), (2, 3))
>>> axes.unify(x, y)
>>> axes.show(y)
'x.0:2 × x.1:3'
>>> first, second = axes.cut(cols, (1, 2))
>>> axes.show(y)
'x.0:2 × (x.1.0:1! | x.1.1:2)'
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["DATA", "ONE", "Atom", "Axes", "Concat", "Link", "Product", "Term", "size", "size_with"]

# A concatenation is compared with a product piece by piece; above this many pieces it is frozen instead.
_MOST_PIECES = 4096


@dataclass(eq=False)
class Atom:
    """A run of `size` positions that nothing has split yet. Compared by identity."""

    size: int
    label: str
    frozen: str | None = None
    bound: Term | None = None

    def __repr__(self) -> str:
        return f"{self.label}:{self.size}{'!' if self.frozen else ''}"


@dataclass(frozen=True)
class Product:
    """Row-major product of factors, outermost first. The empty product is `ONE`, the size that broadcasts."""

    factors: tuple[Term, ...]


@dataclass(frozen=True)
class Concat:
    """Parts laid end to end."""

    parts: tuple[Term, ...]


Term = Atom | Product | Concat

ONE = Product(())

DATA = "batch or sequence"  # why an axis of the model's input is frozen


@dataclass(frozen=True)
class Link:
    """Two atoms became related at a graph node: equal, or the second is a piece of the first."""

    first: Atom
    second: Atom
    cause: str
    how: str


def size(term: Term) -> int:
    """Number of positions of a term.

    >>> size(Product((Atom(2, "h"), Concat((Atom(3, "a"), Atom(4, "b"))))))
    14
    """
    match term:
        case Atom():
            return term.size
        case Product(factors):
            return math.prod(size(f) for f in factors)
        case Concat(parts):
            return sum(size(p) for p in parts)


def size_with(term: Term, sizes: Mapping[Atom, int]) -> int:
    """Number of positions of a term in normal form when some atoms have other sizes.

    >>> a, b = Atom(2, "a"), Atom(3, "b")
    >>> size_with(Product((a, Concat((b, b)))), {b: 1})
    4
    """
    match term:
        case Atom():
            return sizes.get(term, term.size)
        case Product(factors):
            return math.prod(size_with(f, sizes) for f in factors)
        case Concat(parts):
            return sum(size_with(p, sizes) for p in parts)


def _product(factors: Iterable[Term]) -> Term:
    flat: list[Term] = []
    for f in factors:
        flat.extend(f.factors if isinstance(f, Product) else (f,))
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def _concat(parts: Iterable[Term]) -> Term:
    flat: list[Term] = []
    for p in parts:
        flat.extend(p.parts if isinstance(p, Concat) else (p,))
    return flat[0] if len(flat) == 1 else Concat(tuple(flat))


class Axes:
    """All atoms of one graph, what they turned out to be, and which graph node said so.

    Attributes:
        links: every merge and every split, in order; the material of explanations.
        freezes: every atom that was frozen, with the graph node at which it was.
        cause: name of the graph node that is being analysed; set by the analysis.
    """

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.freezes: list[tuple[Atom, str]] = []
        self.cause = ""

    # -- making terms ---------------------------------------------------------------------------------------------

    def atom(self, n: int, label: str, frozen: str | None = None) -> Term:
        """A fresh axis of n positions; `ONE` when n is 1."""
        return ONE if n == 1 else Atom(n, label, frozen)

    def product(self, factors: Iterable[Term]) -> Term:
        """Row-major product, in normal form."""
        return self.find(_product(factors))

    def concat(self, parts: Iterable[Term]) -> Term:
        """Parts end to end, in normal form. A part of size 1 becomes a position of its own that always stays."""
        named = [self._single("joined") if p == ONE else p for p in (self.find(p) for p in parts) if size(p)]
        return _concat(named) if named else Atom(0, "empty", "an empty axis")

    def find(self, term: Term) -> Term:
        """Normal form of a term: every bound atom replaced by what it is bound to."""
        match term:
            case Atom():
                if term.bound is None:
                    return term
                term.bound = self.find(term.bound)
                return term.bound
            case Product(factors):
                found = tuple(self.find(f) for f in factors)
                return term if found == factors else _product(found)
            case Concat(parts):
                found = tuple(self.find(p) for p in parts)
                return term if found == parts else _concat(found)

    def atoms(self, term: Term) -> Iterator[Atom]:
        """The unbound atoms of a term, in order, repeated as often as they occur."""
        found = self.find(term)
        match found:
            case Atom():
                yield found
            case Product(children) | Concat(children):
                for child in children:
                    yield from self.atoms(child)

    def show(self, term: Term) -> str:
        """A term in one line: `×` joins factors, `|` joins parts, `!` marks what is frozen.

        >>> Axes().show(Product((Atom(3, "kv"), Concat((Atom(2, "a"), Atom(4, "b"))))))
        'kv:3 × (a:2 | b:4)'
        """
        found = self.find(term)
        match found:
            case Atom():
                return repr(found)
            case Product(factors):
                shown = [f"({self.show(f)})" if isinstance(f, Concat) else self.show(f) for f in factors]
                return " × ".join(shown) or "1"
            case Concat(parts):
                return " | ".join(f"({self.show(p)})" if isinstance(p, Product) else self.show(p) for p in parts)

    # -- freezing -------------------------------------------------------------------------------------------------

    def freeze(self, term: Term, reason: str) -> None:
        """Forbid cutting any atom of a term. The first reason of an atom is kept."""
        for atom in self.atoms(term):
            if atom.frozen is None:
                atom.frozen = reason
                self.freezes.append((atom, self.cause))

    def _is_data(self, term: Term) -> bool:
        return all((a.frozen or "") == DATA for a in self.atoms(term))

    def is_frozen(self, term: Term) -> bool:
        """Whether no atom of the term may be cut."""
        return all(a.frozen is not None for a in self.atoms(term))

    # -- unification ----------------------------------------------------------------------------------------------

    def unify(self, first: Term, second: Term) -> None:
        """Say that two terms are the same axis, position by position.

        Atoms are refined as far as needed. Terms of the same size that cannot be aligned are frozen, both of them.

        Raises:
            ValueError: the sizes differ.

        >>> axes = Axes()
        >>> q, kv, rep = axes.atom(6, "q"), axes.atom(3, "kv"), axes.atom(2, "rep")
        >>> axes.unify(q, axes.product((kv, rep)))
        >>> axes.show(q)
        'kv:3 × rep:2'
        """
        s, t = self.find(first), self.find(second)
        if s is t or s == t:
            return
        if size(s) != size(t):
            if self._is_data(s) and self._is_data(t):
                return  # sizes that depend on the input are examples; they need not agree, and are never cut
            raise ValueError(f"cannot align {self.show(s)} with {self.show(t)}: sizes {size(s)} and {size(t)}")
        match s, t:
            case Atom(), _:
                self._bind(s, t)
            case _, Atom():
                self._bind(t, s)
            case Product(), Product():
                self._align_products(s, t)
            case Concat(), Concat():
                self._unify_pairs(self.cut(s, [size(p) for p in t.parts]), t.parts)
            case Product(), Concat(parts):
                self._unify_pairs(self.cut(s, [size(p) for p in parts]), parts)
            case Concat(parts), Product():
                self._unify_pairs(parts, self.cut(t, [size(p) for p in parts]))

    def _unify_pairs(self, first: Sequence[Term], second: Sequence[Term]) -> None:
        for s, t in zip(first, second, strict=True):
            # A piece of size 1 is a position of its own and always stays: there is nothing to align.
            if size(s) > 1:
                self.unify(s, t)

    def _align_products(self, s: Product, t: Product) -> None:
        left, right = list(s.factors), list(t.factors)
        while left and right:
            a, b = left.pop(), right.pop()
            inner = min(size(a), size(b))
            split_a, split_b = self.factor(a, inner), self.factor(b, inner)
            if split_a is None or split_b is None:
                self._give_up(s, t)
                return
            self.unify(split_a[1], split_b[1])
            left.extend([split_a[0]] if split_a[0] != ONE else [])
            right.extend([split_b[0]] if split_b[0] != ONE else [])

    def _give_up(self, s: Term, t: Term) -> None:
        reason = f"{self.show(s)} and {self.show(t)} meet at {self.cause} and cannot be aligned"
        self.freeze(s, reason)
        self.freeze(t, reason)

    def _bind(self, atom: Atom, term: Term) -> None:
        within = list(self.atoms(term))
        if atom in within:
            self._give_up(atom, term)
            return
        for other in within:
            self.links.append(Link(atom, other, self.cause, "equal" if isinstance(term, Atom) else "piece"))
        if atom.frozen is not None:
            self.freeze(term, atom.frozen)
        atom.bound = term

    def _single(self, label: str) -> Atom:
        return Atom(1, label, f"a single position, used by itself at {self.cause}")

    # -- splitting ------------------------------------------------------------------------------------------------

    def factor(self, term: Term, inner: int) -> tuple[Term, Term] | None:
        """Write a term as outer × inner, refining it.

        Returns:
            The two factors, or None when the term has no such factorisation.

        >>> axes = Axes()
        >>> outer, inner = axes.factor(axes.atom(12, "x"), 4)
        >>> axes.show(outer), axes.show(inner)
        ('x.0:3', 'x.1:4')
        """
        t = self.find(term)
        n = size(t)
        if inner == n:
            return ONE, t
        if inner == 1:
            return t, ONE
        if n % inner:
            return None
        match t:
            case Atom():
                a, b = Atom(n // inner, f"{t.label}.0"), Atom(inner, f"{t.label}.1")
                self._bind(t, Product((a, b)))
                return a, b
            case Product(factors):
                last, rest = factors[-1], _product(factors[:-1])
                if size(last) <= inner:
                    split = self.factor(rest, inner // size(last)) if inner % size(last) == 0 else None
                    return None if split is None else (split[0], self.product((split[1], last)))
                split = self.factor(last, inner)
                return None if split is None else (self.product((rest, split[0])), split[1])
            case Concat(parts):
                return self._factor_concat(t, parts, inner)

    def _factor_concat(self, t: Concat, parts: tuple[Term, ...], inner: int) -> tuple[Term, Term] | None:
        if all(size(p) % inner == 0 for p in parts) and any(size(p) != inner for p in parts):
            # Every part has the inner factor: it comes out, and is the same in all of them.
            pairs = [self.factor(p, inner) for p in parts]
            if any(pair is None for pair in pairs):
                return None
            split = [pair for pair in pairs if pair is not None]
            for _, b in split[1:]:
                self.unify(split[0][1], b)
            return self.concat([a for a, _ in split]), self.find(split[0][1])
        pieces = size(t) // inner
        if pieces > _MOST_PIECES:
            return None
        # Read as equal rows laid end to end: the rows stay, and what is cut from one is cut from all.
        rows = self.cut(t, [inner] * pieces)
        for row in rows[1:]:
            self.unify(rows[0], row)
        outer = Atom(pieces, "rows", f"read as {pieces} rows of {inner} at {self.cause}; each row is something else")
        return outer, self.find(rows[0])

    def cut(self, term: Term, sizes: Sequence[int]) -> list[Term]:
        """Cut a term into consecutive pieces of the given sizes, refining it.

        A piece of size 1 comes back as `ONE` (it broadcasts from there on) and always stays. A term that cannot be cut
        at these places is frozen, and so are the pieces.

        Raises:
            ValueError: the sizes do not add up to the term's.
        """
        t = self.find(term)
        if sum(sizes) != size(t):
            raise ValueError(f"cannot cut {self.show(t)} into {list(sizes)}")
        if 0 in sizes:
            pieces_left = iter(self.cut(t, [n for n in sizes if n]) if any(sizes) else [])
            return [next(pieces_left) if n else Atom(0, "empty", "an empty axis") for n in sizes]
        if len(sizes) == 1:
            return [t]
        pieces = self._pieces(t, sizes)
        if pieces is None:
            reason = f"{self.show(t)} is cut into {list(sizes)} at {self.cause}, across its structure"
            self.freeze(t, reason)
            return [self.atom(n, "piece", reason) for n in sizes]
        return [ONE if size(p) == 1 else p for p in pieces]

    def _pieces(self, t: Term, sizes: Sequence[int]) -> list[Term] | None:
        match t:
            case Atom():
                fresh: list[Term] = [
                    self._single(f"{t.label}.{i}") if n == 1 else Atom(n, f"{t.label}.{i}") for i, n in enumerate(sizes)
                ]
                self._bind(t, _concat([f for f in fresh if size(f)]))
                return fresh
            case Concat(parts):
                return self._pieces_of_concat(list(parts), sizes)
            case Product(factors):
                rest = _product(factors[1:])
                inner = size(rest)
                if all(n % inner == 0 for n in sizes):
                    outers = self.cut(factors[0], [n // inner for n in sizes])
                    return [self.product((o, rest)) for o in outers]
                if size(factors[0]) > _MOST_PIECES:
                    return None
                # The cut runs through a row: keep the rows, and treat the product as its rows laid end to end.
                self.freeze(factors[0], f"its rows are cut apart at {self.cause}")
                return self._pieces_of_concat([rest] * size(factors[0]), sizes)

    def _pieces_of_concat(self, parts: list[Term], sizes: Sequence[int]) -> list[Term] | None:
        queue = parts[::-1]
        pieces: list[Term] = []
        for n in sizes:
            taken: list[Term] = []
            while n > 0:
                part = self.find(queue.pop())
                have = size(part)
                if have > n:
                    split = self._pieces(part, [n, have - n])
                    if split is None:
                        return None
                    queue.append(split[1])
                    part, have = split[0], n
                taken.append(part)
                n -= have
            pieces.append(_concat(taken) if taken else Atom(0, "empty", "an empty axis"))
        return pieces

    def reshape(self, dims: Sequence[Term], sizes: Sequence[int]) -> tuple[Term, ...]:
        """Terms of a row-major reshape of `dims` to `sizes`.

        Dimensions that cannot be regrouped are frozen, and so are the results.

        Raises:
            ValueError: the numbers of elements differ.
        """
        if math.prod(size(d) for d in dims) != math.prod(sizes):
            raise ValueError(f"cannot reshape {[self.show(d) for d in dims]} to {list(sizes)}")
        whole = self.product(dims)
        queue = list(whole.factors if isinstance(whole, Product) else (whole,))[::-1]
        result: list[Term] = []
        for n in sizes:
            taken: list[Term] = []
            need = n
            while need > 1:
                part = self.find(queue.pop())
                have = size(part)
                if need % have:
                    split = self.factor(part, have // need) if have % need == 0 else None
                    if split is None:
                        return self._frozen_reshape(dims, sizes)
                    queue.append(split[1])
                    part, have = split[0], need
                taken.append(part)
                need //= have
            result.append(self.product(taken) if taken else ONE)
        return tuple(self.find(t) for t in result)

    def _frozen_reshape(self, dims: Sequence[Term], sizes: Sequence[int]) -> tuple[Term, ...]:
        shown = ", ".join(self.show(d) for d in dims)
        reason = f"({shown}) is viewed as {list(sizes)} at {self.cause}, across its structure"
        for d in dims:
            self.freeze(d, reason)
        return tuple(self.atom(n, "viewed", reason) for n in sizes)
