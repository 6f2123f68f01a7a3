"""The project itself: what the README promises, and the rules of the house that a script can check."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path for path in [*ROOT.glob("*.py"), *ROOT.glob("c*/*.py")])


def test_every_command_in_the_readme_exists():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^ *(?:\$ )?((?:python|torchrun|pip|bash) .*)$", readme, re.M)
    assert len(commands) >= 5
    for command in commands:
        for file in re.findall(r"[\w./-]+\.(?:py|txt|sh)\b", command):
            assert (ROOT / file).exists(), command
    assert any(command.startswith("pip install -r requirements.txt && bash demo.sh") for command in commands)
    assert any("python -m pytest" in command for command in commands)


def test_the_readme_lists_every_script():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for script in SCRIPTS:
        name = script.relative_to(ROOT).as_posix()
        inside = script.parent.name in ("config", "contests")
        assert name in readme or inside or script.stem == "__init__", name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_short_and_says_what_it_teaches(script):
    lines = script.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 300 and max(map(len, lines)) <= 110
    assert lines[0].startswith('"""')


def test_nothing_reads_or_writes_a_pickle():
    """And fuzz.py (test_long.py) plants some in the place of every file that is read."""
    forbidden = re.compile(r"\b(pickle|dill|joblib|shelve|marshal)\b|\b(np|numpy)\.load\(|_object\("
                           r"|(?<!safetensors\.)torch\.(load|save)\(|(?<![.\w])(exec|eval)\(")
    for script in SCRIPTS:
        lines = script.read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if forbidden.search(line)] == []


SCRIPTS_WITH_HELP = "tokenizer data train sample sft dpo eval plot curate classifier export bench".split()


@pytest.mark.parametrize("name", SCRIPTS_WITH_HELP)
def test_a_script_helps_and_nothing_happens_on_import(name, tmp_path):
    script = f"{name}.py"
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=100,
    )
    assert done.returncode == 0 and script in done.stdout and "--" in done.stdout
    assert not list(tmp_path.iterdir())


def test_demo_sh_and_the_readme_name_the_same_commands_in_the_same_order():
    """Whoever cannot run a shell script types what it would have run."""
    found, command = [], r"python \w+\.py (?:config/demo\w*\.py|out/demo/(?:pretrain|sft|dpo)\b)"
    for file in ("demo.sh", "README.md"):
        text = (ROOT / file).read_text(encoding="utf-8")
        found.append(re.findall(command, text)[:8])
    assert found[0] == found[1] and len(found[0]) == 8


def test_public_functions_are_annotated():
    """mypy checks in CI that the annotations are true; this, that they are there."""
    missing = []
    for script in SCRIPTS:
        tree = ast.parse(script.read_text(encoding="utf-8"))
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for node in [*tree.body, *(item for each in classes for item in each.body)]:
            if isinstance(node, ast.FunctionDef) and (node.name[0] != "_" or node.name[:2] == "__"):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                named = [argument for argument in arguments if argument.arg not in ("self", "cls", "ctx")]
                if not all(argument.annotation for argument in named) or not (
                        node.returns or node.name == "__init__"):
                    missing.append(f"{script.name}: {node.name}")
    assert missing == []
