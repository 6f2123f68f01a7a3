"""learn/scaling.py: the dial of sizes, the law from losses whose law is known, and real runs in small."""

import json
import math
import multiprocessing

import children
import pytest

from config import UserError, sized
from config.demo import config as demo
from learn import scaling

TINY = ["--data=builtin-docs", "--tokenizer_bytes=100_000", "--vocab_size=400", "--seq_len=64",
        "--dtype=float32", "--budgets", "1e9", "2e9", "--layers", "1", "2", "3"]  # fmt: skip


def test_four_layers_are_the_demo_and_every_other_number_makes_a_model():
    """Sizes that cannot be built raise UserError. SmolLM-135M has 9 heads that share 3, too."""
    assert sized(4) == demo
    assert (sized(9).n_head, sized(9).n_kv_head) == (9, 3)
    assert (sized(1).n_head, sized(1).n_kv_head) == (1, 1) and sized(7).n_kv_head == 1
    models = [sized(n) for n in range(1, 33)]
    assert {(cfg.head_dim, cfg.d_model / cfg.n_layer, cfg.d_ff / cfg.d_model) for cfg in models} == {
        (48, 48, 8 / 3)}
    for smaller, larger in zip(models, models[1:]):
        assert larger.n_params > smaller.n_params and larger.batch > smaller.batch and larger.lr < smaller.lr
        assert larger.lr**2 * larger.d_model == pytest.approx(smaller.lr**2 * smaller.d_model)


def known_law(budget, sizes, seed=8, A=400.0, B=2000.0, alpha=0.35, beta=0.4, embedding=0):
    """Scores as if the loss were 1.7 + A / N^alpha + B / D^beta, with compute 6 N D = budget."""
    found = []
    for n_layer, N in enumerate(sizes):
        D = budget / (6 * N)
        found.append({"budget": budget, "n_layer": n_layer, "seed": seed, "parameters": N, "tokens": D,
                      "parameters in blocks": N - embedding, "bits per byte":
                      1.7 + A / N**alpha + B / D**beta})  # fmt: skip
    return found


