"""The searches, over arbitrary error curves."""

from hypothesis import given
from hypothesis import strategies as st

from elastictok_jax.tokenizer.search import SEARCHES, binary_search, full_search

curves = st.lists(st.floats(0, 1), min_size=1, max_size=40)


@given(curve=curves, target=st.floats(0, 1), low=st.integers(1, 5))
def test_full_search_is_the_minimum(curve, target, low):
    high = low + len(curve) - 1
    choice = full_search(lambda n: curve[n - low], low=low, high=high, target=target)
    reaching = [low + i for i, error in enumerate(curve) if error <= target]
    assert choice.met == bool(reaching)
    assert choice.length == (reaching[0] if reaching else high)
    assert choice.mse == curve[choice.length - low]


@given(curve=curves, target=st.floats(0, 1), low=st.integers(1, 5))
def test_binary_search_never_misses_a_reachable_target(curve, target, low):
    high = low + len(curve) - 1
    choice = binary_search(lambda n: curve[n - low], low=low, high=high, target=target)
    assert choice.mse == curve[choice.length - low]
    assert choice.met == (choice.mse <= target) == any(error <= target for error in curve)


@given(curve=curves, target=st.floats(0, 1))
def test_binary_equals_full_on_a_falling_curve_in_few_measurements(curve, target):
    curve = sorted(curve, reverse=True)
    limits = dict(low=1, high=len(curve), target=target)
    measured = []

    def measure(n):
        measured.append(n)
        return curve[n - 1]

    choice = binary_search(measure, **limits)
    assert choice == full_search(lambda n: curve[n - 1], **limits)
    if choice.met:
        assert len(measured) <= 1 + len(curve).bit_length()


@given(curve=curves, tight=st.floats(0, 1), loose=st.floats(0, 1))
def test_full_search_spends_no_more_on_a_looser_target(curve, tight, loose):
    tight, loose = sorted((tight, loose))

    def at(target):
        return full_search(lambda n: curve[n - 1], low=1, high=len(curve), target=target)

    assert at(loose).length <= at(tight).length


def test_each_search_has_a_name():
    assert set(SEARCHES) == {"binary", "full"}
