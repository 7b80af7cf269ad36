"""What a scene holds and where it lies, drawn from its number alone."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import replace

from omnilmm.training.scenes import (
    BORDER,
    CHARACTERS,
    COLOURS,
    GRID,
    PAINT,
    SHAPES,
    SIZES,
    Scene,
    Split,
    Thing,
    Writing,
    generator,
    is_held_out,
)

RADII: Mapping[str, tuple[float, float]] = {"small": (0.085, 0.1), "large": (0.14, 0.175)}
"""From the centre to the rim, as a share of the picture's shorter side."""

MAX_COUNT = 9
TONE_APART = 64.0
"""A colour without a name is at least this far, in RGB, from the one that is held out with its shape."""

WORDS = (
    "ACE ACT ADD AGE AIR ANT APE ARM ART ASK BAG BAR BAT BED BEE BIG BIRD BOAT BOOK BOX BOY BUS CAFE CAKE CAR CAT CITY "
    "COLD COW CUP DAY DESK DOG DOOR DUCK EAR EAST EGG EXIT EYE FARM FAST FIRE FISH FLAG FOG FOX FROG GAME GATE GIFT "
    "GLAD GOAT GOLD GOOD HAND HAT HELP HILL HOME HOT HOUR ICE INK JAM JAR JOB JUMP KEY KID KIND KING KITE LAKE LAMP "
    "LEAF LEG LION LOVE MAP MILK MOON MUD NAME NEST NET NEW NORTH NOSE NUT OAK OIL OPEN OWL PARK PEN PIG PLAY POND "
    "QUIZ RAIN RED RICE RING ROAD ROCK SALT SAND SEA SHIP SHOP SIGN SKY SNOW SONG STAR STOP SUN TAXI TEA TEN TIME TOY "
    "TREE TWO VAN VIEW WALK WALL WAVE WAY WEB WEST WIND WOLF WOOD YARD YEAR YES ZERO ZOO"
)
"""Words that pictures show, with a space between them."""

WIDTHS = (1.0, 1.0, 1.0, 4 / 3, 3 / 4)
TEXTURES: Mapping[str, float] = {"plain": 0.4, "gradient": 0.15, "grain": 0.15, "stripes": 0.08, "photo": 0.22}


def is_word_held_out(word: str) -> bool:
    """One word in six."""
    return hashlib.sha256(word.encode()).digest()[0] % 6 == 0


def make_scene(split: Split, seed: int, index: int, *, level: float = 1.0) -> Scene:
    """Scene number `index`.

    Args:
        split: decides which pairs and words may occur.
        seed: a world of its own for every number.
        index: from 0.
        level: below 1, only the easiest share of the layouts is used: 0 gives one thing on a plain ground.
    """
    rng = generator("scene", split, seed, index, round(level, 3))
    layouts = tuple(LAYOUTS)[: max(1, round(level * len(LAYOUTS)))]
    if split is Split.COMBINATIONS:
        layouts = tuple(name for name in layouts if name not in ("empty", "writing"))
    layout = rng.choices(layouts, [LAYOUTS[name][0] for name in layouts])[0]
    kinds = LAYOUTS[layout][1](rng, _Pairs(rng, split))
    width = rng.choice(WIDTHS)
    writing = _writing(rng, split) if layout == "writing" else None
    # What people draw often stands right in the middle, between cells: too close a call to be asked in an exam.
    border = rng.choice((BORDER, 0.0)) if split is Split.TRAIN else BORDER
    things = _placed(rng, kinds, width, writing, border)
    for _ in range(8):
        if len(things) == len(kinds):
            break
        things = max(things, _placed(rng, kinds, width, writing, border), key=len)
    simple = {"plain": 1.0} if level < 0.3 else TEXTURES
    return Scene(
        things=things,
        writings=() if writing is None else (writing,),
        texture=rng.choices(tuple(simple), tuple(simple.values()))[0],
        noise=rng.getrandbits(32),
        width=width,
    )


