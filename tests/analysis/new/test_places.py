from __future__ import annotations

import numpy as np
import pytest

from focal_d2.analysis.new.names import read_names
from focal_d2.analysis.new.places import find_places
from focal_d2.analysis.new.split import LEFT_OUT, TEST, TRAIN, VAL, imbalance, propose_split, wanted_shares
from focal_d2.errors import UserError

GRID = [f"park_{y}_{x}" for y in (0, 50, 100, 150) for x in (0, 50, 100)]


def places_of(names, *, side=10, **options):
    return find_places(read_names(names), np.full((len(names), 2), side), **options)


@pytest.mark.parametrize(
    "names, kind, groups",
    [
        (GRID, "tiles", 1),
        ([f"site{s}_r{r:02}_c{c:02}" for s in "AB" for r in range(3) for c in range(3)], "tiles", 2),
        ([f"{film}_{i:04}" for film in ("a", "b") for i in range(5)], "frames", 2),
        ([f"film{film}/{i}" for film in (1, 2) for i in range(5)], "frames", 2),
        # Dates and times of photographs are no rows and columns.
        ([f"IMG_2021030{d}_{1200 + 7 * d + i}{i}" for d in range(1, 4) for i in range(3)], "frames", 3),
        ([f"{n}_jpg.rf.{'0123456789abcdef' * 2}{k}" for n in "abcd" for k in range(2)], "copies", 4),
        (["rex", "tom", "kit", "sue"], "none", 4),
        (["cat_1", "dog_1", "cow_2", "hen_1"], "none", 4),
    ],
)
def test_read_names_finds_the_pattern(names, kind, groups):
    named = read_names(names)
    assert (named.kind, len(set(named.groups))) == (kind, groups)


def test_numbers_of_tiles_are_pixels_or_rows():
    assert read_names(GRID).pixels
    assert not read_names([f"a_{r}_{c}" for r in range(3) for c in range(3)]).pixels


def test_a_picture_is_cut_and_what_reaches_over_the_cut_is_left_out():
    # Tiles of 60 pixels, 50 apart: each overlaps the next ones by 10. One row is to validate on, and the row
    # beside it overlaps it.
    places = places_of(GRID, side=60)
    sides = propose_split(places, np.ones((12, 1)), [0.2], seed=0).sides
    rows = sides.reshape(4, 3)
    assert rows.tolist() in (
        [[VAL] * 3, [LEFT_OUT] * 3, [TRAIN] * 3, [TRAIN] * 3],
        [[TRAIN] * 3, [TRAIN] * 3, [LEFT_OUT] * 3, [VAL] * 3],
    )
    # Tiles of 50 pixels only touch.
    sides = propose_split(places_of(GRID, side=50), np.ones((12, 1)), [0.2], seed=0).sides
    assert (sides == LEFT_OUT).sum() == 0
    assert (sides == VAL).sum() == 3


def test_whole_pictures_are_drawn_where_there_are_enough():
    names = [f"{picture}_{r}_{c}" for picture in "abcdefghij" for r in range(2) for c in range(2)]
    proposal = propose_split(places_of(names), np.ones((40, 1)), [0.2], seed=0)
    by_picture = proposal.sides.reshape(10, 4)
    assert (by_picture == by_picture[:, :1]).all()
    assert (by_picture[:, 0] == VAL).sum() == 2
    assert "10 pictures" in proposal.reason
    assert "whole groups are drawn (seed 0)" in proposal.reason


def test_a_sequence_is_cut_in_time_with_a_gap():
    names = [f"film_{i}" for i in range(50)]
    places = places_of(names, alike=(0.9, 0.1))
    sides = propose_split(places, np.ones((50, 1)), [0.2], seed=0).sides
    if sides[0] == VAL:
        sides = sides[::-1]
    assert sides.tolist() == [TRAIN] * 39 + [LEFT_OUT] + [VAL] * 10
    # Unlike neighbours are no sequence.
    alone = places_of(names, alike=(0.15, 0.1))
    assert len(set(alone.groups.tolist())) == 50
    assert "no sequence: neighbours correlate by 0.15, others by 0.10" in alone.reason


