"""learn/exercise.py and learn/bug.py: each exercise is red without the function and green with it."""

import os
import re
from itertools import count

import children
import pytest

from learn.exercise import STATIONS, copy_project, cut, names_of_tests, pytest_words


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project") / "copy"
    copy_project(folder)
    return folder


def outcomes(words, folder):
    """{"FAILED": {names of tests}, ...} of a command that runs pytest in a folder."""
    done = children.run(*words, "-rA", "--tb=line", "-p", "no:cacheprovider", cwd=folder)
    found = {}
    for outcome, name in re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED) \S+?::(\w+)", done.stdout, re.M):
        found.setdefault(outcome, set()).add(name)
    return found, done


SECONDS = count(10**9, 2)  # Python compiles a file again if its size or the second of its time is new


def write(path, text):
    path.write_text(text, encoding="utf-8")
    os.utime(path, (next(SECONDS),) * 2)


@pytest.mark.parametrize("station", STATIONS, ids=lambda station: station.name)
def test_a_station_is_red_without_the_body_and_green_with_the_solution(station, copy):
    file, _, function = station.function.partition(".")
    path = copy / f"{file}.py"
    source = path.read_text(encoding="utf-8")
    without, body = cut(function, source)
    write(path, without)
    found, done = outcomes(pytest_words(station), copy)
    red = found.get("FAILED", set()) | found.get("ERROR", set())
    assert red == set(names_of_tests(station)) and "NotImplementedError" in done.stdout, done.stdout[-3000:]
    assert not found.keys() & {"PASSED", "SKIPPED"}, done.stdout[-3000:]
    write(path, re.sub(r" *raise NotImplementedError\n", lambda _: body, without))
    assert path.read_text(encoding="utf-8") == source
    found, done = outcomes(pytest_words(station), copy)
    assert found == {"PASSED": set(names_of_tests(station))}, done.stdout[-3000:]
