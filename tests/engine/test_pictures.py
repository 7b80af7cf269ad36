from __future__ import annotations

from engine_fakes import make_vectors

from omnilmm.engine.blocks import PictureMark
from omnilmm.engine.pictures import Pictures
from omnilmm.messages import ImageInput

VECTORS = make_vectors("b", 4)


def make_pictures() -> Pictures:
    return Pictures([ImageInput("a", 2, 4), ImageInput("b", 8, 4, VECTORS), ImageInput("a", 14, 4)])


def test_first_missing_is_neither_supplied_nor_computed():
    pictures = make_pictures()
    assert pictures.first_missing(0) == 2
    assert pictures.first_missing(5) == 2
    assert pictures.first_missing(6) == 14
    assert pictures.first_missing(18) is None
    pictures.supply("a", make_vectors("a", 4))
    assert pictures.first_missing(0) is None


def test_a_key_is_asked_for_once():
    pictures = make_pictures()
    assert pictures.take_unasked(18) == ()
    assert pictures.take_unasked(6) == ("a",)
    assert pictures.take_unasked(0) == ()


def test_within_means_entirely():
    pictures = make_pictures()
    assert pictures.indices_within(5) == ()
    assert pictures.indices_within(12) == (0, 1)
    assert pictures.indices_within(18) == (0, 1, 2)


def test_marks_are_relative_to_the_block():
    pictures = make_pictures()
    assert pictures.marks(0, 2) == []
    assert pictures.marks(4, 8) == [PictureMark("a", -2, 4)]
    assert pictures.marks(8, 16) == [PictureMark("b", 0, 4), PictureMark("a", 6, 4)]


def test_slices_cut_pictures_where_chunks_end():
    pictures = make_pictures()
    pictures.supply("a", make_vectors("a", 4))
    slices = [(piece.offset, piece.first, piece.count) for piece in pictures.slices(4, 10)]
    assert slices == [(0, 2, 2), (4, 0, 2)]
    assert [piece.embedding for piece in pictures.slices(8, 12)] == [VECTORS]
    assert list(pictures.slices(6, 8)) == []
