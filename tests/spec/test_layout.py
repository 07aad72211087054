import pytest

from skymoe.base.errors import ConfigError
from skymoe.spec.layout import DispatchMode, ExpertAxis, Layout, ScheduleKind
from skymoe.spec.split import Split

TWO_LAYERS = Split((4,))


def test_plain_words_are_the_choices_they_name():
    layout = Layout(expert="ep", dispatch="R", schedule="1f1b", stages=TWO_LAYERS)
    assert layout.expert is ExpertAxis.EP
    assert layout.dispatch is DispatchMode.REPLICATED
    assert layout.schedule is ScheduleKind.ONE_F_ONE_B
    assert layout == Layout(expert=ExpertAxis.EP, dispatch=DispatchMode.REPLICATED, stages=TWO_LAYERS)


@pytest.mark.parametrize(
    "field, choices", [("expert", "edp, ep, etp"), ("dispatch", "R, G, A"), ("schedule", "1f1b, interleaved, zbv")]
)
def test_another_word_is_refused_with_the_choices(field, choices):
    with pytest.raises(ConfigError, match=f"{field} is one of {choices}, got 'gpipe'"):
        Layout(**{field: "gpipe"}, stages=TWO_LAYERS)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"pp": 0}, "pp must be at least 1, got 0"),
        ({"pp": 2}, "1 stages are not a multiple of pp 2"),
        ({"pp": 1, "stages": Split((2, 2))}, "1f1b has one stage per rank: 1, got 2"),
        ({"schedule": "zbv"}, "zbv has two stages per rank: 2, got 1"),
        ({"recompute": (1, 1)}, "a count for each of the 1 stages"),
        ({"recompute": (-1,)}, "a count for each of the 1 stages"),
    ],
)
def test_a_layout_that_cannot_be_says_why(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Layout(**{"stages": TWO_LAYERS, **wrong})
