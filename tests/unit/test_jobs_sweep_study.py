"""The memory of a sweep, without training: grids, resuming, repeats and the median stopping rule."""

import math
from pathlib import Path

import pytest

from haori.core.errors import StorageError
from haori.jobs.sweep.space import parse_space
from haori.jobs.sweep.study import Search, open_search
from haori.jobs.sweep.trial import TrialOutcome

RECIPE = {"name": "a", "base": "b", "data": {"path": "p"}}
RATE = parse_space(["optimizer.lr=log:1e-5:1e-1", "method.rank=4,8,16"], RECIPE)


def loss_of(values) -> float:
    return 1 + abs(math.log10(values["optimizer.lr"]) + 3) + 0.1 * (values["method.rank"] != "8")


def finish(search: Search) -> dict[str, str | int | float]:
    proposal = search.ask()
    search.tell(proposal, TrialOutcome(state="finished", loss=loss_of(proposal.values)))
    return proposal.values


def test_an_interrupted_sweep_proposes_what_a_whole_one_does(tmp_path: Path):
    with open_search(tmp_path / "whole.db", "s", RATE, 6, seed=0) as search:
        whole = [finish(search) for _ in range(6)]
    file = tmp_path / "cut.db"
    with open_search(file, "s", RATE, 6, seed=0) as search:
        for _ in range(4):
            finish(search)
        search.ask()  # killed while this one trains
    with open_search(file, "s", RATE, 6, seed=0) as search:
        assert search.queue() == [4]
        while len(search.trials()) < 6:
            finish(search)
        assert [trial.values for trial in search.trials()] == whole
        assert search.queue() == [4]
        assert search.study.get_trials()[-1].number == 6, "an interrupted trial is tried again once"
    assert len({values["optimizer.lr"] for values in whole}) == 6


def test_a_trial_cut_between_its_two_notes_keeps_its_outcome(tmp_path: Path):
    with open_search(tmp_path / "s.db", "s", RATE, 4, seed=0) as search:
        proposal = search.ask()
        proposal.trial.set_user_attr("values", proposal.values)
        proposal.trial.set_user_attr("outcome", TrialOutcome(state="finished", loss=2.0).model_dump(mode="json"))
    with open_search(tmp_path / "s.db", "s", RATE, 4, seed=0) as search:
        assert search.queue() == []
        assert [trial.outcome.loss for trial in search.trials()] == [2.0]
        assert search.study.best_value == 2.0


def test_a_small_grid_is_gone_through_once(tmp_path: Path):
    space = parse_space(["method.rank=4,8", "method.dropout=0,0.1"], RECIPE)
    tried = []
    for _ in range(2):  # the second opening is a resume
        with open_search(tmp_path / "s.db", "s", space, 20, seed=0) as search:
            assert search.wanted == 4
            search.queue()
            for _ in range(2):
                proposal = search.ask()
                assert proposal.known is None
                tried.append(tuple(proposal.values.values()))
                search.tell(proposal, TrialOutcome(state="finished", loss=1.0))
            unfinished = search.wanted - len(search.trials())
    assert unfinished == 0
    assert sorted(tried) == [("4", "0"), ("4", "0.1"), ("8", "0"), ("8", "0.1")]


def test_values_that_were_tried_are_recognised_and_not_counted(tmp_path: Path):
    space = parse_space(["method.rank=4,8,16"], RECIPE)
    with open_search(tmp_path / "s.db", "s", space, 2, seed=0) as search:
        first = search.ask()
        search.tell(first, TrialOutcome(state="finished", loss=1.0))
        search.study.enqueue_trial(dict(first.values))
        again = search.ask()
        assert again.known is not None
        assert again.known.number == first.trial.number
        search.tell(again, again.known.outcome)
        assert len(search.trials()) == 1


def report(search: Search, losses: list[float]) -> int | None:
    """Return the validation at which a trial was given up."""
    proposal = search.ask()
    for number, loss in enumerate(losses, 1):
        if proposal.prune(number, loss):
            search.tell(proposal, TrialOutcome(state="pruned", loss=min(losses[:number])))
            return number
    search.tell(proposal, TrialOutcome(state="finished", loss=min(losses)))
    return None


def test_a_trial_above_the_median_is_given_up_from_the_second_validation_on(tmp_path: Path):
    with open_search(tmp_path / "s.db", "s", RATE, 9, seed=0) as search:
        assert report(search, [9.0, 9.0, 9.0]) is None, "nothing to compare with"
        assert report(search, [3.0, 2.0, 1.0]) is None
        assert report(search, [4.0, 3.0, 2.0]) is None
        assert report(search, [8.0, 2.9, 1.5]) is None, "a bad first validation alone does not count"
        assert report(search, [4.0, 3.6, 3.5]) == 2
        states = [trial.outcome.state for trial in search.trials()]
        assert states == ["finished"] * 4 + ["pruned"]


def test_trials_of_unlike_length_are_not_given_up(tmp_path: Path):
    space = parse_space(["training.epochs=int:1:9"], RECIPE)
    with open_search(tmp_path / "s.db", "s", space, 5, seed=0) as search:
        for _ in range(4):
            assert report(search, [1.0, 1.0]) is None
        assert report(search, [9.0, 9.0]) is None


def test_a_file_that_is_no_database_is_a_sentence(tmp_path: Path):
    file = tmp_path / "notes.txt"
    file.write_text("not a database " * 100)
    with pytest.raises(StorageError, match="cannot hold a study"), open_search(file, "s", RATE, 4, seed=0):
        pass
