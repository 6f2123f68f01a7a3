"""The project itself: the house, what the README promises, and the rules that a script can check."""

import ast
import importlib
import os
import re
from pathlib import Path

import children
import pytest

import plumbing

ROOT = Path(__file__).parent.parent
SEVEN = ["tokenizer", "data", "model", "train", "sft", "dpo", "sample"]
ROOMS = ["config", "corpus", "curate", "evals", "export", "bench", "learn", "plumbing"]
SCRIPTS = sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))])
NAMES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
         for path in SCRIPTS}  # fmt: skip


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path):
    """The project's modules that a file names in any import, also inside functions: {"config"}."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name in NAMES}


def test_the_top_level_shows_the_seven_scripts_of_the_course_and_no_other():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(SEVEN)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_which_question_it_answers(room):
    docstring = ast.get_docstring(tree_of(ROOT / room / "__init__.py"))
    assert "?" in docstring


def test_no_module_imports_itself_through_others():
    graph = {name: imports_of(path) - {name} for name, path in NAMES.items()}
    while leaves := [name for name, imported in graph.items() if not imported & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert graph == {}, "these import each other in a circle, or what does"


def test_the_model_imports_only_the_config():
    assert imports_of(ROOT / "model.py") == {"config", "config.Config"} & NAMES.keys()


def test_the_seven_import_nothing_of_the_rooms_around_them():
    for script in SEVEN:
        rooms = {name.partition(".")[0] for name in imports_of(ROOT / f"{script}.py")}
        assert not rooms & {"curate", "evals", "export", "bench", "learn"}, script


def test_importing_train_pulls_in_at_most_20_modules_of_the_project():
    files_of = ("import sys, train\n"
                "files = [m.__dict__.get('__file__') or '' for m in sys.modules.values()]\n"
                f"print(*(file for file in files if file.startswith({f'{ROOT}/'!r})), sep='\\n')")
    files = children.run("-c", files_of).stdout.splitlines()
    assert str(ROOT / "train.py") in files
    assert len([file for file in files if "/tests/" not in file]) <= 20


def test_plumbing_contains_no_learning():
    """No layers, losses or optimizers: at most the names of torch's base classes, for annotations."""
    for path in (ROOT / "plumbing").glob("*.py"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            learning = [name for name in names if name.startswith(("torch.nn", "torch.optim"))]
            assert set(learning) <= {"torch.optim.Optimizer"}, path.name
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\b(nn|optim)\.[A-Z]|\.backward\(|cross_entropy", text)


def reading_order():
    """The files that the README lists, in its order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    part = text.partition("## Read in this order")[2].partition("\n## ")[0]
    order, folder = [], ""
    for line in part.splitlines():
        for name in re.findall(r"`([\w/]+\.py)`", line.partition(" | ")[0]):
            folder = name.rpartition("/")[0] or (folder if folder == "curate" else "")
            order.append(name if "/" in name or not folder else f"{folder}/{name}")
    return order


def test_the_readme_and_each_files_last_line_agree_on_one_reading_order():
    order = reading_order()
    assert order[:5] == ["tokenizer.py", "data.py", "model.py", "train.py", "sample.py"]
    assert {f"{script}.py" for script in SEVEN} <= set(order)
    says = {}
    for path in SCRIPTS:
        if found := re.search(r"next: (\S+)$", ast.get_docstring(tree_of(path)) or ""):
            says[path.relative_to(ROOT).as_posix()] = found[1]
    assert says == dict(zip(order, order[1:]))


def test_every_command_in_the_readme_and_the_docs_exists():
    commands = []
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        commands += re.findall(r"^ *(?:\$ )?((?:python|torchrun|pip|bash) .*)$", text, re.M)
    assert len(commands) >= 20
    for command in commands:
        for file in re.findall(r"[\w./-]+\.(?:py|txt|sh)\b", command):
            assert (ROOT / file).exists() or file == "input.txt", command  # Shakespeare
        for module in re.findall(r"-m ((?:curate|evals|export|bench|corpus|learn)[\w.]*)", command):
            assert module in NAMES or f"{module}.__main__" in NAMES, command
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = "pip install -r requirements.txt\npython sample.py pretrained/demo --chat"
    for command in (first, "bash demo.sh"):
        assert f"\n{command}" in readme
    assert "\npip install -r requirements.txt && python -m pytest\n" in readme


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 8192
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_script_says_what_it_is_for_in_lines_that_fit_a_screen(script):
    lines = script.read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines)) <= 110
    assert lines[0].startswith('"""')


def test_nothing_reads_or_writes_a_pickle():
    """And fuzz.py (test_long.py) plants some in the place of every file that is read. One file is another
    program's, and of it only tensors and plain values are read: nanoGPT's checkpoint in a benchmark."""
    allowed = {"bench/shakespeare.py": ["torch.load(path, weights_only=True)"]}
    forbidden = re.compile(r"\b(pickle|dill|joblib|shelve|marshal)\b|\b(np|numpy)\.load\(|_object\("
                           r"|(?<!safetensors\.)torch\.(load|save)\(|(?<![.\w])(exec|eval)\(")  # fmt: skip
    for script in SCRIPTS:
        lines = script.read_text(encoding="utf-8").splitlines()
        found = [line for line in lines if forbidden.search(line)]
        expected = allowed.get(script.relative_to(ROOT).as_posix(), [])
        assert len(found) == len(expected) and all(map(str.__contains__, found, expected))


def test_private_parts_of_torch_are_not_used():
    for script in SCRIPTS:
        assert not re.search(r"torch\.(\w+\.)*_(?!_)\w", script.read_text(encoding="utf-8")), script.name


WITH_HELP = ["tokenizer.py", "data.py", "train.py", "sft.py", "dpo.py", "sample.py", "-m curate",
             "-m curate.classifier", "-m evals", "-m evals.plot", "-m export", "-m bench",
             "-m corpus.synthesize", "-m learn.look", "-m learn.exercise", "-m learn.bug"]  # fmt: skip


@pytest.mark.parametrize("command", WITH_HELP)
def test_a_command_helps_and_nothing_happens_on_import(command, tmp_path):
    words = command.split()
    words = [str(ROOT / words[0])] if words[0].endswith(".py") else words
    done = children.run(*words, "--help", cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and command.split()[-1] in done.stdout and "--" in done.stdout
    assert not list(tmp_path.iterdir())


def test_demo_sh_and_the_readme_name_the_same_commands_in_the_same_order():
    """Anyone who cannot run a shell script types what it would have run."""
    found = []
    script = r"python (?:\w+\.py|-m evals)"
    argument = r"(?:config/demo\w*\.py|out/demo/(?:pretrain|sft|dpo)\b)"
    command = rf"^(?:step .*\" +)?({script} {argument})"
    for file in ("demo.sh", "README.md"):
        text = (ROOT / file).read_text(encoding="utf-8")
        found.append(re.findall(command, text, re.M)[:8])
    assert found[0] == found[1] and len(found[0]) == 8


def test_public_functions_are_annotated():
    """mypy checks in CI that the annotations are true; this, that there are some."""
    missing = []
    for script in SCRIPTS:
        tree = tree_of(script)
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for node in [*tree.body, *(item for each in classes for item in each.body)]:
            if isinstance(node, ast.FunctionDef) and (node.name[0] != "_" or node.name[:2] == "__"):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                named = [argument for argument in arguments if argument.arg not in ("self", "cls", "ctx")]
                if not all(argument.annotation for argument in named) or not (
                        node.returns or node.name == "__init__"):  # fmt: skip
                    missing.append(f"{script.name}: {node.name}")
    assert missing == []


def test_a_command_sets_how_threads_wait_before_torch_reads_it():
    """OpenMP reads the variable when torch loads it: every command imports plumbing first."""
    found = 0
    for path in SCRIPTS:
        imports = [node for node in tree_of(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8") and "torch" in names:
            assert "plumbing" in names and names.index("plumbing") < names.index("torch"), path
            found += 1
    assert found >= 7


@pytest.mark.parametrize(("given", "expected"), [
    ({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None)])
def test_what_the_user_has_set_about_waiting_is_kept(given, expected, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    importlib.reload(plumbing)
    assert os.environ.get("GOMP_SPINCOUNT") == expected
