"""How many replicas and processors `haori serve --ray` takes, and options that do not go together; without Ray."""

import pytest

from haori.core.errors import InputError
from haori.serve.ray.scale import Scale, cpus_per_replica, parse_scale
from tests.command_line import haori


def test_replicas_are_a_number_or_bounds():
    assert parse_scale("2") == Scale(2, 2)
    assert parse_scale(" 1:4 ") == Scale(1, 4)
    for text in ("", "0", "0:2", "3:2", "1:", ":2", "1:2:3", "-1", "two", "1.5", "99999"):
        with pytest.raises(InputError, match=r"such as 2"):
            parse_scale(text)


@pytest.mark.parametrize(
    ("nodes", "most", "cpus"),
    [
        ([8], 1, 8),
        ([8], 2, 4),
        ([8], 3, 2),
        ([2], 2, 1),
        ([4, 4], 3, 2),
        ([6, 2], 2, 3),
        ([6, 2], 3, 2),
        ([0, 5], 1, 5),
    ],
)
def test_replicas_share_the_processors_and_none_lies_across_machines(nodes, most, cpus):
    assert cpus_per_replica(nodes, Scale(1, most)) == cpus
    assert sum(node // cpus for node in nodes) >= most
    assert sum(node // (cpus + 1) for node in nodes) < most


@pytest.mark.parametrize(("nodes", "most"), [([], 1), ([2], 3), ([1, 1], 3)])
def test_a_cluster_that_is_too_small_is_a_sentence(nodes, most):
    with pytest.raises(InputError, match=rf"{sum(nodes)} processors, too few for {most}"):
        cpus_per_replica(nodes, Scale(1, most))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--replicas", "2"], "add that"),
        (["--ray-address", "127.0.0.1:1"], "add that"),
        (["--ray", "--replicas", "2:1"], "1:4"),
        (["--ray", "--engine", "vllm"], "leave one of the two out"),
    ],
)
def test_options_that_do_not_go_together_are_a_sentence(capsys, haori_home, arguments, words):
    done = haori(capsys, "serve", "--port", 0, *arguments)
    assert done.code == 2
    assert words in done.err
    assert done.err.count("\n") == 1
