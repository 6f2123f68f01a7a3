"""learn/why.py: every change is what it says, the table by hand, and one real run in small."""

import json
import re
from dataclasses import replace

import pytest

import config
from config import UserError
from config.demo import config as demo
from learn import why

PRESETS = {"pretrain": "config/demo.py", "sft": "config/demo_sft.py", "dpo": "config/demo_dpo.py"}


@pytest.mark.parametrize("change", why.CHANGES, ids=lambda change: change.name)
def test_a_change_changes_one_thing_that_can_be_changed(change):
    usual = config.load([PRESETS[change.stage]])
    cfg = config.load([PRESETS[change.stage], *change.flags.split()])
    assert (cfg != usual) == bool(change.flags)
    if change.edit:
        file, old, new = change.edit
        assert (why.ROOT / file).read_text(encoding="utf-8").count(old) == 1 and new != old
    is_usual = change.name == why.USUAL[change.stage]
    assert is_usual == (not change.flags and not change.edit)
    if "d_model" in change.flags:  # another shape with as many parameters
        assert cfg.n_params == pytest.approx(demo.n_params, rel=0.002)


def test_the_table_has_mean_and_range_and_leaves_out_what_was_not_run(tmp_path):
    for seed, bits in ((8, 1.0), (9, 1.25)):
        (tmp_path / "runs" / f"adamw_{seed}").mkdir(parents=True)
        score = {"bits": bits, "all questions": bits - 0.5}
        (tmp_path / "runs" / f"adamw_{seed}" / "score.json").write_text(json.dumps(score))
    head, line, *rows = why.table(tmp_path)
    assert head.count("|") == line.count("|") == rows[0].count("|")
    assert [cell.strip() for cell in rows[0].split("|")[1:7]] == [
        "`adamw`", "AdamW instead of Muon", "2", "1.125 (1.000 to 1.250)", "", "62% (50% to 75%)"]
    assert len(rows) == 1


def test_the_rows_that_the_settings_of_the_demo_point_to_exist_and_are_in_the_page():
    names = {change.name for change in why.CHANGES}
    page = (why.ROOT / "docs" / "why.md").read_text(encoding="utf-8")
    named = set()
    for preset in PRESETS.values():
        for group in re.findall(r"why: ([\w., ]+)", (why.ROOT / preset).read_text(encoding="utf-8")):
            named |= set(re.findall(r"[\w.]*\w", group))
    assert len(named) >= 15 and named <= names
    assert set(re.findall(r"^\| `([\w.]+)`", page, re.M)) == names


@pytest.mark.parametrize("words, message", [
    (["muonn"], "there is no change 'muonn': there are base, adamw"), (["--jobs=0"], "--jobs=0 must be 1 or"),
    (["--max_steps=-3"], "--max_steps=-3 must be 1 or more")])
def test_a_wrong_word_is_reported_before_any_work(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        why.main([f"--out_dir={tmp_path}/new", *words])
    assert not (tmp_path / "new").exists()


def test_a_run_is_trained_in_a_copy_with_its_edit_and_scored_once(tmp_path, monkeypatch, capsys):
    """Two steps on a little text, with digits in groups, and alone; then nothing is left to do."""
    small = "--data=builtin-docs --tokenizer_bytes=100_000 --n_layer=1 --seq_len=64 --batch=2 --micro_batch=2"
    some = [replace(change, flags=small) for change in why.CHANGES if change.name in ("base", "digits")]
    monkeypatch.setattr(why, "CHANGES", some)
    monkeypatch.setattr(why, "SEEDS", (8,))
    monkeypatch.setattr(why, "BYTES", 2000)
    argv = ["digits", "--max_steps=2", "--jobs=2", f"--out_dir={tmp_path}"]
    why.main(argv)
    printed = capsys.readouterr().out
    assert "| the demo as it is | 1 |" in printed and "| digits in groups of up to three | 1 |" in printed
    scores = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("runs/*/score.json")}
    assert set(scores) == {"base_8", "digits_8"} and all(score["steps"] == 2 for score in scores.values())
    assert all(2 < score["bits"] < 8 and "all questions" not in score for score in scores.values())
    files = [tmp_path / "tokens" / name / "tokenizer" / "tokenizer.json" for name in ("base", "digits")]
    alone, grouped = (json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"] for file in files)
    assert "10" not in alone and "10" in grouped
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/score.json")}
    why.main(argv)
    assert capsys.readouterr().out == printed
    assert times == {path: path.stat().st_mtime_ns for path in times}
