"""learn/exercise.py and learn/bug.py: each exercise is red without the function and green with it."""

import ast
import os
import re
import shutil
from itertools import count
from pathlib import Path

import children
import pytest

from learn import bug, exercise
from learn.exercise import STATIONS, copy_project, cut, names_of_tests, pytest_words

BUGS = bug.exercises()


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project") / "copy"
    copy_project(folder, {})
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
def test_a_station_is_red_without_the_body_and_the_solution_brings_it_back(station, copy):
    file, _, function = station.function.partition(".")
    path = copy / f"{file}.py"
    source = path.read_text(encoding="utf-8")
    without, body = cut(function, source)
    write(path, without)
    found, done = outcomes(pytest_words(station), copy)
    write(path, re.sub(r" *raise NotImplementedError\n", lambda _: body, without))
    assert path.read_text(encoding="utf-8") == source
    red = found.get("FAILED", set()) | found.get("ERROR", set())
    assert red == set(names_of_tests(station)) and "NotImplementedError" in done.stdout, done.stdout[-3000:]
    assert not found.keys() & {"PASSED", "SKIPPED"}, done.stdout[-3000:]


def test_with_the_solutions_back_in_place_the_tests_of_all_stations_are_green(copy):
    """In one process, because each has to import torch and the project first."""
    files = sorted({f"tests/{file}" for station in STATIONS for file in station.tests[0].split()})
    words = " or ".join(word for station in STATIONS for word in station.tests[1].split())
    found, done = outcomes(["-m", "pytest", "-q", *files, "-k", words], copy)
    assert found.keys() == {"PASSED"}, done.stdout[-3000:]
    assert found["PASSED"] >= {name for station in STATIONS for name in names_of_tests(station)}


@pytest.fixture
def project(copy, tmp_path, monkeypatch):
    """The commands take this copy of the project for the project."""
    for module in (exercise, bug):
        monkeypatch.setattr(module, "ROOT", tmp_path / "project")
    shutil.copytree(copy, tmp_path / "project")
    return tmp_path / "project"


def test_an_exercise_says_what_to_do_and_keeps_the_work_of_the_reader(project, capsys):
    exercise.main(["rope"])
    said = capsys.readouterr().out
    file = project / "out" / "exercise" / "rope" / "model.py"
    line = int(re.search(r"model.py, line (\d+)\.$", said, re.M)[1])
    assert file.read_text(encoding="utf-8").splitlines()[line - 1] == "    raise NotImplementedError"
    assert "    rope scores depend on the distance only\n" in said
    assert '-m pytest -q --tb=short tests/test_model.py -k "to_rotate or rope_scores"\n' in said
    file.write_text("my work", encoding="utf-8")
    exercise.main(["rope"])
    assert "your work in it was kept" in capsys.readouterr().out and file.read_text("utf-8") == "my work"
    exercise.main(["rope", "--again"])
    assert "raise NotImplementedError" in file.read_text(encoding="utf-8")
    exercise.main(["rope", "--solution"])
    assert capsys.readouterr().out.endswith("dim=-1) * sin).to(x.dtype)\n")


def test_the_list_names_every_station_in_the_order_of_the_chapters(capsys):
    exercise.main([])
    names = re.findall(r"^     (\S+) +\S+\.py: ", capsys.readouterr().out, re.M)
    assert names == [station.name for station in STATIONS]


@pytest.mark.parametrize(("words", "says"), [
    ("learn.exercise rop", "there is no exercise 'rop'. Did you mean rope?"),
    ("learn.bug 99", "there is no bug '99': name a number from 1 to"), ("learn.bug x", "no bug 'x'")])
def test_a_wrong_name_is_a_sentence_and_exit_code_2(words, says):
    done = children.run("-m", *words.split())
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def where(each):
    """The names of the functions and the classes around the place of a bug."""
    source = (exercise.ROOT / each.file).read_text(encoding="utf-8")
    line = source[:source.index(each.old)].count("\n") + 1
    return {node.name for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.lineno <= line <= node.end_lineno}


def test_every_numbered_bug_has_a_symptom_that_does_not_name_its_place():
    assert bug.every_bug()[:len(BUGS)] == BUGS and len(BUGS) >= 40  # so the number is the place in the list
    for each in BUGS:
        words = set(re.findall(r"\w+", each.symptom))
        assert each.symptom.endswith(".") and not words & where(each) and each.file not in each.symptom, each


def test_a_bug_is_planted_and_the_printed_command_is_red(project, capsys):
    number = [each.what for each in BUGS].index("beta is left out") + 1
    bug.main([str(number)])
    said = capsys.readouterr().out
    folder, command = re.search(r"^    cd (.*)\n    python (.*)$", said, re.M).groups()
    assert BUGS[number - 1].symptom.split() == said.split("notices:")[1].split("Find it")[0].split()
    done = children.run(*command.split(), "--tb=line", cwd=Path(folder).resolve())
    assert re.search("^FAILED", done.stdout, re.M), done.stdout[-3000:]
    bug.main([str(number), "--hint"])
    assert capsys.readouterr().out.strip() == BUGS[number - 1].file
    bug.main([str(number), "--solution"])
    assert f"{BUGS[number - 1].new}" in capsys.readouterr().out