def test_names_of_classes_are_no_places():
    names = [f"{name}_{i}" for name in ("cat", "dog") for i in range(4)]
    classes = [frozenset({k}) for k in (0, 1) for _ in range(4)]
    assert len(set(places_of(names, classes=classes).groups.tolist())) == 8
    assert len(set(places_of(names).groups.tolist())) == 2


def test_images_that_share_pixels_stay_together():
    names = ["rex", "tom", "kit", "sue", "ann", "bob", "eva", "ida"]
    places = places_of(names, shared=[(0, 5), (5, 7)])
    for seed in range(5):
        sides = propose_split(places, np.ones((8, 1)), [0.2], seed=seed).sides
        assert len({sides[0], sides[5], sides[7]}) == 1


def test_a_chain_of_overlaps_without_positions_is_cut():
    # Every image overlaps the next one; the names say nothing.
    names = ["q", "w", "e", "r", "t", "z", "u", "i", "o", "p"]
    places = places_of(names, shared=[(i, i + 1) for i in range(9)])
    sides = propose_split(places, np.ones((10, 1)), [0.2], seed=0).sides
    if sides[0] == VAL:
        sides = sides[::-1]
    assert sides.tolist() == [TRAIN] * 7 + [LEFT_OUT] + [VAL] * 2
    assert places.upright is False


def test_what_cannot_be_cut_is_refused():
    copies = [f"one.rf.{'a' * 16}{k}" for k in range(6)]
    with pytest.raises(UserError, match="no validation set can be cut: .* augmented copies of 1 image"):
        propose_split(places_of(copies), np.ones((6, 1)), [0.2], seed=0)
    with pytest.raises(UserError, match="3 images are too few"):
        propose_split(places_of(["a", "b", "c"]), np.ones((3, 1)), [0.2], seed=0)


def test_positions_on_a_map_are_places():
    # Two areas far apart, of four tiles each.
    extents = np.array([[x + far, 0, x + far + 1, 1] for far in (0, 100) for x in range(4)], dtype=float)
    places = find_places(read_names(list("abcdefgh")), np.full((8, 2), 10), on_map=extents)
    assert places.groups.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert places.upright is False


def test_a_split_is_repeatable_and_has_all_classes():
    rng = np.random.default_rng(0)
    counts = np.zeros((60, 4))
    counts[np.arange(60), rng.integers(0, 3, 60)] = 1
    counts[[7, 30, 50], 3] = 1  # a rare class
    places = places_of([f"{a}{b}x" for a in "abcdefghij" for b in "klmnop"])
    first = propose_split(places, counts, [0.2], seed=1).sides
    assert (first == propose_split(places, counts, [0.2], seed=1).sides).all()
    assert (first != propose_split(places, counts, [0.2], seed=2).sides).any()
    for side in (TRAIN, VAL):
        assert counts[first == side].sum(axis=0).min() > 0
    assert (first == VAL).sum() == 12


def test_imbalance_of_a_worked_case():
    # Four groups of an image each with a box of one class; one of them to validate on where a half is wanted.
    sizes, boxes = np.ones(4), np.ones((4, 1))
    cost = imbalance(np.array([TRAIN, TRAIN, TRAIN, VAL]), sizes, boxes, [0.5])
    assert cost == pytest.approx(4 * 0.25)
    # Nothing to validate on: images and boxes are off by a half on two sides, and a class is missing.
    assert imbalance(np.zeros(4, int), sizes, boxes, [0.5]) == pytest.approx(4 * 0.5 + 1)


def test_a_test_set_needs_enough_data():
    assert wanted_shares(199, 5000, test=True) == [0.2]
    assert wanted_shares(200, 5000, test=True) == [0.15, 0.15]
    assert wanted_shares(200, 5000, test=False) == [0.2]
    sides = propose_split(
        places_of([f"{i:03}x" for i in range(200)]), np.full((200, 1), 6), [0.15, 0.15], seed=0
    ).sides
    assert [(sides == x).sum() for x in (TRAIN, VAL, TEST)] == [140, 30, 30]