def make_full_scene(seed: int, index: int) -> Scene:
    """Full of things of many kinds, or of lines of any letters and digits: there is several times as much to see as in
    a scene that questions can be asked about. Pairs that are held out are missing here too.

    Some things have a colour without a name, or a shape without one, so that neither can be told from the other: where
    all that is red is no circle, red would else become a reason against circles.
    """
    rng = generator("full", seed, index)
    width = rng.choice(WIDTHS)
    kinds: list[_Kind] = []
    writings: tuple[Writing, ...] = ()
    if rng.random() < 0.45:
        lines = rng.choice(((0.2, 0.5, 0.8), (0.17, 0.47, 0.77), (0.23, 0.53, 0.83), (0.3, 0.7)))
        writings = tuple(_line(rng, y) for y in lines)
    else:
        pairs = _Pairs(rng, Split.TRAIN)
        kinds = [(*_nameless(rng, *pairs.draw()), rng.choice(SIZES)) for _ in range(rng.randint(5, 12))]
    return Scene(
        things=_placed(rng, kinds, width, None, BORDER),
        writings=writings,
        texture=rng.choices(tuple(TEXTURES), tuple(TEXTURES.values()))[0],
        noise=rng.getrandbits(32),
        width=width,
    )


def _nameless(rng: random.Random, colour: str, shape: str) -> tuple[str, str]:
    """The pair, or in seven cases of ten one with a colour or a shape that has no name. A colour like the one that is
    held out with the shape is not among them."""
    chance = rng.random()
    if chance < 0.35:
        hidden = next(PAINT[name] for name in COLOURS if is_held_out(name, shape))
        while math.dist(tone := (rng.randrange(256), rng.randrange(256), rng.randrange(256)), hidden) < TONE_APART:
            pass
        return "#" + bytes(tone).hex(), shape
    outline = "frame" if rng.random() < 0.3 else "blob"
    return (colour, f"{outline} {rng.randrange(1 << 16)}") if chance < 0.7 else (colour, shape)


# -- what is in a scene ---------------------------------------------------------------------------------


class _Pairs:
    """Draws colours with shapes as the split allows them. In COMBINATIONS the first drawn is one of those held out."""

    def __init__(self, rng: random.Random, split: Split) -> None:
        self._rng, self._owes_one = rng, split is Split.COMBINATIONS

    def draw(self, taken: tuple[tuple[str, str], ...] = ()) -> tuple[str, str]:
        wanted, self._owes_one = self._owes_one, False
        allowed = [
            (colour, shape)
            for colour in COLOURS
            for shape in SHAPES
            if is_held_out(colour, shape) == wanted and (colour, shape) not in taken
        ]
        return self._rng.choice(allowed)


_Kind = tuple[str, str, str]  # colour, shape, size


def _several(num: int, rng: random.Random, pairs: _Pairs) -> list[_Kind]:
    drawn: list[tuple[str, str]] = []
    for _ in range(num):
        drawn.append(pairs.draw(tuple(drawn)))
    rng.shuffle(drawn)
    return [(*pair, rng.choice(SIZES)) for pair in drawn]


def _one(rng: random.Random, pairs: _Pairs) -> list[_Kind]:
    return _several(1, rng, pairs)


def _two(rng: random.Random, pairs: _Pairs) -> list[_Kind]:
    return _several(2, rng, pairs)


def _some(rng: random.Random, pairs: _Pairs) -> list[_Kind]:
    return _several(rng.choice((3, 3, 4)), rng, pairs)


def _none(rng: random.Random, pairs: _Pairs) -> list[_Kind]:
    return []


def _crowd(rng: random.Random, pairs: _Pairs) -> list[_Kind]:
    """Up to nine things of one sort, or of two sorts of which one is at least two."""
    total = rng.randint(2, MAX_COUNT)
    first = pairs.draw()
    size = "small" if total > 4 else rng.choice(SIZES)
    if rng.random() < 0.4:
        return [(*first, size)] * total
    second = pairs.draw((first,))
    share = rng.randint(1, total - 1)
    return [(*first, size)] * share + [(*second, size)] * (total - share)


