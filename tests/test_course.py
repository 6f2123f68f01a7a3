"""docs/course.md: its code is the project's code, its glossary points at the right lines, its order is the
README's.

    python tests/test_course.py          corrects the line numbers of the glossary, after a file has changed
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COURSE = ROOT / "docs" / "course.md"
ENTRY = re.compile(r"^\| ([^|]+) \| (.+) \| \[([\w/.]+):(\d+)\]\(\.\./([\w/.]+)#L(\d+)\) \|$", re.M)


def text():
    return COURSE.read_text(encoding="utf-8")


def line_of(term, file, near):
    """The line of a file with the term that is nearest to a given one, or None."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = [n for n, line in enumerate(lines, 1) if re.search(rf"(?i)\b{re.escape(term)}", line)]
    return min(found, key=lambda n: abs(n - near), default=None)


def test_every_piece_of_code_in_the_course_is_in_the_file_that_it_names():
    quotes = re.findall(r"<!-- (\S+) -->\n```python\n(.+?)```", text(), re.S)
    assert len(quotes) >= 10 and text().count("```python") == len(quotes)
    for file, code in quotes:
        assert code in (ROOT / file).read_text(encoding="utf-8"), f"{file} has changed: {code}"


def test_every_term_of_the_glossary_is_on_the_line_that_it_names():
    entries = ENTRY.findall(text())
    rows = text().partition("| term | meaning | where |\n|---|---|---|\n")[2].splitlines()
    assert len(entries) == len(rows) >= 60
    assert [entry[0].lower() for entry in entries] == sorted(entry[0].lower() for entry in entries)
    wrong = [f"{term} ({file}:{line})" for term, _, file, line, link, number in entries
             if (file, line) != (link, number) or line_of(term, file, int(line)) != int(line)]
    assert not wrong, f"python tests/test_course.py corrects the lines of {', '.join(wrong)}"


def test_a_term_that_moved_is_found_again(tmp_path):
    assert line_of("wsd", "train.py", 1) == line_of("wsd", "train.py", 50)
    assert line_of("no such term", "train.py", 1) is None


def test_the_course_has_nine_chapters_each_with_a_picture_a_command_and_exercises():
    chapters = re.split(r"^## ", text(), flags=re.M)[1:]
    assert [chapter[:2] for chapter in chapters] == [f"{n}." for n in range(1, 10)] + ["Gl"]
    for chapter in chapters[:9]:
        assert "![" in chapter and "\n```\npython " in chapter and "\nExercises: " in chapter, chapter[:40]
        assert 200 < len(chapter.split()) < 1000, (chapter[:40], len(chapter.split()))


def test_the_chapters_follow_the_reading_order_of_the_readme():
    table = text().partition("| chapter | files |\n|---|---|\n")[2].partition("\n\n")[0]
    files, folder = [], ""
    for name in re.findall(r"`([\w/]+\.py)`", table):
        folder = name.rpartition("/")[0] or (folder if folder == "curate" else "")
        files.append(name if "/" in name or not folder else f"{folder}/{name}")
    from test_project import reading_order
    assert list(dict.fromkeys(files)) == reading_order()


def correct():
    def corrected(match):
        term, meaning, file, line = match.groups()[:4]
        line = line_of(term, file, int(line)) or line
        return f"| {term} | {meaning} | [{file}:{line}](../{file}#L{line}) |"

    COURSE.write_text(ENTRY.sub(corrected, text()), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(correct())
