"""The grid of a sweep, the number that decides, and the map of what was measured."""

from types import SimpleNamespace

import pytest

from ldm.guidance import Guidance
from ldm.sweep.figure import heat_map
from ldm.sweep.goal import Goal, goal_of
from ldm.sweep.grid import Setting, Sweep
from ldm.sweep.records import Record


def test_a_grid_has_each_setting_once_and_no_interval_that_ends_before_it_starts():
    sweep = Sweep(scales=[2, 1, 2], starts=[0, 0.5], ends=[0.25, 1], lengths=[None, 0.1])
    settings = sweep.settings(Guidance())
    intervals = [(0, 0.25), (0, 1), (0.5, 1)]
    wanted = [(s, *interval, length) for length in (None, 0.1) for interval in intervals for s in (1, 2)]
    assert settings == [Setting(*each) for each in wanted]
    assert len({setting.measured for setting in settings}) == 2 * 4  # without guidance, intervals are alike
    own = Sweep(scales=[3]).settings(Guidance(start=0.25, end=0.5))
    assert own == [Setting(3, 0.25, 0.5, None)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": []}, "scales: there is nothing to try in an empty list"),
        ({"lengths": []}, "lengths: there is nothing to try in an empty list"),
        ({"scales": [1, -1]}, r"scales: must be at least 0, given \[1, -1\]"),
        ({"starts": [2]}, r"starts: must be in \[0, 1\]"),
        ({"lengths": [None, 0]}, r"lengths: must be above 0"),
        ({"starts": [0.5, 0.75], "ends": [0.25]}, "every interval would end before it starts, given .0.5, 0.75. and"),
    ],
)
def test_senseless_grids_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sweep(**options).settings(Guidance())


def test_the_first_distance_decides_unless_another_number_is_named():
    inception = SimpleNamespace(names=lambda: {"sfid", "precision", "gfid", "inception_score"})
    probes = SimpleNamespace(names=lambda: {"probe/<feature>", "class_accuracy"})
    assert goal_of(Sweep(), [probes, inception]) == Goal("gfid", lower=True)
    for name, lower in {"sfid": True, "inception_score": False, "probe/block_01": False}.items():
        assert goal_of(Sweep(metric=f"val/{name}"), [probes, inception]) == Goal(name, lower)
    assert not goal_of(Sweep(metric="gfid", mode="max"), [inception]).lower
    with pytest.raises(ValueError, match="no callback logs 'fid'; they log gfid, inception_score, precision, sfid"):
        goal_of(Sweep(metric="fid"), [inception])
    with pytest.raises(ValueError, match="the callbacks log no distance; name one of class_accuracy, probe/<feature>"):
        goal_of(Sweep(), [probes])
    with pytest.raises(ValueError, match=r"trainer.callbacks: nothing measures samples here"):
        goal_of(Sweep(), [])


def test_the_map_frames_the_best_and_has_a_panel_for_each_interval_or_average():
    sweep = Sweep(scales=[1, 2], starts=[0, 0.25, 0.5], ends=[0.25, 1], lengths=[None, 0.1])
    rows = [
        (setting, Record({} if setting.start == 0.5 else {"test/fd_size": setting.scale + setting.start}, {}, 1.0))
        for setting in sweep.settings(Guidance())
    ]
    figure = heat_map(rows, Setting(1, 0, 1, 0.1), Goal("fd_size", lower=True))
    panels = [axes for axes in figure.axes if axes.get_title()]
    ends, averages = (0.25, 1), ("own", 0.1)
    titles = [f"guidance ends at {end}, average {average}" for end in ends for average in averages]
    assert [panel.get_title() for panel in panels] == titles
    frames = {panel.get_title(): len(panel.patches) for panel in panels}
    assert [frames[title] for title in titles] == [0, 3, 0, 3]  # without guidance, all intervals are the best
    texts = [text.get_text() for text in panels[0].texts]
    assert texts == ["1", "2", "1.25", "2.25", "", ""]  # the interval from 0.5 to 0.25 is none
    assert [text.get_text() for text in panels[2].texts][-2:] == ["not\nfinite"] * 2