def _beside_writing(rng: random.Random, pairs: _Pairs) -> list[_Kind]:
    return _several(rng.choice((0, 0, 1, 2)), rng, pairs)


_Layout = tuple[float, Callable[[random.Random, _Pairs], list[_Kind]]]
LAYOUTS: Mapping[str, _Layout] = {  # easiest first: how often, and what is in it
    "one": (0.14, _one),
    "two": (0.26, _two),
    "some": (0.18, _some),
    "writing": (0.18, _beside_writing),
    "crowd": (0.21, _crowd),
    "empty": (0.03, _none),
}


def _writing(rng: random.Random, split: Split) -> Writing:
    """A number of up to four digits or a word. In TRAIN half of the words are any letters, so that reading is learned
    letter by letter and not as a list of words."""
    if rng.random() < 0.55:
        text = str(rng.randrange(10 ** rng.randint(1, 4)))
    elif split is Split.TRAIN and rng.random() < 0.5:
        text = "".join(rng.choices(CHARACTERS[10:], k=rng.randint(2, 5)))
    else:
        text = rng.choice([word for word in WORDS.split() if is_word_held_out(word) == (split is not Split.TRAIN)])
    x, y, height = rng.uniform(0.4, 0.6), _row(rng.uniform(0.25, 0.75)), rng.uniform(0.2, 0.27)
    return Writing(text, x=x, y=y, height=height, font=rng.getrandbits(16))


def _row(y: float) -> float:
    """A height near this one, clear of the border between two cells."""
    return (math.floor(y * GRID) + min(max(y * GRID % 1, 2 * BORDER), 1 - 2 * BORDER)) / GRID


def _line(rng: random.Random, y: float) -> Writing:
    """Any letters or any digits."""
    digits, letters = CHARACTERS[:10], CHARACTERS[10:]
    text = "".join(rng.choices(digits if rng.random() < 0.4 else letters, k=rng.randint(3, 5)))
    x, height = rng.uniform(0.42, 0.58), rng.uniform(0.2, 0.27)
    return Writing(text, x, _row(y + rng.uniform(-0.02, 0.02)), height, rng.getrandbits(16))


# -- where it is ----------------------------------------------------------------------------------------


def _placed(
    rng: random.Random, kinds: list[_Kind], width: float, writing: Writing | None, border: float
) -> tuple[Thing, ...]:
    """The things in places where they overlap neither one another nor the writing, their centres at least `border`
    cells away from the next cell. Crowded scenes may end up with fewer: what finds no place is left out."""
    short = min(width, 1.0)
    placed: list[Thing] = []
    for colour, shape, size in sorted(kinds, key=lambda kind: kind[2]):  # large ones first
        radius = rng.uniform(*RADII[size])
        rim_x, rim_y = radius * short / width, radius * short
        for _ in range(60):
            x, y = rng.uniform(rim_x + 0.02, 0.98 - rim_x), rng.uniform(rim_y + 0.02, 0.98 - rim_y)
            if min(_to_border(x), _to_border(y)) < border:
                continue
            thing = Thing(shape, colour, size, x, y, radius, turn=0.0)
            if _is_clear_of_writing(thing, writing, width) and all(_are_apart(thing, b, width) for b in placed):
                placed.append(replace(thing, turn=rng.uniform(-12, 12)))
                break
    rng.shuffle(placed)
    return tuple(placed)


def _to_border(place: float) -> float:
    """How far it is from here to the next border between cells, in cells."""
    return abs(place * GRID - round(place * GRID))


def _is_clear_of_writing(thing: Thing, writing: Writing | None, width: float) -> bool:
    """Above or below it."""
    return writing is None or abs(thing.y - writing.y) > (thing.radius + 0.65 * writing.height) * min(width, 1.0)


def _are_apart(a: Thing, b: Thing, width: float) -> bool:
    """There is a gap between them, and their centres are not in one cell."""
    distance = math.hypot((a.x - b.x) * width, a.y - b.y)
    return distance > (a.radius + b.radius) * min(width, 1.0) + 0.03 and max(abs(a.x - b.x), abs(a.y - b.y)) > 1 / GRID