def best_of(budget, A=400.0, B=2000.0, alpha=0.35, beta=0.4):
    """Where that loss is lowest (Hoffmann et al. 2022, equation 4)."""
    return (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (budget / 6) ** (beta / (alpha + beta))


def test_the_law_of_losses_that_follow_one_is_found_again():
    """Sizes a factor of 8 around the best one. N_opt ~ C^(beta / (alpha + beta)), D_opt ~ C^(alpha / ...)."""
    budgets = (1e16, 1e17, 1e18, 1e19)
    scores = [score for C in budgets
              for score in known_law(C, [best_of(C) * 1.1 * factor for factor in (1 / 8, 1 / 2, 1, 2, 8)])]
    found = scaling.law(scores)
    for C in budgets:
        assert found[f"N at {C:.1e}"] == pytest.approx(best_of(C), rel=0.1)
        assert found[f"D at {C:.1e}"] == pytest.approx(C / 6 / best_of(C), rel=0.1)
        assert found[f"D/N at {C:.1e}"] == pytest.approx(C / 6 / best_of(C) ** 2, rel=0.2)
    assert found["N ~ C^"] == pytest.approx(0.4 / 0.75, abs=0.005)
    assert found["D ~ C^"] == pytest.approx(0.35 / 0.75, abs=0.005)


def test_without_the_embedding_small_models_grow_faster():
    """N = blocks + 1000: from 2,000 to 4,000 parameters, the blocks grow from 1,000 to 3,000."""
    scores = [score for C, best in ((1.0, 2000), (4.0, 4000))
              for score in known_law(C, [best / 2 + 1, best, 2 * best], embedding=1000)]
    for score in scores:
        best = 2000 if score["budget"] == 1 else 4000
        score["bits per byte"] = math.log(score["parameters"] / best) ** 2
    found = scaling.law(scores)
    assert found["N ~ C^"] == pytest.approx(math.log(2) / math.log(4))
    assert found["N without embedding ~ C^"] > 0.6


def test_a_parabola_has_a_lowest_point_only_between_the_sizes():
    sizes = [1, 10, 100]
    assert scaling.lowest(sizes, [2, 1, 2]) == pytest.approx(10)
    assert scaling.lowest(sizes, [2, 1, 1]) == pytest.approx(10**1.5)
    for losses in ([3, 2, 1.5], [1, 2, 4], [1, 2, 1]):  # lowest at an edge, and a hill
        assert math.isnan(scaling.lowest(sizes, losses))
    assert math.isnan(scaling.lowest([1, 10], [2, 1]))
    assert scaling.exponent([1, 100, 1e4], [3, math.nan, 300]) == pytest.approx(0.5)


def test_ranges_say_how_much_hangs_on_single_runs(monkeypatch):
    """Losses on one parabola: any of them tell where it is lowest. Then one run is lucky."""
    monkeypatch.setattr(scaling, "DRAWS", 200)
    scores = [{"budget": C, "n_layer": n, "seed": 8, "parameters": N, "parameters in blocks": N,
               "tokens": C / N, "bits per byte": 1 + math.log(N / best) ** 2}
              for C, best in ((1e4, 100), (1e6, 1000)) for n in range(10) for N in [best * 2 ** (n - 4)]]
    for what, (low, high, share) in scaling.ranges(scores).items():
        assert low == pytest.approx(high) == pytest.approx(scaling.law(scores)[what]) and share == 1
    scores[2]["bits per byte"] -= 1
    low, high, share = scaling.ranges(scores)["N at 1.0e+04"]
    assert low < scaling.law(scores)["N at 1.0e+04"] < 99 and high == pytest.approx(100)
    few = [score for score in scores if score["n_layer"] in (3, 4, 5)]
    assert 0 < scaling.ranges(few)["N at 1.0e+04"][2] < 1  # a parabola needs three points


def test_all_runs_are_trained_scored_drawn_and_not_repeated(tmp_path, monkeypatch, capsys):
    """Three sizes, two budgets, one seed, a few steps each."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: children.SERVER)
    monkeypatch.setattr(scaling, "FEWEST_STEPS", 5)
    monkeypatch.setattr(scaling, "VAL_ROWS", 8)
    argv = [*TINY, f"--out_dir={tmp_path.as_posix()}", "--seeds", "8", "--jobs=2"]
    scaling.main(argv)
    said, _, printed = capsys.readouterr().out.partition("| FLOP")
    scores = {path: json.loads(path.read_text()) for path in tmp_path.glob("runs/*/score.json")}
    assert "left out: 3 layers at 1.0e+09 FLOP would take 3 steps" in said and len(scores) == 5
    for path, score in scores.items():
        assert score["FLOP"] == pytest.approx(score["budget"], rel=0.5 / score["steps"])
        assert f"| {score['n_layer']} | {score['parameters']:,} |" in printed
        lines = (path.parent / "pretrain" / "log.jsonl").read_text().splitlines()
        assert len(lines) == score["steps"] and 2 < score["bits per byte"] < 8
        assert json.loads(lines[-1])["lr"] < 0.4 * json.loads(lines[len(lines) // 2])["lr"]  # its own decay
    assert len({score["bits per byte"] for score in scores.values()}) == 5
    assert "\nN ~ C^nan" in printed and (tmp_path / "scaling_law.png").stat().st_size > 5000

    (lost, score), *others = scores.items()  # as if it had been stopped before it was scored
    lost.unlink()
    times = {path: path.stat().st_mtime_ns for path, _ in others}
    scaling.main(argv)
    assert capsys.readouterr().out.partition("| FLOP")[2] == printed and json.loads(lost.read_text()) == score
    assert times == {path: path.stat().st_mtime_ns for path, _ in others}

    with pytest.raises(UserError, match="is from a run with other flags: choose another --out_dir"):
        scaling.main([*argv, "--weight_decay=0.1"])


@pytest.mark.parametrize("words, message", [
    (["--layers", "0"], "--layers=0 must be a number, 1 or"), (["--budgets", "inf"], "--budgets=inf must be"),
    (["--seeds", "-1"], "--seeds=-1 must be a number, 0 or"), (["--jobs=0"], "--jobs=0 must be a number, 1"),
    (["--lrr=1"], "no config field 'lrr'"), (["--lr=1"], "--lr=1 cannot be the same in all runs")])
def test_a_wrong_flag_is_reported_before_any_work(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        scaling.main([f"--out_dir={tmp_path.as_posix()}/new", *words])
    assert not (tmp_path / "new").exists()


def test_the_command_exits_with_2_and_one_sentence_for_a_mistake():
    done = children.run("-m", "learn.scaling", "--layers", "0")
    assert done.returncode == 2 and done.stderr == "error: --layers=0 must be a number, 1 or more\n"
    assert children.run("-m", "learn.scaling", "--budgets", "many").returncode == 2
