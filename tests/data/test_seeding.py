from __future__ import annotations

import math

import pytest

from focal_d2.data.seeding import random_state, set_random_state


@pytest.mark.parametrize("place, value", [(2, 625), (2, -1), (2, 2**40), (2, 1.0), (3, 2), (4, math.nan)])
def test_a_state_of_numpys_generator_out_of_its_range_is_refused(place, value):
    state = random_state()
    numbers = list(state["numpy"])
    numbers[place] = value
    with pytest.raises(ValueError, match="NumPy's generator"):
        set_random_state({**state, "numpy": tuple(numbers)})
    set_random_state(state)
