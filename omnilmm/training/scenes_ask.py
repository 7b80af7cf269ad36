"""Conversations about a scene: questions that have exactly one right answer, in both languages.

A conversation is one exchange, or one with a follow-up that means nothing without it ("And the other one?"). Yes and no
are equally frequent, and half of the things that are asked for and are not there differ from what is there in colour
or shape alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Set

from omnilmm.training.scenes import COLOURS, SHAPES, Scene, Split, Thing, generator, is_held_out
from omnilmm.training.scenes_check import Exchange, Kind
from omnilmm.training.scenes_speech import CHINESE, ENGLISH, Speech
from omnilmm.training.scenes_truth import (
    cell_names,
    cell_of,
    is_only,
    kind_names,
    place_names,
    place_of,
    relation,
    truth,
    way_to_name,
)
from omnilmm.training.scenes_words import PLACES

Talk = tuple[Exchange, ...]


def ask(scene: Scene, split: Split, seed: int, index: int, *, num: int) -> tuple[Talk, ...]:
    """`num` conversations about the scene, the languages in turn. All of COMBINATIONS ask about the rare pair."""
    rng = generator("ask", split, seed, index)
    speeches = (ENGLISH, CHINESE) if rng.random() < 0.5 else (CHINESE, ENGLISH)
    return tuple(_Asker(scene, rng, speeches[i % 2], split).talk() for i in range(num))


class _Asker:
    """Asks about one scene in one language."""

    def __init__(self, scene: Scene, rng: random.Random, speech: Speech, split: Split) -> None:
        self._scene, self._rng, self._say, self._split = scene, rng, speech, split
        self._things = scene.things
        self._rare = [thing for thing in scene.things if is_held_out(thing.colour, thing.shape)]

    def talk(self) -> Talk:
        """One conversation of a kind that the scene allows."""
        kinds = tuple(_KINDS)
        for kind in self._rng.choices(kinds, [_KINDS[kind][0] for kind in kinds], k=40):
            talk = _KINDS[kind][1](self)
            if talk is not None:
                return talk
        return (self._exists(),)

    # -- single questions ---------------------------------------------------------------------------

    def what(self) -> Talk | None:
        is_plain = self._scene.writing is None and len({thing.kind for thing in self._things}) == len(self._things)
        if is_plain and len(self._things) <= 3 and self._rng.random() < 0.5:
            return (self._what_is_there(),)
        thing = self._named_by("colour")
        if thing is None:
            return None
        question = self._pick(self._say.what_shape).format(self._say.coloured(thing.colour))
        return (self._exchange(Kind.WHAT, question, self._say.it_is_a(thing.shape), thing),)

    def colour(self) -> Talk | None:
        thing = self._named_by("shape")
        return None if thing is None else (self._colour(thing),)

    def size(self) -> Talk | None:
        thing = self._named_by("shape")
        return None if thing is None else (self._size(thing),)

    def where(self) -> Talk | None:
        thing = self._named_by("shape", "both")
        return None if thing is None or place_of(thing) is None else (self._where(thing),)

    def count(self) -> Talk | None:
        if not self._things and self._rng.random() < 0.5:
            return None
        return (self._count(self._countable()),)

    def relation(self) -> Talk | None:
        """Is one thing on that side of another, or on which side is it?"""
        pairs = [(a, b) for a in self._things for b in self._things if a is not b and self._can_name(a, b)]
        pairs = [pair for pair in pairs if not self._rare or pair[0] in self._rare]
        if not pairs:
            return None
        first, second = self._rng.choice(pairs)
        axes = [axis for axis in (("left", "right"), ("above", "below")) if relation(first, second, axis) is not None]
        if not axes:
            return None
        axis = self._rng.choice(axes)
        side = relation(first, second, axis)
        assert side is not None
        names = (self._name(first), self._name(second))
        cells = (cell_of(first, axis), cell_of(second, axis))
        allowed = kind_names(first) | kind_names(second) | cell_names(*cells)
        if self._rng.random() < 0.5:
            question, required = self._say.which_side(*names, axis), {self._say.side(side)}
            answer = self._say.for_they_lie(names, cells, axis, self._say.it_is(side))
            return (self._stated(Kind.RELATION, question, answer, required, allowed),)
        asked = self._rng.choice(axis)
        question = self._say.is_it(*names, asked)
        answer = self._say.for_they_lie(names, cells, axis, self._say.it_is_so(asked == side))
        return (self._yes_or_no(Kind.RELATION, question, asked == side, answer, allowed),)

    def exists(self) -> Talk:
        return (self._exists(),)

    def absent(self) -> Talk | None:
        """It is asked about something as if it were there, and it is not."""
        missing = [shape for shape in SHAPES if all(thing.shape != shape for thing in self._things)]
        if self._scene.writing is None and self._rng.random() < 0.3:
            is_number = self._rng.random() < 0.5
            question = self._pick(self._say.read_number if is_number else self._say.read_word)
            return (self._stated(Kind.ABSENT, question, self._say.no_writing(is_number=is_number), {"no"}),)
        shape = self._rng.choice(missing)
        forms = (self._say.which_colour, self._say.where_is, self._say.which_size)
        question = self._pick(self._rng.choice(forms)).format(self._say.the(shape))
        return (self._stated(Kind.ABSENT, question, self._say.there_is_no(shape=shape), {"no"}, {f"shape {shape}"}),)

    def read(self) -> Talk | None:
        writing = self._scene.writing
        if writing is None:
            return None
        forms = self._say.read_number if writing.is_number else self._say.read_word
        forms = self._say.read_any if self._rng.random() < 0.3 else forms
        name = f"number {writing.text}" if writing.is_number else f"word {writing.text}"
        answer = self._say.it_says(writing.text, is_number=writing.is_number)
        return (self._stated(Kind.READ, self._pick(forms), answer, {name}),)

    def describe(self) -> Talk | None:
        if len(self._things) > 3 or any(place_of(thing) is None for thing in self._things):
            return None
        things = sorted(self._things, key=lambda thing: (PLACES.index(place_of(thing) or ""), thing.x))
        question = self._pick(self._say.describe)
        if not things and self._scene.writing is None:
            return (self._stated(Kind.DESCRIBE, question, self._say.nothing, {"no"}),)
        text = self._scene.writing.text if self._scene.writing is not None else None
        answer = self._say.description([(t.size, t.colour, t.shape, place_of(t) or "") for t in things], text)
        phrases = [truth(thing) for thing in things]
        if text is not None:
            phrases.append(frozenset({f"number {text}" if text.isdigit() else f"word {text}"}))
        return (
            Exchange(Kind.DESCRIBE, self._say.language, question, answer, frozenset(), frozenset(), tuple(phrases)),
        )

    # -- two turns ------------------------------------------------------------------------------------

    def other_one(self) -> Talk | None:
        """Two things: about one, then "and the other one?"."""
        if len(self._things) != 2 or not self._can_name(*self._things):
            return None
        first, second = self._rng.sample(self._things, 2)
        question = self._pick(self._say.and_the_other)
        about = self._rng.choice(("colour", "size", "where", "what"))
        if about == "what":
            if first.colour == second.colour:
                return None
            opening = self._pick(self._say.what_shape).format(self._say.coloured(first.colour))
            return (
                self._exchange(Kind.WHAT, opening, self._say.it_is_a(first.shape), first),
                self._exchange(Kind.FOLLOW_UP, question, self._say.other_is_a(second.shape), second, "shape"),
            )
        if first.shape == second.shape or (about == "where" and not (place_of(first) and place_of(second))):
            return None
        if about == "where":
            place = place_of(second) or ""
            answer = self._say.other_is_at(place)
            follow_up = self._stated(Kind.FOLLOW_UP, question, answer, place_names(place), truth(second))
            return self._where(first), follow_up
        opening_turn = self._colour(first) if about == "colour" else self._size(first)
        answer = self._say.other_is(second.colour if about == "colour" else second.size)
        return opening_turn, self._exchange(Kind.FOLLOW_UP, question, answer, second, about)

    def then_it(self) -> Talk | None:
        """It is there; then its colour, size or place, as "it"."""
        thing = self._named_by("shape")
        if thing is None:
            return None
        question = self._pick(self._say.is_there).format(self._say.a(None, thing.shape))
        opening = self._yes_or_no(Kind.EXISTS, question, True, self._say.there_is(None, thing.shape), truth(thing))
        about = self._rng.choice(("colour", "size", "where"))
        if about == "where":
            place = place_of(thing)
            if place is None:
                return None
            answer = self._say.it_is_at(place)
            names = place_names(place)
            return opening, self._stated(Kind.FOLLOW_UP, self._pick(self._say.it_where), answer, names, truth(thing))
        forms, value = (self._say.it_colour, thing.colour) if about == "colour" else (self._say.it_size, thing.size)
        return opening, self._exchange(Kind.FOLLOW_UP, self._pick(forms), self._say.it_is_so_much(value), thing, about)

    def and_those(self) -> Talk | None:
        """How many of one sort, and then only the other sort's name."""
        shapes = sorted({thing.shape for thing in self._things})
        if not shapes:
            return None
        first = self._rng.choice(shapes)
        second = self._rng.choice([shape for shape in (shapes if len(shapes) > 1 else SHAPES) if shape != first])
        follow_up = self._count(("shape", second))
        question = self._say.and_shapes(second)
        return self._count(("shape", first)), Exchange(
            Kind.FOLLOW_UP, follow_up.language, question, follow_up.answer, follow_up.required, follow_up.allowed
        )

    # -- exchanges ------------------------------------------------------------------------------------

    def _what_is_there(self) -> Exchange:
        """Everything, from left to right."""
        question = self._pick(self._say.what_is_there)
        if not self._things:
            return self._stated(Kind.WHAT, question, self._say.nothing, {"no"})
        kinds = [thing.kind for thing in sorted(self._things, key=lambda thing: thing.x)]
        phrases = tuple(frozenset({f"colour {colour}", f"shape {shape}"}) for colour, shape in kinds)
        answer = self._say.there_are_these(kinds)
        return Exchange(Kind.WHAT, self._say.language, question, answer, frozenset(), frozenset(), phrases)

    def _colour(self, thing: Thing) -> Exchange:
        name = self._say.the(thing.shape)
        question = self._pick(self._say.which_colour).format(name)
        return self._exchange(Kind.COLOUR, question, self._say.is_so_much(name, thing.colour), thing)

    def _size(self, thing: Thing) -> Exchange:
        name = self._say.the(thing.shape)
        question = self._pick(self._say.which_size).format(name)
        return self._exchange(Kind.SIZE, question, self._say.is_so_much(name, thing.size), thing)

    def _where(self, thing: Thing) -> Exchange:
        name = self._name(thing)
        place = place_of(thing) or ""
        question = self._pick(self._say.where_is).format(name)
        return self._stated(Kind.WHERE, question, self._say.is_at(name, place), place_names(place), truth(thing))

    def _count(self, sort: tuple[str, str]) -> Exchange:
        by, value = sort
        num = sum(1 for thing in self._things if by == "all" or getattr(thing, by) == value)
        question = self._pick(self._say.how_many).format(self._say.many(by, value))
        kind = Kind.COUNT_MANY if num > 5 else Kind.COUNT
        required = {"no"} if num == 0 else {f"number {num}"}
        return self._stated(kind, question, self._say.there_are(num, by, value), required, {f"{by} {value}"})

    def _exists(self) -> Exchange:
        """Equally often something that is there and something that is not."""
        kinds = {thing.kind for thing in self._things}
        wanted = bool(kinds) and self._rng.random() < 0.44  # then_it always asks for what is there
        by_shape_only = self._rng.random() < 0.3 and not self._rare
        if wanted:
            colour, shape = self._rng.choice(sorted({t.kind for t in self._rare} or kinds))
        else:
            colour, shape = self._missing(kinds, by_shape_only=by_shape_only)
        asked = None if by_shape_only else colour
        question = self._pick(self._say.is_there).format(self._say.a(asked, shape))
        answer = (
            self._say.there_is(asked, shape)
            if wanted
            else self._say.there_is_no(colour=asked, shape=shape, yes_or_no=True)
        )
        return self._yes_or_no(Kind.EXISTS, question, wanted, answer, {f"colour {colour}", f"shape {shape}"})

    def _missing(self, kinds: set[tuple[str, str]], *, by_shape_only: bool) -> tuple[str, str]:
        """A colour and shape that are not there together; half of them share one with something that is. In training
        the pairs that are held out are not even mentioned."""
        shapes = {shape for _, shape in kinds}
        pairs = [
            (colour, shape)
            for colour in COLOURS
            for shape in SHAPES
            if (colour, shape) not in kinds
            and not (by_shape_only and shape in shapes)
            and (self._split is not Split.TRAIN or not is_held_out(colour, shape))
        ]
        near = [pair for pair in pairs if any(pair[0] == kind[0] or pair[1] == kind[1] for kind in kinds)]
        return self._rng.choice(near if near and self._rng.random() < 0.5 else pairs)

    def _exchange(self, kind: Kind, question: str, answer: str, thing: Thing, about: str | None = None) -> Exchange:
        """The answer states an attribute of `thing`: `about`, or what the kind asks for."""
        about = about or {Kind.WHAT: "shape", Kind.COLOUR: "colour", Kind.SIZE: "size"}[kind]
        return self._stated(kind, question, answer, {f"{about} {getattr(thing, about)}"}, truth(thing))

    def _yes_or_no(
        self, kind: Kind, question: str, is_so: bool, answer: str, allowed: Set[str] = frozenset()
    ) -> Exchange:
        return self._stated(kind, question, answer, {"yes" if is_so else "no"}, allowed)

    def _stated(
        self, kind: Kind, question: str, answer: str, required: Set[str], allowed: Set[str] = frozenset()
    ) -> Exchange:
        names = frozenset(required)
        return Exchange(kind, self._say.language, question, answer, names, names | allowed)

    # -- which thing is meant ---------------------------------------------------------------------------

    def _named_by(self, *ways: str) -> Thing | None:
        """Something that can be named in one of these ways; the rare pair where there is one."""
        found = [t for t in (self._rare or self._things) if any(is_only(t, self._things, way) for way in ways)]
        return self._rng.choice(found) if found else None

    def _name(self, thing: Thing) -> str:
        return self._say.name(thing, way_to_name(thing, self._things))

    def _can_name(self, *things: Thing) -> bool:
        return all(way_to_name(thing, self._things) for thing in things)

    def _countable(self) -> tuple[str, str]:
        """("shape", "circle"), ("colour", "red") or ("all", ""): now and then something that is not there."""
        by = self._rng.choice(("shape", "shape", "colour", "all"))
        if by == "all":
            return by, ""
        values = SHAPES if by == "shape" else COLOURS
        present = sorted({getattr(thing, by) for thing in self._things})
        return by, self._rng.choice(present if present and self._rng.random() < 0.85 else values)

    def _pick(self, forms: tuple[str, ...]) -> str:
        return self._rng.choice(forms)


_Maker = Callable[[_Asker], Talk | None]
_KINDS: Mapping[str, tuple[float, _Maker]] = {
    "what": (1.0, _Asker.what),
    "colour": (1.0, _Asker.colour),
    "size": (0.7, _Asker.size),
    "where": (1.0, _Asker.where),
    "count": (1.6, _Asker.count),
    "relation": (2.0, _Asker.relation),
    "exists": (1.4, _Asker.exists),
    "absent": (0.5, _Asker.absent),
    "read": (3.0, _Asker.read),
    "describe": (0.9, _Asker.describe),
    "other one": (1.0, _Asker.other_one),
    "then it": (0.7, _Asker.then_it),
    "and those": (0.4, _Asker.and_those),
}
